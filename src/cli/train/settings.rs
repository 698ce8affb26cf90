//! Settings of a run: flags over a file.

use crate::adapter::{AUTO, Kind};
use crate::cli::names;
use crate::error::{Error, ErrorCode, Result};
use crate::train::{Forgetting, TrainConfig};
use serde::Serialize;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Settings, and which of them somebody chose.
pub(in crate::cli) struct Chosen {
    pub config: TrainConfig,
    /// Keys of flags that were given, and of the file.
    pub given: BTreeSet<String>,
}

/// Flags that override `train.toml`, under the same names; see [`TrainConfig`] for the defaults.
#[derive(clap::Args, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Settings {
    /// Method of the adapter: lora, dora, lora-fa, lora-xs, dylora, sora, melora, hydra, delta-lora, bdlora, adalora,
    /// gralora, vera, miss, delora, loha, lokr, oft, hra, road, shira, beft (biases), bottleneck (narrow networks), ia3
    /// (scaled activations), ln-tuning (norms), trainable-tokens (rows of the embedding), prompt-tuning (embeddings
    /// before each text), p-tuning (the same, made by a network while it learns), prefix-tuning (keys and values before
    /// each text) or cartridge (those of the data's own text, trained further). [default: lora]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    method: Option<String>,
    /// Methods that are trained together with it, each in a file of its own: prefix-tuning, prompt-tuning, bottleneck,
    /// ln-tuning, ia3, beft, lora.
    #[arg(long, value_delimiter = ',', value_name = "METHODS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    beside: Option<Vec<String>>,
    /// Rank of the adapter, or auto: each layer of a lora gets what gradients of a few batches ask for, within
    /// --budget-parameters or --budget-mb. [default: 8]
    #[arg(long, value_parser = rank_or_auto, value_name = "RANK|auto")]
    #[serde(skip_serializing_if = "Option::is_none")]
    rank: Option<toml::Value>,
    /// Values that the ranks of --rank auto may have together.
    #[arg(long, value_name = "VALUES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    budget_parameters: Option<usize>,
    /// Size of the adapter's file that the ranks of --rank auto may come to, in MB.
    #[arg(long, value_name = "MB")]
    #[serde(skip_serializing_if = "Option::is_none")]
    budget_mb: Option<f64>,
    /// LoRA's alpha. [default: twice the rank]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    alpha: Option<f64>,
    /// Layers to adapt, such as q_proj,v_proj; embed_tokens and lm_head are not among all. [default: all; with ia3,
    /// PEFT's choice; with ln-tuning, the norms of whole hidden states]
    #[arg(long, value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    targets: Option<Vec<String>>,
    /// Those of the targets whose input ia3 scales instead of their output. [default: PEFT's choice]
    #[arg(long, value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    feedforward_modules: Option<Vec<String>>,
    /// Virtual tokens of prefix-tuning, cartridge, prompt-tuning and p-tuning. [default: 20]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    num_virtual_tokens: Option<usize>,
    /// Of the virtual tokens of a cartridge, how many of the first are not moved. [default: 1]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    num_frozen_tokens: Option<usize>,
    /// Width of the network that makes the virtual tokens of p-tuning. [default: 128]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    encoder_hidden_size: Option<usize>,
    /// Text as whose embeddings the virtual tokens of prompt-tuning begin, or as whose keys and values those of a
    /// cartridge do. [default: tokens by chance; of a cartridge the data]
    #[arg(long, value_name = "TEXT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_init_text: Option<String>,
    /// Ids of tokens whose rows of the embedding are trained: by trainable-tokens alone, or beside lora.
    #[arg(long, value_delimiter = ',', value_name = "IDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    trainable_token_indices: Option<Vec<u32>>,
    /// Tokens from whose last occurrence in a text on lora works; what comes before them is the base's (activated
    /// LoRA).
    #[arg(long, value_delimiter = ',', value_name = "IDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    alora_invocation_tokens: Option<Vec<u32>>,
    /// How lora begins: true (A uniform, B zero), gaussian, orthogonal, pissa, pissa_niter_N or milora (the largest or
    /// smallest singular values of the weights), olora (their QR), loftq (what rounding lost), eva or corda or
    /// corda_kpm (from what layers read), lora_ga (from gradients). [default: true]
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    init_lora_weights: Option<String>,
    /// Steps' worth of data that eva, corda and lora_ga look at. [default: 8]
    #[arg(long, value_name = "STEPS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    init_steps: Option<u64>,
    /// The model's weights in 16 bits, for loftq: a folder, .safetensors or .gguf file.
    #[arg(long, value_name = "PATH", value_parser = names::path())]
    #[serde(skip_serializing_if = "Option::is_none")]
    loftq_source: Option<PathBuf>,
    /// Biases of the base that lora trains beside: none, all, or lora_only for those of adapted layers. [default: none]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    bias: Option<String>,
    /// A key of PEFT's config of the method that has no flag of its own, such as group_size=32 for road; may be
    /// repeated.
    #[arg(long = "option", value_name = "KEY=VALUE")]
    #[serde(skip)]
    options: Vec<String>,
    /// Dropout of the adapters' input. [default: 0]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    dropout: Option<f32>,
    /// Let the ranks of adalora grow from one to --option target_r=R, instead of falling to it.
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    grow_ranks: bool,
    /// What dropout leaves out of a lora's term: input (elements), rank or token. [default: input]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    dropout_form: Option<String>,
    /// Steps after which a lora puts aside what it has learned and begins anew (ReLoRA); the adapter has all ranks. [default: never]
    #[arg(long, value_name = "STEPS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    relora: Option<u64>,
    /// Share of the smallest moments of the optimizer that become zero then, 1 for all. [default: 0.99]
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    relora_prune: Option<f32>,
    /// Steps in which the learning rate rises again then. [default: 10]
    #[arg(long, value_name = "STEPS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    relora_warmup: Option<u64>,
    /// Rank of the adapter that comes out of --relora, at most. [default: no bound]
    #[arg(long, value_name = "RANK")]
    #[serde(skip_serializing_if = "Option::is_none")]
    relora_rank: Option<usize>,
    /// Layers that learn at a time, while the others rest (LISA). [default: all]
    #[arg(long, value_name = "LAYERS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    layers_at_once: Option<usize>,
    /// Steps with the same ones. [default: 10]
    #[arg(long, value_name = "STEPS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    layers_every: Option<u64>,
    /// Which of them come next: random, or rotate from the last layer down. [default: random]
    #[arg(long, value_name = "ORDER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    layers_order: Option<String>,
    /// Share of the layers that backward leaves out, more often the less they matter (DropBP). [default: none]
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    dropbp: Option<f32>,
    /// Riemannian preconditioning of a lora's gradients, with this damping. [default without a number: 1e-6]
    #[arg(long, value_name = "DAMPING", num_args = 0..=1, default_missing_value = "1e-6")]
    #[serde(skip_serializing_if = "Option::is_none")]
    riemannian: Option<f64>,
    /// Sharpness-aware steps: the gradient is taken so far up the hill. Twice the time. [default without a number: 0.05]
    #[arg(long, value_name = "DISTANCE", num_args = 0..=1, default_missing_value = "0.05")]
    #[serde(skip_serializing_if = "Option::is_none")]
    sam: Option<f32>,
    /// Share of the words of questions that a pass leaves out at random; every fourth leaves a question whole. [default: 0]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_dropout: Option<f32>,
    /// Scale by alpha / sqrt(rank).
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    rslora: bool,
    /// Peak learning rate, up to 1; more for sgd only. [default: 2e-4]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    lr: Option<f32>,
    /// Course of the learning rate: constant, linear or cosine. [default: cosine]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    schedule: Option<String>,
    /// Steps of warm-up before the first at the peak, or a fraction of all steps below 1, rounded down. [default: 0.03]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    warmup: Option<f64>,
    /// Passes over the data. [default: 3]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    epochs: Option<usize>,
    /// Optimizer steps in all, instead of epochs.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    steps: Option<u64>,
    /// Samples in one pass; with --packing, the pass has batch x seq tokens. [default: 4]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    batch: Option<usize>,
    /// Passes per optimizer step. [default: 1]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    accumulate: Option<usize>,
    /// Longest sample in tokens; what is longer is split. [default: 1024]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    seq: Option<usize>,
    /// Fill every pass with short samples up to batch x seq tokens; they do not see each other.
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    packing: bool,
    /// Let samples of similar length share a pass.
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    bucketing: bool,
    /// Bound on the gradient's norm, 0 for none. [default: 1]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    clip: Option<f64>,
    /// Decoupled weight decay. [default: 0]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    weight_decay: Option<f32>,
    /// Optimizer: adamw, adamw8bit (moments in 8 bits), sgd or lion. [default: adamw]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    optimizer: Option<String>,
    /// What SGD keeps of its moment; 0 keeps none. [default: 0]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    momentum: Option<f32>,
    /// Decay of AdamW's first moment; share of the moment in Lion's update. [default: 0.9]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    beta1: Option<f32>,
    /// Decay of AdamW's second moment or of Lion's only one. [default: 0.999, 0.99]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    beta2: Option<f32>,
    /// Added to the root of AdamW's second moment. [default: 1e-8]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    eps: Option<f32>,
    /// Learning rate of B over that of A (LoRA+). [default: 1]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    lora_plus_ratio: Option<f32>,
    /// Seed of initialization, order and dropout. [default: 0]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    /// Steps between checkpoints; 0 leaves them to --save-seconds. [default: 50]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    save_every: Option<u64>,
    /// Seconds after which a checkpoint is due in any case, sooner while a run is young; 0 leaves them to --save-every.
    /// [default: 120]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    save_seconds: Option<u64>,
    /// JSONL that is evaluated during training.
    #[arg(long, value_parser = names::path())]
    #[serde(skip_serializing_if = "Option::is_none")]
    eval_data: Option<PathBuf>,
    /// Share of the records to hold out and evaluate, instead of --eval-data.
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    eval_split: Option<f64>,
    /// Steps between evaluations; 0 evaluates only before the first step and at the end. [default: 0]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    eval_every: Option<u64>,
    /// What may be forgotten: nats a token by which the loss on a general text may rise, such as 0.1, or percent of the
    /// general questions that the model knew, such as 5%. The last adapter within that is written.
    #[arg(long, value_name = "NATS|PERCENT%")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_forgetting: Option<String>,
    /// Hold the model, on general prompts, to what it says without the adapter, so that it keeps what it knew: auto,
    /// off, or the weight of that beside what is learned. [default: auto]
    #[arg(long, value_name = "WEIGHT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    keep: Option<String>,
    /// Ask no general questions before the run and after it.
    #[arg(long)]
    #[serde(skip)]
    skip_check: bool,
    /// Evaluations without a lower held-out loss after which to stop; 0 for never. [default: 0]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    patience: Option<u64>,
    /// Write the adapter of the evaluation with the lowest held-out loss instead of the last one.
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    keep_best: bool,
    /// Arithmetic: exact (f32) or bf16. [default: bf16]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    precision: Option<String>,
    /// Anonymous memory that the process may hold, in MB; says what it gives up for it. May be another one when a run
    /// is resumed. [default: no bound]
    #[arg(long, value_name = "MB")]
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_budget: Option<u64>,
}

