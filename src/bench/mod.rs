//! How fast a model runs and learns on this machine, and what share of the machine's limits that is.
//!
//! Works on token ids alone. For each number of threads: the machine's limits, decoding (plain and with an adapter in
//! turn), prompts, and single kernels; when all that is done and freed, training. So the memory peak of decoding holds
//! nothing of training's, and training's nothing but what decoding's freed memory may leave in the allocator. The
//! limits are taken again at the end and the higher ones hold, as other programs can only take away from them.
//! Top-level figures are medians; everything else stands beside them.

#[cfg(feature = "ggml")]
mod against;
mod figure;
#[cfg(feature = "ggml")]
pub mod ggml;
#[cfg(feature = "ggml")]
pub mod gguf;
mod infer;
mod kernels;
mod learn;
mod machine;
mod profile;
pub mod shape;
mod shapes;
mod work;

#[cfg(feature = "ggml")]
pub use against::{Against, KernelRatio, ModelRatio, Theirs, compare};
pub use figure::Figure;
pub use kernels::Kernel;
pub use machine::Machine;
pub use profile::{OpTime, Profile};
pub use work::Demand;

use crate::engine::{self, Engine};
use crate::error::{Error, ErrorCode, Result};
use crate::train::{MemoryPlan, TrainConfig};
use pocketlora_kernels::cpu::limits;
use serde::Serialize;
use std::path::Path;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Numbers of threads, each measured by itself; 0 is all cores.
    pub threads: Vec<usize>,
    /// Trials of each figure, after a warm-up.
    pub trials: usize,
    /// Tokens of the prompt.
    pub prefill: usize,
    /// Tokens decoded one by one.
    pub decode: usize,
    /// Tokens of a training sequence.
    pub sequence: usize,
    /// Measure training.
    pub train: bool,
    /// With training alone: measure it once more, by operation.
    pub profile: bool,
    /// Settings of training, but for those that the measurement itself decides.
    pub settings: TrainConfig,
    /// Measure single kernels.
    pub kernels: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            threads: vec![0],
            trials: 5,
            prefill: 512,
            decode: 128,
            sequence: 256,
            train: true,
            profile: false,
            settings: TrainConfig { rank: 8, ..TrainConfig::default() },
            kernels: true,
        }
    }
}

/// Hears what is being measured, and stops the work with `false`.
pub type OnMeasure<'a> = dyn FnMut(&str) -> bool + 'a;

/// Everything that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// One for each number of threads.
    pub runs: Vec<Run>,
    /// What the machine could do, on the most threads measured.
    pub limits: MeasuredLimits,
    /// Single operations.
    pub kernels: Vec<Kernel>,
    /// The model.
    pub model: Model,
    /// The machine and the program.
    pub machine: Machine,
    /// Lengths that were measured.
    pub tokens: Lengths,
    /// Trials of each figure.
    pub trials: usize,
}

/// One number of threads.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Threads.
    pub threads: usize,
    /// Instruction set of the kernels.
    pub isa: &'static str,
    /// Median tokens a second of a prompt.
    pub prefill_tok_s: f64,
    /// Median tokens a second one by one.
    pub decode_tok_s: f64,
    /// The same with an adapter of rank 16 on every linear layer.
    pub adapter_decode_tok_s: f64,
    /// Median tokens a second of a training step.
    pub train_tok_s: Option<f64>,
    /// Dirty memory at its highest.
    pub peak_anonymous_bytes: Peaks,
    /// What training was planned to hold, and how far its peak is from that.
    pub train_memory: Option<TrainMemory>,
    /// Share of the machine's limits.
    pub share: Share,
    /// What the adapter takes from decoding, in percent: of trials in turn, the median ratio.
    pub adapter_tax: f64,
    /// Bytes a second that decoding reads, in 1e9.
    pub decode_gb_s: f64,
    /// The machine's limits on this number of threads.
    pub limits: MeasuredLimits,
    /// The trials behind the medians.
    pub figures: Figures,
}

/// Tokens a second.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "as in `Run`")]
pub struct Figures {
    pub prefill: Figure,
    pub decode: Figure,
    pub adapter_decode: Figure,
    pub train: Option<Figure>,
}

/// Dirty memory of the process at its highest, in bytes; `None` where the system does not tell.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Peaks {
    /// While a text of the decoded length was held.
    pub decode: Option<u64>,
    /// In the middle of a training step.
    pub train: Option<u64>,
}

/// Memory of training: planned and measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct TrainMemory {
    /// What was planned before the first step, by purpose.
    pub plan: MemoryPlan,
    /// Anonymous bytes that the run was planned to take.
    pub planned_bytes: u64,
    /// That it took, above those that the process held before.
    pub taken_bytes: Option<u64>,
    /// The difference in percent of the plan.
    pub deviation_percent: Option<f64>,
}

