//! LoRA-GA's beginning (Wang et al. 2024): `A` has the first `r` right singular vectors of the gradient `G` `[out, in]`
//! by a layer's weight, and `B` the left ones after them, both times `out^(1/4) / sqrt(16)`: the first step moves `B A`
//! as a step of W's own would.
//!
//! `G` is never there. A LoRA with any `A` and `B = 0` changes nothing, and the gradient of its `B` is `G Aᵀ`; one with
//! `A = 0` has `Bᵀ G` as that of its `A`. So passes with such a probe are the products of a randomized range finder
//! (Halko et al. 2011), for all layers at once.

use super::range::{columns, floats, orthonormal};
use super::{filled, put, transposed};
use crate::adapter::methods::lora::Lora;
use crate::adapter::svd::{Columns, of_product};
use crate::adapter::{AdapterFile, HostTensor, Method, Tensors};
use crate::rng::{mix, normals};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// PEFT's `stable_gamma`.
const GAMMA: f32 = 16.0;

/// Directions that are followed for `rank`, as PEFT does.
pub(super) fn width(rank: usize, [out, input]: [usize; 2]) -> usize {
    (4 * rank).min(out).min(input)
}

/// What is known of the gradient by one layer's weight.
struct Layer {
    module: String,
    shape: [usize; 2],
    rank: usize,
    /// `[k, in]`: directions, then `Qᵀ G`.
    rows: Vec<f32>,
    /// `Q`, an orthonormal basis of `G`'s columns, as far as it is known.
    basis: Columns,
}

/// What is known of the gradients by some layers' weights, from passes with a probe.
pub(crate) struct Sketch {
    layers: Vec<Layer>,
    /// The probe's B is asked for its gradient, and not its A.
    asks_b: bool,
}

impl Sketch {
    /// Passes over the same data from which gradients are known well enough.
    pub const PASSES: usize = 4;

    /// Begins with random directions, for modules with their layers' shapes `[out, in]` and ranks.
    pub(crate) fn new(modules: Vec<(String, [usize; 2], usize)>, seed: u64) -> Self {
        let layer = |((module, shape, rank), i): ((String, [usize; 2], usize), u64)| {
            let rows = normals(&[seed, i], 1.0, width(rank, shape) * shape[1]);
            let rows = floats(&orthonormal(&rows, shape[1]));
            Layer { module, shape, rank, rows, basis: Columns::new() }
        };
        Self { layers: modules.into_iter().zip(0..).map(layer).collect(), asks_b: true }
    }

    /// The probe of the next pass.
    pub(crate) fn probe(&self) -> AdapterFile {
        let mut tensors = Tensors::new();
        let mut modules = Vec::with_capacity(self.layers.len());
        for Layer { module, shape: [out, input], rank, rows, basis } in &self.layers {
            let width = width(*rank, [*out, *input]);
            let (a, b) = match self.asks_b {
                true => (rows.clone(), vec![0.0; out * width]),
                false => (vec![0.0; width * input], transposed(&floats(basis), width)),
            };
            tensors.insert(format!("{module}.lora_A.weight"), HostTensor { shape: vec![width, *input], data: a });
            tensors.insert(format!("{module}.lora_B.weight"), HostTensor { shape: vec![*out, width], data: b });
            // A factor of 1.
            modules.push((module.clone(), width, width as f64));
        }
        AdapterFile::new(PathBuf::new(), Method::Lora(Lora::of_modules(&modules)), tensors)
    }

    /// Takes what a pass with the probe gave: gradients by the names of its tensors.
    pub(crate) fn take(&mut self, gradients: &BTreeMap<String, Vec<f32>>) {
        for layer in &mut self.layers {
            let part = if self.asks_b { "lora_B.weight" } else { "lora_A.weight" };
            let Some(gradient) = gradients.get(&format!("{}.{part}", layer.module)) else { continue };
            if self.asks_b {
                layer.basis = orthonormal(&transposed(gradient, layer.shape[0]), layer.shape[0]);
            } else {
                layer.rows.clone_from(gradient);
            }
        }
        self.asks_b = !self.asks_b;
    }

