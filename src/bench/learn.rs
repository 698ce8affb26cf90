//! Training steps: unless asked otherwise a LoRA of rank 8 on all linear layers, AdamW, each layer run again when its
//! gradient is due.

use super::{Figure, OnMeasure, Options, check, infer};
use crate::base::Base;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::memory::Peak;
use crate::train::{Dataset, MemoryPlan, Observer, Sample, StepReport, TrainConfig, Trainer};
use pocketlora_kernels::Backend;
use std::ops::ControlFlow;
use tempfile::TempDir;

/// What one engine gave.
pub(super) struct Training {
    pub rate: Figure,
    pub peak: Peak,
    pub plan: MemoryPlan,
}

/// What a trainer needs for `options.trials` steps after a first one.
pub(super) struct Run {
    pub config: TrainConfig,
    pub data: Dataset,
    /// Where the adapter would go; gone with the run.
    pub out: TempDir,
}

impl Run {
    pub fn new<B: Backend>(base: &Base<B>, options: &Options) -> Result<Self> {
        let ids = infer::tokens(base, options.sequence);
        let data = Dataset::new("random tokens", vec![Sample::of_text(ids)]);
        let config = TrainConfig {
            batch: 1,
            steps: Some(options.trials as u64 + 1),
            seq: options.sequence,
            save_every: 0,
            save_seconds: 0,
            ..options.settings.clone()
        };
        let out = tempfile::tempdir().map_err(|e| Error::io("create a folder in", &std::env::temp_dir(), e))?;
        Ok(Self { config, data, out })
    }
}

/// Runs a step that is not counted, tells `each` `None`, then runs and tells those that are. Returns how many.
pub(super) fn steps<B: Backend>(
    trainer: &mut Trainer<B>,
    options: &Options,
    progress: &mut OnMeasure<'_>,
    each: &mut dyn FnMut(Option<&StepReport>),
) -> Result<usize> {
    for step in 0..=options.trials {
        check(progress, &if step == 0 { "train, warm-up".to_owned() } else { format!("train, step {step}") })?;
        let report = trainer.step(&mut Watcher)?;
        each((step > 0).then_some(&report));
    }
    Ok(options.trials)
}

/// Measures whole optimizer steps of one sequence each, the first not counted.
pub(super) fn measure(engine: &Engine, options: &Options, progress: &mut OnMeasure<'_>) -> Result<Training> {
    let Run { config, data, out } = Run::new(engine.base(), options)?;
    let mut trainer = engine.trainer(config, data, None, None, out.path())?;
    let mut rates = Vec::new();
    steps(trainer.inner(), options, progress, &mut |report| {
        rates.extend(report.map(|r| r.tokens as f64 / r.time.as_secs_f64()));
    })?;
    Ok(Training { rate: Figure::new(rates), peak: trainer.peak(), plan: trainer.plan() })
}

/// The loop here stops between steps by itself.
struct Watcher;

impl Observer for Watcher {
    fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}
