//! Training of adapters on a frozen base.

mod allocate;
pub mod auto;
mod batches;
mod beside;
mod best;
mod budget;
mod checkpoint;
mod config;
mod control;
mod data;
mod effect;
mod evaluation;
mod first;
mod hold_out;
mod init;
mod keep;
pub(crate) mod layers;
mod learned;
mod lock;
mod loss;
mod material;
mod observer;
mod optimizer;
mod plan;
mod precondition;
mod quiz;
mod ranks;
mod relora;
mod report;
mod room;
mod run_folder;
mod saving;
mod setup;
mod sharpness;
pub(crate) mod step;
pub(crate) mod sums;
mod trained;
mod words;

pub use crate::data::Unused;
pub use batches::BatchReport;
pub(crate) use batches::{Batches, largest_micro_batch};
pub use checkpoint::has_checkpoint;
pub use config::{Optimizer, Schedule, TrainConfig, TrainPrecision};
pub use control::{Directive, Policy, TrainHandle};
pub(crate) use data::encode;
pub use data::{Asked, Checks, Dataset, Mask, Sample, SampleLimits, SplitRecord, Splits};
pub use hold_out::{Evaluation, Overlap, hold_out};
pub(crate) use hold_out::{general_start, general_text, plain};
pub(crate) use keep::keep_share;
pub use keep::{Forgetting, Keep, KeepReport, Prompts};
pub(crate) use layers::Depth;
pub use layers::LayerOrder;
pub use learned::{Change, Learned, Recall};
pub use material::Material;
pub(crate) use material::Shipped;
use observer::Tally;
pub use observer::{Check, Observer, StepReport, Summary};
pub use plan::MemoryPlan;
pub(crate) use quiz::{ANSWER as QUIZ_ANSWER, reading};
pub use quiz::{Known, Quiz};
pub use ranks::{LayerRank, RankChoice};
pub use report::{Bar, DataReport, Lengths};
use run_folder::Journal;
pub use run_folder::{LogLine, RunFolder, SETTINGS};
pub(crate) use setup::{fingerprint, plan_for, refuse_model};
pub use step::Layout;
pub(crate) use step::{MicroBatch, Watch, micro_step};
pub(crate) use sums::Sums;

use crate::adapter::{AdapterFile, Adapters, Dropout, Gradients};
use crate::base::{Base, Pool};
use crate::error::{Error, ErrorCode, Result};
use crate::memory::Peak;
use crate::rng::mix;
use crate::turn::Turn;
use allocate::Allocator;
use best::Candidate;
use checkpoint::RunFacts;
use keep::{Held, Lessons};
use layers::StepLayers;
use lock::{Earlier, FolderLock};
use pocketlora_kernels::{Backend, Call};
use relora::Cycles;
use room::Room;
use saving::Pace;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use trained::Trained;

/// Stream of random numbers that a run draws from its seed.
const DROPOUT: u64 = 3;
/// Of what a step's adapter is made of, where that is chosen.
const DRAW: u64 = 11;

/// A run between two steps.
pub(crate) struct Trainer<B: Backend> {
    base: Arc<Base<B>>,
    config: TrainConfig,
    data: Dataset,
    batches: Batches,
    eval_data: Option<Dataset>,
    /// What of it is learned as well.
    eval_overlap: Option<Overlap>,
    /// What tells forgetting.
    general: Option<Dataset>,
    quiz: Option<Quiz>,
    /// What the model is held to.
    held: Option<Held>,
    /// What the adapter of the start was taught.
    taught: Lessons,
    /// Prompts that are answered at once.
    at_once: usize,
    out: PathBuf,
    /// The adapter in training without its tensors. Weights that the adapter of the start brought along are in it: they
    /// stay as they are, and are written again.
    file: AdapterFile,
    adapters: Adapters<B>,
    tensors: Vec<Trained<B>>,
    /// What the adapter's beginning looks at, as long as it has to be given that.
    beginning: Option<Vec<MicroBatch>>,
    /// Gives ranks up, where the method has a budget of them.
    allocator: Option<Allocator>,
    /// What was learned before the adapter began anew, where it does.
    cycles: Option<Cycles>,
    /// Layers of the step under way.
    layers: StepLayers<B>,
    grads: Gradients<B>,
    pool: Pool<B>,
    /// The pool holds the memory that was planned for it.
    ready: bool,
    plan: MemoryPlan,
    facts: RunFacts,
    peak: Peak,
    /// The device's queue.
    turn: Turn,
    handle: TrainHandle,
    policy: Option<Policy>,
    /// Time of pauses in the step under way.
    paused: Duration,
    /// When the run is to end.
    end_by: Option<Instant>,
    out_of_time: bool,
    /// To be told at the next chance.
    warnings: Vec<Error>,
    /// The checkpoint in the output folder is this run's.
    saved: bool,
    /// Held on the disk for the adapter.
    room: Option<Room>,
    /// What an earlier run left in the output folder and this one may not replace.
    earlier: Option<Earlier>,
    _lock: FolderLock,
}

