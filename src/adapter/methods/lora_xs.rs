//! LoRA-XS (Bałazy et al. 2024): `y = x Wᵀ + s B R A x` with the largest singular values of the weight, `A = V_rᵀ` `[r,
//! in]` and `B = U_r S_r` `[out, r]`, both fixed; only `R` `[r, r]` is trained. The file is a LoRA with `R A` and `B`.
//! Backward makes the gradient of `R A`, and on the host that of `R`.

use super::lora::Lora;
use super::lora_kin::{self, kin_of_lora};
use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{HostTensor, TensorSpec, Tensors};
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, Result};
use crate::rng::normals;
use Use::Honoured;
use pocketlora_models::{Model, Param};
use serde_json::Value;

const PARTS: &[&str] = &["lora_A.weight", "lora_B.weight", "lora_R.weight"];
const KEYS: &[KeyUse] = &[("lora_alpha", Honoured, ""), ("r", Honoured, ""), ("use_rslora", Honoured, "")];
/// Deviation of a fresh `R`.
const SMALL: f32 = 1e-5;

/// The LoRA that it becomes.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraXs {
    pub(in crate::adapter) lora: Lora,
}

/// `R A`.
struct Mixed {
    rank: usize,
}

impl Map for Mixed {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        Ok(vec![mixed(own[0], own[2], self.rank)])
    }

    /// `dR = dM Aᵀ`.
    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let width = (own[0].len() / self.rank.max(1)).max(1);
        let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>();
        let rows = grads[0].chunks(width).flat_map(|g| own[0].chunks(width).map(move |a| dot(g, a)));
        vec![Vec::new(), Vec::new(), rows.collect()]
    }
}

/// `R A` of `A` `[r, in]` and `R` `[r, r]`.
fn mixed(a: &[f32], r: &[f32], rank: usize) -> Vec<f32> {
    let width = (a.len() / rank.max(1)).max(1);
    let row = |r: &[f32]| {
        let mut row = vec![0.0; width];
        r.iter().zip(a.chunks(width)).for_each(|(r, a)| row.iter_mut().zip(a).for_each(|(row, a)| *row += r * a));
        row
    };
    r.chunks(rank.max(1)).flat_map(row).collect()
}

impl LoraXs {
    /// The LoRA that it is.
    pub(in crate::adapter) fn finish(&self, tensors: &mut Tensors) -> Lora {
        lora_kin::plain(tensors, PARTS, &|own| {
            let (a, b, r) = (&own[0], own[1].clone(), &own[2]);
            [HostTensor { shape: a.shape.clone(), data: mixed(&a.data, &r.data, a.shape[0]) }, b]
        });
        self.lora.clone()
    }
}

impl AdapterMethod for LoraXs {
    kin_of_lora!("lora_xs");
    const NAME: &'static str = "LoRA-XS";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;
    const FROZEN: &'static [&'static str] = &["lora_A.weight", "lora_B.weight"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        Ok(Self { lora: lora_kin::read(keys)? })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let (method, layers): (Self, Vec<Param>) = lora_kin::begin(settings, model)?;
        for spec in layers.iter().map(|p| &model.params()[p.0 as usize]) {
            let side = spec.shape.iter().copied().min().unwrap_or(0);
            if method.lora.rank > side {
                let expected = format!("at most the {side} singular values of `{}`", spec.module());
                return Err(Error::config("rank", expected, method.lora.rank));
            }
        }
        Ok((method, layers))
    }

    fn shapes(&self, _module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        let rank = self.lora.rank;
        vec![vec![rank, input], vec![out, rank], vec![rank, rank]]
    }

    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        match part {
            2 => normals(&[seed, 0x7873, module as u64], SMALL, spec.values()),
            // The weight says them.
            _ => vec![0.0; spec.values()],
        }
    }

    fn plan(&self, module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let (rank, own) = self.lora.of_module(module);
        let (a, b) = (Of::Made(vec![rank, weight.shape()[1]]), Of::Part(PARTS[1]));
        Ok(Plan::made(vec![Piece::LowRank { a, b, factor: own * factor }], Mixed { rank }))
    }

    fn write(&self) -> Value {
        self.lora.write()
    }
}
