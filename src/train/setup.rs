//! What a run starts from: the layers it adapts, their fresh matrices, and the tensors that it moves.

use super::best::Candidates;
use super::budget::choose;
use super::checkpoint::RunFacts;
use super::control::TrainHandle;
use super::hold_out::Overlap;
use super::lock::FolderLock;
use super::optimizer::State;
use super::plan::Work;
use super::saving::sweep_folder;
use super::{Batches, Dataset, Sample, TrainConfig, Trainer, largest_micro_batch};
use crate::adapter::{AdapterFile, Adapters, HostTensor, LoraConfig, LoraModule, Replaced, mark};
use crate::error::{Error, ErrorCode, Result};
use crate::exec::train::Gradients;
use crate::exec::{Base, Pool};
use crate::memory::{Peak, anonymous_bytes};
use crate::rng::{Rng, mix};
use pocketlora_kernels::{Backend, WorkType};
use pocketlora_models::{Param, ParamSpec, Role};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Stream of random numbers for fresh matrices.
const INIT: u64 = 1;

/// A tensor in training.
pub(super) struct Trained<B: Backend> {
    pub name: String,
    pub shape: [usize; 2],
    /// Factor of its module on `B A`.
    pub scale: f32,
    /// Its learning rate over the run's: LoRA+ has B learn faster.
    pub rate: f32,
    /// The linear layer's weight and the number of the tensor among its adapter's, which holds the values.
    pub place: (Param, usize),
    pub state: State<B>,
}

/// Whether `name` is that of a copy in the model cache, which earlier versions gave to adapters as their base.
fn is_copy(name: &str) -> bool {
    let key = name.rsplit_once("-nf4-").map_or("", |(_, key)| key);
    name.is_empty() || key.len() == 16 && key.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Refuses data that nothing can be learned from, or that is of another model's tokenizer.
fn check_data<B: Backend>(base: &Base<B>, replaced: &Replaced<B>, data: &Dataset) -> Result<()> {
    let place = |what: &dyn std::fmt::Display| format!("`{}`: {what}", data.path.display());
    for (i, sample) in data.samples.iter().enumerate() {
        base.check_ids(replaced, &sample.ids).map_err(|e| e.at(place(&format_args!("sample {}", i + 1))))?;
    }
    if data.samples.iter().map(Sample::trained_tokens).sum::<usize>() == 0 {
        let message = format!(
            "expected at least one token to learn, got none in {} samples; give them answers",
            data.samples.len()
        );
        return Err(Error::new(ErrorCode::Data, place(&"samples"), message));
    }
    Ok(())
}

/// Linear layers that `targets` name.
pub(crate) fn target_modules<'m>(params: &'m [ParamSpec], targets: &[String]) -> Result<Vec<&'m ParamSpec>> {
    let linears = || params.iter().filter(|p| p.role == Role::Linear);
    let named = |p: &ParamSpec, target: &str| {
        target == "all" || p.module() == target || p.module().ends_with(&format!(".{target}"))
    };
    for target in targets {
        if !linears().any(|p| named(p, target)) {
            let mut known: Vec<&str> = linears().filter_map(|p| p.module().rsplit('.').next()).collect();
            known.sort_unstable();
            known.dedup();
            return Err(Error::config("targets", format!("`all` or some of `{}`", known.join("`, `")), target));
        }
    }
    Ok(linears().filter(|p| targets.iter().any(|t| named(p, t))).collect())
}

/// Fresh LoRA matrices: A uniform in `±1/sqrt(in)` (PEFT's Kaiming-uniform with a = sqrt 5), B zero.
pub(crate) fn fresh_modules(modules: &[&ParamSpec], lora: &LoraConfig, seed: u64) -> Vec<LoraModule> {
    let rank = lora.rank;
    let one = |(i, spec): (usize, &&ParamSpec)| {
        let (out, input) = (spec.shape[0], spec.shape[1]);
        let mut rng = Rng::new(mix(mix(seed, INIT), i as u64));
        let bound = (input as f32).sqrt().recip();
        let a = (0..rank * input).map(|_| (rng.unit() * 2.0 - 1.0) * bound).collect();
        let a = HostTensor { shape: [rank, input], data: a };
        let b = HostTensor { shape: [out, rank], data: vec![0.0; out * rank] };
        LoraModule::new(spec.module().to_owned(), a, b, lora)
    };
    modules.iter().enumerate().map(one).collect()
}

