//! Delta-LoRA (Zi et al. 2023): the weight itself moves as `B A` does, by `delta_lambda` times each change of `s B A`
//! after step `delta_start`. The base stays as it is here: changes add up to `B A - B0 A0` with what A and B were then,
//! so that the layer gives `x Wᵀ + s (1 + λ) (x Aᵀ) Bᵀ - s λ (x A0ᵀ) B0ᵀ`, where A and B learn as if λ were zero. The
//! file is a LoRA of twice the rank. Backward makes the gradients of a LoRA; before that step it is one.

use super::lora::Lora;
use super::lora_kin::{self, kin_of_lora};
use crate::adapter::init::{FIRST, grown};
use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings};
use crate::adapter::peft::{KeyUse, Keys, Use, number};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{TensorSpec, Tensors};
use crate::adapter::weight::LayerWeight;
use crate::error::Result;
use Use::Honoured;
use pocketlora_models::{Model, Param};
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};

const PARTS: &[&str] = &["lora_A.weight", "lora_B.weight", FIRST[0], FIRST[1]];
const KEYS: &[KeyUse] = &[
    ("delta_lambda", Honoured, ""),
    ("delta_start", Honoured, ""),
    ("lora_alpha", Honoured, ""),
    ("r", Honoured, ""),
    ("use_rslora", Honoured, ""),
];

/// Settings of Delta-LoRA.
#[derive(Clone, Debug, PartialEq)]
pub struct DeltaLora {
    /// How far the weight moves with `B A` (`delta_lambda`).
    pub lambda: f64,
    /// Steps before it does (`delta_start`).
    pub start: u64,
    pub(in crate::adapter) lora: Lora,
}

/// `(1 + λ) A` and `B`, from the start on; before it `A` and `B`.
struct Moving {
    lambda: f32,
    start: u64,
    moves: AtomicBool,
}

impl Moving {
    /// What the term is larger by than what A and B learn of.
    fn larger(&self) -> f32 {
        if self.moves.load(Ordering::Relaxed) { 1.0 + self.lambda } else { 1.0 }
    }
}

impl Map for Moving {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let larger = self.larger();
        Ok(vec![own[0].iter().map(|a| a * larger).collect(), own[1].to_vec()])
    }

    /// Those of `s B A` alone.
    fn backward(&self, _own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let larger = self.larger();
        vec![grads[0].to_vec(), grads[1].iter().map(|g| g / larger).collect(), Vec::new(), Vec::new()]
    }

    fn at(&self, step: u64) {
        self.moves.store(step >= self.start, Ordering::Relaxed);
    }
}

impl DeltaLora {
    /// The LoRA that it is.
    pub(in crate::adapter) fn finish(&self, tensors: &mut Tensors) -> Lora {
        let mut lora = self.lora.clone();
        let begun = |(name, tensor): (&String, &crate::adapter::HostTensor)| {
            name.ends_with(FIRST[0]) && tensor.data.iter().any(|v| *v != 0.0)
        };
        if tensors.iter().any(begun) {
            grown(tensors, 1.0 + self.lambda as f32, self.lambda as f32);
            lora.grow();
        } else {
            tensors.retain(|name, _| !crate::adapter::is_first(name));
        }
        lora
    }
}

impl AdapterMethod for DeltaLora {
    kin_of_lora!("delta_lambda");
    const NAME: &'static str = "Delta-LoRA";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;
    const FROZEN: &'static [&'static str] = &FIRST;

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let lambda = keys.number("delta_lambda", Some(2.0))?;
        if lambda < 0.0 {
            return Err(keys.wrong("delta_lambda", "a number from 0"));
        }
        Ok(Self { lambda, start: keys.whole("delta_start", 1, 500)? as u64, lora: lora_kin::read(keys)? })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        lora_kin::begin(settings, model)
    }

    fn shapes(&self, module: &str, layer: [usize; 2]) -> Vec<Vec<usize>> {
        [self.lora.shapes(module, layer), self.lora.shapes(module, layer)].concat()
    }

    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        if part > 1 { vec![0.0; spec.values()] } else { self.lora.start(spec, part, module, seed) }
    }

    fn plan(&self, module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let ([out, input], (rank, own)) = (weight.shape(), self.lora.of_module(module));
        let (factor, lambda) = (own * factor, self.lambda as f32);
        let (a, b) = (Of::Made(vec![rank, input]), Of::Made(vec![out, rank]));
        let (first_a, first_b) = (Of::Part(FIRST[0]), Of::Part(FIRST[1]));
        let pieces =
            vec![Piece::LowRank { a, b, factor }, Piece::LowRank { a: first_a, b: first_b, factor: -factor * lambda }];
        Ok(Plan::made(pieces, Moving { lambda, start: self.start, moves: AtomicBool::new(false) }))
    }

    fn write(&self) -> Value {
        let mut config = self.lora.write();
        config["delta_lambda"] = number(self.lambda);
        config["delta_start"] = self.start.into();
        config
    }
}
