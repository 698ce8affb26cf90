//! A tensor in signs (ComPEFT, Yadav et al. 2023): the share of its values with the largest magnitudes stays, each as its
//! sign and all with one size, their mean magnitude. Their places are the gaps between them in Golomb-Rice codes, each
//! followed by the sign: a gap `g` is `g >> k` ones, a zero, and the last `k` bits of `g`, the lowest first.

/// The largest `k` that is tried, and read.
const MOST_LOW_BITS: u8 = 24;

/// The signs of some of a tensor's values.
#[derive(Debug, PartialEq)]
pub(super) struct Signs {
    /// Magnitude of all of them.
    pub size: f32,
    /// `k` of the codes.
    pub low_bits: u8,
    /// How many there are.
    pub kept: usize,
    /// The codes, each byte from its lowest bit on.
    pub codes: Vec<u8>,
}

impl Signs {
    /// Of the share `density` of `values`, which are finite: of at least one, and of equal ones of the first.
    pub fn of(values: &[f32], density: f64) -> Self {
        let kept = ((values.len() as f64 * density).round() as usize).clamp(1, values.len().max(1)).min(values.len());
        let mut places: Vec<usize> = (0..values.len()).collect();
        if kept < places.len() {
            let by_size = |a: &usize, b: &usize| values[*b].abs().total_cmp(&values[*a].abs()).then(a.cmp(b));
            places.select_nth_unstable_by(kept, by_size);
            places.truncate(kept);
            places.sort_unstable();
        }
        let sum: f64 = places.iter().map(|&i| f64::from(values[i].abs())).sum();
        let size = (sum / kept.max(1) as f64) as f32;
        if size == 0.0 {
            return Self { size, low_bits: 0, kept: 0, codes: Vec::new() };
        }
        let mut next = 0;
        let gap = |&place: &usize| place - std::mem::replace(&mut next, place + 1);
        let gaps: Vec<usize> = places.iter().map(gap).collect();
        let cost = |k: &u8| gaps.iter().map(|gap| (gap >> k) + usize::from(*k)).sum::<usize>();
        let low_bits = (0..=MOST_LOW_BITS).min_by_key(cost).unwrap_or_default();
        let mut codes = Bits::default();
        for (gap, place) in gaps.iter().zip(&places) {
            (0..gap >> low_bits).for_each(|_| codes.push(true));
            codes.push(false);
            (0..low_bits).for_each(|bit| codes.push(gap >> bit & 1 == 1));
            codes.push(values[*place] < 0.0);
        }
        Self { size, low_bits, kept, codes: codes.bytes }
    }

    /// Adds them to `values`. None where the codes are broken: a place beyond the last value, or an early end.
    pub fn add_to(&self, values: &mut [f32]) -> Option<()> {
        if self.low_bits > MOST_LOW_BITS || !self.size.is_finite() {
            return None;
        }
        let mut codes = Codes { bytes: &self.codes, at: 0 };
        let mut next = 0usize;
        for _ in 0..self.kept {
            let mut gap = 0usize;
            while codes.next()? {
                gap += 1;
            }
            gap <<= self.low_bits;
            for bit in 0..self.low_bits {
                gap |= usize::from(codes.next()?) << bit;
            }
            let sign = if codes.next()? { -1.0 } else { 1.0 };
            let place = next.checked_add(gap)?;
            *values.get_mut(place)? += sign * self.size;
            next = place + 1;
        }
        Some(())
    }
}

#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    /// Bits of the last byte that are taken, 8 where there is none.
    taken: u8,
}

impl Bits {
    fn push(&mut self, bit: bool) {
        if self.bytes.is_empty() || self.taken == 8 {
            self.bytes.push(0);
            self.taken = 0;
        }
        if let Some(last) = self.bytes.last_mut() {
            *last |= u8::from(bit) << self.taken;
        }
        self.taken += 1;
    }
}

struct Codes<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Codes<'_> {
    fn next(&mut self) -> Option<bool> {
        let byte = *self.bytes.get(self.at / 8)?;
        let bit = byte >> (self.at % 8) & 1 == 1;
        self.at += 1;
        Some(bit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn the_largest_values_come_back_as_signs_of_their_mean() {
        let mut rng = Rng::new(5);
        for (len, density) in [(1, 0.5), (7, 0.3), (64, 1.0), (1000, 0.01), (4096, 0.2), (5000, 0.54), (3, 0.001)] {
            let values: Vec<f32> = (0..len).map(|_| rng.normal()).collect();
            let signs = Signs::of(&values, density);
            let mut read = vec![0.0; len];
            signs.add_to(&mut read).unwrap();
            let mut sorted: Vec<f32> = values.iter().map(|v| v.abs()).collect();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let kept = ((len as f64 * density).round() as usize).max(1);
            let mean = sorted[..kept].iter().sum::<f32>() / kept as f32;
            for (value, read) in values.iter().zip(&read) {
                let expected = if value.abs() >= sorted[kept - 1] { mean * value.signum() } else { 0.0 };
                assert!((read - expected).abs() < 1e-5 * mean, "{len} {density}: {read} for {value}");
            }
            // Never far above the entropy of the places and the signs.
            let share = kept as f64 / len as f64;
            let entropy = if share < 1.0 { -share * share.log2() - (1.0 - share) * (1.0 - share).log2() } else { 0.0 };
            let bits = 8.0 * signs.codes.len() as f64;
            assert!(len < 1000 || bits < 1.06 * len as f64 * (entropy + share), "{len} {density}: {bits} bits");
        }
        assert_eq!(Signs::of(&[0.0; 9], 0.5).kept, 0);
        assert_eq!(Signs::of(&[], 0.5).kept, 0);
    }

    #[test]
    fn broken_codes_are_told() {
        let whole = Signs::of(&[1.0, -2.0, 3.0, 0.5, 0.1, -9.0], 0.5);
        let broken = [
            Signs { codes: whole.codes[..0].to_vec(), ..whole_of(&whole) },
            Signs { kept: 60, ..whole_of(&whole) },
            Signs { low_bits: 200, ..whole_of(&whole) },
            Signs { size: f32::NAN, ..whole_of(&whole) },
            Signs { codes: vec![0xff; 4], ..whole_of(&whole) },
        ];
        for (case, signs) in broken.iter().enumerate() {
            assert_eq!(signs.add_to(&mut [0.0; 6]), None, "case {case}");
        }
        assert_eq!(whole.add_to(&mut [0.0; 2]), None);
    }

    fn whole_of(signs: &Signs) -> Signs {
        Signs { size: signs.size, low_bits: signs.low_bits, kept: signs.kept, codes: signs.codes.clone() }
    }
}