impl TrainMemory {
    fn new(training: &learn::Training) -> Self {
        let (plan, peak) = (training.plan, training.peak.bytes());
        Self {
            plan,
            planned_bytes: plan.anonymous(),
            taken_bytes: peak.map(|peak| peak.saturating_sub(plan.before)),
            deviation_percent: peak.map(|peak| plan.deviation(peak)),
        }
    }
}

/// Shares of the machine's limits.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Share {
    /// Of the memory's read bandwidth, in decoding.
    pub read: f64,
    /// Of the 8-bit peak, in prompts.
    pub int8: f64,
    /// Of the bf16 peak, or of the f32 peak where there is no higher one, in training.
    pub train: Option<f64>,
}

/// See [`limits::Limits`].
#[derive(Clone, Copy, Debug, Serialize)]
#[expect(missing_docs, reason = "as in the kernels' own struct")]
pub struct MeasuredLimits {
    pub read_gb_s: f64,
    pub f32_gflops: f64,
    pub int8_gops: f64,
    pub bf16_gflops: Option<f64>,
}

impl From<limits::Limits> for MeasuredLimits {
    fn from(l: limits::Limits) -> Self {
        Self { read_gb_s: l.read_gb_s, f32_gflops: l.f32_gflops, int8_gops: l.int8_gops, bf16_gflops: l.bf16_gflops }
    }
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Model {
    /// Name of its folder, or of its shape.
    pub name: String,
    /// Its family.
    pub model_type: String,
    /// Bytes of mapped files.
    pub mapped_bytes: u64,
    /// What each token asks for.
    #[serde(flatten)]
    pub work: Demand,
}

/// Numbers of tokens.
#[derive(Clone, Copy, Debug, Serialize)]
#[expect(missing_docs, reason = "as in `Options`")]
pub struct Lengths {
    pub prefill: usize,
    pub decode: usize,
    pub train: usize,
}

/// What inference leaves for the report.
struct First {
    threads: usize,
    isa: &'static str,
    limits: limits::Limits,
    inference: infer::Inference,
}

/// Measures the model in `dir`, opened as `open` says but for its threads.
///
/// # Errors
/// The model cannot be opened, a setting is out of range, out of memory, stopped.
pub fn run(dir: &Path, open: &engine::Options, options: &Options, progress: &mut OnMeasure<'_>) -> Result<Report> {
    let engines = Engines { dir, open };
    let options = &fitted(&engines.open(1)?, options)?;
    let mut kernels = Vec::new();
    let mut model = None;
    let mut firsts = Vec::new();
    for threads in &options.threads {
        check(progress, &format!("the machine's limits, threads: {threads}"))?;
        let limits = limits::measure(*threads, options.trials)?;
        let engine = engines.open(*threads)?;
        let inference = infer::measure(&engine, options, progress)?;
        if options.kernels {
            kernels.extend(kernels::measure(&engine, options, &limits, progress)?);
        }
        model.get_or_insert_with(|| describe(&engine));
        let backend = &engine.base().backend;
        firsts.push(First { threads: backend.threads(), isa: backend.isa().name(), limits, inference });
    }
    let mut trainings = Vec::new();
    for first in firsts.iter_mut() {
        let training = match options.train {
            true => Some(learn::measure(&engines.open(first.threads)?, options, progress)?),
            false => None,
        };
        trainings.push(training);
        check(progress, &format!("the machine's limits once more, threads: {}", first.threads))?;
        first.limits = first.limits.max(limits::measure(first.threads, options.trials)?);
    }
    let Some(model) = model else { return Err(Error::config("threads", "at least one number", "nothing")) };
    let runs: Vec<Run> =
        firsts.into_iter().zip(trainings).map(|(first, training)| sum_up(first, training, &model, options)).collect();
    let most = runs.iter().max_by_key(|run| run.threads).map(|run| run.limits);
    Ok(Report {
        limits: most.expect("there is a model, hence a run"),
        runs,
        kernels,
        model,
        machine: Machine::here(),
        tokens: Lengths { prefill: options.prefill, decode: options.decode, train: options.sequence },
        trials: options.trials,
    })
}

/// Training alone, in a process that has done nothing else: its peak is what training takes.
#[derive(Clone, Debug, Serialize)]
pub struct TrainReport {
    /// One for each number of threads. What an earlier one has freed may be among what a later one finds held.
    pub runs: Vec<TrainRun>,
    /// The model.
    pub model: Model,
    /// The machine and the program.
    pub machine: Machine,
    /// Tokens of the sequence.
    pub sequence: usize,
    /// Trials of each figure.
    pub trials: usize,
}

/// One number of threads.
#[derive(Clone, Debug, Serialize)]
pub struct TrainRun {
    /// Threads.
    pub threads: usize,
    /// Instruction set of the kernels.
    pub isa: &'static str,
    /// Median tokens a second.
    pub train_tok_s: f64,
    /// The trials behind it.
    pub figure: Figure,
    /// Dirty memory of the process at its highest, in bytes.
    pub peak_anonymous_bytes: Option<u64>,
    /// Planned and taken.
    pub train_memory: TrainMemory,
    /// Where a step's time goes, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<Profile>,
}

/// Measures training alone of the model in `dir`.
///
/// # Errors
/// As [`run`].
pub fn train(
    dir: &Path,
    open: &engine::Options,
    options: &Options,
    progress: &mut OnMeasure<'_>,
) -> Result<TrainReport> {
    let engines = Engines { dir, open };
    let first = engines.open(1)?;
    let (options, model) = (&fitted(&first, options)?, describe(&first));
    drop(first);
    let mut runs = Vec::new();
    for threads in &options.threads {
        let engine = engines.open(*threads)?;
        let training = learn::measure(&engine, options, progress)?;
        let isa = engine.base().backend.isa().name();
        drop(engine);
        let profile =
            if options.profile { Some(profile::measure(&engines, *threads, options, progress)?) } else { None };
        runs.push(TrainRun {
            threads: *threads,
            isa,
            train_tok_s: training.rate.median,
            peak_anonymous_bytes: training.peak.bytes(),
            train_memory: TrainMemory::new(&training),
            figure: training.rate,
            profile,
        });
    }
    let (machine, sequence, trials) = (Machine::here(), options.sequence, options.trials);
    Ok(TrainReport { runs, model, machine, sequence, trials })
}

/// Opens the model anew for each part, so that none inherits another's memory.
struct Engines<'a> {
    dir: &'a Path,
    open: &'a engine::Options,
}

