//! Settings of a training run: the keys of `train.toml` and the flags of `pocketlora train`.

use crate::error::{Error, Result};
use pocketlora_kernels::{Arithmetic, MOMENT_BLOCK};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How the learning rate moves after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls to zero in a line.
    Linear,
    /// Falls to zero in half a cosine (Loshchilov & Hutter 2017).
    Cosine,
}

/// Arithmetic of training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32 everywhere.
    Exact,
    /// bf16 products where the CPU has fast ones, f32 elsewhere; layer inputs rest in 16 bits.
    Bf16,
}

impl Precision {
    /// Of the products with weights.
    pub(super) fn arithmetic(self) -> Arithmetic {
        match self {
            Self::Exact => Arithmetic::Exact,
            Self::Bf16 => Arithmetic::Bf16,
        }
    }
}

/// All settings, with their defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct TrainConfig {
    /// Rank of the adapter.
    pub rank: usize,
    /// LoRA's alpha; twice the rank unless given.
    pub alpha: Option<f64>,
    /// Last path parts of the linear layers to adapt; `all` means every linear layer of the decoder.
    pub targets: Vec<String>,
    /// Dropout of the adapters' input.
    pub dropout: f32,
    /// Scale by `alpha / sqrt(rank)`.
    pub rslora: bool,
    /// Peak learning rate.
    pub lr: f32,
    /// Its course.
    pub schedule: Schedule,
    /// Steps of linear warm-up; below 1, a fraction of all steps.
    pub warmup: f64,
    /// Passes over the data.
    pub epochs: usize,
    /// Optimizer steps in all; overrides `epochs`.
    pub steps: Option<u64>,
    /// Samples in one forward and backward pass; with `packing`, the pass has as many as fit `batch` times `seq` tokens.
    pub batch: usize,
    /// Passes per optimizer step.
    pub accumulate: usize,
    /// Longest sample in tokens; what is longer is split.
    pub seq: usize,
    /// Fill every pass with short samples up to `batch` times `seq` tokens (best fit, decreasing). They do not see each
    /// other.
    pub packing: bool,
    /// Let samples of similar length share a pass, so that passes differ more and waste less; not with `packing`.
    pub bucketing: bool,
    /// Bound on the gradient's norm; 0 does not clip.
    pub clip: f64,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Optimizer.
    pub optimizer: Optimizer,
    /// What SGD keeps of its moment; 0 keeps none.
    pub momentum: f32,
    /// Decay of AdamW's first moment; share of the moment in Lion's update.
    pub beta1: f32,
    /// Decay of AdamW's second moment or of Lion's only one; 0.999 and 0.99 unless given.
    pub beta2: Option<f32>,
    /// Added to the root of AdamW's second moment.
    pub eps: f32,
    /// The learning rate of B over that of A (LoRA+, Hayou et al. 2024).
    pub lora_plus_ratio: f32,
    /// Seed of initialization, order and dropout.
    pub seed: u64,
    /// Steps between checkpoints; 0 writes one only when stopped.
    pub save_every: u64,
    /// JSONL that is evaluated during training.
    pub eval_data: Option<PathBuf>,
    /// Share of the records that is held out and evaluated, instead of `eval_data`.
    pub eval_split: Option<f64>,
    /// Steps between evaluations; 0 evaluates only at the beginning and the end.
    pub eval_every: u64,
    /// Nats a token by which the loss on a general text may rise: the last adapter within that is written.
    pub max_forgetting: Option<f64>,
    /// Evaluations in a row without a lower held-out loss after which the run ends; 0 for never.
    pub patience: u64,
    /// Write the adapter of the evaluation with the lowest held-out loss instead of the last one.
    pub keep_best: bool,
    /// Arithmetic.
    pub precision: Precision,
    /// Anonymous memory that the whole process may hold, in MB: more is recomputed until it fits.
    pub memory_budget: Option<u64>,
}

/// Optimizers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    /// AdamW (Loshchilov & Hutter 2019).
    AdamW,
    /// AdamW with moments in 8 bits (Dettmers et al. 2021).
    AdamW8bit,
    /// SGD, with momentum or without, and decoupled weight decay.
    Sgd,
    /// Lion (Chen et al. 2023).
    Lion,
}

