//! What a run will hold in memory, known before its first step.

use super::{Dataset, TrainConfig, largest_micro_batch};
use pocketlora_models::Config;
use serde::Serialize;

/// Bytes by purpose. All but `weights_mapped` are anonymous (dirty) memory; the tokenizer and the program itself come
/// on top.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// Base weights, mapped from their files.
    pub weights_mapped: u64,
    /// Adapter: working matrices, f32 masters and gradients.
    pub adapter: u64,
    /// First and second moments.
    pub optimizer: u64,
    /// Input of every layer.
    pub layer_inputs: u64,
    /// Activations and gradients of the one layer that is being run.
    pub layer_workspace: u64,
    /// The loss of one chunk of learned tokens.
    pub logits: u64,
}

impl MemoryPlan {
    pub(super) fn new(
        model: &Config,
        config: &TrainConfig,
        data: &Dataset,
        trained_values: usize,
        work_bytes: usize,
        weights_mapped: u64,
        loss: impl Fn(usize) -> usize,
    ) -> Self {
        let tokens = largest_micro_batch(data, config);
        let (q, kv) = (model.heads * model.head_dim, model.kv_heads * model.head_dim);
        // Norms, sums and projections back to the residual stream; queries before and after their rotation and the
        // attention's output; keys likewise, and values; gate, up and their product.
        let values = 7 * model.hidden_size + 3 * q + 3 * kv + 3 * model.intermediate_size;
        let bytes = |floats: usize| 4 * floats as u64;
        Self {
            weights_mapped,
            adapter: (trained_values * (8 + work_bytes)) as u64,
            optimizer: config.state_bytes(trained_values),
            layer_inputs: bytes(tokens * model.hidden_size * model.layers),
            layer_workspace: bytes(2 * tokens * values),
            logits: loss(tokens) as u64,
        }
    }

    /// Anonymous bytes in all.
    #[must_use]
    pub fn anonymous(&self) -> u64 {
        self.adapter + self.optimizer + self.layer_inputs + self.layer_workspace + self.logits
    }
}
