//! Smaller adapters, by what their ranks matter for some data.

use super::Engine;
use crate::adapter::{AdapterFile, PruneBy, PrunedSize, add_scores, check_pruning, write_pruned};
use crate::error::{Error, ErrorCode, Result};
use crate::eval::score_data;
use crate::format::Existing;
use crate::train::{Dataset, Material, Observer, Optimizer, Schedule, TrainConfig};
use std::path::Path;

/// Samples whose gradient is looked at together, and how many such looks there are at most.
const BATCH: usize = 8;
const LOOKS: usize = 32;

/// How many looks at `data` tell what matters.
pub(crate) fn looks(data: &Dataset) -> u64 {
    data.samples.len().div_ceil(BATCH).clamp(1, LOOKS) as u64
}

/// What pruning left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pruned {
    /// Of the adapter before and after.
    pub size: [PrunedSize; 2],
    /// Mean loss of the learned tokens of the data: of the model alone, with the adapter, with what is left of it.
    pub loss: [f64; 3],
}

impl Engine {
    /// Writes to `out` a smaller LoRA than `adapter`: the share `keep` of its values, above 0 and below 1, that matters most
    /// for `data`. To be called without attached adapters. `observer` hears of each look at the data as of a step.
    ///
    /// # Errors
    /// The adapter is none of plain LoRA or does not fit this model, `out` holds something, stopped by the observer, out of
    /// memory. Nothing is written then.
    pub fn prune(
        &self,
        adapter: &AdapterFile,
        data: &Dataset,
        keep: f64,
        by: PruneBy,
        (out, existing): (&Path, Existing),
        observer: &mut dyn Observer,
    ) -> Result<Pruned> {
        check_pruning(adapter, keep, out, existing)?;
        if !self.attached().is_empty() {
            let message = "expected an engine without attached adapters, got some; detach them first";
            return Err(Error::new(ErrorCode::Config, "prune", message));
        }
        let steps = looks(data);
        let config = TrainConfig {
            batch: BATCH.min(data.samples.len().max(1)),
            steps: Some(steps),
            // So small that no value changes: only gradients are wanted.
            lr: 1e-30,
            optimizer: Optimizer::Sgd,
            momentum: 0.0,
            weight_decay: 0.0,
            clip: 0.0,
            schedule: Schedule::Constant,
            warmup: 0.0,
            ..TrainConfig::default()
        };
        let config = config.with_adapter(self.base().model.as_ref(), adapter, &|_| false)?;
        let scratch = tempfile::tempdir().map_err(|e| Error::io("create a folder in", &std::env::temp_dir(), e))?;
        let mut scores = Default::default();
        let mut trainer = self.trainer_of(config, Material::of(data.clone()), Some(adapter), scratch.path())?;
        for _ in 0..steps {
            let report = trainer.step(observer)?;
            add_scores(&mut scores, adapter, &trainer.gradients()?);
            if observer.on_step(&report).is_break() {
                return Err(Error::new(ErrorCode::Cancelled, "prune", "stopped; nothing was written"));
            }
        }
        drop(trainer);
        let plain = self.loss_with(None, data, observer)?;
        let before = self.loss_with(Some(adapter.clone()), data, observer)?;
        let size = write_pruned(adapter, &scores, keep, by, out, existing)?;
        let after = self.loss_with(Some(AdapterFile::open(out)?), data, observer)?;
        Ok(Pruned { size, loss: [plain, before, after] })
    }

    /// Mean loss of the learned tokens of `data` with `adapter`, or with none, beside what is attached.
    ///
    /// # Errors
    /// The adapter does not fit this model, stopped by the observer, out of memory.
    pub fn loss_with(&self, adapter: Option<AdapterFile>, data: &Dataset, observer: &mut dyn Observer) -> Result<f64> {
        let id = adapter.map(|file| self.attach_file(file, 1.0)).transpose()?;
        let score = score_data(self, data, &mut |_| observer.keep_going());
        id.map_or(Ok(()), |id| self.detach(id))?;
        score.map(|score| score.nll_sum / score.tokens as f64)
    }
}
