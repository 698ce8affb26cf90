//! What a fresh LoRA begins with, where that is more than random numbers: some of the data, gradients on it.

use super::setup::gradients;
use super::step::{MicroBatch, Watch, micro_step};
use super::sums::Sums;
use super::{Batches, Dataset, Depth, MemoryPlan, TrainConfig};
use crate::adapter::{AdapterFile, Adapters, Lora, Method, Sketch, TensorId, Tensors, is_first};
use crate::base::{Base, Pool};
use crate::error::Result;
use crate::format::open_source;
use crate::memory::Peak;
use pocketlora_kernels::Backend;
use std::collections::BTreeMap;

/// Steps whose data is looked at unless somebody says otherwise.
const STEPS: u64 = 8;

/// What the beginning of an adapter of `method` looks at: the samples of the first steps.
pub(super) fn looked_at(
    method: &Method,
    batches: &mut Batches,
    data: &Dataset,
    config: &TrainConfig,
) -> Vec<MicroBatch> {
    if !method.begins_with().is_some_and(|init| init.reads_data()) {
        return Vec::new();
    }
    let steps = config.init_steps.unwrap_or(STEPS).min(batches.total_steps());
    (1..=steps).flat_map(|step| batches.micro_batches(data, step)).collect()
}

/// Gives the fresh `tensors` of `lora` what they begin with.
///
/// # Errors
/// There is no source that it needs, or it is of another model; out of memory.
pub(super) fn begin_lora<B: Backend>(
    base: &Base<B>,
    lora: &Lora,
    tensors: &mut Tensors,
    micros: &[MicroBatch],
    config: &TrainConfig,
    plan: &MemoryPlan,
) -> Result<()> {
    let source = config.loftq_source.as_deref().map(open_source).transpose()?;
    let texts: Vec<Vec<u32>> = micros.iter().flat_map(MicroBatch::texts).collect();
    lora.begin_with(base, tensors, &texts, source.as_deref(), config.seed)?;
    let Some(mut sketch) = lora.sketch(base.model.as_ref(), tensors, config.seed) else { return Ok(()) };
    for pass in 0..Sketch::PASSES {
        if pass > 0 && pass % 2 == 0 {
            sketch.again();
        }
        let found = with_probe(base, &sketch, micros, config, plan)?;
        sketch.take(&found);
    }
    sketch.put(tensors, config.seed);
    Ok(())
}

/// Keeps `A` and `B` as they are after `step` steps, where the method of `file` wants to know what they were then; after none,
/// that they were nothing.
///
/// # Errors
/// Device lost.
pub(super) fn hold<B: Backend>(
    base: &Base<B>,
    adapters: &mut Adapters<B>,
    file: &mut AdapterFile,
    step: u64,
) -> Result<()> {
    if !file.method.holds_at(step) {
        return Ok(());
    }
    let fixed = adapters.held().fixed().filter(|(_, spec)| is_first(&spec.name));
    let fixed: Vec<(TensorId, String)> = fixed.map(|(id, spec)| (id, spec.name.clone())).collect();
    for (id, name) in fixed {
        let own = name.replace("lora_A0.", "lora_A.").replace("lora_B0.", "lora_B.");
        let own = adapters.held().specs().find(|(_, spec)| spec.name == own).map(|(id, _)| id);
        let Some(tensor) = file.tensors.get_mut(&name) else { continue };
        tensor.data = match own.filter(|_| step > 0) {
            Some(own) => adapters.held().read(&base.backend, own)?,
            None => vec![0.0; tensor.data.len()],
        };
        adapters.held_mut().update(&base.backend, id, &mut |buffer| base.backend.write(buffer, &tensor.data));
    }
    Ok(())
}

/// The gradients of the mean loss of `micros` by the tensors of the probe that `sketch` asks for, by their names.
fn with_probe<B: Backend>(
    base: &Base<B>,
    sketch: &Sketch,
    micros: &[MicroBatch],
    config: &TrainConfig,
    plan: &MemoryPlan,
) -> Result<BTreeMap<String, Vec<f32>>> {
    let backend = &base.backend;
    let mut adapters = Adapters::none(base);
    adapters.attach_to_train(base, &sketch.probe())?;
    let (mut grads, mut pool, mut sums) = (gradients(base, &adapters)?, Pool::default(), Sums::new(backend, 1)?);
    let scale = 1.0 / micros.iter().map(MicroBatch::trained).sum::<usize>().max(1) as f32;
    let (arithmetic, mut depth) = (config.precision.arithmetic(), Depth::default());
    for micro in micros.iter().flat_map(|micro| micro.split(plan.pass_tokens)) {
        let mut watch = Watch { keep_going: &mut || true, peak: &mut Peak::ignored() };
        let (learned, sums) = ((Some(&mut grads), &mut depth), (&mut sums, 0));
        micro_step(
            base,
            &adapters,
            &micro,
            scale,
            None,
            arithmetic,
            &plan.layout,
            learned,
            &mut pool,
            sums,
            &mut watch,
        )?;
    }
    let tensors: Vec<(TensorId, String)> = adapters.held().specs().map(|(id, spec)| (id, spec.name.clone())).collect();
    let mut found = BTreeMap::new();
    for (id, name) in tensors {
        let Some(grad) = grads.of(id) else { continue };
        let mut values = vec![0.0; backend.len(grad)];
        backend.read(grad, &mut values)?;
        found.insert(name, values);
    }
    Ok(found)
}
