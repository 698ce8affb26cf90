//! What a run starts from: the layers it adapts, their fresh matrices, and the tensors that it moves.

use super::best::Candidates;
use super::checkpoint::RunFacts;
use super::control::TrainHandle;
use super::lock::FolderLock;
use super::optimizer::State;
use super::saving::sweep_folder;
use super::{Batches, Dataset, Precision, Sample, TrainConfig, Trainer};
use crate::adapter::{AdapterFile, Adapters, HostTensor, LoraConfig, LoraModule};
use crate::error::{Error, ErrorCode, Result};
use crate::exec::train::Gradients;
use crate::exec::{Base, Pool};
use crate::memory::Peak;
use crate::rng::{Rng, mix};
use pocketlora_kernels::{Backend, WorkType};
use pocketlora_models::{ParamSpec, Role};
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
    pub master: B::Buffer,
    pub state: State<B>,
}

/// Refuses data that nothing can be learned from, or that is of another model's tokenizer.
fn check_data<B: Backend>(base: &Base<B>, data: &Dataset) -> Result<()> {
    let place = |what: &dyn std::fmt::Display| format!("`{}`: {what}", data.path.display());
    for (i, sample) in data.samples.iter().enumerate() {
        base.check_ids(&sample.ids).map_err(|e| e.at(place(&format_args!("sample {}", i + 1))))?;
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
pub(super) fn target_modules<'m>(params: &'m [ParamSpec], targets: &[String]) -> Result<Vec<&'m ParamSpec>> {
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

/// Masters, moments and gradients for every tensor of the attached adapter, in the order of the base's parameters.
pub(super) fn trained_tensors<B: Backend>(
    base: &Base<B>,
    adapters: &mut Adapters<B>,
    modules: &[LoraModule],
    config: &TrainConfig,
) -> Result<(Vec<Trained<B>>, Gradients<B>)> {
    let backend = &base.backend;
    let params = base.model.params();
    let mut tensors = Vec::new();
    let mut grads = Gradients { ranges: vec![None; params.len()], tensors: Vec::new() };
    for (param, adapter) in adapters.iter_mut() {
        let path = params[param.0 as usize].module();
        let module = modules.iter().find(|m| m.path == path || (m.path == "lm_head" && path == "model.embed_tokens"));
        let module = module.expect("every attached adapter came from one of these modules");
        let start = tensors.len();
        for (spec, host) in adapter.tensors(backend).into_iter().zip([&module.a, &module.b]) {
            let len = host.data.len();
            let mut master = backend.buffer(len)?;
            backend.write(&mut master, &host.data);
            tensors.push(Trained {
                name: format!("{}.{}", module.path, spec.name),
                shape: spec.shape,
                scale: module.scale,
                rate: if spec.name.starts_with("lora_B") { config.lora_plus_ratio } else { 1.0 },
                master,
                state: State::new(backend, config, len)?,
            });
            grads.tensors.push(backend.buffer(len)?);
        }
        grads.ranges[param.0 as usize] = Some(start..tensors.len());
    }
    Ok((tensors, grads))
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
        check_data(&base, &data)?;
        eval_data.iter().try_for_each(|data| check_data(&base, data))?;
        let targets = target_modules(base.model.params(), &config.targets)?;
        let mut names: Vec<String> =
            targets.iter().filter_map(|p| p.module().rsplit('.').next().map(str::to_owned)).collect();
        names.sort_unstable();
        names.dedup();
        let lora = match init {
            Some(file) => file.config.clone(),
            None => LoraConfig {
                rank: config.rank,
                alpha: config.alpha(),
                rslora: config.rslora,
                dropout: f64::from(config.dropout),
                rank_pattern: Vec::new(),
                alpha_pattern: Vec::new(),
                targets: names,
                base: base_name,
            },
        };
        let modules = match init {
            Some(file) => file.modules.clone(),
            None => fresh_modules(&targets, &lora, config.seed),
        };
        let mut batches = Batches::new(&data, &config)?;
        let total_steps = batches.total_steps();
        let facts = RunFacts {
            step: 0,
            total_steps,
            config: serde_json::to_value(&config).expect("plain data serializes"),
            data: data.fingerprint(),
            base: base_fingerprint,
            init: init.map_or(0, |file| fingerprint(&file.modules)),
            candidates: Candidates::default(),
            start: None,
        };
        let file = AdapterFile { dir: out.to_owned(), config: lora.clone(), modules };
        let dtype = match config.precision {
            Precision::Exact => WorkType::F32,
            Precision::Bf16 => WorkType::F16,
        };
        let mut adapters = Adapters::none(&base);
        adapters.attach(&base, &file, 1.0, dtype)?;
        let (tensors, grads) = trained_tensors(&base, &mut adapters, &file.modules, &config)?;
        std::fs::create_dir_all(out).map_err(|e| Error::io("create", out, e))?;
        let lock = FolderLock::take(out)?;
        sweep_folder(out);
        Ok(Self {
            base,
            config,
            data,
            batches,
            eval_data,
            general: None,
            out: out.to_owned(),
            lora,
            adapters,
            tensors,
            grads,
            pool: Pool::default(),
            pool_tokens: 0,
            facts,
            peak: Peak::default(),
            handle: TrainHandle::new(),
            policy: None,
            held: Duration::ZERO,
            warnings: Vec::new(),
            saved: false,
            _lock: lock,
        })
    }
}

/// A number that changes when any value does.
pub(super) fn fingerprint(modules: &[LoraModule]) -> u64 {
    let values = modules.iter().flat_map(|m| m.a.data.iter().chain(&m.b.data));
    values.fold(1, |hash, v| mix(hash, u64::from(v.to_bits())))
}
