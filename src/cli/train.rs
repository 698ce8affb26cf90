//! `pocketlora train`: a LoRA adapter from a data file.

use super::args::{megabytes, print_json};
use super::{data, interrupt, model, progress};
use crate::adapter::AdapterFile;
use crate::error::{Error, ErrorCode, Result};
use crate::session::{Material, Options, Session};
use crate::train::{DataReport, MemoryPlan, Observer, StepReport, Summary, TrainConfig, has_checkpoint};
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::{Value, json};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Directory, .gguf file, or name of a model in the cache.
    #[arg(short, long, default_value = model::DEFAULT)]
    model: String,
    /// JSONL or CSV with `messages`, `prompt` and `completion`, `instruction` and `output`, or `text`; or a folder of
    /// .txt and .md notes.
    #[arg(short, long)]
    data: PathBuf,
    /// Folder for the adapter.
    #[arg(short, long, required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    /// Show the first samples, what of them is learned, and figures of the data; train nothing.
    #[arg(long)]
    dry_run: bool,
    /// Settings as TOML; flags win over it.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Continue a stopped run from its checkpoint in the output folder.
    #[arg(long)]
    resume: bool,
    /// Replace an adapter, or the checkpoint of an unfinished run, in the output folder.
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,
    /// Start from this PEFT adapter; its rank, alpha and layers are kept.
    #[arg(long, value_name = "ADAPTER")]
    init: Option<PathBuf>,
    /// Threads; 0 measures how many serve best.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Run 16- and 32-bit weights as they are instead of quantizing them at first use.
    #[arg(long)]
    no_quantize: bool,
    /// One JSON object per step on stdout, the summary last.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Settings,
}

/// Flags that override `train.toml`, under the same names; see [`TrainConfig`] for the defaults.
#[derive(clap::Args, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Settings {
    /// Rank of the adapter. [default: 8]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    rank: Option<usize>,
    /// LoRA's alpha. [default: twice the rank]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    alpha: Option<f64>,
    /// Linear layers to adapt, such as q_proj,v_proj. [default: all]
    #[arg(long, value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    targets: Option<Vec<String>>,
    /// Dropout of the adapters' input. [default: 0]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    dropout: Option<f32>,
    /// Scale by alpha / sqrt(rank).
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    rslora: bool,
    /// Peak learning rate. [default: 2e-4]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    lr: Option<f32>,
    /// Course of the learning rate: constant, linear or cosine. [default: cosine]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    schedule: Option<String>,
    /// Steps of warm-up, or a fraction of all steps below 1. [default: 0.03]
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
    /// Steps between checkpoints; 0 writes one only when stopped. [default: 50]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    save_every: Option<u64>,
    /// JSONL that is evaluated during training.
    #[arg(long)]
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
    /// Nats a token by which the loss on a general text may rise; the last adapter within that is written.
    #[arg(long, value_name = "NATS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_forgetting: Option<f64>,
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
    /// Anonymous memory that the process may hold, in MB; says what it gives up for it. May be another one when a run is
    /// resumed. [default: no bound]
    #[arg(long, value_name = "MB")]
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_budget: Option<u64>,
}

impl Args {
    fn out(&self) -> &Path {
        self.out.as_deref().expect("asked for where it is used")
    }
}

impl Settings {
    /// The settings of `file`, with the flags that were given laid over them.
    fn merge(&self, file: Option<&Path>) -> Result<TrainConfig> {
        let mut table = match file {
            None => toml::Table::new(),
            Some(path) => {
                let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
                let parsed: toml::Table = text.parse().map_err(|e: toml::de::Error| bad_settings(Some(path), &e))?;
                // Checked by itself first, so that a typing error in the file is reported as the file's.
                toml::Value::Table(parsed.clone())
                    .try_into::<TrainConfig>()
                    .map_err(|e| bad_settings(Some(path), &e))?;
                parsed
            }
        };
        let flags = toml::Table::try_from(self).map_err(|e| Error::config("flags", "plain values", e))?;
        table.extend(flags);
        let config: TrainConfig = toml::Value::Table(table).try_into().map_err(|e| bad_settings(None, &e))?;
        config.validate()?;
        Ok(config)
    }
}

fn bad_settings(file: Option<&Path>, e: &toml::de::Error) -> Error {
    let place = file.map_or_else(|| "flags".to_owned(), |f| format!("`{}`", f.display()));
    Error::new(ErrorCode::Config, place, e.to_string().trim_end().to_owned())
}

