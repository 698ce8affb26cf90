//! A counted random stream: value number `i` of a key is a function of both, so a run can be resumed anywhere and
//! gives the same numbers whatever the thread count or library version. The order of samples depends on the seed and the
//! epoch alone, dropout on the seed, the step and the layer: a checkpoint needs no state of a generator.

pub use pocketlora_kernels::mix;

/// A position in a key's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rng {
    key: u64,
    next: u64,
}

impl Rng {
    /// The start of the stream of `key`.
    #[must_use]
    pub fn new(key: u64) -> Self {
        Self { key, next: 0 }
    }

    /// The next 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.next += 1;
        mix(self.key, self.next - 1)
    }

    /// Uniform in `[0, 1)`, with 24 random bits.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u32 << 24) as f32
    }

    /// Normal with a deviation of 1: two uniform numbers give two such, of which one is used (Box & Muller 1958).
    pub fn normal(&mut self) -> f32 {
        let (a, b) = (1.0 - f64::from(self.unit()), f64::from(self.unit()));
        ((-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
    }

    /// Uniform in `0..n`, by the high half of a 128-bit product (bias below `n / 2^64`).
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// A permutation of `0..n` (Fisher-Yates).
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }

    /// `n` numbers between `-bound` and `bound`.
    pub fn uniforms(&mut self, bound: f32, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.unit() * 2.0 - 1.0) * bound).collect()
    }
}

/// `n` normal numbers with the given deviation, of the stream that `keys` name.
#[must_use]
pub fn normals(keys: &[u64], deviation: f32, n: usize) -> Vec<f32> {
    let mut rng = Rng::new(keys.iter().copied().reduce(mix).unwrap_or_default());
    (0..n).map(|_| deviation * rng.normal()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_fixed_for_all_time() {
        let mut rng = Rng::new(7);
        let first: Vec<u64> = (0..2).map(|_| rng.bits()).collect();
        assert_eq!(first, [mix(7, 0), mix(7, 1)]);
        // SplitMix64 seeded with 0 starts with this value (reference implementation).
        assert_eq!(mix(0, 0), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn a_permutation_holds_every_number_once() {
        let mut order = Rng::new(3).permutation(100);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
