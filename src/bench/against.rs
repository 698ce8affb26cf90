//! Our kernels and models beside ggml's, in one process, in turn, as ratios of the same moment.

use super::ggml::{self, Llama, Products, Quant};
use super::kernels::{Group, groups, noise, spelled};
use super::{Engines, Figure, OnMeasure, Options, check, fitted, infer};
use crate::adapter::Adapters;
use crate::engine::{self, Engine, Transcript};
use crate::error::{Error, ErrorCode, Result};
use crate::exec::infer::PREFILL_CHUNK;
use pocketlora_kernels::cpu::{Matrix, Table};
use pocketlora_kernels::{Backend, Call};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// ggml's threads go on spinning for a while after their work; ours must not be timed meanwhile, nor theirs during ours.
const CALM: Duration = Duration::from_millis(5);
/// Length of one trial of a kernel.
const TRIAL: f64 = 0.05;
/// Weights of one shape at most: as much as any cache, without taking the memory of a large model once more.
const COPIES: usize = 256 << 20;

/// Everything that was compared.
#[derive(Clone, Debug, Serialize)]
pub struct Against {
    /// Version of ggml.
    pub version: String,
    /// What it was built for, in its own words.
    pub system: String,
    /// Single products.
    pub kernels: Vec<KernelRatio>,
    /// Whole models.
    pub models: Vec<ModelRatio>,
}

/// One product on one number of threads.
#[derive(Clone, Debug, Serialize)]
pub struct KernelRatio {
    /// Ours.
    pub name: String,
    /// Its sizes.
    pub shape: String,
    /// The layers of this shape.
    pub layers: String,
    /// Threads.
    pub threads: usize,
    /// Ours, in calls a second.
    pub ours: Figure,
    /// Theirs.
    pub theirs: Vec<Theirs>,
}

/// The same product in one of ggml's types.
#[derive(Clone, Debug, Serialize)]
pub struct Theirs {
    /// The type.
    pub quant: &'static str,
    /// Whether it chose a layout of its own for the weights.
    pub repacked: bool,
    /// Calls a second.
    pub calls: Figure,
    /// Ours over theirs, of trials in turn the median.
    pub ratio: f64,
}

/// A whole model on one number of threads.
#[derive(Clone, Debug, Serialize)]
pub struct ModelRatio {
    /// The GGUF file's name.
    pub file: String,
    /// What llama.cpp says of it.
    pub description: String,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// Threads.
    pub threads: usize,
    /// Ours over theirs for a prompt, of trials in turn the median.
    pub prefill_ratio: f64,
    /// The same for decoding.
    pub decode_ratio: f64,
    /// Tokens a second of a prompt: theirs.
    pub prefill: Figure,
    /// Tokens a second one by one: theirs.
    pub decode: Figure,
    /// Ours in the same trials.
    pub our_prefill: Figure,
    /// Ours in the same trials.
    pub our_decode: Figure,
}

/// Compares the model in `dir` with ggml's types on the same shapes, and with the GGUF files `files` as whole models.
///
/// # Errors
/// This build of ggml lacks instructions that our kernels use; a model cannot be opened; out of memory; stopped.
pub fn compare(
    dir: &Path,
    open: &engine::Options,
    options: &Options,
    files: &[PathBuf],
    progress: &mut OnMeasure<'_>,
) -> Result<Against> {
    let missing = ggml::missing_instructions(Table::best().isa());
    if !missing.is_empty() {
        let message = format!(
            "expected ggml built for this CPU, got one without `{}`; build with CFLAGS=-march=native and \
             CXXFLAGS=-march=native, or compare what it has with `POCKETLORA_ISA`",
            missing.join("`, `")
        );
        return Err(Error::new(ErrorCode::Device, "ggml", message));
    }
    let engines = Engines { dir, open };
    let options = &fitted(&engines.open(1)?, options)?;
    let (mut kernels, mut models) = (Vec::new(), Vec::new());
    for threads in &options.threads {
        let engine = engines.open(*threads)?;
        if options.kernels {
            for tokens in [1, options.prefill.min(PREFILL_CHUNK)] {
                for group in groups(engine.base()) {
                    // Only the last token of a prompt meets the head.
                    if !group.head || tokens == 1 {
                        kernels.push(product(&engine, options, &group, tokens, progress)?);
                    }
                }
            }
        }
        models.extend(whole(&engine, options, files, progress)?);
    }
    let (system, version) = ggml::system();
    Ok(Against { version, system, kernels, models })
}