/// What a run works on between two questions whether to go on.
struct Parts<'t, B: Backend> {
    base: &'t Base<B>,
    adapters: &'t Adapters<B>,
    grads: &'t mut Gradients<B>,
    pool: &'t mut Pool<B>,
    peak: &'t mut Peak,
    depth: &'t mut Depth<B>,
}

/// What the passes of a step came to, beside their gradient.
struct Found {
    /// Mean loss of the learned tokens, with what is added for the values of tensors.
    loss: f64,
    /// Mean divergence on what is held.
    held_loss: Option<f64>,
    /// Of the gradient.
    norm: f64,
}

impl<B: Backend> Trainer<B> {
    /// Shares the device with all who stand in `queue`. To be called before the run.
    pub(crate) fn take_turns(&mut self, queue: Turn) {
        self.turn = queue;
    }

    /// What it learns.
    pub(crate) fn data(&self) -> &Dataset {
        &self.data
    }

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
        MemoryPlan { weights_mapped, ..self.plan }
    }

    /// Trained values.
    #[must_use]
    pub fn trained_parameters(&self) -> usize {
        self.tensors.iter().map(|t| t.spec.values()).sum()
    }

    /// Memory at the fullest moments of the steps so far.
    #[must_use]
    pub fn peak(&self) -> Peak {
        self.peak
    }

    /// Gradients that the optimizer had in the last step, clipped and all, under their PEFT names.
    ///
    /// # Errors
    /// Device lost.
    pub fn gradients(&self) -> Result<Vec<(String, Vec<f32>)>> {
        let read = |t: &Trained<B>| {
            let grad = self.grads.tensors[t.id.number()].as_ref().expect("what is trained has a gradient");
            let mut host = vec![0.0; self.base.backend.len(grad)];
            self.base.backend.read(grad, &mut host)?;
            Ok((t.spec.name.clone(), host))
        };
        self.tensors.iter().map(read).collect()
    }

    /// A handle that pauses, resumes and stops this trainer, and asks for snapshots, from any thread.
    #[must_use]
    pub fn handle(&self) -> TrainHandle {
        self.handle.clone()
    }

    /// Has the run end with the first step that is done at `time`, with the adapter of then.
    pub fn end_by(&mut self, time: Instant) {
        self.end_by = Some(time);
    }

    /// Sets the rule that is asked between layers whether to work, pause or stop.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = Some(policy);
    }

    /// Lets this run replace the adapter or the checkpoint that an earlier one left in its folder.
    pub fn replace_earlier(&mut self) {
        self.earlier = None;
    }

    fn check_earlier(&self) -> Result<()> {
        self.earlier.map_or(Ok(()), |earlier| Err(earlier.refusal(&self.out)))
    }

    /// Runs to the end, or until the observer, the policy or a handle stops it; then writes the adapter, or a checkpoint.
    ///
    /// # Errors
    /// Non-finite loss or gradients (the last checkpoint is kept), files that cannot be written, out of memory.
    pub fn run(&mut self, observer: &mut dyn Observer) -> Result<Summary> {
        self.check_earlier()?;
        if !self.finished() {
            self.room = Some(self.hold_room()?);
        }
        let _running = self.handle.enter();
        let mut tally = Tally::new();
        self.warnings.drain(..).for_each(|warning| observer.on_warning(&warning));
        let mut journal = Journal::open(&self.out, &self.config, self.facts.step, self.facts.start, observer);
        let mut stopped = stops(self.begin(observer))?;
        if !stopped && let Some(found) = self.evaluate_if_due(observer)? {
            // Where no step is left, it is what the end finds; what is found before the first one is not.
            if self.facts.step > 0 {
                tally.evaluated(found);
            }
            journal.evaluated(self.facts.step, found, observer);
        }
        stopped |= self.evaluation_pending();
        if !stopped && !self.finished() {
            stopped = stops(self.prepare(observer))?;
        }
        let mut pace = Pace::new();
        while !stopped && !self.finished() {
            let mut report = match self.step(observer) {
                Err(e) if e.code() == ErrorCode::Cancelled => break,
                other => other?,
            };
            self.out_of_time = self.end_by.is_some_and(|end| Instant::now() >= end);
            let found = self.evaluate_if_due(observer)?;
            let Evaluation { held_out, general, known } = found.unwrap_or_default();
            (report.eval_loss, report.general_loss, report.known) = (held_out, general, known);
            tally.add(&report);
            journal.add(&report, observer);
            if report.learns_little() {
                observer.on_warning(&report.little_to_learn());
            }
            stopped = observer.on_step(&report).is_break();
            let due = self.config.save_every > 0 && report.step.is_multiple_of(self.config.save_every);
            if (due || pace.due(self.config.save_seconds)) && !stopped && !self.finished() {
                let begin = Instant::now();
                self.try_checkpoint(observer)?;
                journal.draw(observer);
                pace.saved(begin.elapsed());
            }
        }
        journal.draw(observer);
        let done = self.finished();
        if done {
            tally.evaluated(self.evaluate_end(observer)?);
            self.finish(observer)?;
        } else {
            // What the adapter will need again is the checkpoint's now, which is all that there is.
            self.room = None;
            self.save_checkpoint()?;
        }
        self.handle.serve(&|| self.snapshot());
        Ok(self.summary(done, tally))
    }

    /// Whether there is nothing left to do but to write the adapter. What the choice of it depends on must be known.
    fn finished(&self) -> bool {
        let out_of_patience = self.facts.candidates.exhausted(self.config.patience);
        let undecided = self.rule().keeps() && self.evaluation_pending();
        out_of_patience || (self.out_of_time || self.facts.step == self.facts.total_steps) && !undecided
    }

    fn summary(&self, done: bool, tally: Tally) -> Summary {
        let kept = self.facts.candidates.kept.filter(|_| done && self.rule().keeps());
        Summary {
            done,
            steps: self.facts.step,
            adapter_step: kept.map_or(self.facts.step, |kept| kept.step),
            out_of_patience: self.facts.candidates.exhausted(self.config.patience),
            out_of_time: self.out_of_time && self.facts.step < self.facts.total_steps,
            loss: tally.loss,
            tokens: tally.tokens,
            trained_tokens: tally.trained,
            time: tally.start.elapsed(),
            peak_anonymous_bytes: self.peak.bytes(),
            before: self.facts.start,
            eval_loss: tally.last.held_out,
            general_loss: tally.last.general,
            known: tally.last.known,
            asked: self.questions(),
            eval_overlap: self.eval_overlap,
            kept: kept.map(|Candidate { loss: held_out, general, known, .. }| Evaluation { held_out, general, known }),
            adapter: self.out.clone(),
        }
    }

    /// One optimizer step. A stopped or failed one leaves the run as it was before.
    ///
    /// # Errors
    /// All steps are done, stopped by the observer, non-finite loss or gradients, out of memory.
    pub fn step(&mut self, observer: &mut dyn Observer) -> Result<StepReport> {
        if self.facts.step >= self.facts.total_steps {
            let message = format!(
                "expected a step that is left, got a run whose `{}` steps are done; begin another run from its adapter",
                self.facts.total_steps
            );
            return Err(Error::new(ErrorCode::Config, "training", message));
        }
        self.check_earlier()?;
        let _running = self.handle.enter();
        self.warnings.drain(..).for_each(|warning| observer.on_warning(&warning));
        self.begin(observer)?;
        self.prepare(observer)?;
        self.paused = Duration::ZERO;
        let queue = self.turn.clone();
        let _turn = queue.take();
        let start = Instant::now();
        let number = self.facts.step + 1;
        let mut micros = self.batches.micro_batches(&self.data, number);
        let trained: usize = micros.iter().map(MicroBatch::trained).sum();
        micros.extend(self.held.as_ref().and_then(|held| held.micro_batch(number)));
        self.choose_layers(number)?;
        let Found { loss, held_loss, norm } = self.gradient(number, &micros, trained, observer)?;
        let grad_norm = self.up_the_hill(number, &micros, trained, norm, observer)?;
        self.clip(grad_norm)?;
        self.precondition()?;
        self.note_layers()?;
        let lr = self.config.lr_at(number, self.facts.total_steps);
        let steps: Vec<Option<u64>> = self.tensors.iter().map(|t| self.steps_of(t, number)).collect();
        let Self { base, config, adapters, grads, tensors, allocator, file, .. } = self;
        for (trained, steps) in tensors.iter_mut().zip(steps) {
            // One that rests has no gradient.
            let (Some(grad), Some(steps)) = (grads.of(trained.id), steps) else { continue };
            let grad = &*grad;
            let mut done = Ok(());
            adapters.held_mut().update(&base.backend, trained.id, &mut |master| {
                let Trained { group, moments, .. } = trained;
                done = moments.step(&base.backend, config, *group, lr, steps, grad, master);
                done = std::mem::replace(&mut done, Ok(())).and_then(|()| trained.hold(&base.backend, master, true));
            });
            done?;
        }
        if let Some(allocator) = allocator {
            allocator.step(number - 1, base, adapters, grads, tensors)?;
        }
        adapters.shrink(base, lr)?;
        first::hold(base, adapters, file, number)?;
        self.restart_if_due(number)?;
        self.adapters.renew(&self.base, number)?;
        self.facts.step = number;
        Ok(StepReport {
            step: number,
            total_steps: self.facts.total_steps,
            loss,
            lr,
            grad_norm,
            tokens: micros.iter().map(MicroBatch::tokens).sum(),
            trained,
            time: start.elapsed().saturating_sub(self.paused),
            eval_loss: None,
            general_loss: None,
            known: None,
            held_loss,
        })
    }

    /// The gradient of step `number` on its `trained` tokens, in place of the last one.
    ///
    /// # Errors
    /// Stopped by the observer, non-finite loss or gradients, out of memory.
    fn gradient(
        &mut self,
        number: u64,
        micros: &[MicroBatch],
        trained: usize,
        observer: &mut dyn Observer,
    ) -> Result<Found> {
        let base = Arc::clone(&self.base);
        // The squares of gradients, then the losses of passes, of which each has a sample at least. They are read together,
        // for a device that records work stands still while it is waited for.
        let most = micros.iter().map(|micro| micro.numbers().len()).sum::<usize>();
        let mut sums = Sums::new(&base.backend, 1 + most)?;
        let draws = self.adapters.draw(&base, mix(mix(self.config.seed, DRAW), number))?;
        let passes = self.accumulate(number, micros, trained, &mut sums, observer);
        if passes.is_err() && draws {
            self.adapters.renew(&base, self.facts.step)?;
        }
        let passes = passes?;
        let penalty = self.adapters.pull(&base, &mut self.grads)?;
        for t in &self.tensors {
            if let Some(grad) = self.grads.of(t.id) {
                t.hold(&base.backend, grad, false)?;
                sums.add_squares(&base.backend, 0, grad)?;
            }
        }
        let sums = sums.read(&base.backend)?;
        let [loss, held_loss] = mean_losses(number, micros, &passes, &sums)?;
        let norm = sums[0].sqrt();
        if !norm.is_finite() {
            return Err(diverged(number, micros, &format!("a gradient of norm `{norm}`")));
        }
        Ok(Found { loss: loss.unwrap_or(f64::NAN) + penalty, held_loss, norm })
    }

    /// Runs the passes of step `number`: the gradient of the mean loss over its `trained` tokens, and of the weighted mean
    /// divergence on what is held, in place of the last step's, and losses in `sums`. Returns the places of each micro-batch's passes in it.
    fn accumulate(
        &mut self,
        number: u64,
        micros: &[MicroBatch],
        trained: usize,
        sums: &mut Sums<B>,
        observer: &mut dyn Observer,
    ) -> Result<Vec<Range<usize>>> {
        if trained == 0 {
            let place = format!("step {number}, {}", samples_of(micros));
            return Err(Error::new(ErrorCode::Data, place, "expected at least one token to learn, got none"));
        }
        for grad in self.grads.tensors.iter_mut().flatten() {
            self.base.backend.run(Call::Zero { x: grad })?;
        }
        let mut places = Vec::with_capacity(micros.len());
        let weight = self.held.as_ref().map_or(0.0, Held::weight);
        let mut next = 1;
        for (i, micro) in micros.iter().enumerate() {
            let dropout = (self.config.dropout > 0.0).then(|| {
                let key = mix(mix(mix(self.config.seed, DROPOUT), number), i as u64);
                Dropout { p: self.config.dropout, key, first: 0, form: self.config.dropout_form }
            });
            self.layers.draw(&self.config, &self.facts.drop_rates, number, i);
            let scale = if micro.is_held() { weight / micro.trained() as f32 } else { 1.0 / trained as f32 };
            let first = next;
            next = self.passes(micro, scale, dropout, (sums, first), observer)?;
            places.push(first..next);
        }
        Ok(places)
    }

    /// One micro-batch in passes as large as memory was planned for: adds its gradient, and the losses of each pass to a
    /// number of `sums` from `at` on. Returns the number after the last.
    fn passes(
        &mut self,
        micro: &MicroBatch,
        scale: f32,
        mut dropout: Option<Dropout>,
        (sums, mut at): (&mut Sums<B>, usize),
        observer: &mut dyn Observer,
    ) -> Result<usize> {
        if micro.tokens() <= self.plan.pass_tokens {
            self.micro(micro, scale, dropout, true, (sums, at), observer)?;
            return Ok(at + 1);
        }
        for pass in micro.split(self.plan.pass_tokens) {
            self.micro(&pass, scale, dropout, true, (&mut *sums, at), observer)?;
            at += 1;
            // However it is split, its tokens drop by one stream.
            if let Some(dropout) = &mut dropout {
                dropout.first += pass.tokens() as u64;
            }
        }
        Ok(at)
    }

    /// Scales gradients of a norm above the bound down to it, as `torch.nn.utils.clip_grad_norm_` does.
    fn clip(&mut self, grad_norm: f64) -> Result<()> {
        if self.config.clip > 0.0 && grad_norm > self.config.clip {
            let factor = (self.config.clip / (grad_norm + 1e-6)) as f32;
            for t in &self.tensors {
                let Some(grad) = self.grads.of(t.id) else { continue };
                self.base.backend.run(Call::Scale { factor, x: grad })?;
            }
        }
        Ok(())
    }

    /// One pass: adds its losses to a number of `sums`, and its gradient if `learn`. The caller has the turn.
    fn micro(
        &mut self,
        micro: &MicroBatch,
        scale: f32,
        dropout: Option<Dropout>,
        learn: bool,
        sums: (&mut Sums<B>, usize),
        observer: &mut dyn Observer,
    ) -> Result<()> {
        if !std::mem::replace(&mut self.ready, true) {
            let floats = |bytes: u64| bytes as usize / size_of::<f32>();
            let (passing, kept) = (floats(self.plan.layer_workspace), floats(self.plan.layer_inputs));
            self.pool.reserve(&self.base.backend, passing, kept)?;
        }
        let arithmetic = self.config.precision.arithmetic();
        let layout = self.plan.layout;
        let done = self.guarded(observer, |parts, keep_going| {
            let Parts { base, adapters, grads, pool, peak, depth } = parts;
            let mut watch = Watch { keep_going, peak };
            let learned = (learn.then_some(grads), depth);
            micro_step(base, adapters, micro, scale, dropout, arithmetic, &layout, learned, pool, sums, &mut watch)
        });
        if done.is_err() {
            // What the abandoned pass held is gone from it.
            self.pool.clear();
            self.ready = false;
        }
        done
    }

    /// Does `work` with the device's turn, which the caller has. It asks between layers whether to go on: all who have a say
    /// in that, and whoever waits for a snapshot or for the device comes first there.
    fn guarded<R>(
        &mut self,
        observer: &mut dyn Observer,
        work: impl FnOnce(Parts<'_, B>, &mut dyn FnMut() -> bool) -> R,
    ) -> R {
        let Self { base, adapters, tensors, grads, pool, peak, file, turn, handle, policy, paused, .. } = self;
        let (base, adapters, tensors, file) = (&**base, &*adapters, &*tensors, &*file);
        let (aside, depth) = ((self.cycles.as_ref(), self.facts.step), &mut self.layers.depth);
        let mut others = || match policy {
            _ if !observer.keep_going() => Directive::Stop,
            Some(policy) => policy(),
            None => Directive::Run,
        };
        work(Parts { base, adapters, grads, pool, peak, depth }, &mut || {
            let make = || {
                let _turn = turn.take();
                saving::snapshot(base, adapters, tensors, file, aside)
            };
            let (go, pause) = turn.without(|| handle.ask(&mut others, &make));
            *paused += pause;
            go
        })
    }
}

