//! What a run will hold in memory, known before its first step.
//!
//! The largest micro-batch is passed through the code that trains, on a backend that only counts ([`Counted`]), and then
//! the longest sample that is evaluated: what they take is what the run will take, for the calls are the same.
//!
//! Freed memory goes back to the system before the plan is made (`mmap.rs`). Without that, what the tokenizer left behind
//! would count as held, and the run would take as much again from the system.

use super::keep::held_of_lengths;
use super::layers::Depth;
use super::step::{Layout, MicroBatch, Watch, micro_step};
use super::sums::Sums;
use super::trained::gradients;
use super::{Optimizer, TrainConfig};
use crate::adapter::{Adapters, Dropout, Gradients, Learned, Method, TensorPart, TensorSpec};
use crate::base::{Base, Pool};
use crate::error::Result;
use crate::memory::Peak;
use pocketlora_kernels::Counted;
use pocketlora_kernels::cpu::Table;
use pocketlora_models::Model;
use serde::Serialize;
use std::sync::Arc;

/// Bytes by purpose. All but `weights_mapped` are anonymous (dirty) memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// Base weights and their scales, mapped from their files.
    pub weights_mapped: u64,
    /// The adapter's values in f32, which forward, backward and the optimizer all use.
    pub adapter: u64,
    /// Its gradients.
    pub gradients: u64,
    /// The optimizer's moments.
    pub optimizer: u64,
    /// Inputs of layers from which those are run again.
    pub layer_inputs: u64,
    /// Activations and gradients of the one layer or loss that is being run.
    pub layer_workspace: u64,
    /// What attention turns, and gradients of its earlier keys.
    pub attention: u64,
    /// Logits of one chunk of learned tokens.
    pub logits: u64,
    /// Copies of the adapter's largest tensor while a checkpoint is written.
    pub saving: u64,
    /// Panels of weights and rounded activations that threads multiply.
    pub kernels: u64,
    /// The base's answers to general prompts, and its likeliest tokens at their places.
    pub references: u64,
    /// What answering general prompts and questions takes: before the steps and after them, when they hold nothing but the
    /// adapter, gradients, moments and references.
    pub asking: u64,
    /// What an adapter that begins with more than random numbers takes for that, its values included: before there are
    /// gradients or moments. 0 for any other.
    pub beginning: u64,
    /// What the process held before the run took anything: the program, the base's tables, and the next two. Measured,
    /// and not part of [`MemoryPlan::anonymous`]; 0 where the system does not tell.
    pub before: u64,
    /// Of that, samples to learn and to evaluate: computed.
    pub data: u64,
    /// Of that, the session's tokenizer and chat template, measured when they were loaded; 0 once they are let go.
    pub tokenizer: u64,
    /// What those took while they were there, before the run.
    pub tokenizer_loaded: u64,
    /// Tokens of a pass at most, of the samples of a micro-batch; a longer sample is a pass by itself.
    pub pass_tokens: usize,
    /// What is traded for time.
    pub layout: Layout,
    /// Whose moments those are.
    pub optimizer_kind: Optimizer,
}

impl MemoryPlan {
    /// Anonymous bytes that the run takes.
    #[must_use]
    pub fn anonymous(&self) -> u64 {
        let training = self.adapter + self.gradients + self.optimizer + self.references + self.steps().max(self.asking);
        training.max(self.beginning)
    }

    /// Of that, what passes take and give back.
    pub(super) fn steps(&self) -> u64 {
        // Attention, loss and checkpoints take theirs in turn.
        self.layer_inputs + self.layer_workspace + self.kernels + self.attention.max(self.logits).max(self.saving)
    }

    /// Anonymous bytes of the whole process.
    #[must_use]
    pub fn process(&self) -> u64 {
        self.before + self.anonymous()
    }

    /// How far `peak` anonymous bytes of the process are from what was planned for the run, in percent of that.
    #[must_use]
    pub fn deviation(&self, peak: u64) -> f64 {
        let (taken, planned) = (peak as f64 - self.before as f64, self.anonymous() as f64);
        100.0 * (taken - planned) / planned
    }
}

