//! Data that is not learned: a share of the samples, and a general text that tells what a run makes the model forget.

use super::{Dataset, Forgetting, Known, Sample, TrainConfig};
use crate::error::{Error, ErrorCode, Result};
use crate::rng::mix;
use crate::tokenizer::Tokenizer;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::Path;

/// Stream of random numbers for the choice of held-out samples.
const HOLD_OUT: u64 = 5;
/// Longest window of the general text, in tokens.
const WINDOW: usize = 256;
/// Characters of its beginning that tell what a language costs.
const START: usize = 800;
/// Written for this purpose: plain prose, a dialogue, an explanation, numbers.
const GENERAL: &str = include_str!("general.txt");

/// What an evaluation found: mean losses (natural log), and what the model still knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Evaluation {
    /// On the held-out data, if there is any.
    pub held_out: Option<f64>,
    /// On the general text, if it is watched.
    pub general: Option<f64>,
    /// General questions that were answered rightly, if they were asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known: Option<Known>,
}

impl Evaluation {
    /// Whether no more than `limit` was forgotten since `start`. Without a limit, or where one of the two has not been
    /// measured, yes; a loss that is not a number does not pass.
    #[must_use]
    pub fn passes(&self, start: Option<Self>, limit: Option<Forgetting>) -> bool {
        let start = start.unwrap_or_default();
        match limit {
            Some(Forgetting::Nats(limit)) => {
                self.general.zip(start.general).is_none_or(|(now, before)| now - before <= limit)
            }
            Some(Forgetting::Percent(limit)) => {
                self.known.zip(start.known).is_none_or(|(now, before)| now.lost_percent(before) <= limit)
            }
            None => true,
        }
    }
}

/// How much of what is evaluated is learned as well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Overlap {
    /// Records to evaluate on.
    pub records: usize,
    /// Those of them of which a sample is learned, token for token, from whatever file it came.
    pub learned: usize,
}

impl Overlap {
    /// Of `held` with `learned`.
    #[must_use]
    pub fn of(learned: &Dataset, held: &Dataset) -> Self {
        let seen: HashSet<u64> = learned.samples.iter().map(|s| tokens_hash(s, 0)).collect();
        let records = held.by_record();
        let both = records
            .iter()
            .filter(|r| held.samples[r.samples.clone()].iter().any(|s| seen.contains(&tokens_hash(s, 0))));
        Self { records: records.len(), learned: both.count() }
    }

    /// That the loss on the data at `path` is not what it seems, if so.
    #[must_use]
    pub fn warning(self, path: &Path) -> Option<Error> {
        let Self { records, learned } = self;
        let message = format!(
            "expected records that are not learned, got `{learned}` of {records} that are in both, the training data and \
             this; their loss says little about what the model has not seen: take them out of one, or use `--eval-split` \
             instead"
        );
        (learned > 0).then(|| Error::new(ErrorCode::Data, format!("`{}`", path.display()), message))
    }
}

fn tokens_hash(sample: &Sample, key: u64) -> u64 {
    sample.ids.iter().fold(key, |hash, &id| mix(hash, u64::from(id)))
}

/// Splits `data` as `config` says: what is learned, and what is held out of it or was given for that. Which records are
/// held out depends on their tokens and the seed; what has a sample in common stays together, so that no sample is on
/// both sides, nor parts of one record.
///
/// # Errors
/// A split is asked for and there are fewer than two records without a sample in common.
pub fn hold_out(config: &TrainConfig, data: Dataset, given: Option<Dataset>) -> Result<(Dataset, Option<Dataset>)> {
    let Some(share) = config.eval_split else { return Ok((data, given)) };
    let kin = kin(&data, mix(config.seed, HOLD_OUT));
    let mut distinct: Vec<u64> = kin.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
    if distinct.len() < 2 {
        let message =
            "expected at least two records with different samples to split, got one; give `--eval-data` instead";
        return Err(Error::new(ErrorCode::Data, format!("`{}`", data.path.display()), message));
    }
    let count = ((share * distinct.len() as f64).round() as usize).clamp(1, distinct.len() - 1);
    // Hashes in order of their size are records in no order at all.
    distinct.truncate(count);
    let (learned, held) = data.partition(|record| distinct.binary_search(&kin[record]).is_ok());
    Ok((learned, Some(held)))
}