/// Settings that take each other's place: where a flag gives one, the other of a file has had its day.
const RIVALS: [[&str; 2]; 4] =
    [["steps", "epochs"], ["eval-data", "eval-split"], ["packing", "bucketing"], ["budget-parameters", "budget-mb"]];

/// What says that ranks are measured.
const AUTO_RANK: &str = "auto";

fn rank_or_auto(text: &str) -> std::result::Result<toml::Value, String> {
    match text.parse::<u32>() {
        Ok(rank) => Ok(i64::from(rank).into()),
        Err(_) if text == AUTO_RANK => Ok(AUTO_RANK.into()),
        Err(_) => Err(format!("expected a whole number or `{AUTO_RANK}`, got `{text}`")),
    }
}

/// `rank = "auto"` is a budget without a rank: takes the word out. Returns whether ranks are to be measured.
///
/// # Errors
/// One of the two is there without the other.
fn take_auto_rank(table: &mut toml::Table, typed: &BTreeSet<String>) -> Result<bool> {
    let auto = table.get("rank").and_then(toml::Value::as_str) == Some(AUTO_RANK);
    let budget = ["budget-parameters", "budget-mb"].into_iter().find(|key| table.contains_key(*key));
    match budget {
        None if auto => Err(Error::config("rank", "`budget-parameters` or `budget-mb` beside `auto`", "neither")),
        // A file that a run wrote has the ranks that were chosen.
        Some(key) if !auto && typed.contains("rank") => {
            Err(Error::config(key, "`rank` as `auto` beside it", format!("a rank of {}", table["rank"])))
        }
        budget => {
            if auto {
                table.remove("rank");
            }
            Ok(budget.is_some())
        }
    }
}