pub(super) fn run(args: &Args) -> Result<bool> {
    // The program itself, before it has read anything.
    let baseline = crate::memory::anonymous_bytes();
    let config = args.settings.merge(args.config.as_deref())?;
    if args.dry_run {
        data::dry_run(&args.model, !args.no_quantize, &args.data, &config, args.json)?;
        return Ok(true);
    }
    check_out(args)?;
    let dir = model::resolve(&args.model, !args.no_quantize)?;
    let options = Options { threads: args.threads, ids_only: true, ..super::args::options() };
    let mut session = Session::open(&dir, &options)?;
    let (summary, plan, data) = fit(&mut session, config, args)?;
    report(&summary, plan, &data, baseline, &session, args.json);
    Ok(summary.done)
}

/// Refuses to write over what an earlier run left, unless told to.
fn check_out(args: &Args) -> Result<()> {
    let finished = args.out().join("adapter_config.json").exists();
    let unfinished = has_checkpoint(args.out());
    let message = match (args.resume || args.overwrite, unfinished, finished) {
        (true, ..) | (_, false, false) => return Ok(()),
        (_, true, _) => "holds an unfinished run; continue it with `--resume` or replace it with `--overwrite`",
        (_, _, true) => "holds an adapter; name another folder or replace it with `--overwrite`",
    };
    Err(Error::new(ErrorCode::Config, format!("`{}`", args.out().display()), message))
}

/// Reads the data and lets the tokenizer go: training needs no text.
fn read(session: &mut Session, config: &TrainConfig, args: &Args) -> Result<Material> {
    session.load_text()?;
    let data = session.dataset(&args.data, config.seq)?;
    let eval_data = config.eval_data.as_ref().map(|path| session.dataset(path, config.seq)).transpose()?;
    let material = session.material(config, data, eval_data)?;
    session.forget_text();
    Ok(material)
}

fn fit(session: &mut Session, config: TrainConfig, args: &Args) -> Result<(Summary, MemoryPlan, DataReport)> {
    let material = read(session, &config, args)?;
    let init = args.init.as_deref().map(AdapterFile::open).transpose()?;
    let mut trainer = session.trainer_of(config, material, init.as_ref(), args.out())?;
    drop(init);
    if args.resume {
        trainer.resume()?;
        eprintln!("resuming after step {}", trainer.step_number());
    }
    let report = trainer.data_report();
    eprint!("{}", data::text(&report));
    eprintln!("adapter: {} trained values", trainer.trained_parameters());
    let plan = trainer.plan(session.mapped_bytes());
    eprintln!("{}", plan_text(&plan));
    let mut watcher = Watcher::new(trainer.total_steps(), trainer.step_number(), args.json);
    let summary = trainer.run(&mut watcher);
    watcher.bar.finish_and_clear();
    Ok((summary?, plan, report))
}

/// What a run will hold, and what was given up for a budget.
pub(super) fn plan_text(plan: &MemoryPlan) -> String {
    let layout = &plan.layout;
    let mut text = format!(
        "memory: {} mapped (weights and their scales); {} anonymous: {} held before, {} for the run\n  before: program and \
         base {}, data {}, tokenizer {}{}\n  adapter {}, gradients {}, optimizer {}, layer \
         inputs {}, one layer {}, attention {}, logits {}, kernels {}\n  {} tokens in a pass, {}",
        megabytes(plan.weights_mapped),
        megabytes(plan.process()),
        megabytes(plan.before),
        megabytes(plan.anonymous()),
        megabytes(plan.before.saturating_sub(plan.data + plan.tokenizer)),
        megabytes(plan.data),
        megabytes(plan.tokenizer),
        match plan.tokenizer_loaded.saturating_sub(plan.tokenizer) {
            0 => String::new(),
            gone => format!(" (let go; {} while data was read)", megabytes(gone)),
        },
        megabytes(plan.adapter),
        megabytes(plan.gradients),
        megabytes(plan.optimizer),
        megabytes(plan.layer_inputs),
        megabytes(plan.layer_workspace),
        megabytes(plan.attention),
        megabytes(plan.logits),
        megabytes(plan.kernels),
        plan.pass_tokens,
        match layout.every {
            1 => "every layer's input kept".to_owned(),
            n => format!("every {n} layers an input kept"),
        },
    );
    if layout.narrow {
        text.push_str(" in 16 bits");
    }
    if layout.part != usize::MAX {
        text.push_str(&format!(", feed-forward by {} tokens", layout.part));
    }
    if layout.loss_rows != usize::MAX {
        text.push_str(&format!(", loss by {} tokens", layout.loss_rows));
    }
    text.push_str(&format!(", moments of {}", json!(plan.optimizer_kind).as_str().unwrap_or_default()));
    text
}