impl Optimizer {
    /// Bytes that it keeps for `values` trained values; SGD as it is with momentum, see [`TrainConfig::state_bytes`].
    #[must_use]
    pub fn state_bytes(self, values: usize) -> u64 {
        let values = values as u64;
        match self {
            Self::AdamW => 8 * values,
            Self::AdamW8bit => 2 * (values + 4 * values.div_ceil(MOMENT_BLOCK as u64)),
            Self::Sgd | Self::Lion => 4 * values,
        }
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: None,
            targets: vec!["all".to_owned()],
            dropout: 0.0,
            rslora: false,
            lr: 2e-4,
            schedule: Schedule::Cosine,
            warmup: 0.03,
            epochs: 3,
            steps: None,
            batch: 4,
            accumulate: 1,
            seq: 1024,
            packing: false,
            bucketing: false,
            clip: 1.0,
            weight_decay: 0.0,
            optimizer: Optimizer::AdamW,
            momentum: 0.0,
            beta1: 0.9,
            beta2: None,
            eps: 1e-8,
            lora_plus_ratio: 1.0,
            seed: 0,
            save_every: 50,
            eval_data: None,
            eval_split: None,
            eval_every: 0,
            max_forgetting: None,
            patience: 0,
            keep_best: false,
            precision: Precision::Bf16,
            memory_budget: None,
        }
    }
}

impl TrainConfig {
    /// LoRA's alpha.
    #[must_use]
    pub fn alpha(&self) -> f64 {
        self.alpha.unwrap_or(2.0 * self.rank as f64)
    }

    /// The optimizer's second beta.
    #[must_use]
    pub fn beta2(&self) -> f32 {
        self.beta2.unwrap_or(if self.optimizer == Optimizer::Lion { 0.99 } else { 0.999 })
    }

