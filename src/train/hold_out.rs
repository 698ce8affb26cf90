//! Data that is not learned: a share of the samples, and a general text that tells what a run makes the model forget.

use super::{Dataset, Sample, TrainConfig};
use crate::error::{Error, ErrorCode, Result};
use crate::rng::mix;
use crate::tokenizer::Tokenizer;
use std::collections::BTreeSet;

/// Stream of random numbers for the choice of held-out samples.
const HOLD_OUT: u64 = 5;
/// Longest window of the general text, in tokens.
const WINDOW: usize = 256;
/// Written for this purpose: plain prose, a dialogue, an explanation, numbers.
const GENERAL: &str = include_str!("general.txt");

/// What an evaluation found: mean losses (natural log).
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Evaluation {
    /// On the held-out data, if there is any.
    pub held_out: Option<f64>,
    /// On the general text, if it is watched.
    pub general: Option<f64>,
}

impl Evaluation {
    /// Whether the general text has become at most `limit` nats a token less likely since `start`. Without a limit or
    /// one of the losses, yes; a loss that is not a number does not pass.
    #[must_use]
    pub fn passes(&self, start: Option<Self>, limit: Option<f64>) -> bool {
        match (self.general, start.and_then(|s| s.general), limit) {
            (Some(now), Some(before), Some(limit)) => now - before <= limit,
            _ => true,
        }
    }
}

/// Splits `data` as `config` says: what is learned, and what is held out of it or was given for that. Which samples are
/// held out depends on their tokens and the seed; samples with the same tokens stay together.
///
/// # Errors
/// A split is asked for and there are fewer than two different samples.
pub fn hold_out(config: &TrainConfig, mut data: Dataset, given: Option<Dataset>) -> Result<(Dataset, Option<Dataset>)> {
    let Some(share) = config.eval_split else { return Ok((data, given)) };
    let key = mix(config.seed, HOLD_OUT);
    let hash = |s: &Sample| s.ids.iter().fold(key, |hash, &id| mix(hash, u64::from(id)));
    let mut distinct: Vec<u64> = data.samples.iter().map(hash).collect::<BTreeSet<_>>().into_iter().collect();
    if distinct.len() < 2 {
        let message = "expected at least two different samples to split, got one; give `--eval-data` instead";
        return Err(Error::new(ErrorCode::Data, format!("`{}`", data.path.display()), message));
    }
    let count = ((share * distinct.len() as f64).round() as usize).clamp(1, distinct.len() - 1);
    // Hashes in order of their size are samples in no order at all.
    distinct.truncate(count);
    let all = std::mem::take(&mut data.samples);
    let mut held = data.clone();
    (held.samples, data.samples) = all.into_iter().partition(|s| distinct.binary_search(&hash(s)).is_ok());
    Ok((data, Some(held)))
}

/// The general text in windows that are no longer than what a step of `data` takes at once.
///
/// # Errors
/// The tokenizer cannot express it.
pub fn general_text(tokenizer: &Tokenizer, data: &Dataset) -> Result<Dataset> {
    let ids = tokenizer.encode(GENERAL, true)?;
    let window = |ids: &[u32]| Sample { ids: ids.to_vec(), trained: (0..ids.len()).map(|i| i > 0).collect() };
    let windows = ids.chunks(WINDOW.min(data.longest()).max(2)).filter(|w| w.len() > 1);
    Ok(Dataset::new("the general text", windows.map(window).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(ids: &[u32]) -> Dataset {
        let sample = |&id: &u32| Sample { ids: vec![id, id + 1], trained: [false, true].into_iter().collect() };
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
    fn one_sample_cannot_be_split() {
        let config = TrainConfig { eval_split: Some(0.5), ..TrainConfig::default() };
        assert_eq!(hold_out(&config, data(&[7, 7]), None).unwrap_err().code(), ErrorCode::Data);
    }

    #[test]
    fn forgetting_is_the_rise_of_the_general_loss() {
        let general = |loss| Evaluation { held_out: None, general: Some(loss) };
        for (now, limit, passes) in [
            (3.1, Some(0.2), true),
            (3.3, Some(0.2), false),
            (2.0, Some(0.0), true),
            (f64::NAN, Some(9.0), false),
            (9.0, None, true),
        ] {
            assert_eq!(general(now).passes(Some(general(3.0)), limit), passes, "{now} {limit:?}");
        }
    }
}
