//! BOFT (Liu et al. 2024): `y = s (W Qᵀ x) + b`, `s` `[out]`, with `Q` a product of `m` orthogonal factors `P_j diag(R_j) P_jᵀ`: blocks
//! `R = (1 - S) (1 + S)^-1` of `S = (r - rᵀ) / 2`, where `r` is in the file, among columns that the permutation `P_j` puts side by side,
//! farther ones for each further factor. The layer's bias stays as it is. The blocks are made on the host; each factor works on what
//! the layer reads, the last one first. Backward reads the layer's input, and computes that of each factor once more.

use crate::adapter::fold::{Fold, WeightFold};
use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings, begin_with, check_divides, options_of, targets_in};
use crate::adapter::peft::{Found, KeyUse, Keys, Use};
use crate::adapter::pieces::{Of, Piece, Plan, fold};
use crate::adapter::square::{Square, inverse};
use crate::adapter::tensor::{Stored, TensorSpec, Tensors};
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, Result};
use Use::{Default as OnlyDefault, Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::path::Path;

const PARTS: &[&str] = &["boft_R", "boft_s"];
/// Factors at most: each doubles how far columns may be from each other.
const MOST: usize = 16;

/// The keys of PEFT's BOFT configs (0.21).
const KEYS: &[KeyUse] = &[
    ("bias", Honoured, ""),
    ("boft_block_num", Honoured, ""),
    ("boft_block_size", Honoured, ""),
    ("boft_dropout", NoEffect, ""), // of training
    ("boft_n_butterfly_factor", Honoured, ""),
    ("exclude_modules", Honoured, ""),
    ("fan_in_fan_out", OnlyDefault, "linear layers of the supported families are not transposed: set it to `false`"),
    ("init_weights", NoEffect, ""), // how it began
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("target_modules", Honoured, ""),
];

/// Settings of BOFT.
#[derive(Clone, Debug, PartialEq)]
pub struct Boft {
    /// Blocks (`boft_block_num`), 0 where their size is given.
    pub blocks: usize,
    /// Columns of a block (`boft_block_size`), 0 where their number is given.
    pub block_size: usize,
    /// Factors (`boft_n_butterfly_factor`). PEFT makes a single one where it finds no CUDA compiler, whatever its config says.
    pub factors: usize,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

impl Boft {
    /// Columns of a block of a layer with `input` of them; 0 where they are no whole number of blocks that all factors can mix.
    fn size(&self, input: usize) -> usize {
        let size = if self.block_size > 0 { self.block_size } else { input / self.blocks.max(1) };
        let whole = size > 0 && input.is_multiple_of(size) && (self.blocks == 0 || size * self.blocks == input);
        // Halves of blocks are what the permutations move.
        let far = self.factors == 1
            || size.is_multiple_of(2) && (input / size.max(1)).is_multiple_of(1 << (self.factors - 1));
        if whole && far { size } else { 0 }
    }

    /// Where `P_j` has each column of `n`, for `j` and blocks of `size`: within groups of 2^j blocks, first the halves of blocks
    /// with even numbers, then those with odd ones.
    fn places(&self, n: usize, size: usize, j: usize) -> Vec<u32> {
        if self.factors == 1 {
            return (0..n as u32).collect();
        }
        let (group, half) = (size << j, size / 2);
        let halves = group / half;
        let order: Vec<usize> = (0..halves).step_by(2).chain((1..halves).step_by(2)).collect();
        let mut places = vec![0; n];
        for p in 0..n {
            let from = p / group * group + order[p % group / half] * half + p % half;
            places[from] = p as u32;
        }
        places
    }

    fn plan_of(&self, module: &str, [out, input]: [usize; 2], bias: Option<Vec<f32>>) -> Result<Plan> {
        let size = self.size(input);
        check_divides(module, input, size, "boft_block_size")?;
        let piece = |j: usize| {
            let places = self.places(input, size, j);
            // What it reads is Pᵀ-turned back: x'[q] += R[o, k] x[p], o at p and k at q.
            let entries = (0..input).flat_map(|p| (0..size).map(move |k| (p, p / size * size + k)));
            let (rows, cols) = entries.map(|(o, k)| (places[k], places[o])).unzip();
            Piece::Butterfly { values: Of::Made(vec![input / size, size, size]), rows, cols }
        };
        let mut pieces: Vec<Piece> = (0..self.factors).rev().map(piece).collect();
        let shift = bias.as_ref().map(|_| Of::Made(vec![out]));
        pieces.push(Piece::Output { scale: Some(Of::Part(PARTS[1])), turn: None, shift });
        Ok(Plan::made(pieces, Cayley { size, values: input * size, bias }))
    }
}

/// The blocks of all factors, the last one first, and what goes to a layer's bias.
struct Cayley {
    /// Columns of a block, values of a factor.
    size: usize,
    values: usize,
    bias: Option<Vec<f32>>,
}

impl Cayley {
    fn skew(&self, r: &[f32]) -> Square {
        let r = Square::of(self.size, r);
        r.clone().plus(-1.0, &r.transposed()).scaled(0.5)
    }

    /// `(1 + S)^-1`.
    fn solved(&self, r: &[f32]) -> Square {
        inverse(&Square::one(self.size).plus(1.0, &self.skew(r)))
    }
}

// Blocks are apart from each other, so that the threads on which they are computed change nothing.
impl Map for Cayley {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        // R = (1 - S) (1 + S)^-1 = 2 (1 + S)^-1 - 1
        let one = |r: &[f32]| -> Vec<f32> {
            let block = self.solved(r).scaled(2.0).plus(-1.0, &Square::one(self.size));
            block.values().iter().map(|v| *v as f32).collect()
        };
        let of = |factor: &[f32]| factor.par_chunks(self.size * self.size).map(one).collect::<Vec<_>>().concat();
        let shift = self.bias.as_ref().map(|bias| bias.iter().zip(own[1]).map(|(b, s)| (1.0 - s) * b).collect());
        Ok(own[0].chunks(self.values).rev().map(of).chain(shift).collect())
    }

    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        // R = 2 X - 1 with X = (1 + S)^-1, so dS = -Xᵀ (2 dR) Xᵀ.
        let one = |(r, dr): (&[f32], &[f32])| -> Vec<f32> {
            let x = self.solved(r).transposed();
            let ds = x.times(&Square::of(self.size, dr)).times(&x).scaled(-2.0);
            let dr = ds.clone().plus(-1.0, &ds.transposed()).scaled(0.5);
            dr.values().iter().map(|v| *v as f32).collect()
        };
        let block = self.size * self.size;
        let factors = own[0].chunks(self.values).rev().zip(grads);
        let mut all: Vec<Vec<f32>> = factors
            .map(|(r, dr)| r.par_chunks(block).zip(dr.par_chunks(block)).map(one).collect::<Vec<_>>().concat())
            .collect();
        all.reverse();
        let ds = self.bias.as_ref().zip(grads.last());
        let ds = ds.map(|(bias, shift)| bias.iter().zip(*shift).map(|(b, g)| -b * g).collect());
        vec![all.concat(), ds.unwrap_or_default()]
    }
}