/// Moments and gradients for every tensor of the attached adapters, in the order of the base's parameters.
pub(super) fn trained_tensors<B: Backend>(
    base: &Base<B>,
    adapters: &mut Adapters<B>,
    scales: &HashMap<String, f32>,
    config: &TrainConfig,
) -> Result<(Vec<Trained<B>>, Gradients<B>)> {
    let backend = &base.backend;
    let params = base.model.params();
    let mut tensors = Vec::new();
    let mut grads = Gradients { ranges: vec![None; params.len()], tensors: Vec::new() };
    for (param, adapter) in adapters.iter_mut() {
        let path = module_path(&params[param.0 as usize]);
        let start = tensors.len();
        for (part, spec) in adapter.tensors(backend).into_iter().enumerate() {
            let len = spec.shape[0] * spec.shape[1];
            tensors.push(Trained {
                name: format!("{path}.{}", spec.name),
                shape: spec.shape,
                scale: scales[path],
                rate: if spec.name.starts_with("lora_B") { config.lora_plus_ratio } else { 1.0 },
                place: (param, part),
                state: State::new(backend, config, len)?,
            });
            grads.tensors.push(backend.buffer(len)?);
        }
        grads.ranges[param.0 as usize] = Some(start..tensors.len());
    }
    Ok((tensors, grads))
}

/// The module that an adapter names; a tied head is the embedding's parameter, but not its module.
fn module_path(spec: &ParamSpec) -> &str {
    if spec.role == Role::Embedding { "lm_head" } else { spec.module() }
}

/// What a run on `data` that is evaluated on `eval_data` takes memory for: a fresh adapter of `targets`, or one like
/// `init`.
fn work<B: Backend>(
    base: &Base<B>,
    targets: &[&ParamSpec],
    config: &TrainConfig,
    init: Option<&AdapterFile>,
    data: &Dataset,
    eval_data: Option<&Dataset>,
) -> Work {
    let adapted = |(i, spec): (usize, &ParamSpec)| {
        let rank = match init {
            Some(file) => file.modules.iter().find(|m| m.path == module_path(spec))?.a.shape[0],
            None => targets.iter().any(|target| target.name == spec.name).then_some(config.rank)?,
        };
        Some((Param(i as u32), rank, [spec.shape[0], spec.shape[1]]))
    };
    let matrices = base.model.params().iter().enumerate().filter(|(_, spec)| spec.shape.len() == 2);
    let mut lengths: Vec<usize> = data.samples.iter().map(|s| s.ids.len()).collect();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    // What is free but not given back would be counted as held, and then be taken once more.
    crate::mmap::release_freed();
    Work {
        model: Arc::clone(&base.model),
        threads: base.backend.threads(),
        adapted: matrices.filter_map(adapted).collect(),
        lengths,
        largest: largest_micro_batch(data, config),
        evaluated: eval_data.map_or(0, Dataset::longest),
        before: anonymous_bytes().unwrap_or(0),
        data: (data.bytes() + eval_data.map_or(0, Dataset::bytes)) as u64,
    }
}

