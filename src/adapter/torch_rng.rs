//! The random numbers that torch draws on a processor (MT19937; Matsumoto & Nishimura 1998), for methods whose files leave out
//! what their config's seed gives.

/// State words, and how far apart the ones are that are mixed.
const WORDS: usize = 624;
const APART: usize = 397;

/// `torch.Generator` after `manual_seed`.
pub(super) struct TorchRng {
    state: [u32; WORDS],
    next: usize,
}

impl TorchRng {
    pub fn new(seed: u64) -> Self {
        let mut state = [seed as u32; WORDS];
        for i in 1..WORDS {
            let before = state[i - 1];
            state[i] = 1_812_433_253_u32.wrapping_mul(before ^ before >> 30).wrapping_add(i as u32);
        }
        Self { state, next: WORDS }
    }

    /// The next 32 bits.
    pub fn bits(&mut self) -> u32 {
        if self.next == WORDS {
            for i in 0..WORDS {
                let y = self.state[i] & 0x8000_0000 | self.state[(i + 1) % WORDS] & 0x7fff_ffff;
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + APART) % WORDS] ^ y >> 1 ^ odd;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= y << 7 & 0x9d2c_5680;
        y ^= y << 15 & 0xefc6_0000;
        y ^ y >> 18
    }

    /// `n` numbers as `uniform_(-bound, bound)` fills a tensor of f32.
    pub fn uniforms(&mut self, bound: f32, n: usize) -> Vec<f32> {
        let unit = |bits: u32| (bits & 0xff_ffff) as f32 / (1_u32 << 24) as f32;
        (0..n).map(|_| unit(self.bits()) * (bound + bound) - bound).collect()
    }

    /// The first `count` of `randperm(n)`, without the others.
    pub fn permuted(&mut self, n: usize, count: usize) -> Vec<usize> {
        let mut moved = std::collections::BTreeMap::new();
        let one = |i: usize| {
            let at = self.bits() as usize % (n - i) + i;
            let here = moved.get(&i).copied().unwrap_or(i);
            moved.insert(at, here).unwrap_or(at)
        };
        (0..count.min(n)).map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_torch() {
        // The reference of the generator itself.
        let mut rng = TorchRng::new(5489);
        let all: Vec<u32> = (0..10_000).map(|_| rng.bits()).collect();
        assert_eq!((all[0], all[9_999]), (3_499_211_612, 4_123_659_995));
        // `torch.randperm(64 * 96, generator=torch.Generator().manual_seed(777))[:6]`
        assert_eq!(TorchRng::new(777).permuted(64 * 96, 6), [4199, 4278, 2571, 2255, 5219, 1478]);
        let all = TorchRng::new(1).permuted(50, 50);
        assert_eq!(all.iter().copied().collect::<std::collections::BTreeSet<_>>().len(), 50);
        // `torch.empty(4).uniform_(-0.25, 0.25)` and the like begin so, with a seed of 3.
        let bound = 2_f32.sqrt() / 96_f32.sqrt() * 3_f32.sqrt();
        let first = TorchRng::new(3).uniforms(bound, 4);
        let expected = [-0.247_868_24, -0.197_215_32, -0.107_078_76, -0.236_522_59];
        assert!(first.iter().zip(expected).all(|(a, e)| (a - e).abs() < 1e-7), "{first:?}");
    }
}
