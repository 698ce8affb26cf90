//! Settings of a training run: the keys of `train.toml` and the flags of `pocketlora train`.

use super::keep::{Forgetting, Keep};
use super::layers::LayerOrder;
use crate::adapter::{DropoutForm, Init, Kind, Settings};
use crate::error::{Error, ErrorCode, Result};
use pocketlora_kernels::{Arithmetic, MOMENT_BLOCK};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
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
pub enum TrainPrecision {
    /// f32 everywhere.
    Exact,
    /// bf16 products where the CPU has fast ones, f32 elsewhere; layer inputs rest in 16 bits.
    Bf16,
}

impl TrainPrecision {
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
    /// Method of the adapter.
    #[serde(skip_serializing_if = "is_default")]
    pub method: Kind,
    /// Methods of adapters that are trained together with that one, each in a file of its own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub beside: Vec<Kind>,
    /// Rank of the adapter.
    pub rank: usize,
    /// Ranks of single layers, by the ends of their paths, of which the longest that fits counts; 0 leaves a layer out.
    #[serde(alias = "rank_pattern", skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
    /// LoRA's alpha; twice the rank unless given.
    pub alpha: Option<f64>,
    /// LoRA's alpha of single layers, by the ends of their paths.
    #[serde(alias = "alpha_pattern", skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Values that ranks may have together that are chosen by measurement ([`Engine::choose_ranks`](crate::Engine::choose_ranks)).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget_parameters: Option<usize>,
    /// The same as the size of the adapter's file, in MB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget_mb: Option<f64>,
    /// Last path parts of the linear layers to adapt; `all` means every linear layer of the decoder, `auto` those that PEFT
    /// adapts by default with IA3 in the model's family.
    pub targets: Vec<String>,
    /// Those of them whose input IA3 scales instead of their output; where none are given, PEFT's choice.
    #[serde(alias = "feedforward_modules", skip_serializing_if = "Vec::is_empty")]
    pub feedforward_modules: Vec<String>,
    /// Virtual tokens of a prefix or a prompt; 20 unless given.
    #[serde(alias = "num_virtual_tokens", skip_serializing_if = "Option::is_none")]
    pub num_virtual_tokens: Option<usize>,
    /// Of a cartridge's virtual tokens, how many of the first are not moved; 1 unless given.
    #[serde(alias = "num_frozen_tokens", skip_serializing_if = "Option::is_none")]
    pub num_frozen_tokens: Option<usize>,
    /// Width of the network that makes the virtual tokens of P-tuning; 128 unless given.
    #[serde(alias = "encoder_hidden_size", skip_serializing_if = "Option::is_none")]
    pub encoder_hidden_size: Option<usize>,
    /// The text as whose embeddings the virtual tokens of a prompt begin, tokens by chance unless given; of a cartridge the
    /// text whose keys and values it begins with, that of the data unless given.
    #[serde(alias = "prompt_tuning_init_text", skip_serializing_if = "Option::is_none")]
    pub prompt_init_text: Option<String>,
    /// Ids of tokens whose rows of the embedding are trained: alone, or beside LoRA.
    #[serde(alias = "trainable_token_indices", skip_serializing_if = "Vec::is_empty")]
    pub trainable_token_indices: Vec<u32>,
    /// LoRA works from the last occurrence of these tokens in a text on alone (activated LoRA).
    #[serde(alias = "alora_invocation_tokens", skip_serializing_if = "Vec::is_empty")]
    pub alora_invocation_tokens: Vec<u32>,
    /// How LoRA begins, by the name that PEFT has for it, such as `pissa`; `true` for A uniform and B zero, as unless given.
    #[serde(alias = "init_lora_weights", skip_serializing_if = "Option::is_none")]
    pub init_lora_weights: Option<String>,
    /// Steps' worth of data that a beginning from data looks at; 8 unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_steps: Option<u64>,
    /// The model's weights in more bits than the base's, for `loftq`: a folder or file that `quantize` reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loftq_source: Option<PathBuf>,
    /// Which biases of the base LoRA trains beside (BitFit): `none`, `all`, or `lora_only` for those of adapted layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bias: Option<String>,
    /// Keys of PEFT's config of the method that have no name of their own here, such as `group_size` of ROAD.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub options: Map<String, Value>,
    /// Ranks of AdaLoRA grow from one of each module to its target, instead of falling to it (as in IncreLoRA).
    #[serde(skip_serializing_if = "is_default")]
    pub grow_ranks: bool,
    /// Dropout of the adapters' input.
    pub dropout: f32,
    /// What dropout leaves out: elements of the input, ranks or tokens of a LoRA's term.
    #[serde(skip_serializing_if = "is_default")]
    pub dropout_form: DropoutForm,
    /// Steps after which a LoRA puts aside what it has learned and begins anew (ReLoRA).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relora: Option<u64>,
    /// Share of the smallest moments that become zero then; 0.99 unless given, 1 lets the optimizer begin anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relora_prune: Option<f32>,
    /// Steps in which the learning rate rises again then; 10 unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relora_warmup: Option<u64>,
    /// Rank of the adapter that comes out at most, at least twice the rank; no bound unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relora_rank: Option<usize>,
    /// Layers that learn at a time (LISA); all unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_at_once: Option<usize>,
    /// Steps with the same ones; 10 unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_every: Option<u64>,
    /// Which come next.
    #[serde(skip_serializing_if = "is_default")]
    pub layers_order: LayerOrder,
    /// Share of the layers that backward leaves out on average, by chance, and more often the less they matter (DropBP).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropbp: Option<f32>,
    /// Damping of Riemannian preconditioning; none without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub riemannian: Option<f64>,
    /// How far up the hill the gradient is taken (sharpness-aware steps); at the place itself without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sam: Option<f32>,
    /// Share of the words of questions that a pass leaves out at random (word dropout, Iyyer et al. 2015), so that answers
    /// are learned to more than the letters of their questions; every fourth pass over the data leaves a question whole.
    /// What a user says in a conversation is a question; texts have none.
    #[serde(skip_serializing_if = "is_default")]
    pub prompt_dropout: f32,
    /// Scale by `alpha / sqrt(rank)`.
    pub rslora: bool,
    /// Peak learning rate; above 1 for SGD only, whose steps are as large as the gradient makes them.
    pub lr: f32,
    /// Its course.
    pub schedule: Schedule,
    /// Steps of linear warm-up before the first step at the peak, fewer than all; below 1, a fraction of all steps,
    /// rounded down.
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
    /// Steps between checkpoints; 0 leaves them to `save_seconds`.
    pub save_every: u64,
    /// Seconds after which a checkpoint is due in any case: sooner while a run is young, so that a kill costs at most half
    /// of it, and later where writing one takes more than a twentieth of the time. 0 leaves them to `save_every`; where
    /// both are 0 one is written only when the run is stopped.
    pub save_seconds: u64,
    /// JSONL that is evaluated during training.
    pub eval_data: Option<PathBuf>,
    /// Share of the records that is held out and evaluated, instead of `eval_data`.
    pub eval_split: Option<f64>,
    /// Evaluates, where neither of them is given, on answers of the data under other wordings of their questions, and on some
    /// records that it can do without; read by [`Reader::material`](crate::Reader::material).
    #[serde(skip_serializing_if = "is_default")]
    pub eval_reworded: bool,
    /// Steps between evaluations; 0 evaluates only at the beginning and the end.
    pub eval_every: u64,
    /// What the model may forget, by the loss on a general text or by general questions: the last adapter within that is
    /// written.
    pub max_forgetting: Option<Forgetting>,
    /// Holds the model to what it says without the adapter, on general prompts.
    pub keep: Keep,
    /// Asks general questions before the run and after it.
    pub check: bool,
    /// Evaluations in a row without a lower held-out loss after which the run ends; 0 for never.
    pub patience: u64,
    /// Write the adapter of the evaluation with the lowest held-out loss instead of the last one.
    pub keep_best: bool,
    /// Arithmetic.
    pub precision: TrainPrecision,
    /// Anonymous memory that the whole process may hold, in MB: more is recomputed until it fits.
    pub memory_budget: Option<u64>,
}