/// What a run is made of, as far as its memory depends on it.
pub(super) struct Work {
    pub model: Arc<dyn Model>,
    /// Kernels and threads that it runs on.
    pub table: &'static Table,
    pub threads: usize,
    /// What is trained, and its tensors.
    pub method: Method,
    pub specs: Vec<TensorSpec>,
    /// What is trained together with it.
    pub beside: Vec<(Method, Vec<TensorSpec>)>,
    /// Tensors beside them, that stand in for parts of the base.
    pub learned: Vec<Learned>,
    /// What is beside them and not in training.
    pub aside: Option<(Method, Vec<TensorSpec>)>,
    /// Lengths of the samples, the longest first.
    pub lengths: Vec<usize>,
    /// Tokens of the largest micro-batch.
    pub largest: usize,
    /// Tokens of the longest sample that is evaluated, 0 for none. Windows of the general text need no count: they are no
    /// longer than the longest sample that is learned.
    pub evaluated: usize,
    /// Lengths of the longest texts that a step holds.
    pub held: Vec<usize>,
    /// Bytes of what it is held to.
    pub references: u64,
    pub before: u64,
    pub data: u64,
    /// Tokens of the data that the adapter's beginning looks at.
    pub looked_at: usize,
}

/// Shapes `[out, in]` and ranks of the layers that a LoRA with tensors `specs` adapts.
fn layers_of(specs: &[TensorSpec]) -> Vec<([usize; 2], usize)> {
    let a = specs.iter().filter(|spec| spec.name.ends_with(".lora_A.weight"));
    let b = specs.iter().filter(|spec| spec.name.ends_with(".lora_B.weight"));
    a.zip(b).map(|(a, b)| ([b.shape[0], a.shape[1]], a.shape[0])).collect()
}

impl Work {
    /// Trained values.
    pub fn values(&self) -> usize {
        self.all().filter(|spec| !self.method.is_frozen(&spec.name)).map(TensorSpec::values).sum()
    }

    /// All tensors of the adapter.
    fn all(&self) -> impl Iterator<Item = &TensorSpec> {
        let beside = self.beside.iter().flat_map(|(_, specs)| specs);
        self.specs.iter().chain(beside).chain(self.learned.iter().map(|learned| &learned.spec))
    }

    /// Lengths of the samples of passes of at most `most` tokens that take as much as any: one of the longest samples, and
    /// one of as many samples as there can be where these are more, for each sample has virtual tokens of its own.
    fn fullest(&self, config: &TrainConfig, most: usize) -> Vec<Vec<usize>> {
        let most = most.min(self.largest);
        let (mut longest, mut left) = (Vec::new(), most);
        for len in &self.lengths {
            if !longest.is_empty() && *len > left {
                break;
            }
            longest.push(*len);
            left = left.saturating_sub(*len);
        }
        longest.extend((left > 0).then_some(left));
        let tokens: usize = longest.iter().sum();
        let samples = if config.packing { self.lengths.len() } else { config.batch };
        let mut left = tokens;
        let fits = |len: &&usize| left.checked_sub(**len).inspect(|rest| left = *rest).is_some();
        let count = self.lengths.iter().rev().take(samples).take_while(fits).count();
        let many = (0..count).map(|i| tokens / count + usize::from(i < tokens % count)).collect();
        if count > longest.len() { vec![longest, many] } else { vec![longest] }
    }

