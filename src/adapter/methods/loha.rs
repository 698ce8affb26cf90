//! LoHa (Hyeon-Woo et al. 2022): `W + s (w1_a w1_b) * (w2_a w2_b)`, element by element, `s = alpha / r`, each product of rank
//! `r`. The elementwise product of two matrices of rank `r` has rank `r²`: it runs as the low-rank term with the rows
//! `w1_b_i * w2_b_j` and the columns `w1_a_i * w2_a_j`, which the base's product takes along.

use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings, begin_with, options_of, targets_in};
use crate::adapter::peft::{KeyUse, Keys, RETRAIN, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::adapter::weight::LayerWeight;
use crate::error::Result;
use crate::rng::normals;
use Use::{Default as OnlyDefault, Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};

/// Stream of random numbers for fresh matrices.
const INIT: u64 = 0x6c6f_6861;
/// Bound on the rank, for what it takes grows with the square.
const MOST: usize = 64;

/// The keys of PEFT's LoHa configs (0.21).
const KEYS: &[KeyUse] = &[
    ("alpha", Honoured, ""),
    ("alpha_pattern", OnlyDefault, RETRAIN),
    ("exclude_modules", Honoured, ""),
    ("init_weights", NoEffect, ""), // how it began
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("module_dropout", NoEffect, ""),
    ("r", Honoured, ""),
    ("rank_dropout", NoEffect, ""),
    ("rank_pattern", OnlyDefault, RETRAIN),
    ("target_modules", Honoured, ""),
    ("use_effective_conv2d", NoEffect, ""), // of layers that language models do not have
];

/// Settings of LoHa.
#[derive(Clone, Debug, PartialEq)]
pub struct Loha {
    /// Rank (`r`) of each of the two products.
    pub rank: usize,
    /// `alpha`.
    pub alpha: f64,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

/// The term of rank `r²`.
struct Products {
    rank: usize,
}

impl Map for Products {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let [a1, b1, a2, b2] = own else { unreachable!("one for each part") };
        let (rank, input) = (self.rank, b1.len() / self.rank);
        let pairs = (0..rank * rank).map(|ij| (ij / rank, ij % rank));
        let row = |(i, j): (usize, usize)| {
            let (x, y) = (&b1[i * input..(i + 1) * input], &b2[j * input..(j + 1) * input]);
            x.iter().zip(y).map(|(x, y)| x * y).collect::<Vec<f32>>()
        };
        let a = pairs.flat_map(row).collect();
        let rows = a1.chunks(rank).zip(a2.chunks(rank));
        let b = rows.flat_map(|(x, y)| x.iter().flat_map(|x| y.iter().map(move |y| x * y))).collect();
        Ok(vec![a, b])
    }

    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let [a1, b1, a2, b2] = own else { unreachable!("one for each part") };
        let (rank, input) = (self.rank, b1.len() / self.rank);
        let mut all = own.iter().map(|values| vec![0.0; values.len()]).collect::<Vec<_>>();
        for (ij, grad) in grads[0].chunks(input).enumerate() {
            let (i, j) = (ij / rank * input, ij % rank * input);
            for (c, g) in grad.iter().enumerate() {
                all[1][i + c] += g * b2[j + c];
                all[3][j + c] += g * b1[i + c];
            }
        }
        for (row, grad) in grads[1].chunks(rank * rank).enumerate() {
            for (ij, g) in grad.iter().enumerate() {
                let (i, j) = (row * rank + ij / rank, row * rank + ij % rank);
                all[0][i] += g * a2[j];
                all[2][j] += g * a1[i];
            }
        }
        all
    }
}

impl AdapterMethod for Loha {
    const PEFT_TYPE: &'static str = "LOHA";
    const NAME: &'static str = "LoHa";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"];
    const STORED: Stored = Stored::F32;
    const HAS_STRENGTH: bool = true;
    const SETTINGS: &'static [&'static str] = &["rank", "alpha", "targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let rank = keys.whole("r", 1, 8)?;
        if rank > MOST {
            return Err(keys.wrong("r", "at most 64, for it works with the square of that"));
        }
        Ok(Self { rank, alpha: keys.number("alpha", Some(8.0))?, targets: Vec::new() })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let config = [("r", settings.rank.into()), ("alpha", crate::adapter::peft::number(settings.alpha))];
        begin_with(&config, settings, model)
    }

    fn shapes(&self, _module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        let pair = || [vec![out, self.rank], vec![self.rank, input]];
        pair().into_iter().chain(pair()).collect()
    }

    /// As PEFT begins: normal with deviations of 0.1 and 1, but for `w2_a`, which is zero.
    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        let deviation = [0.1, 1.0, 0.0, 1.0][part];
        normals(&[seed, INIT, module as u64, part as u64], deviation, spec.values())
    }

    fn plan(&self, _module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let ([out, input], rank) = (weight.shape(), self.rank);
        let (a, b) = (Of::Made(vec![rank * rank, input]), Of::Made(vec![out, rank * rank]));
        let factor = factor * (self.alpha / rank as f64) as f32;
        Ok(Plan::made(vec![Piece::LowRank { a, b, factor }], Products { rank }))
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { rank: self.rank, alpha: self.alpha, targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({
            "alpha": crate::adapter::peft::number(self.alpha),

            "r": self.rank,
             "use_effective_conv2d": false,
        })
    }

    fn describe(&self) -> (String, Value) {
        let keys = json!({"rank": self.rank, "alpha": self.alpha});
        (format!("{} of rank {}, alpha {}", Self::NAME, self.rank, self.alpha), keys)
    }
}