/// What is as usual is not written, so that settings which came later leave earlier runs' checkpoints as they were.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
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
    /// As people write it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::AdamW => "adamw",
            Self::AdamW8bit => "adamw8bit",
            Self::Sgd => "sgd",
            Self::Lion => "lion",
        }
    }

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
            method: Kind::Lora,
            beside: Vec::new(),
            rank: 8,
            rank_pattern: BTreeMap::new(),
            alpha: None,
            alpha_pattern: BTreeMap::new(),
            budget_parameters: None,
            budget_mb: None,
            targets: vec!["all".to_owned()],
            feedforward_modules: Vec::new(),
            num_virtual_tokens: None,
            num_frozen_tokens: None,
            encoder_hidden_size: None,
            prompt_init_text: None,
            trainable_token_indices: Vec::new(),
            alora_invocation_tokens: Vec::new(),
            init_lora_weights: None,
            init_steps: None,
            loftq_source: None,
            bias: None,
            options: Map::new(),
            grow_ranks: false,
            dropout: 0.0,
            dropout_form: DropoutForm::Input,
            relora: None,
            relora_prune: None,
            relora_warmup: None,
            relora_rank: None,
            layers_at_once: None,
            layers_every: None,
            layers_order: LayerOrder::Random,
            dropbp: None,
            riemannian: None,
            sam: None,
            prompt_dropout: 0.0,
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
            save_seconds: 120,
            eval_data: None,
            eval_split: None,
            eval_reworded: false,
            eval_every: 0,
            max_forgetting: None,
            keep: Keep::Off,
            check: false,
            patience: 0,
            keep_best: false,
            precision: TrainPrecision::Bf16,
            memory_budget: None,
        }
    }
}

