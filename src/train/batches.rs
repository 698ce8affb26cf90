//! Which samples a step learns from: a function of the data, the settings and the step's number alone, so that a resumed
//! run goes on with the same ones.
//!
//! A micro-batch is what one forward and backward pass takes, its samples end to end without padding, each with positions
//! and attention of its own. A step sums the gradients of `accumulate` micro-batches. An epoch gives every sample once,
//! in an order of its own, and its last step may be smaller.

use super::{Dataset, MicroBatch, Sample, TrainConfig};
use crate::error::{Error, ErrorCode, Result};
use crate::rng::{Rng, mix};
use serde::Serialize;
use std::borrow::Cow;
use std::collections::BTreeSet;

/// Stream of random numbers for the order of samples.
const ORDER: u64 = 2;
/// Stream for the order of micro-batches that were made of samples of chosen lengths.
const SHUFFLE: u64 = 4;
/// Stream for the words of questions that are left out.
const LEFT_OUT: u64 = 8;
/// Epochs of which one leaves a question whole.
const WHOLE: u64 = 4;
/// Samples that are packed together: enough to find good fits, few enough that epochs differ.
const PACK_WINDOW: usize = 4096;
/// Micro-batches whose samples are sorted together by length.
const BUCKETS: usize = 64;

/// How micro-batches are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// `batch` samples in shuffled order.
    Shuffled,
    /// `batch` samples of similar length.
    Bucketed,
    /// As many samples as fit.
    Packed,
}

/// The micro-batches of a run.
#[derive(Clone, Debug)]
pub struct Batches {
    /// Tokens of each sample.
    lengths: Vec<u32>,
    mode: Mode,
    batch: usize,
    accumulate: usize,
    /// Most tokens of a packed micro-batch.
    capacity: usize,
    epochs: u64,
    steps: Option<u64>,
    seed: u64,
    /// Share of the words of questions that are left out.
    left_out: f32,
    current: Option<Epoch>,
    /// With packing: steps before each epoch, as far as known; epochs differ.
    before: Vec<u64>,
}

/// One pass over the data: samples in order, and where each micro-batch ends among them.
#[derive(Clone, Debug)]
struct Epoch {
    number: u64,
    samples: Vec<u32>,
    ends: Vec<u32>,
}

impl Epoch {
    fn new<'m>(number: u64, micros: impl IntoIterator<Item = &'m [u32]>) -> Self {
        let mut out = Self { number, samples: Vec::new(), ends: Vec::new() };
        for micro in micros {
            out.samples.extend_from_slice(micro);
            out.ends.push(out.samples.len() as u32);
        }
        out
    }

    fn micro(&self, i: usize) -> &[u32] {
        let start = if i == 0 { 0 } else { self.ends[i - 1] as usize };
        &self.samples[start..self.ends[i] as usize]
    }

    fn micros(&self) -> impl Iterator<Item = &[u32]> {
        (0..self.ends.len()).map(|i| self.micro(i))
    }

    /// The micro-batches of the epoch's step `at` (0-based).
    fn step(&self, at: usize, accumulate: usize) -> impl Iterator<Item = &[u32]> {
        let start = at * accumulate;
        (start..(start + accumulate).min(self.ends.len())).map(|i| self.micro(i))
    }
}

/// Figures of the first epoch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BatchReport {
    /// Micro-batches.
    pub micro_batches: usize,
    /// Optimizer steps.
    pub steps: usize,
    /// Mean number of samples in a micro-batch.
    pub samples_per_micro_batch: f64,
    /// Tokens of the largest micro-batch.
    pub largest_tokens: usize,
    /// Share of `batch` times `seq` tokens that the mean micro-batch has.
    pub fill: f64,
    /// Tokens that are run and not part of any sample.
    pub padded_tokens: usize,
}

impl Batches {
    /// The micro-batches of a run on `data`.
    ///
    /// # Errors
    /// There are no samples.
    pub fn new(data: &Dataset, config: &TrainConfig) -> Result<Self> {
        if data.samples.is_empty() || u32::try_from(data.samples.len()).is_err() {
            let message = format!("expected 1 to {} samples, got `{}`; check the file", u32::MAX, data.samples.len());
            return Err(Error::new(ErrorCode::Data, format!("`{}`", data.path.display()), message));
        }
        Ok(Self {
            lengths: data.samples.iter().map(|s| s.ids.len() as u32).collect(),
            mode: match (config.packing, config.bucketing) {
                (true, _) => Mode::Packed,
                (_, true) => Mode::Bucketed,
                _ => Mode::Shuffled,
            },
            batch: config.batch,
            accumulate: config.accumulate,
            capacity: config.batch * config.seq,
            epochs: config.epochs as u64,
            steps: config.steps,
            seed: config.seed,
            left_out: config.prompt_dropout,
            current: None,
            before: vec![0],
        })
    }

