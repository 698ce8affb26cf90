//! Training of LoRA adapters on a frozen base.

mod batches;
mod checkpoint;
mod config;
mod data;
mod evaluation;
mod loss;
mod observer;
mod plan;
mod report;
mod saving;
mod setup;
mod step;

pub use batches::{BatchReport, Batches, largest_micro_batch};
pub use config::{Optimizer, Precision, Schedule, TrainConfig};
pub use data::{Dataset, Limits, Mask, Sample, Splits};
pub(crate) use loss::bytes as loss_bytes;
pub use observer::{Observer, StepReport, Summary};
pub use plan::MemoryPlan;
pub use report::{Bar, DataReport, Lengths};
pub(crate) use setup::fresh_modules;
pub use step::{MicroBatch, Watch, micro_step};

use crate::adapter::{Adapters, Dropout, LoraConfig};
use crate::error::{Error, ErrorCode, Result};
use crate::exec::train::Gradients;
use crate::exec::{Base, Pool};
use crate::memory::Peak;
use crate::rng::mix;
use checkpoint::RunFacts;
use pocketlora_kernels::{AdamW, Backend};
use setup::Trained;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// Stream of random numbers that a run draws from its seed.
const DROPOUT: u64 = 3;

/// A run between two steps.
pub struct Trainer<B: Backend> {
    base: Arc<Base<B>>,
    config: TrainConfig,
    data: Dataset,
    batches: Batches,
    eval_data: Option<Dataset>,
    out: PathBuf,
    lora: LoraConfig,
    adapters: Adapters<B>,
    tensors: Vec<Trained<B>>,
    grads: Gradients<B>,
    pool: Pool<B>,
    pool_tokens: usize,
    facts: RunFacts,
    peak: Peak,
}

impl<B: Backend> Trainer<B> {
    /// Steps done.
    #[must_use]
    pub fn step_number(&self) -> u64 {
        self.facts.step
    }

    /// Steps in all.
    #[must_use]
    pub fn total_steps(&self) -> u64 {
        self.facts.total_steps
    }

    /// What the run will hold in memory, with `weights_mapped` bytes of mapped files.
    #[must_use]
    pub fn plan(&self, weights_mapped: u64) -> MemoryPlan {
        let work_bytes = match self.config.precision {
            Precision::Exact => 4,
            Precision::Bf16 => 2,
        };
        let (model, values) = (self.base.model.config(), self.trained_parameters());
        let head_trained = self.grads.ranges[self.base.model.head_param().0 as usize].is_some();
        let loss = |rows| loss_bytes(&self.base, head_trained, rows);
        MemoryPlan::new(model, &self.config, &self.data, values, work_bytes, weights_mapped, loss)
    }

    /// Trained values.
    #[must_use]
    pub fn trained_parameters(&self) -> usize {
        self.tensors.iter().map(|t| t.shape[0] * t.shape[1]).sum()
    }

    /// Memory at the fullest moments of the steps so far.
    #[must_use]
    pub fn peak(&self) -> Peak {
        self.peak
    }

    /// Gradients of the last step, after clipping, under their PEFT names.
    ///
    /// # Errors
    /// Device lost.
    pub fn gradients(&self) -> Result<Vec<(String, Vec<f32>)>> {
        let read = |(t, grad): (&Trained<B>, &B::Buffer)| {
            let mut host = vec![0.0; self.base.backend.len(grad)];
            self.base.backend.read(grad, &mut host)?;
            Ok((t.name.clone(), host))
        };
        self.tensors.iter().zip(&self.grads.tensors).map(read).collect()
    }

    /// Runs to the end, or until the observer stops it; then writes the adapter, or a checkpoint.
    ///
    /// # Errors
    /// Non-finite loss or gradients (the last checkpoint is kept), files that cannot be written, out of memory.
    pub fn run(&mut self, observer: &mut dyn Observer) -> Result<Summary> {
        let start = Instant::now();
        let (mut tokens, mut trained, mut loss, mut eval_loss) = (0u64, 0u64, f64::NAN, None);
        let mut stopped = false;
        while self.facts.step < self.facts.total_steps && !stopped {
            let mut report = match self.step(observer) {
                Err(e) if e.code() == ErrorCode::Cancelled => break,
                other => other?,
            };
            let last = report.step == report.total_steps;
            if last || self.config.eval_every > 0 && report.step.is_multiple_of(self.config.eval_every) {
                report.eval_loss = match self.evaluate(observer) {
                    Err(e) if e.code() == ErrorCode::Cancelled => None,
                    other => other?,
                };
            }
            tokens += report.tokens as u64;
            trained += report.trained as u64;
            (loss, eval_loss) = (report.loss, report.eval_loss.or(eval_loss));
            stopped = observer.on_step(&report).is_break();
            if !last && self.config.save_every > 0 && report.step.is_multiple_of(self.config.save_every) {
                self.save_checkpoint()?;
            }
        }
        let done = self.facts.step == self.facts.total_steps;
        if done {
            self.save_adapter()?;
            checkpoint::remove(&self.out)?;
        } else {
            self.save_checkpoint()?;
        }
        Ok(Summary {
            done,
            steps: self.facts.step,
            loss,
            tokens,
            trained_tokens: trained,
            time: start.elapsed(),
            peak_anonymous_bytes: self.peak.bytes(),
            eval_loss,
            adapter: self.out.clone(),
        })
    }

