//! A set of token positions that lie in a few runs.

use std::ops::Range;

/// Which tokens of a sample are learned: runs in order, apart from each other and not empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mask(Box<[Range<u32>]>);

impl Mask {
    /// Positions in the set.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.iter().map(Range::len).sum()
    }

    /// Whether position `i` is in the set.
    #[must_use]
    pub fn contains(&self, i: usize) -> bool {
        let after = self.0.partition_point(|run| run.start as usize <= i);
        after > 0 && i < self.0[after - 1].end as usize
    }

    /// The positions, rising.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().flat_map(|run| run.start as usize..run.end as usize)
    }

    /// The runs, rising.
    #[must_use]
    pub fn runs(&self) -> &[Range<u32>] {
        &self.0
    }

    pub(super) fn heap_bytes(&self) -> usize {
        size_of_val(&*self.0)
    }
}

/// One flag a token.
impl FromIterator<bool> for Mask {
    fn from_iter<I: IntoIterator<Item = bool>>(flags: I) -> Self {
        let mut runs: Vec<Range<u32>> = Vec::new();
        for (i, _) in (0u32..).zip(flags).filter(|(_, flag)| *flag) {
            match runs.last_mut() {
                Some(run) if run.end == i => run.end += 1,
                _ => runs.push(i..i + 1),
            }
        }
        Self(runs.into())
    }
}

#[cfg(test)]
mod tests {
    use super::Mask;

    #[test]
    fn a_mask_holds_what_it_was_made_of() {
        for bits in 0..64u32 {
            let flags: Vec<bool> = (0..6).map(|i| bits >> i & 1 == 1).collect();
            let mask: Mask = flags.iter().copied().collect();
            assert_eq!((0..6).map(|i| mask.contains(i)).collect::<Vec<_>>(), flags);
            let ones: Vec<usize> = (0..6).filter(|&i| flags[i]).collect();
            assert_eq!((mask.iter().collect::<Vec<_>>(), mask.count()), (ones.clone(), ones.len()));
            assert!(!mask.contains(6));
        }
    }
}