impl Engines<'_> {
    fn open(&self, threads: usize) -> Result<Engine> {
        Engine::open(self.dir, &engine::Options { threads, ..self.open.clone() })
    }
}

/// The options with lengths that the model's context allows and threads that are numbers.
fn fitted(engine: &Engine, options: &Options) -> Result<Options> {
    let context = engine.context_tokens();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut fitted = options.clone();
    for threads in &mut fitted.threads {
        *threads = if *threads == 0 { cores } else { *threads };
    }
    if fitted.trials == 0 {
        return Err(Error::config("trials", "a whole number from 1", 0));
    }
    fitted.threads.iter().try_for_each(|threads| engine::check_threads(*threads))?;
    for (name, length) in
        [("prefill", &mut fitted.prefill), ("decode", &mut fitted.decode), ("seq", &mut fitted.sequence)]
    {
        if *length < 2 {
            return Err(Error::config(name, "at least 2 tokens", *length));
        }
        *length = (*length).min(context);
    }
    Ok(fitted)
}

fn describe(engine: &Engine) -> Model {
    let base = engine.base();
    Model {
        name: engine.dir().file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
        model_type: base.model.config().model_type.clone(),
        mapped_bytes: engine.mapped_bytes(),
        work: Demand::of(base, engine.numbers().arithmetic),
    }
}

fn sum_up(first: First, training: Option<learn::Training>, model: &Model, options: &Options) -> Run {
    let First { threads, isa, limits, inference } = first;
    let infer::Inference { prefill, decode, adapter_decode, decode_peak } = inference;
    let work = &model.work;
    let decode_gb_s = decode.median * work.bytes_per_token as f64 / 1e9;
    let train_limit = limits.bf16_gflops.unwrap_or(limits.f32_gflops) * 1e9;
    let train_tok_s = training.as_ref().map(|t| t.rate.median);
    Run {
        threads,
        isa,
        prefill_tok_s: prefill.median,
        decode_tok_s: decode.median,
        adapter_decode_tok_s: adapter_decode.median,
        train_tok_s,
        peak_anonymous_bytes: Peaks {
            decode: decode_peak.bytes(),
            train: training.as_ref().and_then(|t| t.peak.bytes()),
        },
        train_memory: training.as_ref().map(TrainMemory::new),
        share: Share {
            read: decode_gb_s / limits.read_gb_s,
            int8: prefill.median * work.prefill_ops(options.prefill) / (limits.int8_gops * 1e9),
            train: train_tok_s.map(|rate| rate * work.train_ops() / train_limit),
        },
        adapter_tax: 100.0 * (1.0 - adapter_decode.ratio(&decode)),
        decode_gb_s,
        limits: limits.into(),
        figures: Figures { prefill, decode, adapter_decode, train: training.map(|t| t.rate) },
    }
}

/// Tells what comes next and whether to go on.
fn check(progress: &mut OnMeasure<'_>, what: &str) -> Result<()> {
    if progress(what) { Ok(()) } else { Err(Error::new(ErrorCode::Cancelled, "bench", "stopped as asked")) }
}