impl TrainConfig {
    /// Whether it asks for what only a fresh adapter of its method begins with.
    pub(super) fn begins(&self, name: &str) -> bool {
        match name {
            "bias" => self.bias.as_ref().is_some_and(|bias| bias != "none"),
            "rank-pattern" => !self.rank_pattern.is_empty(),
            "alpha-pattern" => !self.alpha_pattern.is_empty(),
            "budget-parameters" => self.budget_parameters.is_some(),
            "budget-mb" => self.budget_mb.is_some(),
            _ => self.method != Kind::TrainableTokens && !self.trainable_token_indices.is_empty(),
        }
    }

    /// LoRA's alpha.
    #[must_use]
    pub fn alpha(&self) -> f64 {
        self.alpha.unwrap_or(2.0 * self.rank as f64)
    }

    /// What an adapter's method reads of them.
    #[must_use]
    pub fn adapter(&self) -> Settings {
        Settings {
            rank: self.rank,
            alpha: self.alpha(),
            rank_pattern: self.rank_pattern.clone(),
            alpha_pattern: self.alpha_pattern.clone(),
            rslora: self.rslora,
            // The number that somebody typed: an f32 widened as it is has digits of its own.
            dropout: self.dropout.to_string().parse().unwrap_or(f64::from(self.dropout)),
            targets: self.targets.clone(),
            feedforward_modules: self.feedforward_modules.clone(),
            num_virtual_tokens: self.num_virtual_tokens.unwrap_or(20),
            num_frozen_tokens: self.num_frozen_tokens.unwrap_or(1),
            encoder_hidden_size: self.encoder_hidden_size.unwrap_or(128),
            prompt_init_text: self.prompt_init_text.clone(),
            trainable_token_indices: self.trainable_token_indices.clone(),
            alora_invocation_tokens: self.alora_invocation_tokens.clone(),
            init_lora_weights: self.init_lora_weights.clone().unwrap_or_else(|| "true".to_owned()),
            bias: self.bias.clone().unwrap_or_else(|| "none".to_owned()),
            lora_plus_ratio: self.lora_plus_ratio,
            options: self.options.clone(),
        }
    }

    /// These with what an adapter has decided.
    pub(super) fn of_method(self, method: Kind, theirs: Settings) -> Self {
        let Settings { rank, alpha, rslora, targets, feedforward_modules, num_virtual_tokens: tokens, options, .. } =
            theirs.clone();
        let (ids, alora_invocation_tokens) = (theirs.trainable_token_indices, theirs.alora_invocation_tokens);
        let num_virtual_tokens = method.reads("num-virtual-tokens").then_some(tokens);
        let encoder_hidden_size = method.reads("encoder-hidden-size").then_some(theirs.encoder_hidden_size);
        let num_frozen_tokens = method.reads("num-frozen-tokens").then_some(theirs.num_frozen_tokens);
        let trainable_token_indices = match method {
            Kind::TrainableTokens => ids,
            _ => self.trainable_token_indices.clone(),
        };
        // A setting that the method does not read would be refused as idle.
        let alpha = if method.reads("alpha") { Some(alpha) } else { self.alpha };
        Self {
            method,
            rank,
            alpha,
            rslora,
            targets,
            feedforward_modules,
            num_virtual_tokens,
            num_frozen_tokens,
            encoder_hidden_size,
            trainable_token_indices,
            alora_invocation_tokens,
            options,
            ..self
        }
    }

