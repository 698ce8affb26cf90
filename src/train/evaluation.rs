//! The loss on data that is not learned, and what follows from it.

use super::best::{Candidate, FOLDER, Rule};
use super::{MicroBatch, Observer, Sample, Trainer};
use crate::error::{ErrorCode, Result};
use pocketlora_kernels::Backend;
use std::sync::Arc;

impl<B: Backend> Trainer<B> {
    /// Whether an evaluation belongs to the last step, and has not been made.
    pub(super) fn evaluation_pending(&self) -> bool {
        let (step, every) = (self.facts.step, self.config.eval_every);
        let due = step == self.facts.total_steps || every > 0 && step.is_multiple_of(every);
        self.eval_data.is_some() && step > 0 && due && self.facts.candidates.evaluated != step
    }

    /// Which candidates are kept.
    pub(super) fn rule(&self) -> Rule {
        Rule { lowest: self.config.keep_best, must_pass: false }
    }

    /// The evaluation that is due, if one is; one that is stopped stays due.
    pub(super) fn evaluate_if_due(&mut self, observer: &mut dyn Observer) -> Result<Option<f64>> {
        if !self.evaluation_pending() {
            return Ok(None);
        }
        let loss = match self.evaluate(observer) {
            Err(e) if e.code() == ErrorCode::Cancelled => return Ok(None),
            other => other?,
        };
        self.judge(loss, true, observer)?;
        Ok(loss)
    }

    /// Decides on the adapter as it is now, which `passes` what it must pass, and keeps it if it is better.
    fn judge(&mut self, loss: Option<f64>, passes: bool, observer: &mut dyn Observer) -> Result<()> {
        let candidate = Candidate { step: self.facts.step, loss };
        if self.facts.candidates.judge(candidate, passes, self.rule()) {
            match self.write_adapter(&self.out.join(FOLDER)) {
                Ok(()) => self.facts.candidates.kept = Some(candidate),
                Err(e) if e.code() == ErrorCode::Io => observer.on_warning(&e),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Mean loss on the evaluation data, if there is any.
    fn evaluate(&mut self, observer: &mut dyn Observer) -> Result<Option<f64>> {
        let Some(data) = self.eval_data.take() else { return Ok(None) };
        let base = Arc::clone(&self.base);
        let loss = base.backend.scope(|| {
            let losses = data.samples.iter().map(|s| self.micro(&MicroBatch::new([s]), 1.0, None, false, observer));
            losses.sum::<Result<f64>>()
        });
        let tokens: usize = data.samples.iter().map(Sample::trained_tokens).sum();
        self.eval_data = Some(data);
        Ok(Some(loss? / tokens as f64))
    }
}
