//! DyLoRA (Valipour et al. 2023): a LoRA that is trained for all ranks up to `r` at once. Each step draws a rank `b`,
//! and only the first `b` rows of `A` and columns of `B` work and learn in it, with the factor of a LoRA of that rank.
//! The file is a LoRA of rank `r`; the first ranks of it are a LoRA by themselves (`prune --cut-rank`). Backward makes
//! the gradients of a LoRA.

use super::lora::Lora;
use super::lora_kin::{self, kin_of_lora};
use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::TensorSpec;
use crate::adapter::weight::LayerWeight;
use crate::error::Result;
use crate::rng::Rng;
use Use::Honoured;
use pocketlora_models::{Model, Param};
use serde_json::Value;
use std::sync::atomic::{AtomicUsize, Ordering};

const PARTS: &[&str] = &["lora_A.weight", "lora_B.weight"];
const KEYS: &[KeyUse] = &[("lora_alpha", Honoured, ""), ("r", Honoured, ""), ("use_rslora", Honoured, "")];

/// The LoRA that it becomes.
#[derive(Clone, Debug, PartialEq)]
pub struct Dylora {
    pub(in crate::adapter) lora: Lora,
}

/// The first rows of `A`, as large as makes up for the factor of a smaller rank; the others are zero.
struct First {
    rank: usize,
    rslora: bool,
    drawn: AtomicUsize,
}

impl First {
    fn masked(&self, rows: &[f32]) -> Vec<f32> {
        let (width, drawn) = (rows.len() / self.rank.max(1), self.drawn.load(Ordering::Relaxed));
        let ratio = self.rank as f32 / drawn.max(1) as f32;
        let scale = if self.rslora { ratio.sqrt() } else { ratio };
        rows.iter().enumerate().map(|(i, v)| if i < drawn * width { v * scale } else { 0.0 }).collect()
    }
}

impl Map for First {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        Ok(vec![self.masked(own[0])])
    }

    fn backward(&self, _own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        // B's own gradient is zero where a row is.
        vec![self.masked(grads[0]), Vec::new()]
    }

    fn draw(&self, key: u64) -> bool {
        self.drawn.store(1 + Rng::new(key).below(self.rank.max(1)), Ordering::Relaxed);
        true
    }

    fn at(&self, _step: u64) {
        self.drawn.store(self.rank, Ordering::Relaxed);
    }
}

impl AdapterMethod for Dylora {
    kin_of_lora!("dylora");
    const NAME: &'static str = "DyLoRA";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;

    fn read(keys: &Keys<'_>) -> Result<Self> {
        Ok(Self { lora: lora_kin::read(keys)? })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        lora_kin::begin(settings, model)
    }

    fn shapes(&self, module: &str, layer: [usize; 2]) -> Vec<Vec<usize>> {
        self.lora.shapes(module, layer)
    }

    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        self.lora.start(spec, part, module, seed)
    }

    fn plan(&self, module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let (rank, own) = self.lora.of_module(module);
        let (a, b) = (Of::Made(vec![rank, weight.shape()[1]]), Of::Part(PARTS[1]));
        let map = First { rank, rslora: self.lora.rslora, drawn: AtomicUsize::new(rank) };
        Ok(Plan::made(vec![Piece::LowRank { a, b, factor: own * factor }], map))
    }

    fn write(&self) -> Value {
        self.lora.write()
    }
}