    /// As a run's `train.toml` has them: without what the adapter's method does not read.
    ///
    /// # Errors
    /// A value that TOML has not.
    pub(crate) fn to_toml(&self) -> Result<String> {
        let text = toml::to_string(self).map_err(|e| Error::config("settings", "values that TOML has", e))?;
        let idle = |line: &&str| line.split_once(" = ").is_some_and(|(key, _)| self.is_idle(key));
        Ok(text.lines().filter(|line| !idle(line)).map(|line| format!("{line}\n")).collect())
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
            check(name, value, range.contains(&value), &format!("a whole number from 1 to {max}"))
        };
        whole("rank", self.rank, 4096)?;
        self.check_ranks()?;
        self.check_beside()?;
        self.check_relora()?;
        self.check_layers()?;
        self.check_riemannian()?;
        self.check_sam()?;
        whole("num-virtual-tokens", self.num_virtual_tokens.unwrap_or(1), 65_536)?;
        let bias = self.bias.as_deref().unwrap_or("none");
        check("bias", bias, ["none", "all", "lora_only"].contains(&bias), "`none`, `all` or `lora_only`")?;
        whole("encoder-hidden-size", self.encoder_hidden_size.unwrap_or(1), 65_536)?;
        whole("epochs", self.epochs, 1_000_000)?;
        whole("batch", self.batch, 65_536)?;
        whole("accumulate", self.accumulate, 65_536)?;
        whole("seq", self.seq, 1 << 20)?;
        if self.packing && self.bucketing {
            return Err(Error::config("bucketing", "off where `packing` is on", "both"));
        }
        let init = Init::named(self.init_lora_weights.as_deref().unwrap_or("true"))?;
        check("init-steps", 0, self.init_steps != Some(0), "a whole number from 1")?;
        if let Some(steps) = self.init_steps.filter(|_| !init.reads_data()) {
            return Err(Error::config(
                "init-steps",
                "`init-lora-weights` of `eva`, `corda`, `corda_kpm` or `lora_ga` beside it",
                steps,
            ));
        }
        if init == Init::Orthogonal && self.rank_budget().is_some() {
            let expected = "another beginning beside a budget of ranks, which may be odd";
            return Err(Error::config("init-lora-weights", expected, init.name()));
        }
        if self.relora.is_some() && init.is_taken_away() {
            let expected =
                "a beginning that takes nothing from the weights, beside `relora`, which begins again and again";
            return Err(Error::config("init-lora-weights", expected, init.name()));
        }
        match &self.loftq_source {
            None if init == Init::Loftq => {
                let expected = "the model's weights in more bits beside `init-lora-weights = loftq`";
                return Err(Error::config("loftq-source", expected, "none"));
            }
            Some(path) if init != Init::Loftq => {
                return Err(Error::config("loftq-source", "`init-lora-weights = loftq` beside it", path.display()));
            }
            _ => {}
        }
        check("steps", 0, self.steps != Some(0), "a whole number from 1")?;
        check("memory-budget", 0, self.memory_budget != Some(0), "a whole number of MB from 1")?;
        if self.targets.is_empty() {
            return Err(Error::config("targets", "at least one layer name, or `all`", "nothing"));
        }
        let (alpha, lr, decay) = (self.alpha(), self.lr, self.weight_decay);
        check("alpha", alpha, alpha > 0.0 && alpha.is_finite(), "a number above 0")?;
        for (name, share) in [("dropout", self.dropout), ("prompt-dropout", self.prompt_dropout)] {
            check(name, share, (0.0..1.0).contains(&share), &format!("a number in `0 <= {name} < 1`"))?;
        }
        let bound = if self.optimizer == Optimizer::Sgd { f32::MAX } else { 1.0 };
        let expected = "a number in `0 < lr <= 1`, or above 1 with `sgd` as the optimizer";
        check("lr", lr, lr > 0.0 && lr <= bound, expected)?;
        let steps = self.warmup;
        let sensible = steps.is_finite() && steps >= 0.0 && (steps < 1.0 || steps.fract() == 0.0);
        check("warmup", steps, sensible, "a whole number of steps, or a fraction of all steps from 0 to below 1")?;
        check("clip", self.clip, self.clip >= 0.0 && self.clip.is_finite(), "a number above 0, or 0 for none")?;
        check("weight-decay", decay, (0.0..=1.0).contains(&decay), "a number in `0 <= weight-decay <= 1`")?;
        for (name, value) in [("momentum", self.momentum), ("beta1", self.beta1), ("beta2", self.beta2())] {
            check(name, value, (0.0..1.0).contains(&value), &format!("a number in `0 <= {name} < 1`"))?;
        }
        check("eps", self.eps, self.eps > 0.0 && self.eps.is_finite(), "a number above 0")?;
        let share = self.eval_split.unwrap_or(0.5);
        check("eval-split", share, share > 0.0 && share < 1.0, "a number in `0 < eval-split < 1`")?;
        if let (Some(share), Some(_)) = (self.eval_split, &self.eval_data) {
            return Err(Error::config("eval-split", "either it or `eval-data`", share));
        }
        self.max_forgetting.map_or(Ok(()), Forgetting::check)?;
        self.keep.check()?;
        let ratio = self.lora_plus_ratio;
        check("lora-plus-ratio", ratio, ratio > 0.0 && ratio <= 1000.0, "a number in `0 < lora-plus-ratio <= 1000`")?;
        // B learns at this rate; the slack is that of rounding.
        let expected = format!("a number that times the `lr` of `{lr}` is at most 1, or `sgd` as the optimizer");
        check("lora-plus-ratio", ratio, lr * ratio <= bound * (1.0 + 1e-6), &expected)?;
        for (name, on) in [("patience", self.patience > 0), ("keep-best", self.keep_best)] {
            if on && self.eval_every == 0 {
                return Err(Error::config(name, "`eval-every` beside it, at least 1", self.eval_every));
            }
        }
        self.check_effect(&|name| self.is_changed(name))
    }

    /// These settings as they can be in force in a run of `total` steps, and what could not be: of a warm-up that leaves
    /// no step for the peak, as much remains as does.
    #[must_use]
    pub fn fitted_to(self, total: u64) -> (Self, Option<Error>) {
        if self.warmup_steps(total) < total {
            return (self, None);
        }
        let most = total.saturating_sub(1);
        let message = format!(
            "expected fewer steps than the {total} of the run, got `{}`; taken are {most}, so that the last step reaches the \
             peak: give fewer, or a fraction of the run below 1",
            self.warmup
        );
        let warning = Error::new(ErrorCode::Config, "setting `warmup`", message);
        (Self { warmup: most as f64, ..self }, Some(warning))
    }

    /// Steps of warm-up in a run of `total`. Rounded down, so that a short run wastes none on it.
    fn warmup_steps(&self, total: u64) -> u64 {
        if self.warmup < 1.0 { (self.warmup * total as f64) as u64 } else { self.warmup as u64 }
    }

    /// Learning rate of `step` (1-based) of `total`, as transformers has it, but for the warm-up: with `w` steps of it,
    /// theirs are 0, 1/w, .. of the peak and the first of them learns nothing; ours are 1/(w+1), 2/(w+1), .. In both, step
    /// `w + 1` is the first at the peak, from where the rate falls towards zero.
    #[must_use]
    pub fn lr_at(&self, step: u64, total: u64) -> f32 {
        let (warmup, done) = (self.warmup_steps(total), step - 1);
        let factor = if done < warmup {
            step as f64 / (warmup + 1) as f64
        } else {
            let progress = (done - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
            match self.schedule {
                Schedule::Constant => 1.0,
                Schedule::Linear => 1.0 - progress,
                Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            }
        };
        (f64::from(self.lr) * factor) as f32 * self.rate_after_restart(step)
    }
}