/// Whether somebody stopped what was `done`.
///
/// # Errors
/// Any other than that.
fn stops(done: Result<()>) -> Result<bool> {
    match done {
        Err(e) if e.code() == ErrorCode::Cancelled => Ok(true),
        other => other.map(|()| false),
    }
}

/// Mean loss of the learned tokens of a step, and mean divergence on the held ones, where there are such; from the losses of
/// its micro-batches' passes.
fn mean_losses(number: u64, micros: &[MicroBatch], passes: &[Range<usize>], sums: &[f64]) -> Result<[Option<f64>; 2]> {
    let mut found = [(0.0, 0); 2];
    for (micro, passes) in micros.iter().zip(passes) {
        let part: f64 = sums[passes.clone()].iter().sum();
        if !part.is_finite() {
            return Err(diverged(number, std::slice::from_ref(micro), &format!("a loss of `{part}`")));
        }
        let (loss, tokens) = &mut found[usize::from(micro.is_held())];
        *loss += part;
        *tokens += micro.trained();
    }
    Ok(found.map(|(loss, tokens)| (tokens > 0).then(|| loss / tokens as f64)))
}

fn diverged(number: u64, micros: &[MicroBatch], got: &str) -> Error {
    let message = format!(
        "expected a finite loss and gradient, got {got}; start again with a lower `--lr` and `--overwrite`, for from its \
         last checkpoint the run would come by here again"
    );
    Error::new(ErrorCode::Diverged, format!("step {number}, {}", samples_of(micros)), message)
}

/// The samples (1-based) that micro-batches were made of.
fn samples_of(micros: &[MicroBatch]) -> String {
    if micros.iter().all(MicroBatch::is_held) {
        return "general prompts".to_owned();
    }
    let numbers = micros.iter().filter(|micro| !micro.is_held()).flat_map(MicroBatch::numbers);
    let numbers: Vec<String> = numbers.map(|i| (i + 1).to_string()).collect();
    match numbers.len() {
        0..=8 => format!("samples {}", numbers.join(", ")),
        n => format!("samples {} and {} more", numbers[..8].join(", "), n - 8),
    }
}
