//! Ranks by measurement: how many each layer gets of a budget of values.
//!
//! A layer matters as much as the loss falls when its weight moves: its score is the norm of the gradient `G` `[out, in]` of
//! the mean loss by the weight itself, over a few batches before the first step. A frozen base has no such gradient, and none
//! is made: at `B = 0` the gradient of B is `s G Aᵀ`, a projection of `G` on `r` random directions, and with `A` uniform in
//! `±1/sqrt(in)` its squared norm is `s² r / (3 in)` times that of `G` on average (Johnson & Lindenstrauss 1984). GoRA (He
//! et al. 2025) and AdaLoRA (Zhang et al. 2023) go by `|weight x gradient|` instead, which wants the weight in floating point.
//!
//! Ranks are given out one at a time, as seats are by the method of D'Hondt: the next goes to the layer with the largest
//! `score / (values of a rank x (its ranks + 1))` for which a rank still fits. So the values of layers are as their scores, the
//! budget is kept, and of two layers of one shape the one that matters more has at least as many. A layer may get none.

use super::TrainConfig;
use super::run_folder::write_ranks;
use crate::error::{Error, ErrorCode, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

/// Most ranks of a layer.
const MOST: usize = 4096;
/// MB of a value in 16 bits.
const VALUE_MB: f64 = 2e-6;
/// Alpha of a layer over its rank, unless an alpha was given.
const ALPHA: f64 = 2.0;

/// What was measured of a layer, and what it got.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerRank {
    /// The layer's path.
    pub module: String,
    /// The norm of the gradient by its weight.
    pub score: f64,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Its rank; 0 where it is left as it is.
    pub rank: usize,
}

impl LayerRank {
    /// Values of one rank.
    fn cost(&self) -> usize {
        self.shape[0] + self.shape[1]
    }
}

/// Ranks that were chosen for a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RankChoice {
    /// Values that they may have together.
    pub budget: usize,
    /// All layers that were measured, in the order of the model.
    pub layers: Vec<LayerRank>,
}

impl RankChoice {
    /// Shares `budget` values out to layers of which path, shape `[out, in]` and score are known.
    ///
    /// # Errors
    /// There is not enough for a single rank; no score is above 0, or one is no number.
    pub(crate) fn new(measured: Vec<(String, [usize; 2], f64)>, budget: usize) -> Result<Self> {
        let fresh = |(module, shape, score)| LayerRank { module, score, shape, rank: 0 };
        let mut layers: Vec<LayerRank> = measured.into_iter().map(fresh).collect();
        let place = "choice of ranks";
        if let Some(bad) = layers.iter().find(|layer| !layer.score.is_finite()) {
            let message = format!("expected a finite gradient of `{}`, got `{}`", bad.module, bad.score);
            return Err(Error::new(ErrorCode::Diverged, place, message));
        }
        if layers.iter().all(|layer| layer.score <= 0.0) {
            let message = "expected a gradient that tells which layers matter, got zeros; give a `rank` instead";
            return Err(Error::new(ErrorCode::Data, place, message));
        }
        let least = layers.iter().map(LayerRank::cost).min().unwrap_or(0);
        if budget < least {
            let expected = format!("at least {least} values, which one rank of the smallest layer has");
            return Err(Error::config("budget-parameters", expected, budget));
        }
        let mut left = budget;
        loop {
            let fits = |layer: &LayerRank| {
                layer.score > 0.0 && layer.cost() <= left && layer.rank < layer.shape[0].min(layer.shape[1]).min(MOST)
            };
            let claim = |layer: &LayerRank| layer.score / (layer.cost() * (layer.rank + 1)) as f64;
            // Of equal claims the first one's.
            let next = layers.iter().enumerate().rev().filter(|(_, layer)| fits(layer));
            let next = next.max_by(|(_, a), (_, b)| claim(a).total_cmp(&claim(b))).map(|(i, _)| i);
            let Some(next) = next else { break };
            layers[next].rank += 1;
            left -= layers[next].cost();
        }
        Ok(Self { budget, layers })
    }

