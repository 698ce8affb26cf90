//! Hydra (Kim et al. 2024): a LoRA beside a layer and one behind it, `y = u + (u Cᵀ) Dᵀ` with `u = x Wᵀ + s (x Aᵀ) Bᵀ +
//! b`, `A` `[r, in]`, `B` and `D` `[out, r]`, `C` `[r, out]`. Both are linear, so that the file is a LoRA of twice the
//! rank, `[A; C W]` and `[B + D C B, D / s]`, with `D C b / s` as its bias where the layer has one. Backward computes
//! `u` and `u Cᵀ` once more.

use super::lora::Lora;
use super::lora_kin::{self, kin_of_lora};
use crate::adapter::method::{AdapterMethod, Settings, layer_at};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::replaced::Replaced;
use crate::adapter::tensor::{HostTensor, TensorSpec, Tensors};
use crate::adapter::weight::{LayerWeight, Weight};
use crate::base::Base;
use crate::error::Result;
use Use::Honoured;
use pocketlora_kernels::Backend;
use pocketlora_models::{Model, Param};
use serde_json::Value;

const PARTS: &[&str] = &["lora_A.weight", "lora_B.weight", "lora_C.weight", "lora_D.weight"];
const KEYS: &[KeyUse] = &[("lora_alpha", Honoured, ""), ("r", Honoured, ""), ("use_rslora", Honoured, "")];

/// The LoRA that is beside a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Hydra {
    pub(in crate::adapter) lora: Lora,
}

/// `x y` of `x` `[n, k]` and `y` `[k, m]`.
fn times(x: &[f32], y: &[f32], inner: usize) -> Vec<f32> {
    let cols = y.len() / inner.max(1);
    let row = |x: &[f32]| {
        let mut sum = vec![0.0f64; cols];
        x.iter().zip(y.chunks(cols.max(1))).for_each(|(x, y)| {
            sum.iter_mut().zip(y).for_each(|(sum, y)| *sum += f64::from(*x) * f64::from(*y));
        });
        sum.into_iter().map(|v| v as f32).collect::<Vec<_>>()
    };
    x.chunks(inner.max(1)).flat_map(row).collect()
}

impl Hydra {
    /// The LoRA that it is on `base`.
    ///
    /// # Errors
    /// Out of memory.
    pub(in crate::adapter) fn finish<B: Backend>(&self, tensors: &mut Tensors, base: &Base<B>) -> Result<Lora> {
        let (replaced, rank, mut biases) = (Replaced::default(), self.lora.rank, Vec::new());
        let ends = |name: &String| name.strip_suffix(".lora_A.weight").map(str::to_owned);
        let modules: Vec<String> = tensors.keys().filter_map(ends).collect();
        for module in &modules {
            let Some(layer) = layer_at(base.model.as_ref(), module) else { continue };
            let [a, b, c, d] = [0, 1, 2, 3].map(|i| {
                tensors.remove(&format!("{module}.{}", PARTS[i])).map(|tensor| tensor.data).unwrap_or_default()
            });
            let scale = self.lora.of_module(module).1;
            let weight = Weight { base, replaced: &replaced, layer, counts: false };
            let [out, input] = LayerWeight::shape(&weight);
            // D C B, and D over the factor.
            let behind = times(&d, &times(&c, &b, out), rank);
            let wide = b.chunks(rank).zip(behind.chunks(rank)).zip(d.chunks(rank)).flat_map(|((b, behind), d)| {
                let sum = b.iter().zip(behind).map(|(b, x)| b + x);
                sum.chain(d.iter().map(|d| d / scale)).collect::<Vec<_>>()
            });
            let wide = wide.collect();
            let long = [a, crate::adapter::init::Operator::back(&weight, &c)?].concat();
            let bias = weight
                .bias()?
                .map(|bias| times(&d, &times(&c, &bias, out), rank).into_iter().map(|v| v / scale).collect::<Vec<_>>());
            biases.push(bias.unwrap_or_else(|| vec![0.0; out]));
            tensors.insert(format!("{module}.lora_A.weight"), HostTensor { shape: vec![2 * rank, input], data: long });
            tensors.insert(format!("{module}.lora_B.weight"), HostTensor { shape: vec![out, 2 * rank], data: wide });
        }
        let mut lora = self.lora.clone();
        lora.grow();
        if biases.iter().flatten().any(|b| *b != 0.0) {
            lora.bias = true;
            for (module, data) in modules.iter().zip(biases) {
                let tensor = HostTensor { shape: vec![data.len()], data };
                tensors.insert(format!("{module}.lora_B.bias"), tensor);
            }
        }
        Ok(lora)
    }
}

impl AdapterMethod for Hydra {
    kin_of_lora!("hydra");
    const NAME: &'static str = "Hydra";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;

    fn read(keys: &Keys<'_>) -> Result<Self> {
        Ok(Self { lora: lora_kin::read(keys)? })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        lora_kin::begin(settings, model)
    }

    fn shapes(&self, module: &str, layer: [usize; 2]) -> Vec<Vec<usize>> {
        let [out, _] = layer;
        [self.lora.shapes(module, layer), self.lora.shapes(module, [out, out])].concat()
    }

    /// Both begin as a LoRA does.
    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        self.lora.start(spec, part % 2, 2 * module + part / 2, seed)
    }

    fn plan(&self, module: &str, _weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let factor = self.lora.of_module(module).1 * factor;
        let (a, b, u, v) = (Of::Part(PARTS[0]), Of::Part(PARTS[1]), Of::Part(PARTS[2]), Of::Part(PARTS[3]));
        Ok(Plan::plain(vec![Piece::LowRank { a, b, factor }, Piece::Behind { u, v }]))
    }

    fn write(&self) -> Value {
        self.lora.write()
    }
}