impl<B: Backend> Trainer<B> {
    /// Prepares a run whose adapter will be written to the folder `out`, from scratch or from the adapter `init`.
    ///
    /// # Errors
    /// A setting is out of range, another trainer works in `out`, `init` belongs to another base, there is nothing to
    /// learn, out of memory.
    pub fn new(
        base: Arc<Base<B>>,
        base_fingerprint: u64,
        base_name: Option<String>,
        config: TrainConfig,
        data: Dataset,
        eval_data: Option<Dataset>,
        init: Option<&AdapterFile>,
        out: &Path,
    ) -> Result<Self> {
        config.validate()?;
        let attention_dropout = base.model.config().attention_dropout;
        if attention_dropout > 0.0 {
            let message = format!("{attention_dropout} is not supported in training; set it to 0 there");
            return Err(Error::new(
                ErrorCode::Unsupported,
                "key `attention_dropout` of the model's config.json",
                message,
            ));
        }
        config.check_evaluated(eval_data.is_some())?;
        init.map_or(Ok(()), |file| mark::check(&base, file))?;
        let kept = init.map(|file| file.replaced.clone()).unwrap_or_default();
        let replaced = init.map(|file| Replaced::default().with(&base, file, 1.0)).transpose()?.unwrap_or_default();
        check_data(&base, &replaced, &data)?;
        eval_data.iter().try_for_each(|data| check_data(&base, &replaced, data))?;
        let mut batches = Batches::new(&data, &config)?;
        let total_steps = batches.total_steps();
        let (config, too_warm) = config.fitted_to(total_steps);
        let params = base.model.params();
        let (config, targets) = match init {
            Some(file) => (config.of_adapter(params, file)?, Vec::new()),
            None => {
                let targets = target_modules(params, &config.targets)?;
                (config, targets)
            }
        };
        let eval_overlap = eval_data.as_ref().map(|held| Overlap::of(&data, held));
        let learned_too = eval_overlap.and_then(|overlap| overlap.warning(&eval_data.as_ref()?.path));
        let (plan, config) = choose(&work(&base, &targets, &config, init, &data, eval_data.as_ref()), &config)?;
        let mut names: Vec<String> =
            targets.iter().filter_map(|p| p.module().rsplit('.').next().map(str::to_owned)).collect();
        names.sort_unstable();
        names.dedup();
        let dropout = decimal(config.dropout);
        let doubts = init.map_or(Ok(Vec::new()), |file| file.doubts(base.model.as_ref()))?;
        let doubt = |message| {
            let place = init.map_or_else(String::new, |file| format!("`{}`", file.dir.display()));
            Error::new(ErrorCode::AdapterMismatch, place, message)
        };
        let mut lora = match init {
            Some(file) => {
                let base = file.config.base.clone().filter(|name| !is_copy(name)).or(base_name);
                LoraConfig { dropout, base, ..file.config.clone() }
            }
            None => LoraConfig {
                rslora: config.rslora,
                dropout,
                targets: names,
                base: base_name,
                ..LoraConfig::new(config.rank, config.alpha())
            },
        };
        lora.base_mark = Some(mark::of(&base)?);
        let modules = match init {
            Some(file) => file.modules.clone(),
            None => fresh_modules(&targets, &lora, config.seed),
        };
        let facts = RunFacts {
            step: 0,
            total_steps,
            config: serde_json::to_value(&config).expect("plain data serializes"),
            data: data.fingerprint(),
            base: base_fingerprint,
            init: init.map_or(0, fingerprint),
            candidates: Candidates::default(),
            start: None,
        };
        let file = AdapterFile::new(out.to_owned(), lora.clone(), modules).with(kept.clone());
        let scales = file.modules.iter().map(|m| (m.path.clone(), m.scale)).collect();
        let mut adapters = Adapters::none(&base);
        adapters.attach(&base, &file, 1.0, WorkType::F32)?;
        // What follows may take its place.
        drop(file);
        let (tensors, grads) = trained_tensors(&base, &mut adapters, &scales, &config)?;
        std::fs::create_dir_all(out).map_err(|e| Error::io("create", out, e))?;
        let lock = FolderLock::take(out)?;
        sweep_folder(out);
        Ok(Self {
            base,
            config,
            warnings: too_warm.into_iter().chain(learned_too).chain(doubts.into_iter().map(doubt)).collect(),
            eval_overlap,
            data,
            batches,
            eval_data,
            general: None,
            out: out.to_owned(),
            lora,
            kept,
            adapters,
            tensors,
            grads,
            pool: Pool::default(),
            ready: false,
            plan,
            facts,
            peak: Peak::default(),
            handle: TrainHandle::new(),
            policy: None,
            held: Duration::ZERO,
            saved: false,
            _lock: lock,
        })
    }
}

/// The number that somebody typed: an f32 widened as it is has digits of its own.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// A number that changes when any value does.
pub(super) fn fingerprint(file: &AdapterFile) -> u64 {
    let values = file.modules.iter().flat_map(|m| m.a.data.iter().chain(&m.b.data));
    let hash = values.fold(1, |hash, v| mix(hash, u64::from(v.to_bits())));
    // Of a whole embedding, the start and the length tell enough.
    let kept = file.replaced.whole.iter().flat_map(|w| {
        let bytes = &w.tensor.bytes;
        bytes.iter().take(64).map(|&b| u64::from(b)).chain([bytes.len() as u64])
    });
    kept.fold(hash, mix)
}
