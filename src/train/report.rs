//! What a run will learn from, in figures.

use super::{BatchReport, Batches, Dataset, Splits, TrainConfig, Trainer, Unused};
use crate::error::Result;
use pocketlora_kernels::Backend;
use serde::Serialize;

/// Figures of a data set under the settings of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DataReport {
    /// Lines, rows and files.
    pub records: usize,
    /// Samples that they became.
    pub samples: usize,
    /// Tokens of all samples.
    pub tokens: usize,
    /// Tokens that are learned.
    pub trained_tokens: usize,
    /// Lengths of samples.
    pub lengths: Lengths,
    /// What was too long.
    pub splits: Splits,
    /// What is in the data and not used.
    pub unused: Unused,
    /// How samples are put together in the first epoch.
    pub batches: BatchReport,
    /// Optimizer steps of the run.
    pub total_steps: u64,
    /// Memory that the data takes, in bytes.
    pub bytes: usize,
}

/// Lengths of samples, in tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lengths {
    /// Half of the samples have at most as many.
    pub p50: usize,
    /// Nine of ten have at most as many.
    pub p90: usize,
    /// The longest has as many.
    pub max: usize,
    /// Samples by length: bars at powers of two, from the first that is not empty on.
    pub histogram: Vec<Bar>,
}

/// One bar of a histogram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Bar {
    /// Samples of at most as many tokens, and more than the bar before.
    pub up_to: usize,
    /// How many there are.
    pub samples: usize,
}

impl DataReport {
    /// Figures of `data` as a run with `config` would use it.
    ///
    /// # Errors
    /// There are no samples.
    pub fn new(data: &Dataset, config: &TrainConfig) -> Result<Self> {
        Ok(Self::of(data, &mut Batches::new(data, config)?))
    }

    /// Figures of `data` and the micro-batches that were made of it.
    fn of(data: &Dataset, batches: &mut Batches) -> Self {
        Self {
            records: data.records,
            samples: data.samples.len(),
            tokens: data.tokens(),
            trained_tokens: data.trained_tokens(),
            lengths: Lengths::new(data.samples.iter().map(|s| s.ids.len()).collect()),
            splits: data.splits,
            unused: data.unused.clone(),
            batches: batches.report(),
            total_steps: batches.total_steps(),
            bytes: data.bytes(),
        }
    }
}

impl<B: Backend> Trainer<B> {
    /// Figures of what this run learns from, held-out samples not counted.
    pub fn data_report(&mut self) -> DataReport {
        DataReport::of(&self.data, &mut self.batches)
    }
}

impl Lengths {
    fn new(mut lengths: Vec<usize>) -> Self {
        lengths.sort_unstable();
        // Nearest rank: the smallest length that `percent` of the samples do not exceed.
        let rank = |percent: usize| lengths[(lengths.len() * percent).div_ceil(100).max(1) - 1];
        let (p50, p90, max) = (rank(50), rank(90), rank(100));
        let (mut histogram, mut up_to, mut below) = (Vec::new(), lengths[0].next_power_of_two(), 0);
        while below < lengths.len() {
            let until = lengths.partition_point(|&n| n <= up_to);
            histogram.push(Bar { up_to, samples: until - below });
            (below, up_to) = (until, up_to * 2);
        }
        Self { p50, p90, max, histogram }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_counted_by_nearest_rank_and_powers_of_two() {
        let lengths = Lengths::new(vec![40, 3, 5, 4, 9, 8, 7, 6, 10, 5]);
        assert_eq!((lengths.p50, lengths.p90, lengths.max), (6, 10, 40));
        let bars: Vec<_> = lengths.histogram.iter().map(|b| (b.up_to, b.samples)).collect();
        assert_eq!(bars, [(4, 2), (8, 5), (16, 2), (32, 0), (64, 1)]);
        assert_eq!(Lengths::new(vec![7]).p50, 7);
    }
}