    /// The plan for passes of at most `pass_tokens`.
    ///
    /// # Errors
    /// An id outside the vocabulary, which there is none of.
    pub fn plan(&self, config: &TrainConfig, pass_tokens: usize, layout: Layout) -> Result<MemoryPlan> {
        let base = Base::<Counted>::counted(Counted::new(self.table, self.threads), Arc::clone(&self.model))?;
        let mut adapters = Adapters::none(&base);
        adapters.attach_zeros(&base, &self.method, &self.specs)?;
        self.beside.iter().try_for_each(|(method, specs)| adapters.attach_zeros(&base, method, specs))?;
        adapters.attach_learned(&base, &self.learned, None)?;
        if let Some((method, specs)) = &self.aside {
            adapters.attach_fixed_zeros(&base, method, specs)?;
        }
        let mut grads = gradients(&base, &adapters)?;
        let mut depth = match config.dropbp {
            Some(_) => Depth::measuring(&base.backend, self.model.config().layers)?,
            None => Depth::default(),
        };
        let passes = self.fullest(config, pass_tokens);
        let tokens: usize = passes[0].iter().sum();
        let mut pool = Pool::default();
        pool.reserve(&base.backend, 1, 1)?;
        let dropout = (config.dropout > 0.0).then_some(Dropout {
            p: config.dropout,
            key: 0,
            first: 0,
            form: config.dropout_form,
        });
        let arithmetic = config.precision.arithmetic();
        let mut sums = Sums::new(&base.backend, 1)?;
        let mut pass = |micro: &MicroBatch, dropout, grads: Option<&mut Gradients<Counted>>| {
            let mut watch = Watch { keep_going: &mut || true, peak: &mut Peak::ignored() };
            let sums = (&mut sums, 0);
            let learned = (grads, &mut depth);
            micro_step(&base, &adapters, micro, 1.0, dropout, arithmetic, &layout, learned, &mut pool, sums, &mut watch)
        };
        for lengths in passes {
            pass(&MicroBatch::of_lengths(lengths, tokens), dropout, Some(&mut grads))?;
        }
        for held in held_of_lengths(&self.held).split(tokens) {
            pass(&held, dropout, Some(&mut grads))?;
        }
        if self.evaluated > 0 {
            // Samples are evaluated one at a time, and only their loss is asked for.
            pass(&MicroBatch::of_lengths(vec![self.evaluated], self.evaluated), None, None)?;
        }
        let count = base.backend.count();
        // What was put aside of a module comes to the host with what comes to it, and both as they will be.
        let aside_bytes = self
            .aside
            .iter()
            .flat_map(|(_, specs)| specs.windows(2))
            .map(|pair| 2 * 4 * (pair[0].values() + pair[1].values()) as u64);
        let aside_bytes = aside_bytes.max().unwrap_or(0);
        let on_device = |fixed: bool| {
            let parts = adapters.held().parts().filter(|(part, _)| fixed || *part != TensorPart::Fixed);
            4 * parts.map(|(_, values)| values as u64).sum::<u64>()
        };
        // What is never trained is held for the file as well.
        let frozen = self.specs.iter().filter(|spec| self.method.is_frozen(&spec.name));
        let frozen = 4 * frozen.map(|spec| spec.values() as u64).sum::<u64>();
        let trained = self.all().filter(|spec| !self.method.is_frozen(&spec.name));
        let all = 4 * self.all().map(|spec| spec.values() as u64).sum::<u64>();
        let largest = 2 * 4 * trained.map(TensorSpec::values).max().unwrap_or(0) as u64;
        let (begins, hidden) = (self.method.begins_with(), self.model.config().hidden_size);
        let mut plan = MemoryPlan {
            weights_mapped: 0,
            adapter: on_device(true) + frozen,
            gradients: on_device(false),
            // A budget of ranks remembers two numbers for each value.
            optimizer: config.state_bytes(self.values())
                + self.method.budget().map_or(0, |_| 8 * self.values() as u64)
                // Where the tensors stand while the gradient is taken up the hill.
                + config.sam.map_or(0, |_| 4 * self.values() as u64),
            layer_inputs: count.regions[1] as u64,
            layer_workspace: count.regions[0] as u64,
            attention: count.attention as u64,
            logits: count.loss as u64,
            // Its values, and the bytes of the file; all at once of one that is made into another.
            saving: (largest + if self.method.converts() { all } else { 0 })
                .max(adapters.held().made_bytes())
                .max(config.riemannian_bytes(self.all()))
                .max(aside_bytes),
            kernels: count.kernels as u64,
            references: self.references,
            asking: 0,
            beginning: 0,
            before: self.before,
            data: self.data,
            tokenizer: 0,
            tokenizer_loaded: 0,
            pass_tokens: tokens,
            layout,
            optimizer_kind: config.optimizer,
        };
        if let Some(init) = begins {
            let passes = if init.reads_data() { plan.steps() } else { 0 };
            plan.beginning = all + passes + init.bytes(&layers_of(&self.specs), hidden, self.looked_at);
        }
        Ok(plan)
    }
}
