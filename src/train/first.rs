//! What a fresh LoRA begins with, where that is more than random numbers: some of the data, gradients on it.

use super::optimizer::Moments;
use super::step::{MicroBatch, Watch, micro_step};
use super::sums::Sums;
use super::trained::gradients;
use super::{Batches, Dataset, Depth, MemoryPlan, Observer, Parts, StepReport, TrainConfig, Trainer};
use crate::adapter::{
    AdapterFile, Adapters, HostTensor, Method, Progress, Sketch, TensorId, TensorSpec, Tensors, is_first,
};
use crate::base::{Base, Pool};
use crate::error::Result;
use crate::format::open_source;
use crate::memory::Peak;
use pocketlora_kernels::Backend;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::ControlFlow;

/// Steps whose data is looked at unless somebody says otherwise.
const STEPS: u64 = 8;

/// What the beginning of a fresh adapter of `method` looks at, where it takes work: the samples of the first steps, if any.
pub(super) fn looked_at(
    method: &Method,
    batches: &mut Batches,
    data: &Dataset,
    config: &TrainConfig,
) -> Option<Vec<MicroBatch>> {
    if !method.begins_with()?.reads_data() {
        return Some(Vec::new());
    }
    let steps = config.init_steps.unwrap_or(STEPS).min(batches.total_steps());
    Some((1..=steps).flat_map(|step| batches.micro_batches(data, step)).collect())
}

/// Refuses a beginning that the fresh `tensors` of `method` cannot have, before any work.
///
/// # Errors
/// Its source does not open, or lacks a layer; a layer that it cannot look at.
pub(super) fn check<B: Backend>(
    base: &Base<B>,
    method: &Method,
    tensors: &Tensors,
    config: &TrainConfig,
) -> Result<()> {
    let Method::Lora(lora) = method else { return Ok(()) };
    let source = config.loftq_source.as_deref().map(open_source).transpose()?;
    lora.check_beginning(base, tensors, source.as_deref())
}

/// What a run's adapter begins with, from the base and some of the data.
struct Beginning<'a> {
    method: &'a Method,
    looked_at: &'a [MicroBatch],
    config: &'a TrainConfig,
    plan: &'a MemoryPlan,
}

impl Beginning<'_> {
    /// Puts it into the fresh `tensors`.
    ///
    /// # Errors
    /// The source that it needs is of another model; stopped; out of memory.
    fn put<B: Backend>(&self, base: &Base<B>, tensors: &mut Tensors, progress: &mut Progress<'_>) -> Result<()> {
        let Self { method, looked_at, config, .. } = self;
        let Method::Lora(lora) = method else { return method.begin_with_weights(base, tensors, config.seed, progress) };
        let source = config.loftq_source.as_deref().map(open_source).transpose()?;
        let texts: Vec<Vec<u32>> = looked_at.iter().flat_map(MicroBatch::texts).collect();
        lora.begin_with(base, tensors, &texts, source.as_deref(), config.seed, progress)?;
        let Some(mut sketch) = lora.sketch(base.model.as_ref(), tensors, config.seed) else { return Ok(()) };
        for pass in 0..Sketch::PASSES {
            if pass > 0 && pass % 2 == 0 {
                sketch.again();
            }
            let found = self.with_probe(base, &sketch, pass, progress)?;
            sketch.take(&found);
        }
        sketch.put(tensors, config.seed);
        Ok(())
    }

    /// The gradients of the mean loss of what is looked at by the tensors of the probe that `sketch` asks for in round
    /// number `round`, by their names.
    fn with_probe<B: Backend>(
        &self,
        base: &Base<B>,
        sketch: &Sketch,
        round: usize,
        progress: &mut Progress<'_>,
    ) -> Result<BTreeMap<String, Vec<f32>>> {
        let (backend, Self { looked_at, config, plan, .. }) = (&base.backend, self);
        let mut adapters = Adapters::none(base);
        adapters.attach_to_train(base, &sketch.probe())?;
        let (mut grads, mut pool, mut sums) = (gradients(base, &adapters)?, Pool::default(), Sums::new(backend, 1)?);
        let scale = 1.0 / looked_at.iter().map(MicroBatch::trained).sum::<usize>().max(1) as f32;
        let (arithmetic, mut depth) = (config.precision.arithmetic(), Depth::default());
        for (i, micro) in looked_at.iter().enumerate() {
            let (done, all) = (round * looked_at.len() + i, Sketch::PASSES * looked_at.len());
            for part in micro.split(plan.pass_tokens) {
                let mut watch = Watch { keep_going: &mut || progress(done, all), peak: &mut Peak::ignored() };
                let (learned, sums) = ((Some(&mut grads), &mut depth), (&mut sums, 0));
                let layout = &plan.layout;
                micro_step(
                    base, &adapters, &part, scale, None, arithmetic, layout, learned, &mut pool, sums, &mut watch,
                )?;
            }
        }
        let tensors: Vec<(TensorId, String)> =
            adapters.held().specs().map(|(id, spec)| (id, spec.name.clone())).collect();
        let mut found = BTreeMap::new();
        for (id, name) in tensors {
            let Some(grad) = grads.of(id) else { continue };
            let mut values = vec![0.0; backend.len(grad)];
            backend.read(grad, &mut values)?;
            found.insert(name, values);
        }
        Ok(found)
    }
}