    /// The directions of a further round, from what is known.
    pub(crate) fn again(&mut self) {
        for layer in &mut self.layers {
            layer.rows = floats(&orthonormal(&layer.rows, layer.shape[1]));
        }
    }

    /// Puts `A` and `B` into the `tensors` of a fresh LoRA.
    pub(crate) fn put(self, tensors: &mut Tensors, seed: u64) {
        for (Layer { module, shape: [out, input], rank, rows, basis }, i) in self.layers.into_iter().zip(0..) {
            let svd = of_product(basis, columns(&rows, input), 2 * rank);
            let scale = (out as f32).powf(0.25) / GAMMA.sqrt();
            let scaled = |columns: Columns| -> Vec<f32> { floats(&columns).iter().map(|v| v * scale).collect() };
            let (v, u) = (filled(svd.v, mix(seed, 2 * i)), filled(svd.u, mix(seed, 2 * i + 1)));
            let a = scaled(v.into_iter().take(rank).collect());
            let b = transposed(&scaled(u.into_iter().skip(rank).take(rank).collect()), rank);
            put(tensors, &module, [a, b]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::svd::{combined, dot};

    #[test]
    fn probes_find_the_singular_vectors_of_the_gradient() {
        let (out, input, rank) = (40, 30, 3);
        // G = sum of s u vᵀ with falling s.
        let basis = |key: u64, n: usize| orthonormal(&normals(&[key], 1.0, 20 * n), n);
        let (u, v) = (basis(1, out), basis(2, input));
        let s: Vec<f64> = (0..20).map(|i| 0.6f64.powi(i)).collect();
        let row = |o: usize| combined(&v, &(0..20).map(|i| s[i] * u[i][o]).collect::<Vec<_>>());
        let g: Vec<Vec<f64>> = (0..out).map(row).collect();
        let mut sketch = Sketch::new(vec![("m".to_owned(), [out, input], rank)], 5);
        for pass in 0..Sketch::PASSES {
            if pass > 0 && pass % 2 == 0 {
                sketch.again();
            }
            let tensors = sketch.probe().tensors;
            let [a, b] = ["m.lora_A.weight", "m.lora_B.weight"].map(|name| &tensors[name]);
            let width = a.shape[0];
            assert!(width == 4 * rank && (0..2).any(|i| [a, b][i].data.iter().all(|v| *v == 0.0)), "no effect");
            let gx =
                g.iter().flat_map(|g| columns(&a.data, input).iter().map(|x| dot(g, x) as f32).collect::<Vec<_>>());
            let qg = (0..width).flat_map(|k| {
                let q: Vec<f64> = b.data.iter().skip(k).step_by(width).map(|b| f64::from(*b)).collect();
                floats(&vec![combined(&g, &q)])
            });
            let gradients =
                [("m.lora_A.weight".to_owned(), qg.collect()), ("m.lora_B.weight".to_owned(), gx.collect())];
            sketch.take(&BTreeMap::from(gradients));
        }
        let zeros = |shape: [usize; 2]| HostTensor { shape: shape.to_vec(), data: vec![0.0; shape[0] * shape[1]] };
        let mut tensors = Tensors::new();
        tensors.insert("m.lora_A.weight".to_owned(), zeros([rank, input]));
        tensors.insert("m.lora_B.weight".to_owned(), zeros([out, rank]));
        sketch.put(&mut tensors, 5);
        let scale = f64::from(out as u32).powf(0.25) / 4.0;
        for k in 0..rank {
            let a = &columns(&tensors["m.lora_A.weight"].data, input)[k];
            let b: Vec<f64> =
                tensors["m.lora_B.weight"].data.iter().skip(k).step_by(rank).map(|b| f64::from(*b)).collect();
            assert!((dot(a, &v[k]).abs() / scale - 1.0).abs() < 1e-3, "A's row {k}");
            assert!((dot(&b, &u[rank + k]).abs() / scale - 1.0).abs() < 1e-3, "B's column {k}");
        }
    }
}
