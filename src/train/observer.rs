//! What a run tells its host, and how the host stops it.

use super::Known;
use super::hold_out::{Evaluation, Overlap};
use crate::error::{Error, ErrorCode};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// 1-based number.
    pub step: u64,
    /// Steps in all.
    pub total_steps: u64,
    /// Mean loss of the learned tokens (natural log), before the step.
    pub loss: f64,
    /// Learning rate.
    pub lr: f32,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens run.
    pub tokens: usize,
    /// Tokens learned.
    pub trained: usize,
    /// Wall-clock time, pauses not counted.
    pub time: Duration,
    /// Mean loss on the evaluation data, where this step ended with one.
    pub eval_loss: Option<f64>,
    /// Mean loss on the general text, there too.
    pub general_loss: Option<f64>,
    /// General questions that were answered rightly, where they were asked after this step.
    pub known: Option<Known>,
    /// Mean divergence (nats) from what the base says on the held tokens, where the step had some.
    pub held_loss: Option<f64>,
}

/// Loss of a first step below which something is wrong, in nats: text that a model has not seen costs it 1 to 4.
const LITTLE: f64 = 0.05;

impl StepReport {
    /// Whether this is a first step that found next to nothing to learn.
    #[must_use]
    pub fn learns_little(&self) -> bool {
        self.step == 1 && self.loss < LITTLE
    }

    /// What to say of it.
    pub(super) fn little_to_learn(&self) -> Error {
        let message = format!(
            "expected a loss above {LITTLE} before anything is learned, got `{:.3}`; there is almost nothing to learn, or \
             the wrong tokens are learned: look at them with `train --dry-run`",
            self.loss
        );
        Error::new(ErrorCode::Data, "step 1", message)
    }
}

/// What an evaluation looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Data that is not learned: held out, given, or other wordings of what is.
    HeldOut,
    /// A general text.
    GeneralText,
    /// General questions.
    Questions,
}

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::HeldOut => "held-out data",
            Self::GeneralText => "general text",
            Self::Questions => "general questions",
        })
    }
}

/// Who watches a run.
pub trait Observer {
    /// After every step; `Break` stops the run there, with a checkpoint.
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()>;

    /// Asked many times a second; `false` stops the run within a layer's time, with a checkpoint of the last whole
    /// step. Blocking in it pauses the run.
    fn keep_going(&mut self) -> bool {
        true
    }

    /// So much of `all` is done of what a fresh adapter begins with, where that takes work: layers or texts, before the first
    /// step, and for the last time when it is done.
    fn on_beginning(&mut self, done: usize, all: usize) {
        let _ = (done, all);
    }

    /// So many of the `prompts` on which the model will be held are answered: before the first step, and for the last time
    /// when all are.
    fn on_preparing(&mut self, done: usize, prompts: usize) {
        let _ = (done, prompts);
    }

    /// The adapter is being checked: of `all` samples or questions of `what`, `done` have been looked at. Steps go on after
    /// it, if some are left.
    fn on_checking(&mut self, what: Check, done: usize, all: usize) {
        let _ = (what, done, all);
    }

    /// Something failed that training outlives: a checkpoint could not be written, which is tried again when the next one
    /// is due, or the newest one is damaged, so that the run goes on from the one before it. Or something looks wrong: what
    /// is evaluated is learned as well, or the first step finds next to nothing to learn.
    fn on_warning(&mut self, warning: &Error) {
        let _ = warning;
    }
}

/// What a run did.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The run came to its end and the adapter is written.
    pub done: bool,
    /// Steps done, those before a resume included.
    pub steps: u64,
    /// The step after which the adapter was as it is written; an earlier one where the best is kept.
    pub adapter_step: u64,
    /// The run ended early, for the held-out loss fell no more.
    pub out_of_patience: bool,
    /// The run ended early, for the time was over that it had.
    pub out_of_time: bool,
    /// Loss of the last step.
    pub loss: f64,
    /// Tokens run in this process.
    pub tokens: u64,
    /// Tokens learned in this process.
    pub trained_tokens: u64,
    /// Wall-clock time in this process.
    pub time: Duration,
    /// Highest anonymous memory seen, in bytes.
    pub peak_anonymous_bytes: Option<u64>,
    /// What was found before the first step.
    pub before: Option<Evaluation>,
    /// Mean loss on the evaluation data after the last step, if it was measured there.
    pub eval_loss: Option<f64>,
    /// Mean loss on the general text, there too.
    pub general_loss: Option<f64>,
    /// General questions that were answered rightly there, if they were asked.
    pub known: Option<Known>,
    /// General questions asked.
    pub asked: usize,
    /// How much of the evaluation data is learned as well, where there is any.
    pub eval_overlap: Option<Overlap>,
    /// What was found after [`Summary::adapter_step`], where an earlier adapter than the last may have been kept.
    pub kept: Option<Evaluation>,
    /// The adapter's folder.
    pub adapter: PathBuf,
}

impl Summary {
    /// What was found of the adapter that is written; nothing while the run is not done.
    #[must_use]
    pub fn of_adapter(&self) -> Evaluation {
        let last = Evaluation { held_out: self.eval_loss, general: self.general_loss, known: self.known };
        if self.done { self.kept.unwrap_or(last) } else { Evaluation::default() }
    }

    /// What was measured before the first step and not of the adapter that is written, for the check at the end was
    /// stopped. Nothing while the run is not done.
    #[must_use]
    pub fn unmeasured(&self) -> Vec<&'static str> {
        let (before, after) = (self.before.unwrap_or_default(), self.of_adapter());
        let missing = [
            ("loss on the held-out data", before.held_out.is_some() && after.held_out.is_none()),
            ("loss on the general text", before.general.is_some() && after.general.is_none()),
            ("general questions", before.known.is_some() && after.known.is_none()),
        ];
        missing.into_iter().filter(|(_, missing)| self.done && *missing).map(|(name, _)| name).collect()
    }

    /// The share of the general questions known before that the written adapter does not know any more, in percent.
    #[must_use]
    pub fn forgotten_percent(&self) -> Option<f64> {
        Some(self.of_adapter().known?.lost_percent(self.before?.known?))
    }
}

/// What a run sums up for its [`Summary`].
pub(super) struct Tally {
    pub start: Instant,
    pub tokens: u64,
    pub trained: u64,
    pub loss: f64,
    pub last: Evaluation,
}

impl Tally {
    pub fn new() -> Self {
        Self { start: Instant::now(), tokens: 0, trained: 0, loss: f64::NAN, last: Evaluation::default() }
    }

    pub fn add(&mut self, report: &StepReport) {
        self.tokens += report.tokens as u64;
        self.trained += report.trained as u64;
        self.loss = report.loss;
        let StepReport { eval_loss: held_out, general_loss: general, known, .. } = *report;
        // What was found before this step does not hold after it.
        self.last = Evaluation { held_out, general, known };
    }

    pub fn evaluated(&mut self, found: Evaluation) {
        self.last.held_out = found.held_out.or(self.last.held_out);
        self.last.general = found.general.or(self.last.general);
        self.last.known = found.known.or(self.last.known);
    }
}
