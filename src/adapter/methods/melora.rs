//! MELoRA (Ren et al. 2024): `n` small LoRAs beside each other, each from a part of the inputs to a part of the
//! outputs, so that the same rank takes an n-th of the values: `A` and `B` are block-diagonal. Trained are the blocks,
//! `[r, in / n]` and `[out, r / n]`; the file is a LoRA with the whole matrices. Backward makes the gradients of these,
//! and on the host takes the blocks of them.

use super::lora::Lora;
use super::lora_kin::{self, kin_of_lora};
use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings, check_divides};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{HostTensor, TensorSpec, Tensors};
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, Result};
use Use::Honoured;
use pocketlora_models::{Model, Param};
use serde_json::Value;

const PARTS: &[&str] = &["lora_A.weight", "lora_B.weight"];
const KEYS: &[KeyUse] =
    &[("lora_alpha", Honoured, ""), ("mini_loras", Honoured, ""), ("r", Honoured, ""), ("use_rslora", Honoured, "")];

/// Settings of MELoRA.
#[derive(Clone, Debug, PartialEq)]
pub struct Melora {
    /// Small LoRAs (`mini_loras`).
    pub count: usize,
    pub(in crate::adapter) lora: Lora,
}

/// `A` and `B` with blocks on their diagonals.
struct Diagonal {
    rank: usize,
    count: usize,
}

/// The whole `[rows, cols]` matrix with `count` blocks on its diagonal, whose rows are those of `blocks` `[rows, cols /
/// count]`.
fn whole(blocks: &[f32], rows: usize, count: usize) -> Vec<f32> {
    let (width, high) = (blocks.len() / rows.max(1), rows / count.max(1));
    let mut whole = vec![0.0; blocks.len() * count];
    for (i, (row, own)) in whole.chunks_mut((width * count).max(1)).zip(blocks.chunks(width.max(1))).enumerate() {
        row[i / high * width..][..width].copy_from_slice(own);
    }
    whole
}

/// The blocks of such a matrix.
fn blocks(whole: &[f32], rows: usize, count: usize) -> Vec<f32> {
    let (cols, high) = (whole.len() / rows.max(1), rows / count.max(1));
    let width = cols / count.max(1);
    whole.chunks(cols.max(1)).enumerate().flat_map(|(i, row)| row[i / high * width..][..width].to_vec()).collect()
}

impl Diagonal {
    /// Outputs of a `B` of blocks.
    fn outputs(&self, b: usize) -> usize {
        b * self.count / self.rank.max(1)
    }
}

impl Map for Diagonal {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let out = self.outputs(own[1].len());
        Ok(vec![whole(own[0], self.rank, self.count), whole(own[1], out, self.count)])
    }

    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let out = self.outputs(own[1].len());
        vec![blocks(grads[0], self.rank, self.count), blocks(grads[1], out, self.count)]
    }
}

impl Melora {
    /// The LoRA that it is.
    pub(in crate::adapter) fn finish(&self, tensors: &mut Tensors) -> Lora {
        lora_kin::plain(tensors, PARTS, &|own| {
            [0, 1].map(|i| {
                let [rows, cols] = own[i].shape[..] else { unreachable!("both have rows and columns") };
                HostTensor { shape: vec![rows, cols * self.count], data: whole(&own[i].data, rows, self.count) }
            })
        });
        self.lora.clone()
    }
}

impl AdapterMethod for Melora {
    kin_of_lora!("mini_loras");
    const NAME: &'static str = "MELoRA";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let (lora, count) = (lora_kin::read(keys)?, keys.whole("mini_loras", 1, 2)?);
        if !lora.rank.is_multiple_of(count) {
            return Err(Error::config("rank", format!("a multiple of `mini_loras`, `{count}`"), lora.rank));
        }
        Ok(Self { count, lora })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let (method, layers): (Self, Vec<Param>) = lora_kin::begin(settings, model)?;
        for spec in layers.iter().map(|p| &model.params()[p.0 as usize]) {
            spec.shape.iter().try_for_each(|side| check_divides(spec.module(), *side, method.count, "mini_loras"))?;
        }
        Ok((method, layers))
    }

    fn shapes(&self, _module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        vec![vec![self.lora.rank, input / self.count], vec![out, self.lora.rank / self.count]]
    }

    /// As LoRA's, for the inputs that a block has.
    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        self.lora.start(spec, part, module, seed)
    }

    fn plan(&self, module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let ([out, input], (rank, own)) = (weight.shape(), self.lora.of_module(module));
        let (a, b) = (Of::Made(vec![rank, input]), Of::Made(vec![out, rank]));
        Ok(Plan::made(vec![Piece::LowRank { a, b, factor: own * factor }], Diagonal { rank, count: self.count }))
    }

    fn write(&self) -> Value {
        let mut config = self.lora.write();
        config["mini_loras"] = self.count.into();
        config
    }
}