/// One shape at one number of tokens.
fn product(
    engine: &Engine,
    options: &Options,
    group: &Group<'_>,
    tokens: usize,
    progress: &mut OnMeasure<'_>,
) -> Result<KernelRatio> {
    let (base, (o, k)) = (engine.base(), group.shape);
    let (backend, arithmetic) = (&base.backend, engine.numbers().arithmetic);
    let weights: Vec<&Matrix> = group.params.iter().map(|p| base.factor(*p, arithmetic)).collect();
    let first = weights.first().map_or("", |w| w.type_name());
    let op = if tokens == 1 { "matvec" } else { "matmul" };
    let name = format!("{first}_{op}@{} ({})", backend.isa().name(), spelled(arithmetic));
    let shape = format!("T={tokens} O={o} K={k}");
    check(progress, &format!("{name} {shape} against ggml"))?;

    // As many weights in each trial as ours has layers, so that they come from memory or from cache alike.
    let count = weights.len().min(COPIES / (o * k / 2).max(1)).max(1);
    let (x, mut y) = (noise(backend, tokens * k)?, noise(backend, tokens * o)?);
    let mut ours = || {
        weights[..count].iter().for_each(|w| {
            backend
                .run(Call::Matmul { arithmetic, w, x: &x, y: &mut y, accumulate: false })
                .expect("one product takes no memory that may be short");
        })
    };
    let mut theirs = Vec::new();
    for quant in Quant::ALL {
        if let Some(products) = Products::new(quant, group.shape, count, tokens, backend.threads())? {
            theirs.push((quant, products, Vec::new()));
        }
    }
    let mut our_rates = Vec::new();
    for _ in 0..options.trials {
        our_rates.push(count as f64 * rate(&mut ours));
        for (_, products, rates) in &mut theirs {
            rates.push(count as f64 * rate(&mut || products.run()));
        }
    }
    let ours = Figure::new(our_rates);
    let theirs = theirs.into_iter().map(|(quant, products, rates)| {
        let calls = Figure::new(rates);
        Theirs { quant: quant.name(), repacked: products.repacked(), ratio: ours.ratio(&calls), calls }
    });
    let theirs = theirs.collect();
    Ok(KernelRatio { name, shape, layers: group.layers.join(", "), threads: backend.threads(), ours, theirs })
}

/// Rounds a second, after a pause and an untimed round.
fn rate(round: &mut dyn FnMut()) -> f64 {
    sleep(CALM);
    round();
    let (start, mut rounds) = (Instant::now(), 0u32);
    loop {
        round();
        rounds += 1;
        let elapsed = start.elapsed().as_secs_f64();
        if elapsed >= TRIAL {
            return f64::from(rounds) / elapsed;
        }
    }
}

/// Whole models: ours and every file in turn, trial by trial.
fn whole(
    engine: &Engine,
    options: &Options,
    files: &[PathBuf],
    progress: &mut OnMeasure<'_>,
) -> Result<Vec<ModelRatio>> {
    if files.is_empty() {
        return Ok(Vec::new());
    }
    let base = engine.base();
    let (plain, threads) = (Adapters::none(base), base.backend.threads());
    let ids = infer::tokens(base, options.decode.max(options.prefill));
    let (prompt, answer) = (&ids[..options.prefill], &ids[..options.decode]);
    let mut transcript = Transcript::new(base, engine.numbers())?;
    let open = |file: &PathBuf| Llama::open(file, ids.len(), threads);
    let mut theirs: Vec<Llama> = files.iter().map(open).collect::<Result<_>>()?;

    let mut our_rates = [Vec::new(), Vec::new()];
    let mut their_rates = vec![[Vec::new(), Vec::new()]; theirs.len()];
    // Trial 0 brings everything into memory.
    for trial in 0..=options.trials {
        check(progress, &format!("whole models against llama.cpp, threads: {threads}, trial {trial}"))?;
        for part in 0..2 {
            sleep(CALM);
            let rate = match part {
                0 => infer::prefill(engine.on(&plain), &mut transcript, prompt)?,
                _ => infer::decode(engine.on(&plain), &mut transcript, answer)?,
            };
            our_rates[part].push(rate);
            for (llama, rates) in theirs.iter_mut().zip(&mut their_rates) {
                sleep(CALM);
                rates[part].push(llama_rate(llama, if part == 0 { prompt } else { answer }, part == 0)?);
            }
        }
        if trial == 0 {
            our_rates.iter_mut().chain(their_rates.iter_mut().flatten()).for_each(Vec::clear);
        }
    }
    let [our_prefill, our_decode] = our_rates.map(Figure::new);
    let ratios = files.iter().zip(&theirs).zip(their_rates).map(|((file, llama), rates)| {
        let [prefill, decode] = rates.map(Figure::new);
        ModelRatio {
            file: file.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
            description: llama.description(),
            bytes: llama.bytes(),
            threads,
            prefill_ratio: our_prefill.ratio(&prefill),
            decode_ratio: our_decode.ratio(&decode),
            prefill,
            decode,
            our_prefill: our_prefill.clone(),
            our_decode: our_decode.clone(),
        }
    });
    Ok(ratios.collect())
}

/// Tokens a second from an empty context: all at once, or one by one.
fn llama_rate(llama: &mut Llama, ids: &[u32], at_once: bool) -> Result<f64> {
    llama.clear();
    let start = Instant::now();
    if at_once {
        llama.advance(ids)?;
    } else {
        ids.iter().try_for_each(|id| llama.advance(&[*id]))?;
    }
    Ok(ids.len() as f64 / start.elapsed().as_secs_f64())
}