/// Tells an observer how far a beginning is, whenever that asks whether to go on.
struct Telling<'o> {
    observer: &'o mut dyn Observer,
    /// So much of so much.
    at: &'o Cell<(usize, usize)>,
}

impl Observer for Telling<'_> {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        self.observer.on_step(report)
    }

    fn keep_going(&mut self) -> bool {
        let (done, all) = self.at.get();
        self.observer.on_beginning(done, all);
        self.observer.keep_going()
    }
}

impl<B: Backend> Trainer<B> {
    /// Gives the adapter what it begins with, where it does not have that yet and it takes work.
    ///
    /// # Errors
    /// Stopped by the observer, the policy or a handle; its source is of another model; out of memory.
    pub(super) fn begin(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let Some(looked_at) = self.beginning.take() else { return Ok(()) };
        self.give_back();
        // What steps work with is made anew after it, so that the two do not take memory together.
        self.grads.tensors.clear();
        let backend = &self.base.backend;
        for trained in &mut self.tensors {
            trained.moments = Moments::new(backend, &self.config, 0)?;
        }
        crate::mmap::release_freed();
        let begun = self.begin_from(&looked_at, observer);
        if begun.is_err() {
            self.beginning = Some(looked_at);
        }
        let backend = &self.base.backend;
        for trained in &mut self.tensors {
            trained.moments = Moments::new(backend, &self.config, trained.spec.values())?;
        }
        self.grads.tensors = gradients(&self.base, &self.adapters)?.tensors;
        begun
    }

    fn begin_from(&mut self, looked_at: &[MicroBatch], observer: &mut dyn Observer) -> Result<()> {
        let (method, config, plan) = (self.file.method.clone(), self.config.clone(), self.plan);
        let held = self.adapters.held();
        let own = |(id, spec): (TensorId, &TensorSpec)| {
            let data = held.read(&self.base.backend, id)?;
            Ok((spec.name.clone(), HostTensor { shape: spec.shape.clone(), data }))
        };
        let mut tensors = held.specs().map(own).collect::<Result<Tensors>>()?;
        tensors.extend(self.file.tensors.clone());
        let beginning = Beginning { method: &method, looked_at, config: &config, plan: &plan };
        let at = Cell::new((0, 0));
        let queue = self.turn.clone();
        let turn = queue.take();
        self.guarded(&mut Telling { observer: &mut *observer, at: &at }, |Parts { base, .. }, keep_going| {
            beginning.put(base, &mut tensors, &mut |done, all| {
                at.set((done, all));
                keep_going()
            })
        })?;
        drop(turn);
        self.put(tensors)?;
        let (_, all) = at.get();
        observer.on_beginning(all, all);
        Ok(())
    }

    /// Gives the adapter in training `values`, by their names, and makes what is made of them.
    ///
    /// # Errors
    /// Out of memory.
    pub(super) fn put(&mut self, mut values: Tensors) -> Result<()> {
        self.adapters.held_mut().put(&self.base.backend, &values);
        for (name, own) in &mut self.file.tensors {
            own.data = values.remove(name).map_or_else(|| std::mem::take(&mut own.data), |tensor| tensor.data);
        }
        self.adapters.renew(&self.base, self.facts.step)
    }
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