/// Refuses the setting `name` unless `ok`.
fn check(name: &str, value: impl std::fmt::Display, ok: bool, expected: &str) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::config(name, expected, value)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(schedule: Schedule, warmup: f64, total: u64) -> Vec<f32> {
        let config = TrainConfig { lr: 1.0, schedule, warmup, ..Default::default() };
        (1..=total).map(|step| config.lr_at(step, total)).collect()
    }

    /// Those of transformers' `get_linear_schedule_with_warmup` and its relatives, but for the first steps of a warm-up.
    #[test]
    fn rates_are_those_of_transformers_and_reach_the_peak() {
        use Schedule::{Constant, Cosine, Linear};
        let cases: [(Schedule, f64, &[f32]); 8] = [
            (Linear, 0.0, &[1.0]),
            (Cosine, 0.0, &[1.0]),
            (Linear, 0.0, &[1.0, 2.0 / 3.0, 1.0 / 3.0]),
            (Cosine, 0.0, &[1.0, 0.75, 0.25]),
            (Constant, 0.0, &[1.0, 1.0, 1.0]),
            (Linear, 2.0, &[1.0 / 3.0, 2.0 / 3.0, 1.0, 0.75, 0.5, 0.25]),
            // A fraction is rounded down: none of four, one of four.
            (Linear, 0.2, &[1.0, 0.75, 0.5, 0.25]),
            (Constant, 0.3, &[0.5, 1.0, 1.0, 1.0]),
        ];
        for (schedule, warmup, expected) in cases {
            let got = rates(schedule, warmup, expected.len() as u64);
            let close = got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6);
            assert!(close, "{schedule:?}, warm-up {warmup}: {got:?} instead of {expected:?}");
        }
        for (schedule, total) in [Constant, Linear, Cosine].into_iter().flat_map(|s| (1..120).map(move |n| (s, n))) {
            for warmup in [0.0, 0.03, 0.5, 0.999, 1.0, 7.0].into_iter().filter(|w| *w < total as f64) {
                let got = rates(schedule, warmup, total);
                let peak = got.iter().copied().fold(0.0, f32::max);
                assert_eq!(peak, 1.0, "{schedule:?}, warm-up {warmup}, {total} steps: {got:?}");
                assert!(got.iter().all(|rate| *rate > 0.0), "{schedule:?}, warm-up {warmup}, {total} steps: {got:?}");
            }
        }
    }

    #[test]
    fn a_warm_up_that_leaves_no_step_is_cut_and_told() {
        for (warmup, total, left) in
            [(50.0, 4, Some(3.0)), (4.0, 4, Some(3.0)), (3.0, 4, None), (1.0, 1, Some(0.0)), (0.99, 1, None)]
        {
            let (config, warning) = TrainConfig { warmup, ..Default::default() }.fitted_to(total);
            assert_eq!(config.warmup, left.unwrap_or(warmup), "{warmup} of {total}");
            assert_eq!(warning.is_some(), left.is_some(), "{warmup} of {total}");
            if let Some(e) = warning {
                assert!(e.to_string().contains("`warmup`") && e.to_string().contains(&total.to_string()), "{e}");
            }
            assert!((1..=total).any(|step| config.lr_at(step, total) == config.lr), "{warmup} of {total}");
        }
    }

    #[test]
    fn numbers_come_back_from_a_checkpoint_as_they_were() {
        // A hasty parser reads this one back as its neighbour, and a resume would be refused.
        let config = TrainConfig { max_forgetting: Some(1.677_206_192_874_474_1.into()), ..Default::default() };
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
            (TrainConfig { max_forgetting: Some((-0.1).into()), ..Default::default() }, "max-forgetting"),
            (TrainConfig { keep_best: true, ..Default::default() }, "keep-best"),
            (TrainConfig { dropout: 1.0, ..Default::default() }, "dropout"),
            (TrainConfig { prompt_dropout: -0.1, ..Default::default() }, "prompt-dropout"),
            (TrainConfig { steps: Some(0), ..Default::default() }, "steps"),
            (TrainConfig { lr: 1.5, optimizer: Optimizer::Lion, ..Default::default() }, "lr"),
            (TrainConfig { lr: f32::INFINITY, optimizer: Optimizer::Sgd, ..Default::default() }, "lr"),
            (TrainConfig { warmup: 2.5, ..Default::default() }, "warmup"),
            (TrainConfig { warmup: -0.1, ..Default::default() }, "warmup"),
            (TrainConfig { warmup: f64::NAN, ..Default::default() }, "warmup"),
            (TrainConfig { packing: true, bucketing: true, ..Default::default() }, "bucketing"),
            (TrainConfig { lora_plus_ratio: 1000.0, lr: 2e-3, ..Default::default() }, "lora-plus-ratio"),
        ] {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(&format!("`{name}`")), "{error}");
            // No number is written with more digits than anybody typed.
            assert!(!error.contains("000000000000000000"), "{error}");
        }
        let faster = TrainConfig { lora_plus_ratio: 1000.0, lr: 1e-3, ..Default::default() };
        faster.validate().unwrap();
        TrainConfig { lr: 3.0, optimizer: Optimizer::Sgd, ..faster }.validate().unwrap();
        let typed = TrainConfig { dropout: 1.1, ..Default::default() }.validate().unwrap_err().to_string();
        assert!(typed.contains("`0 <= dropout < 1`, got `1.1`"), "{typed}");
    }
}