    /// Bytes that the optimizer keeps for `values` trained values.
    #[must_use]
    pub fn state_bytes(&self, values: usize) -> u64 {
        if self.optimizer == Optimizer::Sgd && self.momentum == 0.0 { 0 } else { self.optimizer.state_bytes(values) }
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// The first setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        let whole = |name: &str, value: usize, max: usize| {
            let range = 1..=max;
            if range.contains(&value) {
                Ok(())
            } else {
                Err(Error::config(name, format!("a whole number from 1 to {max}"), value))
            }
        };
        whole("rank", self.rank, 4096)?;
        whole("epochs", self.epochs, 1_000_000)?;
        whole("batch", self.batch, 65_536)?;
        whole("accumulate", self.accumulate, 65_536)?;
        whole("seq", self.seq, 1 << 20)?;
        if self.packing && self.bucketing {
            return Err(Error::config("bucketing", "off where `packing` is on", "both"));
        }
        if self.steps == Some(0) {
            return Err(Error::config("steps", "at least 1", 0));
        }
        if self.targets.is_empty() {
            return Err(Error::config("targets", "at least one layer name, or `all`", "nothing"));
        }
        let real = |name: &str, value: f64, ok: bool, expected: &str| {
            if ok && value.is_finite() { Ok(()) } else { Err(Error::config(name, expected, value)) }
        };
        real("alpha", self.alpha(), self.alpha() > 0.0, "a number above 0")?;
        let (dropout, lr) = (f64::from(self.dropout), f64::from(self.lr));
        real("dropout", dropout, (0.0..1.0).contains(&dropout), "a number from 0 to below 1")?;
        real("lr", lr, lr > 0.0 && lr <= 1.0, "a number above 0 and up to 1")?;
        real("warmup", self.warmup, self.warmup >= 0.0, "steps, or a fraction of them below 1")?;
        real("clip", self.clip, self.clip >= 0.0, "a number above 0, or 0 for none")?;
        let decay = f64::from(self.weight_decay);
        real("weight-decay", decay, (0.0..=1.0).contains(&decay), "a number from 0 to 1")?;
        for (name, value) in [("momentum", self.momentum), ("beta1", self.beta1), ("beta2", self.beta2())] {
            real(name, f64::from(value), (0.0..1.0).contains(&value), "a number from 0 to below 1")?;
        }
        real("eps", f64::from(self.eps), self.eps > 0.0, "a number above 0")?;
        let share = self.eval_split.unwrap_or(0.5);
        real("eval-split", share, share > 0.0 && share < 1.0, "a number between 0 and 1")?;
        if let (Some(share), Some(_)) = (self.eval_split, &self.eval_data) {
            return Err(Error::config("eval-split", "either it or `eval-data`", share));
        }
        let rise = self.max_forgetting.unwrap_or(0.0);
        real("max-forgetting", rise, rise >= 0.0, "a number from 0")?;
        let ratio = f64::from(self.lora_plus_ratio);
        real("lora-plus-ratio", ratio, ratio > 0.0 && ratio <= 1000.0, "a number above 0 and up to 1000")?;
        for (name, on) in [("patience", self.patience > 0), ("keep-best", self.keep_best)] {
            if on && self.eval_every == 0 {
                return Err(Error::config(name, "`eval-every` beside it, at least 1", self.eval_every));
            }
        }
        Ok(())
    }

    /// Learning rate of `step` (1-based) of `total`.
    #[must_use]
    pub fn lr_at(&self, step: u64, total: u64) -> f32 {
        let warmup = if self.warmup < 1.0 { (self.warmup * total as f64).ceil() } else { self.warmup };
        let at = step as f64;
        let factor = if at <= warmup {
            at / warmup
        } else {
            // The step after the last one would have rate zero; the last one still learns.
            let progress = (at - warmup) / (total as f64 - warmup + 1.0).max(1.0);
            match self.schedule {
                Schedule::Constant => 1.0,
                Schedule::Linear => 1.0 - progress,
                Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            }
        };
        (f64::from(self.lr) * factor) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_and_falls() {
        let config = TrainConfig { lr: 1.0, warmup: 2.0, ..Default::default() };
        let rates: Vec<f32> = (1..=10).map(|s| config.lr_at(s, 10)).collect();
        assert_eq!(rates[..2], [0.5, 1.0]);
        assert!(rates[2..].windows(2).all(|w| w[1] < w[0] && w[1] > 0.0), "{rates:?}");
        let flat = TrainConfig { schedule: Schedule::Constant, warmup: 0.0, lr: 0.5, ..Default::default() };
        assert_eq!(flat.lr_at(1, 10), 0.5);
    }

    #[test]
    fn numbers_come_back_from_a_checkpoint_as_they_were() {
        // A hasty parser reads this one back as its neighbour, and a resume would be refused.
        let config = TrainConfig { max_forgetting: Some(1.677_206_192_874_474_1), ..Default::default() };
        let back: TrainConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(back, config);
    }

    #[test]
    fn bad_settings_name_themselves() {
        for (config, name) in [
            (TrainConfig { rank: 0, ..Default::default() }, "rank"),
            (TrainConfig { lr: f32::NAN, ..Default::default() }, "lr"),
            (TrainConfig { lr: 0.0, ..Default::default() }, "lr"),
            (TrainConfig { lr: 1e9, ..Default::default() }, "lr"),
            (TrainConfig { momentum: 1.0, ..Default::default() }, "momentum"),
            (TrainConfig { beta2: Some(-0.5), ..Default::default() }, "beta2"),
            (TrainConfig { eps: 0.0, ..Default::default() }, "eps"),
            (TrainConfig { lora_plus_ratio: 0.0, ..Default::default() }, "lora-plus-ratio"),
            (TrainConfig { patience: 2, ..Default::default() }, "patience"),
            (TrainConfig { eval_split: Some(1.0), ..Default::default() }, "eval-split"),
            (TrainConfig { eval_split: Some(0.1), eval_data: Some("x".into()), ..Default::default() }, "eval-split"),
            (TrainConfig { max_forgetting: Some(-0.1), ..Default::default() }, "max-forgetting"),
            (TrainConfig { keep_best: true, ..Default::default() }, "keep-best"),
            (TrainConfig { dropout: 1.0, ..Default::default() }, "dropout"),
            (TrainConfig { steps: Some(0), ..Default::default() }, "steps"),
            (TrainConfig { packing: true, bucketing: true, ..Default::default() }, "bucketing"),
        ] {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(&format!("`{name}`")), "{error}");
        }
    }
}
