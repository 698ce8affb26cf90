//! The run folder as the trainer keeps it: what cannot be written costs a warning, not the run.

use super::super::hold_out::Evaluation;
use super::super::{Known, Observer, StepReport, TrainConfig};
use super::{LogLine, RunFolder};
use crate::error::Result;
use std::path::Path;

/// Keeps the log and the picture of a run.
pub(in crate::train) struct Journal {
    folder: Option<RunFolder>,
    /// One warning tells of a disk that stays full.
    warned: bool,
}

impl Journal {
    /// Begins after `step`, of which `start` was found if it is 0.
    pub fn open(
        dir: &Path,
        config: &TrainConfig,
        step: u64,
        start: Option<Evaluation>,
        observer: &mut dyn Observer,
    ) -> Self {
        let mut journal = Self { folder: None, warned: false };
        let opened = RunFolder::open(dir, config, step).map(|folder| journal.folder = Some(folder));
        journal.warn(opened, observer);
        if let (0, Some(found)) = (step, start) {
            journal.evaluated(0, found, observer);
        }
        journal
    }

    /// Notes an evaluation that belongs to no step of this process.
    pub fn evaluated(&mut self, step: u64, found: Evaluation, observer: &mut dyn Observer) {
        let line = LogLine {
            step,
            eval_loss: found.held_out,
            general_loss: found.general,
            known: found.known.map(Known::count),
            ..LogLine::default()
        };
        self.write(|folder| folder.log(&line), observer);
    }

    /// Notes a step, and draws if it was evaluated.
    pub fn add(&mut self, report: &StepReport, observer: &mut dyn Observer) {
        let line = LogLine {
            step: report.step,
            loss: Some(report.loss),
            lr: Some(report.lr),
            grad_norm: Some(report.grad_norm),
            tokens: Some(report.tokens),
            seconds: Some(report.time.as_secs_f64()),
            eval_loss: report.eval_loss,
            general_loss: report.general_loss,
            known: report.known.map(Known::count),
            held_loss: report.held_loss,
            learns_little: report.learns_little(),
        };
        self.write(|folder| folder.log(&line), observer);
        if report.eval_loss.is_some() || report.general_loss.is_some() {
            self.draw(observer);
        }
    }

    /// Draws what was logged.
    pub fn draw(&mut self, observer: &mut dyn Observer) {
        self.write(RunFolder::draw, observer);
    }

    fn write(&mut self, work: impl FnOnce(&RunFolder) -> Result<()>, observer: &mut dyn Observer) {
        let done = self.folder.as_ref().map_or(Ok(()), work);
        self.warn(done, observer);
    }

    fn warn(&mut self, done: Result<()>, observer: &mut dyn Observer) {
        if let Err(e) = done
            && !std::mem::replace(&mut self.warned, true)
        {
            observer.on_warning(&e);
        }
    }
}