    /// Optimizer steps of the run.
    pub fn total_steps(&mut self) -> u64 {
        self.steps.unwrap_or_else(|| self.steps_before(self.epochs))
    }

    /// The micro-batches of step `number` (1-based) of a run on `data`, the data this was made of.
    pub fn micro_batches(&mut self, data: &Dataset, number: u64) -> Vec<MicroBatch> {
        let (epoch, at) = self.locate(number);
        let (accumulate, seed, share) = (self.accumulate, mix(self.seed, LEFT_OUT), self.left_out);
        let micros = self.epoch(epoch).step(at, accumulate);
        let thinned = |&i: &u32| {
            let sample = &data.samples[i as usize];
            // Each sample is whole in one of four epochs, and some are in each epoch.
            if share == 0.0 || sample.asked.count() == 0 || (epoch + u64::from(i)).is_multiple_of(WHOLE) {
                return (i, Cow::Borrowed(sample));
            }
            let mut rng = Rng::new(mix(mix(seed, epoch), u64::from(i)));
            (i, Cow::Owned(sample.thinned(|| rng.unit() < share)))
        };
        let micro =
            |samples: Vec<(u32, Cow<'_, Sample>)>| MicroBatch::numbered(samples.iter().map(|(i, s)| (*i, &**s)));
        micros.map(|m| micro(m.iter().map(thinned).collect())).collect()
    }

    /// Figures of the first epoch.
    pub fn report(&mut self) -> BatchReport {
        let lengths = self.lengths.clone();
        let (capacity, accumulate) = (self.capacity, self.accumulate);
        let epoch = self.epoch(0);
        let tokens = |m: &[u32]| m.iter().map(|&i| lengths[i as usize] as usize).sum::<usize>();
        let (total, count): (usize, usize) = (epoch.micros().map(tokens).sum(), epoch.ends.len());
        BatchReport {
            micro_batches: count,
            steps: count.div_ceil(accumulate),
            samples_per_micro_batch: lengths.len() as f64 / count as f64,
            largest_tokens: epoch.micros().map(tokens).max().unwrap_or(0),
            fill: total as f64 / (count * capacity) as f64,
            padded_tokens: total - lengths.iter().map(|&n| n as usize).sum::<usize>(),
        }
    }

    /// Steps of the epochs before number `epoch` (0-based).
    fn steps_before(&mut self, epoch: u64) -> u64 {
        if self.mode != Mode::Packed {
            return epoch * self.lengths.len().div_ceil(self.batch).div_ceil(self.accumulate) as u64;
        }
        while self.before.len() as u64 <= epoch {
            let last = self.before.len() - 1;
            let steps = self.epoch(last as u64).ends.len().div_ceil(self.accumulate) as u64;
            self.before.push(self.before[last] + steps);
        }
        self.before[epoch as usize]
    }

    /// Epoch (0-based) and step within it of step `number` (1-based).
    fn locate(&mut self, number: u64) -> (u64, usize) {
        let done = number - 1;
        if self.mode != Mode::Packed {
            let per_epoch = self.steps_before(1);
            return (done / per_epoch, (done % per_epoch) as usize);
        }
        while *self.before.last().expect("begins with 0") <= done {
            self.steps_before(self.before.len() as u64);
        }
        let epoch = self.before.partition_point(|&b| b <= done) - 1;
        (epoch as u64, (done - self.before[epoch]) as usize)
    }

    fn epoch(&mut self, number: u64) -> &Epoch {
        let ready = self.current.take().filter(|e| e.number == number);
        let epoch = ready.unwrap_or_else(|| self.plan(number));
        self.current.insert(epoch)
    }

    fn plan(&self, number: u64) -> Epoch {
        let stream = |purpose| Rng::new(mix(mix(self.seed, purpose), number));
        let order = stream(ORDER).permutation(self.lengths.len());
        let order: Vec<u32> = order.into_iter().map(|i| i as u32).collect();
        let micros: Vec<Vec<u32>> = match self.mode {
            Mode::Shuffled => return Epoch::new(number, order.chunks(self.batch)),
            Mode::Bucketed => order.chunks(self.batch * BUCKETS).flat_map(|w| self.bucket(w)).collect(),
            Mode::Packed => order.chunks(PACK_WINDOW).flat_map(|w| self.pack(w)).collect(),
        };
        let shuffled = stream(SHUFFLE).permutation(micros.len());
        Epoch::new(number, shuffled.into_iter().map(|i| &*micros[i]))
    }

    fn by_falling_length(&self, window: &[u32]) -> Vec<u32> {
        let mut sorted = window.to_vec();
        // Stable: samples of one length stay in the epoch's order.
        sorted.sort_by_key(|&i| std::cmp::Reverse(self.lengths[i as usize]));
        sorted
    }

    fn bucket(&self, window: &[u32]) -> Vec<Vec<u32>> {
        self.by_falling_length(window).chunks(self.batch).map(<[u32]>::to_vec).collect()
    }

    /// Best fit, decreasing: each sample goes where least room is left after it.
    fn pack(&self, window: &[u32]) -> Vec<Vec<u32>> {
        let mut bins: Vec<Vec<u32>> = Vec::new();
        let mut rooms: BTreeSet<(usize, usize)> = BTreeSet::new();
        for sample in self.by_falling_length(window) {
            let length = self.lengths[sample as usize] as usize;
            let fitting = rooms.range((length, 0)..).next().copied();
            let (room, bin) = fitting.unwrap_or_else(|| {
                bins.push(Vec::new());
                (self.capacity.max(length), bins.len() - 1)
            });
            rooms.remove(&(room, bin));
            rooms.insert((room - length, bin));
            bins[bin].push(sample);
        }
        bins
    }
}

/// Most tokens that one pass over `data` may have.
#[must_use]
pub fn largest_micro_batch(data: &Dataset, config: &TrainConfig) -> usize {
    let mut lengths: Vec<usize> = data.samples.iter().map(|s| s.ids.len()).collect();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    if config.packing {
        let longest = lengths.first().copied().unwrap_or(0);
        return (config.batch * config.seq).max(longest).min(lengths.iter().sum());
    }
    lengths.iter().take(config.batch).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{Asked, Sample};

    fn data(lengths: impl IntoIterator<Item = usize>) -> Dataset {
        let sample = |n: usize| Sample::of_text(vec![1; n]);
        Dataset::new("made", lengths.into_iter().map(sample).collect())
    }

    fn mixed(n: usize) -> Dataset {
        data((0..n).map(|i| 2 + i * i % 61))
    }

    fn configs() -> [TrainConfig; 4] {
        let base = TrainConfig { batch: 3, accumulate: 2, seq: 64, epochs: 3, seed: 9, ..Default::default() };
        [
            base.clone(),
            TrainConfig { bucketing: true, ..base.clone() },
            TrainConfig { packing: true, ..base.clone() },
            TrainConfig { packing: true, batch: 1, accumulate: 1, ..base },
        ]
    }

    /// Samples of every micro-batch of every step.
    fn all(batches: &mut Batches) -> Vec<Vec<Vec<u32>>> {
        let total = batches.total_steps();
        let step = |number| {
            let (epoch, at) = batches.locate(number);
            let accumulate = batches.accumulate;
            batches.epoch(epoch).step(at, accumulate).map(<[u32]>::to_vec).collect()
        };
        (1..=total).map(step).collect()
    }

    #[test]
    fn every_epoch_has_every_sample_once_and_any_step_can_be_found_by_itself() {
        let data = mixed(101);
        for config in configs() {
            let mut batches = Batches::new(&data, &config).unwrap();
            let steps = all(&mut batches);
            let mut counts = vec![0; 101];
            steps.iter().flatten().flatten().for_each(|&i| counts[i as usize] += 1);
            assert_eq!(counts, vec![3; 101], "{config:?}");
            for number in [1, 2, steps.len() / 2, steps.len()] {
                let mut fresh = Batches::new(&data, &config).unwrap();
                let (epoch, at) = fresh.locate(number as u64);
                let found: Vec<_> = fresh.epoch(epoch).step(at, config.accumulate).map(<[u32]>::to_vec).collect();
                assert_eq!(found, steps[number - 1], "{config:?}");
            }
            let other = TrainConfig { seed: 10, ..config.clone() };
            assert_ne!(all(&mut Batches::new(&data, &other).unwrap()), steps, "{config:?}");
        }
    }

    #[test]
    fn passes_know_the_numbers_of_samples_that_are_all_alike() {
        let data = data(vec![8; 24]);
        for config in configs() {
            let mut batches = Batches::new(&data, &config).unwrap();
            let steps = batches.total_steps() / 3;
            let micros = (1..=steps).flat_map(|number| batches.micro_batches(&data, number)).collect::<Vec<_>>();
            for most in [1, 16, usize::MAX] {
                let passes = micros.iter().flat_map(|m| m.split(most)).collect::<Vec<_>>();
                let mut numbers: Vec<u32> = passes.iter().flat_map(|p| p.numbers()).copied().collect();
                assert!(passes.iter().all(|p| p.tokens() == 8 * p.numbers().len()), "{config:?}");
                numbers.sort_unstable();
                assert_eq!(numbers, (0..24).collect::<Vec<_>>(), "{config:?}, passes of {most} tokens");
            }
        }
    }

    #[test]
    fn questions_are_thinned_as_their_share_says_and_whole_in_one_of_four_epochs() {
        let ids: Vec<u32> = (0..100).collect();
        let mask = |from: usize, to: usize| (0..100).map(|i| (from..to).contains(&i)).collect();
        // Forty words of two tokens.
        let within_words = (0..100).map(|i| (10..90).contains(&i) && i % 2 == 1).collect();
        let asked = Asked { tokens: mask(10, 90), within_words };
        let sample = Sample { asked, ..Sample::new(ids.clone(), mask(90, 100)) };
        let data = Dataset::new("made", vec![sample; 4]);
        let config = TrainConfig { batch: 1, epochs: 4, prompt_dropout: 0.3, ..Default::default() };
        let mut batches = Batches::new(&data, &config).unwrap();
        let (mut whole, mut left) = ([0; 4], 0);
        for number in 1..=16 {
            let micro = batches.micro_batches(&data, number).remove(0);
            let said = micro.ids();
            assert!(said.starts_with(&ids[..10]) && said.ends_with(&ids[90..]) && said.is_sorted(), "{said:?}");
            whole[micro.numbers()[0] as usize] += usize::from(said.len() == 100);
            assert!((10..90).step_by(2).all(|i| said.contains(&i) == said.contains(&(i + 1))), "{said:?}");
            left += said.len() - 20;
            // A resumed run thins alike.
            let again = Batches::new(&data, &config).unwrap().micro_batches(&data, number).remove(0);
            assert_eq!(said, again.ids());
        }
        assert_eq!(whole, [1; 4]);
        // Twelve times 40 words with a share of 0.3 left out: 288 tokens, and a deviation of 20.
        let out = 16 * 80 - left;
        assert!((208..368).contains(&out), "{out}");
    }

    #[test]
    fn packing_fills_what_a_pass_may_hold_and_never_more() {
        let data = mixed(5000);
        let config = TrainConfig { packing: true, batch: 2, seq: 64, ..Default::default() };
        let mut batches = Batches::new(&data, &config).unwrap();
        let report = batches.report();
        assert!(report.largest_tokens <= 128 && report.fill > 0.99 && report.padded_tokens == 0, "{report:?}");
        assert!(largest_micro_batch(&data, &config) >= report.largest_tokens);
        let least = data.tokens().div_ceil(128);
        assert!(report.micro_batches >= least && report.micro_batches <= least + least / 50, "{report:?} of {least}");
    }

    #[test]
    fn best_fit_takes_the_tightest_room() {
        let batches = Batches::new(
            &data([6, 5, 4, 3, 2]),
            &TrainConfig { packing: true, batch: 1, seq: 10, ..Default::default() },
        );
        let packed = batches.unwrap().pack(&[0, 1, 2, 3, 4]);
        assert_eq!(packed, [vec![0, 2], vec![1, 3, 4]]);
    }

    #[test]
    fn buckets_hold_samples_of_similar_length() {
        let data = mixed(300);
        let spread = |config: &TrainConfig| {
            let mut batches = Batches::new(&data, config).unwrap();
            let width = |m: &[u32]| {
                let lengths = m.iter().map(|&i| data.samples[i as usize].ids.len());
                lengths.clone().max().unwrap() - lengths.min().unwrap()
            };
            batches.epoch(0).micros().map(width).sum::<usize>()
        };
        let [shuffled, bucketed, ..] = configs();
        assert!(spread(&bucketed) * 10 < spread(&shuffled));
    }

    #[test]
    fn no_samples_are_refused() {
        let error = Batches::new(&data([]), &TrainConfig::default()).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Data);
    }
}
