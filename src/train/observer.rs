//! What a run tells its host, and how the host stops it.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

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
    /// Wall-clock time.
    pub time: Duration,
    /// Mean loss on the evaluation data, where this step ended with one.
    pub eval_loss: Option<f64>,
}

/// Who watches a run.
pub trait Observer: Send {
    /// After every step; `Break` stops the run there, with a checkpoint.
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()>;

    /// Asked many times a second; `false` stops the run within a layer's time, with a checkpoint of the last whole
    /// step. Blocking in it pauses the run.
    fn keep_going(&mut self) -> bool {
        true
    }
}

/// What a run did.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// All steps were done and the adapter is written.
    pub done: bool,
    /// Steps done, those before a resume included.
    pub steps: u64,
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
    /// Mean loss on the evaluation data at the end.
    pub eval_loss: Option<f64>,
    /// The adapter's folder.
    pub adapter: PathBuf,
}
