//! The loss on data that is not learned, and what follows from it.

use super::best::{Candidate, FOLDER, Rule};
use super::hold_out::Evaluation;
use super::sums::Sums;
use super::{Check, Dataset, Known, MicroBatch, Observer, Parts, Sample, Trainer, quiz};
use crate::error::{ErrorCode, Result};
use crate::exec::infer::Numbers;
use crate::generate::Greedy;
use pocketlora_kernels::{Arithmetic, Backend, CacheType};
use std::sync::Arc;

/// Share of the loss before the first step by which it has to fall to count as better, where auto asks.
const LEAST_FALL: f64 = 0.01;

impl<B: Backend> Trainer<B> {
    /// Whether an evaluation belongs to the last step, and has not been made.
    pub(super) fn evaluation_pending(&self) -> bool {
        let (step, every) = (self.facts.step, self.config.eval_every);
        let due = step == self.facts.total_steps || self.out_of_time || every > 0 && step.is_multiple_of(every);
        let missing = match step {
            0 => self.facts.start.is_none(),
            _ => due && self.facts.candidates.evaluated != step,
        };
        missing && (self.eval_data.is_some() || self.general.is_some() || self.quiz.is_some())
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
        let Evaluation { held_out: loss, general, known } = found;
        let candidate = Candidate { step: self.facts.step, loss, general, known };
        // Where a run goes on for as long as it gets better, a hair is not better.
        let start = self.facts.start.and_then(|s| s.held_out).filter(|_| self.config.eval_reworded);
        let least = start.map_or(0.0, |start| LEAST_FALL * start);
        if self.facts.candidates.judge(candidate, passes, self.rule(), least) {
            match self.write_adapter(&self.out.join(FOLDER)) {
                Ok(()) => self.facts.candidates.kept = Some(candidate),
                Err(e) if e.code() == ErrorCode::Io => observer.on_warning(&e),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Names what the tokenizer takes of the memory held before the run, and what it took before that.
    pub(crate) fn beside_tokenizer(&mut self, held: u64, loaded: u64) {
        (self.plan.tokenizer, self.plan.tokenizer_loaded) = (held, loaded);
    }

    /// General questions that are asked before the run and after it; 0 for none.
    #[must_use]
    pub fn questions(&self) -> usize {
        self.quiz.as_ref().map_or(0, quiz::Quiz::len)
    }

    /// Gives the memory of passes back, in which prompts are answered.
    pub(super) fn give_back(&mut self) {
        self.pool.clear();
        self.ready = false;
        crate::mmap::release_freed();
    }

    /// Which general questions the model answers rightly now. What it takes is not beside what a step takes.
    fn ask_questions(&mut self, observer: &mut dyn Observer) -> Result<Option<Known>> {
        let Some(quiz) = self.quiz.clone() else { return Ok(None) };
        self.give_back();
        // As it will be asked afterwards.
        let arithmetic = match self.config.precision.arithmetic() {
            Arithmetic::Exact => Arithmetic::Exact,
            _ => Arithmetic::Int8,
        };
        let numbers = Numbers { cache: CacheType::F16, arithmetic };
        let mut answers = Vec::with_capacity(quiz.len());
        for group in quiz.ids.chunks(self.at_once) {
            observer.on_checking(Check::Questions, answers.len(), quiz.len());
            let queue = self.turn.clone();
            let _turn = queue.take();
            let found = self.guarded(observer, |Parts { base, adapters, .. }, keep_going| {
                let greedy = Greedy { base, adapters, numbers, max_tokens: quiz::ANSWER, stop: &quiz.stop };
                greedy.answers(group, keep_going, &mut |_, _| Ok(()))
            });
            answers.extend(found?);
        }
        self.peak.sample();
        crate::mmap::release_freed();
        quiz.judge(&answers).map(Some)
    }

    fn evaluate(&mut self, observer: &mut dyn Observer) -> Result<Evaluation> {
        let (held_out, general) = (self.eval_data.take(), self.general.take());
        let found = (|| {
            let held_out = held_out.as_ref().map(|data| self.look(Check::HeldOut, data, observer)).transpose()?;
            // Questions bound what is kept, or else they are for the beginning and the end; so is a general text where looks
            // are many.
            let ends = [0, self.facts.total_steps].contains(&self.facts.step) || self.rule().keeps();
            let general = general.as_ref().filter(|_| ends || !self.config.eval_reworded);
            let general = general.map(|data| self.look(Check::GeneralText, data, observer)).transpose()?;
            let known = if ends { self.ask_questions(observer)? } else { None };
            Ok(Evaluation { held_out, general, known })
        })();
        (self.eval_data, self.general) = (held_out, general);
        found
    }

    /// What only the end of a run is asked, for one that ended before its last step.
    pub(super) fn evaluate_end(&mut self, observer: &mut dyn Observer) -> Result<Evaluation> {
        if self.facts.step == self.facts.total_steps || self.rule().keeps() {
            return Ok(Evaluation::default());
        }
        let general = self.general.take();
        let loss = general.as_ref().map(|data| self.look(Check::GeneralText, data, observer)).transpose();
        self.general = general;
        match loss.and_then(|general| Ok((general, self.ask_questions(observer)?))) {
            // Who does not wait for it goes without.
            Err(e) if e.code() == ErrorCode::Cancelled => Ok(Evaluation::default()),
            found => found.map(|(general, known)| Evaluation { held_out: None, general, known }),
        }
    }

    /// The mean loss as a part of an evaluation, of which the observer is told.
    fn look(&mut self, what: Check, data: &Dataset, observer: &mut dyn Observer) -> Result<f64> {
        observer.on_checking(what, 0, data.samples.len());
        self.mean_loss(data, observer)
    }

    /// Mean loss of the learned tokens of `data`.
    pub(super) fn mean_loss(&mut self, data: &Dataset, observer: &mut dyn Observer) -> Result<f64> {
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
