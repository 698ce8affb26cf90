//! What a model asks of a machine for each token: bytes to read, multiplications and additions to do.

use crate::base::Base;
use crate::exec::multiplied_once;
use pocketlora_kernels::{Arithmetic, Cpu, Memory};
use pocketlora_models::{Param, Role};
use serde::Serialize;
use std::collections::HashSet;

/// Counts of a model's matrices. Attention, norms and adapters are left out: they are a few percent at these lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Demand {
    /// Bytes that each decoded token must read: every linear layer, and the head in the form in which it is used.
    pub bytes_per_token: u64,
    /// Weights of the linear layers.
    pub linear: u64,
    /// Those of them whose product training does not compute again: nothing but the next layer reads what comes of it.
    pub last: u64,
    /// Weights of the head.
    pub head: u64,
}

impl Demand {
    pub(super) fn of(base: &Base<Cpu>, arithmetic: Arithmetic) -> Self {
        let head = base.model.head_param();
        let mut demand = Self { bytes_per_token: 0, linear: 0, last: 0, head: 0 };
        let once: HashSet<u32> = (0..base.model.config().layers)
            .flat_map(|layer| multiplied_once(base.model.as_ref(), layer))
            .map(|param| param.0)
            .collect();
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
                demand.last += if once.contains(&param.0) { weights } else { 0 };
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::fs;
    use std::path::Path;

    /// A norm behind a layer's last product reads what it gives, and experts go through their products again.
    #[test]
    fn products_that_backward_does_not_need_are_computed_once() {
        for (family, layer, expected) in [
            ("llama", 1, &["model.layers.1.mlp.down_proj"][..]),
            ("lfm2", 1, &["model.layers.1.feed_forward.w2"]),
            ("gemma3_text", 1, &[]),
            ("qwen3_moe", 0, &[]),
            // A layer without experts.
            ("qwen3_moe", 1, &["model.layers.1.mlp.down_proj"]),
        ] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles/families").join(family);
            let config: Value = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
            let model = pocketlora_models::build(config.as_object().unwrap()).unwrap();
            let once = multiplied_once(model.as_ref(), layer);
            let names: Vec<_> = once.iter().map(|param| model.params()[param.0 as usize].module()).collect();
            assert_eq!(names, expected, "{family}, layer {layer}");
        }
    }
}
