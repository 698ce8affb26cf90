//! Runs from their start to their end, whatever comes between: optimizers, the choice of the result, pauses, kills, disks
//! that fail, bad settings.

mod choice;
mod control;
mod courses;
mod failures;
#[cfg(all(unix, feature = "cli"))]
mod killed;
mod optimizers;
mod ranks;

use crate::common::tiny_training;
use pocketlora::adapter::AdapterFile;
use pocketlora::train::{Observer, StepReport, Summary, TrainConfig};
use pocketlora::{Engine, Error, Options, Trainer};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Stops after a step and takes notes.
#[derive(Default)]
struct Notes {
    stop_after: Option<u64>,
    losses: Vec<f64>,
    /// Step and loss of every evaluation.
    evaluations: Vec<(u64, f64)>,
    warnings: Vec<String>,
}

impl Observer for Notes {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        self.losses.push(report.loss);
        self.evaluations.extend(report.eval_loss.map(|loss| (report.step, loss)));
        if self.stop_after == Some(report.step) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn on_warning(&mut self, warning: &Error) {
        self.warnings.push(warning.to_string());
    }
}

fn stop_after(step: u64) -> Notes {
    Notes { stop_after: Some(step), ..Notes::default() }
}

struct Fixture {
    dir: tempfile::TempDir,
    model: PathBuf,
    data: PathBuf,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = tiny_training(dir.path(), 11);
    Fixture { dir, model, data }
}

fn config() -> TrainConfig {
    TrainConfig { rank: 4, lr: 3e-3, epochs: 3, batch: 2, accumulate: 2, dropout: 0.1, seed: 5, ..Default::default() }
}

impl Fixture {
    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn engine(&self) -> Engine {
        Engine::open(&self.model, &Options::new().threads(1)).unwrap()
    }

    fn trainer(&self, config: TrainConfig, out: &Path) -> Trainer {
        let engine = self.engine();
        let data = engine.dataset(&self.data, 1024).unwrap();
        engine.trainer(config, data, None, None, out).unwrap()
    }

    fn run(&self, config: &TrainConfig, out: &Path, resume: bool, notes: &mut Notes) -> Summary {
        let mut trainer = self.trainer(config.clone(), out);
        if resume {
            trainer.resume().unwrap();
        }
        trainer.run(notes).unwrap()
    }

    /// The adapter of an undisturbed run.
    fn whole(&self, config: &TrainConfig) -> Vec<u8> {
        let out = self.out("whole");
        assert!(self.run(config, &out, false, &mut Notes::default()).done);
        weights(&out)
    }
}

fn weights(out: &Path) -> Vec<u8> {
    fs::read(out.join("adapter_model.safetensors")).unwrap()
}

/// Whether two adapters hold the same tensors.
fn same(a: &AdapterFile, b: &AdapterFile) -> bool {
    a.tensors == b.tensors
}