impl AdapterMethod for Boft {
    const PEFT_TYPE: &'static str = "BOFT";
    const NAME: &'static str = "BOFT";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;
    const STORED: Stored = Stored::F32;
    const ADDS_UP: bool = false;
    const SETTINGS: &'static [&'static str] = &["targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let blocks = keys.whole("boft_block_num", 0, 0)?;
        let block_size = keys.whole("boft_block_size", 0, if blocks > 0 { 0 } else { 4 })?;
        if (blocks == 0) == (block_size == 0) {
            return Err(
                keys.wrong("boft_block_size", "a size beside `boft_block_num: 0`, or 0 beside a number of blocks")
            );
        }
        let factors = keys.whole("boft_n_butterfly_factor", 1, 1)?;
        if factors > MOST {
            return Err(keys.wrong("boft_n_butterfly_factor", "a whole number up to 16"));
        }
        Ok(Self { blocks, block_size, factors, targets: Vec::new() })
    }

    /// The file tells how many factors there are.
    fn check(&mut self, path: &Path, found: &[Found]) -> Result<Vec<String>> {
        for module in found {
            let there = module.shapes[0].first().copied().unwrap_or_default();
            if there != self.factors && there != 1 {
                let expected = format!("{} factors by `boft_n_butterfly_factor`, or one", self.factors);
                return Err(Error::format(path, format!("module `{}`", module.path), expected, there));
            }
        }
        if found.iter().any(|module| module.shapes[0].first() == Some(&1)) {
            self.factors = 1;
        }
        Ok(Vec::new())
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let (method, layers): (Self, Vec<Param>) = begin_with(&[], settings, model)?;
        let mut inputs = layers.iter().map(|p| model.params()[p.0 as usize].shape[1]);
        match inputs.find(|input| method.size(*input) < 2) {
            Some(input) => {
                let expected = format!("a `boft_block_size` from 2 that the {input} inputs of every layer fit");
                Err(Error::config("options", expected, method.block_size))
            }
            None => Ok((method, layers)),
        }
    }

    fn shapes(&self, _module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        let size = self.size(input);
        vec![vec![self.factors, input / size.max(1), size, size], vec![out, 1]]
    }

    fn start(&self, spec: &TensorSpec, part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        vec![part as f32; spec.values()]
    }

    fn plan(&self, module: &str, weight: &dyn LayerWeight, _factor: f32) -> Result<Plan> {
        self.plan_of(module, weight.shape(), weight.bias()?)
    }

    fn fold(&self, module: &str, layer: [usize; 2], tensors: &Tensors, _factor: f32) -> Option<Box<dyn Fold>> {
        let plan = self.plan_of(module, layer, None).ok()?;
        Some(Box::new(WeightFold(fold(PARTS, &plan, module, tensors, layer)?)))
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({
            "boft_block_num": self.blocks, "boft_block_size": self.block_size, "boft_dropout": 0.0,
            "boft_n_butterfly_factor": self.factors,
        })
    }

    fn describe(&self) -> (String, Value) {
        let keys = json!({"boft_block_num": self.blocks, "boft_block_size": self.block_size, "factors": self.factors});
        let blocks = if self.block_size > 0 { "blocks of" } else { "blocks:" };
        (format!("{}, {blocks} {}, {} factors", Self::NAME, self.block_size.max(self.blocks), self.factors), keys)
    }
}
