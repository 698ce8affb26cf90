//! The loss on data that is not learned.

use super::{MicroBatch, Observer, Sample, Trainer};
use crate::error::Result;
use pocketlora_kernels::Backend;
use std::sync::Arc;

impl<B: Backend> Trainer<B> {
    /// Mean loss on the evaluation data, if there is any.
    pub(super) fn evaluate(&mut self, observer: &mut dyn Observer) -> Result<Option<f64>> {
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
