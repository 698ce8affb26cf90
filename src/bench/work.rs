//! What a model asks of a machine for each token: bytes to read, multiplications and additions to do.

use crate::base::Base;
use pocketlora_kernels::{Arithmetic, Cpu, Memory};
use pocketlora_models::{Param, Role};
use serde::Serialize;

/// Counts of a model's matrices. Attention, norms and adapters are left out: they are a few percent at these lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Demand {
    /// Bytes that each decoded token must read: every linear layer, and the head in the form in which it is used.
    pub bytes_per_token: u64,
    /// Weights of the linear layers.
    pub linear: u64,
    /// Those of them whose output is a layer's, which training does not compute again.
    pub last: u64,
    /// Weights of the head.
    pub head: u64,
}

impl Demand {
    pub(super) fn of(base: &Base<Cpu>, arithmetic: Arithmetic) -> Self {
        let head = base.model.head_param();
        let mut demand = Self { bytes_per_token: 0, linear: 0, last: 0, head: 0 };
        for (i, spec) in base.model.params().iter().enumerate() {
            let param = Param(i as u32);
            if spec.role != Role::Linear && param != head {
                continue;
            }
            let matrix = base.factor(param, arithmetic);
            let (rows, cols) = base.backend.shape(matrix);
            demand.bytes_per_token += matrix.bytes() as u64;
            let weights = (rows * cols) as u64;
            if param == head {
                demand.head += weights;
            } else {
                demand.linear += weights;
                demand.last += if spec.name.ends_with(".down_proj.weight") { weights } else { 0 };
            }
        }
        demand
    }

    /// Operations for each token of a prompt of `tokens`, of which only the last needs the head.
    pub(super) fn prefill_ops(&self, tokens: usize) -> f64 {
        2.0 * (self.linear as f64 + self.head as f64 / tokens as f64)
    }

    /// Operations for each learned token: each layer's product forward, once more (but for the last) when its gradient
    /// is due, and the gradient of its input; the head forward and back.
    pub(super) fn train_ops(&self) -> f64 {
        6.0 * self.linear as f64 - 2.0 * self.last as f64 + 4.0 * self.head as f64
    }
}
