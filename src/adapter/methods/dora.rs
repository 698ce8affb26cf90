//! DoRA (Liu et al. 2024): `y = m V x / |V|` with `V = W + s B A` and the norms of V's rows, so that `m` `[out]` learns how
//! long a row is and `B A` where it points. The layer's bias is added after. Norms are constants in backward, as the paper
//! has it. They come from `|W_o|²`, which is computed once, from `W Aᵀ`, one product with the base's weight after each step,
//! and from `A Aᵀ`: `V` is never there. Served, `m / |V|` is one vector. Backward computes `V x` once more for `m`'s gradient.

use super::lora::{self, Lora};
use crate::adapter::fold::{Fold, LowRankFold};
use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, EMBEDDING, Group, Settings, targets_in};
use crate::adapter::peft::{Found, KeyUse, Keys};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec, Tensors};
use crate::adapter::weight::{LayerWeight, norms};
use crate::error::{Error, Result};
use pocketlora_models::{Model, Param};
use serde_json::Value;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

const PARTS: &[&str] = &["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"];

/// A LoRA (`lora_alpha`, `r` and so on) beside lengths of rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Dora(pub Lora);

/// `m / |V|`, and what goes to a layer's bias.
struct Lengths {
    /// `|W_o|²`.
    squares: Arc<[f64]>,
    bias: Option<Vec<f32>>,
    factor: f32,
    /// The norms that forward used last.
    norms: Mutex<Vec<f32>>,
}

impl Map for Lengths {
    fn forward(&self, own: &[&[f32]], weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let norms = norms(&self.squares, (own[0], own[1]), self.factor, weight)?;
        // A row of zeros has no direction, and stays one.
        let scale: Vec<f32> = own[2].iter().zip(&norms).map(|(m, n)| if *n > 0.0 { m / n } else { 0.0 }).collect();
        *self.norms.lock().unwrap_or_else(PoisonError::into_inner) = norms;
        // What the layer gives has its bias in it, which stays as it is: c (u + b) + (1 - c) b.
        let shift = self.bias.as_ref().map(|bias| bias.iter().zip(&scale).map(|(b, c)| (1.0 - c) * b).collect());
        Ok([scale].into_iter().chain(shift).collect())
    }

    fn backward(&self, _own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let mut dc = grads[0].to_vec();
        if let (Some(ds), Some(bias)) = (grads.get(1), &self.bias) {
            dc.iter_mut().zip(*ds).zip(bias).for_each(|((dc, ds), b)| *dc -= b * ds);
        }
        let norms = self.norms.lock().unwrap_or_else(PoisonError::into_inner);
        let dm = dc.iter().zip(norms.iter()).map(|(dc, n)| if *n > 0.0 { dc / n } else { 0.0 }).collect();
        vec![Vec::new(), Vec::new(), dm]
    }
}

/// `m V / |V|`, a row at a time.
struct LengthFold {
    low_rank: LowRankFold,
    m: Vec<f32>,
}

impl Fold for LengthFold {
    fn weight(&self, rows: Range<usize>, values: &mut [f32]) {
        let cols = values.len() / rows.len().max(1);
        self.low_rank.weight(rows.clone(), values);
        for (row, values) in rows.zip(values.chunks_exact_mut(cols.max(1))) {
            let norm = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt() as f32;
            let scale = if norm > 0.0 { self.m[row] / norm } else { 0.0 };
            values.iter_mut().for_each(|w| *w *= scale);
        }
    }
}

impl AdapterMethod for Dora {
    const PEFT_TYPE: &'static str = "LORA";
    const NAME: &'static str = "DoRA";
    const KEYS: &'static [KeyUse] = lora::KEYS;
    const PARTS: &'static [&'static str] = PARTS;
    // Lengths lie near those of the base's rows, which f16 would round.
    const DIMENSIONS: &'static [usize] = &[2, 2, 1];
    const STORED: Stored = Stored::F32;
    const ASKED_BY: Option<&'static str> = Some("use_dora");
    const ADDS_UP: bool = false;
    const SETTINGS: &'static [&'static str] = Lora::SETTINGS;
    const IN_TRAINING: &'static [&'static str] = Lora::IN_TRAINING;

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let lora = Lora::read(keys)?;
        if lora.bias {
            return Err(keys.wrong("lora_bias", "false beside `use_dora`"));
        }
        Ok(Self(lora))
    }

    fn check(&mut self, path: &Path, found: &[Found]) -> Result<Vec<String>> {
        if found.iter().any(|module| module.path == EMBEDDING) {
            let next =
                "merge the adapter into its base with PEFT's `merge_and_unload`, and use the result as the model";
            return Err(Error::unsupported(path, "DoRA on the embedding", next));
        }
        self.0.check(path, found)
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let (lora, layers) = lora::begin_on_layers(settings, model, Self::NAME)?;
        Ok((Self(lora), layers))
    }

    fn shapes(&self, module: &str, layer: [usize; 2]) -> Vec<Vec<usize>> {
        [self.0.shapes(module, layer), vec![vec![layer[0]]]].concat()
    }

    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        self.0.start(spec, part, module, seed)
    }

    /// Lengths begin as those of the base's rows.
    fn start_from(&self, part: &str, weight: &dyn LayerWeight) -> Result<Option<Vec<f32>>> {
        let [rows, _] = if part == PARTS[2] { weight.squares()? } else { return Ok(None) };
        Ok(Some(rows.iter().map(|square| square.sqrt() as f32).collect()))
    }

    fn plan(&self, module: &str, weight: &dyn LayerWeight, _factor: f32) -> Result<Plan> {
        let (_, factor) = self.0.of_module(module);
        let ([out, _], [squares, _], bias) = (weight.shape(), weight.squares()?, weight.bias()?);
        let shift = bias.as_ref().map(|_| Of::Made(vec![out]));
        let lengths = Lengths { squares: squares.into(), bias, factor, norms: Mutex::default() };
        let pieces = vec![
            Piece::LowRank { a: Of::Part(PARTS[0]), b: Of::Part(PARTS[1]), factor },
            Piece::Output { scale: Some(Of::Made(vec![out])), turn: None, shift },
        ];
        Ok(Plan::made(pieces, lengths))
    }

    fn fold(&self, module: &str, _layer: [usize; 2], tensors: &Tensors, _factor: f32) -> Option<Box<dyn Fold>> {
        let [a, b, m] = [0, 1, 2].map(|i| tensors[&format!("{module}.{}", PARTS[i])].data.clone());
        let (rank, factor) = self.0.of_module(module);
        Some(Box::new(LengthFold { low_rank: LowRankFold { a, b, rank, bias: None, factor }, m }))
    }

    fn group(&self, name: &str, settings: &Settings) -> Group {
        self.0.group(name, settings)
    }

    fn settings(&self, settings: Settings) -> Settings {
        self.0.settings(settings)
    }

    fn set_in_training(&mut self, settings: &Settings) {
        self.0.set_in_training(settings);
    }

    targets_in!(0.targets);

    fn write(&self) -> Value {
        let mut config = self.0.write();
        config["use_dora"] = true.into();
        config
    }

    fn describe(&self) -> (String, Value) {
        let (text, keys) = self.0.describe();
        (text.replacen("LoRA", Self::NAME, 1), keys)
    }
}