    /// Values of all ranks together.
    #[must_use]
    pub fn values(&self) -> usize {
        self.layers.iter().map(|layer| layer.rank * layer.cost()).sum()
    }

    /// The rank that most of the adapted layers have, the smaller of two.
    fn usual(&self) -> usize {
        let mut counts = BTreeMap::new();
        self.layers.iter().filter(|layer| layer.rank > 0).for_each(|layer| *counts.entry(layer.rank).or_insert(0) += 1);
        counts.iter().rev().max_by_key(|(_, count)| **count).map_or(1, |(rank, _)| *rank)
    }

    /// `config` with these ranks. Each layer's term keeps the factor that it has with the usual rank, unless an alpha was
    /// given, which is then that of all.
    #[must_use]
    pub fn apply(&self, config: TrainConfig) -> TrainConfig {
        let rank = self.usual();
        let other = || self.layers.iter().filter(|layer| layer.rank != rank);
        let rank_pattern = other().map(|layer| (layer.module.clone(), layer.rank)).collect();
        let own_alpha = config.alpha.is_none() && !config.rslora;
        let alpha = other().filter(|layer| own_alpha && layer.rank > 0);
        let alpha_pattern = alpha.map(|layer| (layer.module.clone(), ALPHA * layer.rank as f64)).collect();
        TrainConfig { rank, rank_pattern, alpha_pattern, ..config }
    }

    /// A line for each layer: its rank, its score beside the largest, its path.
    #[must_use]
    pub fn text(&self) -> String {
        let adapted = self.layers.iter().filter(|layer| layer.rank > 0).count();
        let mut text = format!(
            "ranks by gradients: {} of {} layers adapted, {} of {} values\n",
            adapted,
            self.layers.len(),
            self.values(),
            self.budget
        );
        let most = self.layers.iter().map(|layer| layer.score).fold(0.0, f64::max);
        for LayerRank { module, score, rank, .. } in &self.layers {
            let _ = writeln!(text, "  rank {rank:>4}, score {:.3}: {module}", score / most);
        }
        text
    }

    /// Writes the same beside a run's adapter, as `ranks.txt`, and as a picture, `ranks.svg`.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        write_ranks(dir, self)
    }
}

