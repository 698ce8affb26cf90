//! Training steps: unless asked otherwise a LoRA of rank 8 on all linear layers, AdamW, each layer run again when its
//! gradient is due.

use super::{Figure, Options, Progress, check, infer};
use crate::error::{Error, Result};
use crate::memory::Peak;
use crate::session::Session;
use crate::train::{Dataset, MemoryPlan, Observer, Sample, StepReport, TrainConfig};
use std::ops::ControlFlow;

/// What one session gave.
pub(super) struct Training {
    pub rate: Figure,
    pub peak: Peak,
    pub plan: MemoryPlan,
}

/// Measures whole optimizer steps of one sequence each, the first not counted.
pub(super) fn measure(session: &Session, options: &Options, progress: &mut Progress<'_>) -> Result<Training> {
    let ids = infer::tokens(session.base(), options.sequence);
    let trained = (0..ids.len()).map(|i| i > 0).collect();
    let data = Dataset::new("random tokens", vec![Sample { ids, trained }]);
    let steps = options.trials as u64 + 1;
    let config =
        TrainConfig { batch: 1, steps: Some(steps), seq: options.sequence, save_every: 0, ..options.settings.clone() };
    let out = tempfile::tempdir().map_err(|e| Error::io("create a folder in", &std::env::temp_dir(), e))?;
    let mut trainer = session.trainer(config, data, None, None, out.path())?;
    let mut watcher = Watcher;
    let mut rates = Vec::new();
    for step in 0..steps {
        check(progress, &if step == 0 { "train, warm-up".to_owned() } else { format!("train, step {step}") })?;
        let report = trainer.step(&mut watcher)?;
        if step > 0 {
            rates.push(report.tokens as f64 / report.time.as_secs_f64());
        }
    }
    Ok(Training { rate: Figure::new(rates), peak: trainer.peak(), plan: trainer.plan(session.mapped_bytes()) })
}

/// The loop here stops between steps by itself.
struct Watcher;

impl Observer for Watcher {
    fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}