impl Settings {
    /// The settings of `files`, of which later ones win, with the flags that were given laid over them. What else holds
    /// for runs from here, and not for a library's, holds for a run that is `new`: another goes on as it began.
    pub fn merge(&self, files: &[&Path], new: bool) -> Result<Chosen> {
        let mut table = toml::Table::new();
        for path in files {
            lay(&mut table, read(path)?);
        }
        let flags = toml::Table::try_from(self).map_err(|e| Error::config("flags", "plain values", e))?;
        let flags = self.with_options(flags)?;
        let typed: BTreeSet<String> = flags.keys().cloned().collect();
        lay(&mut table, flags);
        let mut given: BTreeSet<String> = table.keys().cloned().collect();
        let asked = table.get("rank").and_then(toml::Value::as_str) == Some(AUTO_RANK);
        if take_auto_rank(&mut table, &typed)? {
            given.insert("rank".to_owned());
            if new && !asked && !table.contains_key("rank-pattern") {
                eprintln!(
                    "note: with a budget of values each layer gets the rank that gradients ask for, as `--rank auto` says"
                );
            }
        }
        let method = table.get("method").and_then(|method| method.clone().try_into::<Kind>().ok()).unwrap_or_default();
        if method != Kind::Lora && method.reads("targets") {
            table.entry("targets").or_insert_with(|| vec![AUTO].into());
        }
        if new {
            table.entry("keep").or_insert_with(|| "auto".into());
            table.entry("check").or_insert(true.into());
        }
        if self.skip_check {
            table.insert("check".to_owned(), false.into());
        }
        let config: TrainConfig = toml::Value::Table(table).try_into().map_err(|e| bad_settings(None, &e))?;
        config.validate()?;
        if let Some(Forgetting::Percent(percent)) = config.max_forgetting.filter(|_| self.skip_check) {
            let message = format!(
                "expected the general questions that `--max-forgetting {percent}%` counts, got `--skip-check`, which leaves \
                 them out; leave out one of the two, or give `--max-forgetting` in nats, such as 0.1"
            );
            return Err(Error::new(ErrorCode::Config, "setting `max-forgetting`", message));
        }
        // A file that a run wrote holds all settings. What of them is as usual was chosen by nobody.
        config.check_effect(&|name| typed.contains(name))?;
        config.check_evaluated(config.eval_data.is_some() || config.eval_split.is_some() || config.eval_reworded)?;
        Ok(Chosen { config, given })
    }
}