/// For each record a hash of the samples of all records that it must stay together with.
fn kin(data: &Dataset, key: u64) -> Vec<u64> {
    let hash = |s: &Sample| tokens_hash(s, key);
    let records: Vec<Vec<u64>> =
        data.by_record().into_iter().map(|r| data.samples[r.samples].iter().map(hash).collect()).collect();
    // A forest: each record points to an earlier one of its kin, the first of all to itself.
    let mut toward: Vec<usize> = (0..records.len()).collect();
    let mut seen: HashMap<u64, usize> = HashMap::new();
    for (i, samples) in records.iter().enumerate() {
        for sample in samples {
            let (a, b) = (first_of(&mut toward, i), first_of(&mut toward, *seen.entry(*sample).or_insert(i)));
            toward[a.max(b)] = a.min(b);
        }
    }
    let mut samples: Vec<BTreeSet<u64>> = vec![BTreeSet::new(); records.len()];
    for (i, record) in records.iter().enumerate() {
        samples[first_of(&mut toward, i)].extend(record);
    }
    let hashes: Vec<u64> = samples.into_iter().map(|all| all.into_iter().reduce(mix).unwrap_or(key)).collect();
    (0..records.len()).map(|i| hashes[first_of(&mut toward, i)]).collect()
}

/// The first of a record's kin, to which all on the way point from then on.
fn first_of(toward: &mut [usize], record: usize) -> usize {
    let mut first = record;
    while toward[first] != first {
        // Halving the way keeps all ways short.
        toward[first] = toward[toward[first]];
        first = toward[first];
    }
    first
}

/// The general text in windows of at most `longest` tokens, what a step takes at once.
///
/// # Errors
/// The tokenizer cannot express it.
pub fn general_text(tokenizer: &Tokenizer, longest: usize) -> Result<Dataset> {
    let ids = tokenizer.encode(GENERAL, true)?;
    let windows = ids.chunks(WINDOW.min(longest).max(2)).filter(|w| w.len() > 1);
    Ok(Dataset::new("the general text", windows.map(|ids| Sample::of_text(ids.to_vec())).collect()))
}

/// The beginning of the general text, with its characters: what the model's own language costs it.
///
/// # Errors
/// As [`general_text`].
pub(crate) fn general_start(tokenizer: &Tokenizer) -> Result<(Dataset, usize)> {
    let start: String = GENERAL.chars().take(START).collect();
    Ok((Dataset::new("the general text", vec![plain(tokenizer, &start)?]), start.chars().count()))
}