impl TrainConfig {
    /// As [`RankChoice::new`], with the `budget` of these settings by the name that they have it under.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn share_ranks(&self, measured: Vec<(String, [usize; 2], f64)>, budget: usize) -> Result<RankChoice> {
        let least = measured.iter().map(|(_, shape, _)| shape[0] + shape[1]).min().unwrap_or(0);
        if let Some(megabytes) = self.budget_mb.filter(|_| budget < least) {
            let expected = format!("at least {}, which one rank of the smallest layer takes", (2 * least) as f64 / 1e6);
            return Err(Error::config("budget-mb", expected, megabytes));
        }
        RankChoice::new(measured, budget)
    }

    /// Values that ranks by measurement may have together, where they are asked for: of `budget-mb` those that a file of
    /// that size holds in 16 bits.
    #[must_use]
    pub fn rank_budget(&self) -> Option<usize> {
        self.budget_parameters.or(self.budget_mb.map(|megabytes| (megabytes / VALUE_MB).round() as usize))
    }

    /// Whether ranks are to be measured and are not yet.
    #[must_use]
    pub fn wants_ranks(&self) -> bool {
        self.rank_budget().is_some() && self.rank_pattern.is_empty()
    }

    /// Checks what they say of ranks of single layers.
    ///
    /// # Errors
    /// The first setting that is out of range.
    pub(super) fn check_ranks(&self) -> Result<()> {
        if let (Some(values), Some(_)) = (self.budget_parameters, self.budget_mb) {
            return Err(Error::config("budget-parameters", "either it or `budget-mb`", values));
        }
        if self.budget_parameters == Some(0) {
            return Err(Error::config("budget-parameters", "a whole number from 1", 0));
        }
        if let Some(megabytes) = self.budget_mb.filter(|mb| !(*mb > 0.0 && *mb <= 1e6)) {
            return Err(Error::config("budget-mb", "a number of MB above 0", megabytes));
        }
        if let Some((_, rank)) = self.rank_pattern.iter().find(|(_, rank)| **rank > MOST) {
            return Err(Error::config(
                "rank-pattern",
                format!("ranks from 0, which leaves a layer out, to {MOST}"),
                rank,
            ));
        }
        match self.alpha_pattern.values().find(|alpha| !(**alpha > 0.0 && alpha.is_finite())) {
            Some(alpha) => Err(Error::config("alpha-pattern", "numbers above 0", alpha)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(scores: &[(usize, usize, f64)], budget: usize) -> Result<RankChoice> {
        let layer =
            |(i, (out, input, score)): (usize, &(usize, usize, f64))| (format!("layer.{i}"), [*out, *input], *score);
        RankChoice::new(scores.iter().enumerate().map(layer).collect(), budget)
    }

    #[test]
    fn values_follow_scores_and_the_budget_is_kept() {
        for (name, scores, budget, ranks) in [
            ("as the scores", &[(10, 10, 3.0), (10, 10, 1.0)][..], 160, &[6, 2][..]),
            ("half the values for a rank, twice the ranks", &[(5, 5, 1.0), (10, 10, 1.0)], 80, &[4, 2]),
            ("what is left goes where it fits", &[(10, 10, 9.0), (2, 2, 0.1)], 27, &[1, 1]),
            ("no more than the layer is wide", &[(4, 100, 1.0), (50, 50, 1e-3)], 700, &[4, 2]),
            ("what does not matter gets none", &[(10, 10, 1.0), (10, 10, 0.0)], 100, &[5, 0]),
            ("of equals the first", &[(10, 10, 1.0), (10, 10, 1.0)], 60, &[2, 1]),
        ] {
            let found = choice(scores, budget).unwrap();
            let got: Vec<usize> = found.layers.iter().map(|layer| layer.rank).collect();
            assert_eq!(got, ranks, "{name}");
            assert!(found.values() <= budget, "{name}");
        }
    }

    #[test]
    fn what_cannot_be_shared_out_is_refused() {
        for (scores, budget, said) in [
            (&[(10, 10, 1.0)][..], 19, "`budget-parameters`"),
            (&[(10, 10, 0.0)], 100, "zeros"),
            (&[(10, 10, f64::NAN)], 100, "finite"),
        ] {
            let error = choice(scores, budget).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        for (config, name) in [
            (TrainConfig { budget_parameters: Some(0), ..Default::default() }, "budget-parameters"),
            (TrainConfig { budget_mb: Some(f64::NAN), ..Default::default() }, "budget-mb"),
            (TrainConfig { budget_mb: Some(-1.0), ..Default::default() }, "budget-mb"),
            (
                TrainConfig { budget_mb: Some(1.0), budget_parameters: Some(9), ..Default::default() },
                "budget-parameters",
            ),
            (TrainConfig { rank_pattern: [("q_proj".to_owned(), 5000)].into(), ..Default::default() }, "rank-pattern"),
            (TrainConfig { alpha_pattern: [("q_proj".to_owned(), 0.0)].into(), ..Default::default() }, "alpha-pattern"),
        ] {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(&format!("`{name}`")), "{error}");
        }
    }

    #[test]
    fn each_layer_keeps_the_factor_of_the_usual_rank() {
        let found = choice(&[(10, 10, 3.0), (10, 10, 1.0), (10, 10, 1.0), (10, 10, 0.0)], 100).unwrap();
        let config = found.apply(TrainConfig::default());
        assert_eq!((config.rank, config.alpha()), (1, 2.0));
        assert_eq!(config.rank_pattern, [("layer.0".to_owned(), 3), ("layer.3".to_owned(), 0)].into());
        assert_eq!(config.alpha_pattern, [("layer.0".to_owned(), 6.0)].into());
        let given = found.apply(TrainConfig { alpha: Some(7.0), ..Default::default() });
        assert!(given.alpha_pattern.is_empty());
        assert!(found.text().contains("rank    3, score 1.000: layer.0"), "{}", found.text());
    }
}