    /// One optimizer step. A stopped or failed one leaves the run as it was before.
    ///
    /// # Errors
    /// Stopped by the observer, non-finite loss or gradients, out of memory.
    pub fn step(&mut self, observer: &mut dyn Observer) -> Result<StepReport> {
        let base = Arc::clone(&self.base);
        base.backend.scope(|| self.step_in_scope(observer))
    }

    fn step_in_scope(&mut self, observer: &mut dyn Observer) -> Result<StepReport> {
        let start = Instant::now();
        let number = self.facts.step + 1;
        let micros = self.batches.micro_batches(&self.data, number);
        let trained: usize = micros.iter().map(MicroBatch::trained).sum();
        let scale = 1.0 / trained as f32;

        let base = Arc::clone(&self.base);
        for grad in &mut self.grads.tensors {
            base.backend.zero(grad);
        }
        let mut loss = 0.0;
        for (i, micro) in micros.iter().enumerate() {
            let dropout = (self.config.dropout > 0.0).then(|| {
                let key = mix(mix(mix(self.config.seed, DROPOUT), number), i as u64);
                Dropout { p: self.config.dropout, key }
            });
            loss += self.micro(micro, scale, dropout, true, observer)?;
        }
        let loss = loss / trained as f64;
        let grad_norm = self.grad_norm()?;
        if !loss.is_finite() || !grad_norm.is_finite() {
            let message = format!(
                "expected a finite loss and gradient, got loss `{loss}` and gradient norm `{grad_norm}`; lower the \
                 learning rate, then resume from the last checkpoint or start again"
            );
            return Err(Error::new(ErrorCode::Diverged, format!("step {number}"), message));
        }
        if self.config.clip > 0.0 && grad_norm > self.config.clip {
            // As torch.nn.utils.clip_grad_norm_ does it.
            let factor = (self.config.clip / (grad_norm + 1e-6)) as f32;
            for grad in &mut self.grads.tensors {
                base.backend.scale(factor, grad);
            }
        }
        let lr = self.config.lr_at(number, self.facts.total_steps);
        let weight_decay = self.config.weight_decay;
        let adamw = AdamW { lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay, step: number as u32 };
        for (t, grad) in self.tensors.iter_mut().zip(&self.grads.tensors) {
            base.backend.adamw(&adamw, grad, &mut t.master, &mut t.m, &mut t.v);
        }
        self.publish();
        self.facts.step = number;
        Ok(StepReport {
            step: number,
            total_steps: self.facts.total_steps,
            loss,
            lr,
            grad_norm,
            tokens: micros.iter().map(MicroBatch::tokens).sum(),
            trained,
            time: start.elapsed(),
            eval_loss: None,
        })
    }

    /// Loss sum of one micro-batch, with its gradient added if `learn`.
    fn micro(
        &mut self,
        micro: &MicroBatch,
        scale: f32,
        dropout: Option<Dropout>,
        learn: bool,
        observer: &mut dyn Observer,
    ) -> Result<f64> {
        if self.pool_tokens != micro.tokens() {
            self.pool.clear();
            self.pool_tokens = micro.tokens();
        }
        let mut keep_going = || observer.keep_going();
        let mut watch = Watch { keep_going: &mut keep_going, peak: &mut self.peak };
        let grads = learn.then_some(&mut self.grads);
        let arithmetic = self.config.precision.arithmetic();
        micro_step(&self.base, &self.adapters, micro, scale, dropout, arithmetic, grads, &mut self.pool, &mut watch)
    }

    fn grad_norm(&self) -> Result<f64> {
        let squares = self.grads.tensors.iter().map(|g| self.base.backend.sum_squares(g));
        Ok(squares.sum::<Result<f64, _>>()?.sqrt())
    }

    /// Rounds the masters into the matrices that forward and backward use.
    fn publish(&mut self) {
        let Self { base, adapters, grads, tensors, .. } = self;
        for (param, adapter) in adapters.iter_mut() {
            let Some(range) = grads.ranges[param.0 as usize].clone() else { continue };
            let masters: Vec<&B::Buffer> = tensors[range].iter().map(|t| &t.master).collect();
            adapter.set(&base.backend, &masters);
        }
    }
}
