//! What a run starts from: the layers it adapts, their fresh matrices, and the tensors that it moves.

use crate::adapter::{Adapters, HostTensor, LoraConfig, LoraModule};
use crate::error::{Error, Result};
use crate::exec::Base;
use crate::exec::train::Gradients;
use crate::rng::{Rng, mix};
use pocketlora_kernels::Backend;
use pocketlora_models::{ParamSpec, Role};

/// Stream of random numbers for fresh matrices.
const INIT: u64 = 1;

/// A tensor in training.
pub(super) struct Trained<B: Backend> {
    pub name: String,
    pub shape: [usize; 2],
    pub master: B::Buffer,
    pub m: B::Buffer,
    pub v: B::Buffer,
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
            let (m, v) = (backend.buffer(len)?, backend.buffer(len)?);
            tensors.push(Trained { name: format!("{}.{}", module.path, spec.name), shape: spec.shape, master, m, v });
            grads.tensors.push(backend.buffer(len)?);
        }
        grads.ranges[param.0 as usize] = Some(start..tensors.len());
    }
    Ok((tensors, grads))
}

/// A number that changes when any value does.
pub(super) fn fingerprint(modules: &[LoraModule]) -> u64 {
    let values = modules.iter().flat_map(|m| m.a.data.iter().chain(&m.b.data));
    values.fold(1, |hash, v| mix(hash, u64::from(v.to_bits())))
}