impl Settings {
    /// `flags` with the options that were given.
    fn with_options(&self, mut flags: toml::Table) -> Result<toml::Table> {
        let mut options = toml::Table::new();
        for option in &self.options {
            let pair = option.split_once('=').filter(|(key, _)| !key.trim().is_empty());
            let (key, value) = pair.ok_or_else(|| Error::config("option", "`KEY=VALUE`", option))?;
            // What TOML or JSON reads is such, a number or an object; anything else is a text.
            let read: Option<toml::Table> = format!("v = {value}").parse().ok();
            let json = || serde_json::from_str::<toml::Value>(value).ok();
            let value = read.and_then(|mut table| table.remove("v")).or_else(json).unwrap_or_else(|| value.into());
            options.insert(key.to_owned(), value);
        }
        if !options.is_empty() {
            flags.insert("options".to_owned(), options.into());
        }
        Ok(flags)
    }
}

/// Settings as a file has them.
fn read(path: &Path) -> Result<toml::Table> {
    let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    let parsed: toml::Table = text.parse().map_err(|e: toml::de::Error| bad_settings(Some(path), &e))?;
    // As PEFT writes names, too.
    let parsed: toml::Table = parsed.into_iter().map(|(key, value)| (key.replace('_', "-"), value)).collect();
    // Checked by itself first, so that a typing error in the file is reported as the file's.
    let mut known = parsed.clone();
    if known.get("rank").and_then(toml::Value::as_str) == Some(AUTO_RANK) {
        known.remove("rank");
    }
    toml::Value::Table(known).try_into::<TrainConfig>().map_err(|e| bad_settings(Some(path), &e))?;
    Ok(parsed)
}