/// Shows steps on a bar, or as JSON lines, and passes Ctrl-C on.
pub(super) struct Watcher {
    pub(super) bar: ProgressBar,
    json: bool,
}

impl Watcher {
    pub(super) fn new(total: u64, done: u64, json: bool) -> Self {
        let bar = progress::count(total, "train");
        bar.set_position(done);
        bar.reset_eta();
        Self { bar, json }
    }
}

impl Observer for Watcher {
    fn on_step(&mut self, r: &StepReport) -> ControlFlow<()> {
        let rate = r.tokens as f64 / r.time.as_secs_f64();
        let memory = crate::memory::anonymous_bytes().map_or_else(String::new, |b| format!(", {}", megabytes(b)));
        self.bar.set_position(r.step);
        self.bar.set_message(format!("loss {:.3}, {rate:.0} tok/s{memory}", r.loss));
        if self.json {
            let mut line = json!({
                "step": r.step, "loss": r.loss, "lr": r.lr, "grad_norm": r.grad_norm, "tok_s": rate,
            });
            for (name, loss) in [("eval_loss", r.eval_loss), ("general_loss", r.general_loss)] {
                if let Some(loss) = loss {
                    line[name] = loss.into();
                }
            }
            print_json(&line);
        }
        ControlFlow::Continue(())
    }

    fn keep_going(&mut self) -> bool {
        !interrupt::asked()
    }

    fn on_warning(&mut self, warning: &Error) {
        self.bar.suspend(|| super::print_error("warning", warning));
    }
}

fn report(s: &Summary, plan: MemoryPlan, data: &DataReport, baseline: Option<u64>, session: &Session, as_json: bool) {
    let rate = s.tokens as f64 / s.time.as_secs_f64();
    if as_json {
        print_json(&json!({
            "done": s.done, "steps": s.steps, "adapter_step": s.adapter_step, "out_of_patience": s.out_of_patience,
            "loss": finite(s.loss), "eval_loss": s.eval_loss, "eval_loss_before": s.before.and_then(|b| b.held_out),
            "general_loss": s.general_loss, "general_loss_before": s.before.and_then(|b| b.general),
            "adapter_eval_loss": s.of_adapter().held_out, "adapter_general_loss": s.of_adapter().general, "tok_s": rate,
            "tokens": s.tokens, "trained_tokens": s.trained_tokens, "padded_tokens": data.batches.padded_tokens,
            "seconds": s.time.as_secs_f64(), "peak_anonymous_bytes": s.peak_anonymous_bytes,
            "mapped_bytes": session.mapped_bytes(), "plan": plan, "planned_bytes": plan.anonymous(),
            "baseline_anonymous_bytes": baseline,
            "deviation_percent": s.peak_anonymous_bytes.map(|peak| plan.deviation(peak)),
            "data": data, "adapter": s.adapter,
        }));
    } else {
        println!(
            "{} after {} steps: loss {:.3}; {rate:.0} tok/s, {} anonymous at most, {} mapped",
            if s.done { "done" } else { "stopped" },
            s.steps,
            s.loss,
            s.peak_anonymous_bytes.map_or_else(|| "unknown".to_owned(), megabytes),
            megabytes(session.mapped_bytes())
        );
        let before = s.before.unwrap_or_default();
        for (name, before, after) in
            [("held-out data", before.held_out, s.eval_loss), ("general text", before.general, s.general_loss)]
        {
            if let (Some(before), Some(after)) = (before, after) {
                println!("loss on the {name}: {before:.3} before, {after:.3} after ({:+.3})", after - before);
            }
        }
    }
    if s.out_of_patience {
        eprintln!("ended early: the held-out loss fell no more");
    }
    if s.done && s.adapter_step == 0 {
        eprintln!("warning: the adapter is the one that training began with: all later ones forgot more than allowed");
    } else if s.done && s.adapter_step != s.steps {
        let found = s.of_adapter();
        let losses = [("held-out data", found.held_out), ("general text", found.general)];
        let losses = losses.into_iter().filter_map(|(name, loss)| Some(format!("; loss on the {name} {:.3}", loss?)));
        let losses: String = losses.collect();
        eprintln!("the adapter is that of step {}, which did best by what was asked for{losses}", s.adapter_step);
    }
    if s.done {
        eprintln!("use it: pocketlora chat -m {} -a {}", session.dir().display(), s.adapter.display());
    } else {
        eprintln!("continue it: the same command with --resume");
    }
}

/// JSON has no NaN; a run that was stopped before its first step has no loss.
fn finite(value: f64) -> Value {
    if value.is_finite() { value.into() } else { Value::Null }
}