/// A text as it is, learned whole.
pub(crate) fn plain(tokenizer: &Tokenizer, text: &str) -> Result<Sample> {
    tokenizer.encode(text, true).map(Sample::of_text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(ids: &[u32]) -> Dataset {
        let sample = |&id: &u32| Sample::new(vec![id, id + 1], [false, true].into_iter().collect());
        Dataset::new("test", ids.iter().map(sample).collect())
    }

    fn split(ids: &[u32], seed: u64, share: f64) -> [Vec<u32>; 2] {
        let config = TrainConfig { eval_split: Some(share), seed, ..TrainConfig::default() };
        let (learned, held) = hold_out(&config, data(ids), None).unwrap();
        [learned, held.unwrap()].map(|d| d.samples.iter().map(|s| s.ids[0]).collect())
    }

    #[test]
    fn every_sample_is_learned_or_held_out_and_none_is_both() {
        // Each number twice, so that half of the samples have a double.
        let ids: Vec<u32> = (0..50).chain(0..50).collect();
        for seed in 0..20 {
            let [learned, held] = split(&ids, seed, 0.2);
            assert_eq!((learned.len(), held.len()), (80, 20), "seed {seed}");
            assert!(learned.iter().all(|id| !held.contains(id)), "seed {seed}: {held:?}");
            assert_eq!(split(&ids, seed, 0.2), [learned, held], "seed {seed}: another split");
        }
        assert_ne!(split(&ids, 0, 0.2), split(&ids, 1, 0.2));
        // The order of what is left does not change, and neither side is ever empty.
        assert!(split(&ids, 3, 0.5)[0][..20].is_sorted());
        assert_eq!(split(&[1, 2, 3], 0, 0.01).map(|s| s.len()), [2, 1]);
        assert_eq!(split(&[1, 2, 3], 0, 0.99).map(|s| s.len()), [1, 2]);
    }

    #[test]
    fn what_belongs_together_is_on_one_side_and_each_side_counts_its_own() {
        use crate::train::{SplitRecord, Splits};
        // Records of 1 to 4 samples; every tenth begins as the one before it, which ties those two together.
        let (mut all, mut groups) = (data(&[]), Vec::new());
        for record in 0..60u32 {
            let (first, parts) = (all.samples.len(), 1 + record as usize % 4);
            let group = if record % 10 == 9 { record - 1 } else { record };
            for part in 0..parts as u32 {
                let owner = if part == 0 { group } else { record };
                all.samples.push(Sample { ids: vec![10 * owner + part, 1], ..data(&[0]).samples[0].clone() });
                groups.push((10 * owner + part, group));
            }
            all.records += 1;
            if parts > 1 {
                let splits = Splits { samples: 1, parts, ..Splits::default() };
                all.splits += splits;
                all.split_records.push(SplitRecord { samples: first..first + parts, splits });
            }
        }
        for seed in 0..10 {
            let config = TrainConfig { eval_split: Some(0.3), seed, ..TrainConfig::default() };
            let (learned, held) = hold_out(&config, all.clone(), None).unwrap();
            let held = held.unwrap();
            let groups_of = |side: &Dataset| -> BTreeSet<u32> {
                let group = |s: &Sample| groups.iter().find(|(id, _)| *id == s.ids[0]).unwrap().1;
                side.samples.iter().map(group).collect()
            };
            assert!(groups_of(&learned).is_disjoint(&groups_of(&held)), "seed {seed}");
            assert_eq!(groups_of(&held).len(), 16, "seed {seed}: a share of 54 groups");
            let mut sum = held.splits;
            sum += learned.splits;
            assert_eq!((learned.records + held.records, sum), (60, all.splits), "seed {seed}");
            for side in [&learned, &held] {
                let (records, whole) = (side.by_record(), side.records - side.split_records.len());
                assert_eq!(records.len(), side.records, "seed {seed}");
                assert_eq!(side.samples.len(), whole + side.splits.parts, "seed {seed}");
                for r in &side.split_records {
                    let owners: BTreeSet<u32> =
                        side.samples[r.samples.clone()][1..].iter().map(|s| s.ids[0] / 10).collect();
                    assert_eq!(owners.len(), 1, "seed {seed}: {r:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_on_both_sides_is_counted_by_record() {
        let (all, some) = (data(&[1, 2, 3, 4, 5]), data(&[9, 4, 4, 8, 1]));
        for (learned, held, expected) in [(&all, &all, 5), (&all, &some, 3), (&some, &all, 2), (&all, &data(&[7]), 0)] {
            let found = Overlap::of(learned, held);
            assert_eq!(found, Overlap { records: held.records, learned: expected });
            assert_eq!(found.warning(&held.path).is_some(), expected > 0);
        }
        // A split leaves nothing on both sides, doubles in the data or not.
        for seed in 0..20 {
            let config = TrainConfig { eval_split: Some(0.4), seed, ..TrainConfig::default() };
            let (learned, held) = hold_out(&config, some.clone(), None).unwrap();
            assert_eq!(Overlap::of(&learned, &held.unwrap()).learned, 0, "seed {seed}");
        }
        // A record of two samples, one of which is learned.
        let mut parts = data(&[1, 70, 71]);
        parts.split_records =
            vec![crate::train::SplitRecord { samples: 0..2, splits: crate::train::Splits::default() }];
        parts.records = 2;
        assert_eq!(Overlap::of(&all, &parts), Overlap { records: 2, learned: 1 });
    }

    #[test]
    fn one_sample_cannot_be_split() {
        let config = TrainConfig { eval_split: Some(0.5), ..TrainConfig::default() };
        assert_eq!(hold_out(&config, data(&[7, 7]), None).unwrap_err().code(), ErrorCode::Data);
    }

    #[test]
    fn forgetting_is_the_rise_of_the_general_loss() {
        let general = |loss| Evaluation { general: Some(loss), ..Evaluation::default() };
        for (now, limit, passes) in [
            (3.1, Some(0.2), true),
            (3.3, Some(0.2), false),
            (2.0, Some(0.0), true),
            (f64::NAN, Some(9.0), false),
            (9.0, None, true),
        ] {
            let limit = limit.map(Forgetting::Nats);
            assert_eq!(general(now).passes(Some(general(3.0)), limit), passes, "{now} {limit:?}");
        }
    }
}
