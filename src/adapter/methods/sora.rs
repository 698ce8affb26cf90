//! SoRA (Ding et al. 2023): `y = x Wᵀ + s (g (x Aᵀ)) Bᵀ` with a gate `g` `[r]` for each rank. After each step gates
//! come closer to zero by `sparse_lambda` times the learning rate, and stop there (the proximal step of an L1 norm):
//! ranks that do not pay for it close. The file is a LoRA of the ranks that are open, `g A` and `B`. Backward makes the
//! gradient of `g A`, and on the host those of `g` and `A`.

use super::lora::Lora;
use super::lora_kin::{self, kin_of_lora};
use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings};
use crate::adapter::peft::{KeyUse, Keys, Use, number};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::singular::Singular;
use crate::adapter::tensor::{HostTensor, TensorSpec, Tensors};
use crate::adapter::weight::LayerWeight;
use crate::error::Result;
use Use::Honoured;
use pocketlora_models::{Model, Param};
use serde_json::Value;

const PARTS: &[&str] = &["lora_A.weight", "lora_B.weight", "lora_gate"];
const KEYS: &[KeyUse] =
    &[("lora_alpha", Honoured, ""), ("r", Honoured, ""), ("sparse_lambda", Honoured, ""), ("use_rslora", Honoured, "")];

/// Settings of SoRA.
#[derive(Clone, Debug, PartialEq)]
pub struct Sora {
    /// How fast gates close, over the learning rate (`sparse_lambda`).
    pub sparse_lambda: f64,
    pub(in crate::adapter) lora: Lora,
}

/// `g A`.
struct Gated {
    inner: Singular,
    sparse_lambda: f64,
}

impl Map for Gated {
    fn forward(&self, own: &[&[f32]], weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        self.inner.forward(own, weight)
    }

    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        self.inner.backward(own, grads)
    }

    fn shrunk(&self, own: &[&[f32]], lr: f32) -> Option<(usize, Vec<f32>)> {
        let by = (self.sparse_lambda * f64::from(lr)) as f32;
        Some((2, own[2].iter().map(|g| g.signum() * (g.abs() - by).max(0.0)).collect()))
    }
}

impl Sora {
    /// The LoRA that it is, with ranks of their own for modules where gates have closed.
    pub(in crate::adapter) fn finish(&self, tensors: &mut Tensors) -> Lora {
        lora_kin::plain(tensors, PARTS, &|own| {
            let [a, b, gate] = own else { unreachable!("three parts") };
            let (rank, width) = (a.shape[0], a.shape[1]);
            let mut open: Vec<usize> = (0..rank).filter(|k| gate.data[*k] != 0.0).collect();
            if open.is_empty() {
                // A module that a config names has one rank at least.
                open.push(0);
            }
            let row = |k: &usize| a.data[k * width..][..width].iter().map(|v| v * gate.data[*k]).collect::<Vec<_>>();
            let rows = open.iter().flat_map(row).collect();
            let columns = b.data.chunks(rank).flat_map(|b| open.iter().map(|k| b[*k]).collect::<Vec<_>>()).collect();
            [
                HostTensor { shape: vec![open.len(), width], data: rows },
                HostTensor { shape: vec![b.shape[0], open.len()], data: columns },
            ]
        });
        // The factor of each module stays that of all ranks.
        let factor = f64::from(self.lora.of_module("").1);
        let ranks = tensors.iter().filter_map(|(name, tensor)| {
            let module = name.strip_suffix(".lora_A.weight")?;
            Some((module.to_owned(), tensor.shape[0], factor * tensor.shape[0] as f64))
        });
        Lora { dropout: self.lora.dropout, ..Lora::of_modules(&ranks.collect::<Vec<_>>()) }
    }
}

impl AdapterMethod for Sora {
    kin_of_lora!("sparse_lambda");
    const NAME: &'static str = "SoRA";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let sparse_lambda = keys.number("sparse_lambda", Some(1.0))?;
        if sparse_lambda < 0.0 {
            return Err(keys.wrong("sparse_lambda", "a number from 0"));
        }
        Ok(Self { sparse_lambda, lora: lora_kin::read(keys)? })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        lora_kin::begin(settings, model)
    }

    fn shapes(&self, module: &str, layer: [usize; 2]) -> Vec<Vec<usize>> {
        [self.lora.shapes(module, layer), vec![vec![self.lora.rank]]].concat()
    }

    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        if part == 2 { vec![1.0; spec.values()] } else { self.lora.start(spec, part, module, seed) }
    }

    fn plan(&self, module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let (rank, own) = self.lora.of_module(module);
        let (a, b) = (Of::Made(vec![rank, weight.shape()[1]]), Of::Part(PARTS[1]));
        let inner = Singular { rank, orth_reg_weight: 0.0 };
        let map = Gated { inner, sparse_lambda: self.sparse_lambda };
        Ok(Plan::made(vec![Piece::LowRank { a, b, factor: own * factor }], map))
    }

    fn write(&self) -> Value {
        let mut config = self.lora.write();
        config["sparse_lambda"] = number(self.sparse_lambda);
        config
    }
}