fn lay(table: &mut toml::Table, over: toml::Table) {
    for [a, b] in RIVALS {
        match (over.contains_key(a), over.contains_key(b)) {
            (true, false) => drop(table.remove(b)),
            (false, true) => drop(table.remove(a)),
            _ => {}
        }
    }
    table.extend(over);
}

fn bad_settings(file: Option<&Path>, e: &toml::de::Error) -> Error {
    let place = file.map_or_else(|| "flags".to_owned(), |f| format!("`{}`", f.display()));
    Error::new(ErrorCode::Config, place, e.to_string().trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::Keep;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        settings: Settings,
    }

    fn merged(file: &str, flags: &[&str]) -> Result<TrainConfig> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.toml");
        fs::write(&path, file).unwrap();
        let line = Line::parse_from(["train"].iter().chain(flags));
        line.settings.merge(&[&path], true).map(|chosen| chosen.config)
    }

    #[test]
    fn runs_hold_and_check_unless_told_otherwise() {
        let usual = merged("", &[]).unwrap();
        assert_eq!((usual.keep, usual.check), (Keep::Auto, true));
        let flags = ["--keep", "0.5", "--max-forgetting", "5%", "--eval-every", "2"];
        let told = merged("keep = \"off\"", &flags).unwrap();
        assert_eq!((told.keep, told.check), (Keep::Weight(0.5), true));
        assert_eq!(told.max_forgetting, Some(Forgetting::Percent(5.0)));
        // Questions that are not asked cannot bound anything; a loss can.
        let refused = merged("", &["--skip-check", "--max-forgetting", "5%"]).unwrap_err();
        assert!(
            refused.place().contains("`max-forgetting`") && refused.to_string().contains("`--skip-check`"),
            "{refused}"
        );
        assert!(!merged("", &["--skip-check", "--max-forgetting", "0.1"]).unwrap().check);
        assert_eq!(merged("keep = 2\nmax-forgetting = 0.1", &[]).unwrap().keep, Keep::Weight(2.0));
        for (flags, said) in
            [(["--keep", "0"], "`keep`"), (["--keep", "some"], "`some`"), (["--max-forgetting", "x"], "`x`")]
        {
            let error = merged("", &flags).unwrap_err().to_string();
            assert!(error.contains(said), "{flags:?}: {error}");
        }
        // A run that goes on has what it began with.
        let gone_on = Line::parse_from(["train"]).settings.merge(&[], false).unwrap().config;
        assert_eq!((gone_on.keep, gone_on.check), (Keep::Off, false));
    }

    #[test]
    fn methods_are_chosen_by_flags_and_by_the_names_that_peft_has() {
        let ia3 = merged("method = \"ia3\"\nfeedforward_modules = [\"down_proj\"]", &[]).unwrap();
        assert_eq!((ia3.method, &ia3.targets[..]), (Kind::Ia3, &[AUTO.to_owned()][..]));
        assert_eq!(ia3.feedforward_modules, ["down_proj"]);
        let flags = ["--method", "prefix-tuning", "--num-virtual-tokens", "7"];
        let prefix = merged("num_virtual_tokens = 5", &flags).unwrap();
        assert_eq!((prefix.method, prefix.num_virtual_tokens), (Kind::PrefixTuning, Some(7)));
        assert_eq!(merged("", &[]).unwrap().targets, ["all"]);
        for (flags, said) in [
            (&["--num-virtual-tokens", "7"][..], "`num-virtual-tokens`"),
            (&["--method", "ia3", "--rank", "8"], "`rank`"),
            (&["--method", "prefix-tuning", "--targets", "q_proj"], "`targets`"),
            (&["--method", "lily"], "lily"),
        ] {
            let error = merged("", flags).unwrap_err().to_string();
            assert!(error.contains(said), "{flags:?}: {error}");
        }
    }
}
