//! The loss on data that is not learned, and what follows from it.

use super::best::{Candidate, FOLDER, Rule};
use super::hold_out::Evaluation;
use super::sums::Sums;
use super::{Dataset, MicroBatch, Observer, Sample, Trainer};
use crate::error::{ErrorCode, Result};
use pocketlora_kernels::Backend;
use std::sync::Arc;

impl<B: Backend> Trainer<B> {
    /// Whether an evaluation belongs to the last step, and has not been made.
    pub(super) fn evaluation_pending(&self) -> bool {
        let (step, every) = (self.facts.step, self.config.eval_every);
        let due = step == self.facts.total_steps || every > 0 && step.is_multiple_of(every);
        let missing = match step {
            0 => self.facts.start.is_none(),
            _ => due && self.facts.candidates.evaluated != step,
        };
        missing && (self.eval_data.is_some() || self.general.is_some())
    }

    /// Which candidates are kept.
    pub(super) fn rule(&self) -> Rule {
        Rule { lowest: self.config.keep_best, must_pass: self.config.max_forgetting.is_some() }
    }

    /// The evaluation that is due, if one is; one that is stopped stays due.
    pub(super) fn evaluate_if_due(&mut self, observer: &mut dyn Observer) -> Result<Option<Evaluation>> {
        if !self.evaluation_pending() {
            return Ok(None);
        }
        let found = match self.evaluate(observer) {
            Err(e) if e.code() == ErrorCode::Cancelled => return Ok(None),
            other => other?,
        };
        if self.facts.step == 0 {
            self.facts.start = Some(found);
        }
        // What training starts from is a result only where none that it leads to may pass.
        if self.facts.step > 0 || self.rule().must_pass {
            let passes = found.passes(self.facts.start, self.config.max_forgetting);
            self.judge(found, passes, observer)?;
        }
        Ok(Some(found))
    }

    /// Decides on the adapter as it is now, which `passes` what it must pass, and keeps it if it is better.
    fn judge(&mut self, found: Evaluation, passes: bool, observer: &mut dyn Observer) -> Result<()> {
        let candidate = Candidate { step: self.facts.step, loss: found.held_out, general: found.general };
        if self.facts.candidates.judge(candidate, passes, self.rule()) {
            match self.write_adapter(&self.out.join(FOLDER)) {
                Ok(()) => self.facts.candidates.kept = Some(candidate),
                Err(e) if e.code() == ErrorCode::Io => observer.on_warning(&e),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Watches the loss on a general text, too. To be called before the run.
    pub(crate) fn watch(&mut self, general: Dataset) {
        self.plan.data += general.bytes() as u64;
        self.general = Some(general);
    }

    /// Names what the tokenizer takes of the memory held before the run, and what it took before that.
    pub(crate) fn beside_tokenizer(&mut self, held: u64, loaded: u64) {
        (self.plan.tokenizer, self.plan.tokenizer_loaded) = (held, loaded);
    }

    fn evaluate(&mut self, observer: &mut dyn Observer) -> Result<Evaluation> {
        let (held_out, general) = (self.eval_data.take(), self.general.take());
        let found = (|| {
            let held_out = held_out.as_ref().map(|data| self.mean_loss(data, observer)).transpose()?;
            let general = general.as_ref().map(|data| self.mean_loss(data, observer)).transpose()?;
            Ok(Evaluation { held_out, general })
        })();
        (self.eval_data, self.general) = (held_out, general);
        found
    }

    /// Mean loss of the learned tokens of `data`.
    fn mean_loss(&mut self, data: &Dataset, observer: &mut dyn Observer) -> Result<f64> {
        let (base, queue) = (Arc::clone(&self.base), self.turn.clone());
        let _turn = queue.take();
        let mut sums = Sums::new(&base.backend, data.samples.len())?;
        let mut samples = data.samples.iter().map(|sample| MicroBatch::new([sample])).enumerate();
        samples.try_for_each(|(i, sample)| self.micro(&sample, 1.0, None, false, (&mut sums, i), observer))?;
        let loss: f64 = sums.read(&base.backend)?.iter().sum();
        let tokens: usize = data.samples.iter().map(Sample::trained_tokens).sum();
        Ok(loss / tokens as f64)
    }
}
