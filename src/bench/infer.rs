//! Prompts and decoding, on token ids.

use super::{Figure, OnMeasure, Options, check};
use crate::adapter::{AdapterFile, Adapters, Lora, Method};
use crate::base::Base;
use crate::engine::{Engine, On, Transcript};
use crate::error::Result;
use crate::memory::Peak;
use crate::rng::Rng;
use pocketlora_kernels::{Backend, Cpu, WorkType};
use pocketlora_models::{Param, Role};
use std::path::PathBuf;
use std::time::Instant;

/// Rank of the adapter whose tax is measured.
const RANK: usize = 16;
/// Seed of the tokens.
const TOKENS: u64 = 1;

/// What one engine gave.
pub(super) struct Inference {
    pub prefill: Figure,
    pub decode: Figure,
    pub adapter_decode: Figure,
    /// Sampled while a text of the full length was held, before the adapter was made.
    pub decode_peak: Peak,
}

/// Pseudo-random tokens: a model's speed does not depend on which they are.
pub(super) fn tokens<B: Backend>(base: &Base<B>, count: usize) -> Vec<u32> {
    let (mut rng, vocab) = (Rng::new(TOKENS), base.model.config().vocab_size);
    (0..count).map(|_| rng.below(vocab) as u32).collect()
}

/// Measures decoding from an empty context, plain and with an adapter in turn, then prompts.
pub(super) fn measure(engine: &Engine, options: &Options, progress: &mut OnMeasure<'_>) -> Result<Inference> {
    let base = engine.base();
    let plain = Adapters::none(base);
    let ids = tokens(base, options.decode.max(options.prefill));
    let mut transcript = Transcript::new(base, engine.numbers())?;
    let mut decode = |adapters: &Adapters<Cpu>| decode(engine.on(adapters), &mut transcript, &ids[..options.decode]);

    // Warm-up, which brings the weights into memory; and what decoding holds, before anything else is held.
    check(progress, "decode, warm-up")?;
    decode(&plain)?;
    let mut decode_peak = Peak::default();
    decode_peak.sample();

    let adapted = random_adapter(base)?;
    decode(&adapted)?;
    let (mut plain_rates, mut adapted_rates) = (Vec::new(), Vec::new());
    for trial in 1..=options.trials {
        check(progress, &format!("decode, trial {trial} of {}", options.trials))?;
        plain_rates.push(decode(&plain)?);
        adapted_rates.push(decode(&adapted)?);
    }
    drop(adapted);

    let mut prefill = || prefill(engine.on(&plain), &mut transcript, &ids[..options.prefill]);
    check(progress, "prefill, warm-up")?;
    prefill()?;
    let mut prefill_rates = Vec::new();
    for trial in 1..=options.trials {
        check(progress, &format!("prefill, trial {trial} of {}", options.trials))?;
        prefill_rates.push(prefill()?);
    }
    Ok(Inference {
        prefill: Figure::new(prefill_rates),
        decode: Figure::new(plain_rates),
        adapter_decode: Figure::new(adapted_rates),
        decode_peak,
    })
}

/// Tokens a second when each is run by itself and its logits are read; no sampler takes part.
pub(super) fn decode(on: On<'_>, transcript: &mut Transcript, ids: &[u32]) -> Result<f64> {
    transcript.keep(on.base, &[]);
    let start = Instant::now();
    let mut logits = Vec::new();
    for id in ids {
        transcript.advance(on, &[*id], &mut logits, &mut || true, &mut |_| Ok(()))?;
    }
    Ok(ids.len() as f64 / start.elapsed().as_secs_f64())
}

/// Tokens a second of a prompt, up to the logits after its last token.
pub(super) fn prefill(on: On<'_>, transcript: &mut Transcript, ids: &[u32]) -> Result<f64> {
    transcript.keep(on.base, &[]);
    let start = Instant::now();
    transcript.advance(on, ids, &mut Vec::new(), &mut || true, &mut |_| Ok(()))?;
    Ok(ids.len() as f64 / start.elapsed().as_secs_f64())
}

/// A LoRA on every linear layer, with both factors random, for zeros might be skipped some day.
fn random_adapter(base: &Base<Cpu>) -> Result<Adapters<Cpu>> {
    let (model, method) = (base.model.as_ref(), Method::Lora(Lora::new(RANK, RANK as f64)));
    let specs = method.tensors(model, |p: Param| model.params()[p.0 as usize].role == Role::Linear)?;
    let mut tensors = method.fresh(&specs, base, 0)?;
    let b = specs.iter().filter(|spec| spec.name.ends_with("lora_B.weight"));
    for (i, spec) in b.enumerate() {
        let mut rng = Rng::new(i as u64);
        let tensor = tensors.get_mut(&spec.name).expect("each has its values");
        tensor.data.fill_with(|| (rng.unit() - 0.5) * 1e-3);
    }
    let mut adapters = Adapters::none(base);
    let file = AdapterFile::new(PathBuf::new(), method, tensors);
    adapters.attach(base, &file, 1.0, WorkType::F16)?;
    Ok(adapters)
}
