//! DeLoRA (Bini et al. 2025): `y = x Wᵀ + (x' Aᵀ) D Bᵀ`, where `x'` are the inputs times the norms `w_norm` `[in]` of W's
//! columns at the start, and `D_k = lambda / (r |A_k| |B_k|)`: `A` `[r, in]` and `B` `[out, r]` give the direction, `lambda` the
//! strength. A low-rank term is made of them; gradients go through the norms.

use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings, begin_with, options_of, targets_in};
use crate::adapter::peft::{KeyUse, Keys, RETRAIN, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::adapter::weight::LayerWeight;
use crate::error::Result;
use crate::rng::{Rng, mix};
use Use::{Default as OnlyDefault, Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};

/// Stream of random numbers for fresh matrices.
const INIT: u64 = 0x6465_6c6f;
/// PEFT's bound on norms from below.
const LEAST: f64 = 1e-4;
const PARTS: &[&str] = &["delora_A", "delora_B", "delora_lambda", "delora_w_norm"];

/// The keys of PEFT's DeLoRA configs (0.21).
const KEYS: &[KeyUse] = &[
    ("bias", Honoured, ""),
    ("delora_lambda", Honoured, ""),
    ("exclude_modules", Honoured, ""),
    ("init_weights", NoEffect, ""), // how it began
    ("lambda_pattern", NoEffect, ""),
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("module_dropout", NoEffect, ""),
    ("r", Honoured, ""),
    ("rank_pattern", OnlyDefault, RETRAIN),
    ("target_modules", Honoured, ""),
];

/// Settings of DeLoRA.
#[derive(Clone, Debug, PartialEq)]
pub struct Delora {
    /// Rank (`r`).
    pub rank: usize,
    /// What `lambda` begins with (`delora_lambda`).
    pub lambda: f64,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

/// `A` times the norms of columns, and `B D`.
struct Directions {
    rank: usize,
}

impl Directions {
    /// Norms of the rows of A and of the columns of B.
    fn norms(&self, a: &[f32], b: &[f32]) -> [Vec<f64>; 2] {
        let (rank, input) = (self.rank, a.len() / self.rank);
        let square = |x: &f32| f64::from(*x) * f64::from(*x);
        let of_a = a.chunks(input).map(|row| row.iter().map(square).sum::<f64>().sqrt()).collect();
        let of_b = (0..rank).map(|k| b.iter().skip(k).step_by(rank).map(square).sum::<f64>().sqrt()).collect();
        [of_a, of_b]
    }

    /// `D / lambda`.
    fn factors(&self, [a, b]: &[Vec<f64>; 2]) -> Vec<f64> {
        a.iter().zip(b).map(|(a, b)| 1.0 / (self.rank as f64 * a.max(LEAST) * b.max(LEAST))).collect()
    }
}

impl Map for Directions {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let [a, b, lambda, w_norm] = own else { unreachable!("one for each part") };
        let factors = self.factors(&self.norms(a, b));
        let scaled = a.iter().zip(w_norm.iter().cycle()).map(|(a, w)| a * w).collect();
        let of = |(i, b): (usize, &f32)| (f64::from(*b) * factors[i % self.rank] * f64::from(lambda[0])) as f32;
        Ok(vec![scaled, b.iter().enumerate().map(of).collect()])
    }

    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let [a, b, lambda, w_norm] = own else { unreachable!("one for each part") };
        let (rank, input, lambda) = (self.rank, a.len() / self.rank, f64::from(lambda[0]));
        let norms = self.norms(a, b);
        let factors = self.factors(&norms);
        // What the factor of each rank gets: B's column k is b_k lambda f_k.
        let mut df = vec![0.0; rank];
        for (i, (g, b)) in grads[1].iter().zip(b.iter()).enumerate() {
            df[i % rank] += f64::from(*g) * f64::from(*b);
        }
        let dlambda: f64 = df.iter().zip(&factors).map(|(d, f)| d * f).sum();
        // f_k is 1 / (r |a_k| |b_k|), so df_k / da = -f_k a / |a_k|² where the norm is above its bound.
        let pull = |k: usize, norm: f64| {
            if norm > LEAST { -df[k] * lambda * factors[k] / (norm * norm) } else { 0.0 }
        };
        let of_a: Vec<f64> = norms[0].iter().enumerate().map(|(k, norm)| pull(k, *norm)).collect();
        let of_b: Vec<f64> = norms[1].iter().enumerate().map(|(k, norm)| pull(k, *norm)).collect();
        let da =
            a.iter().zip(grads[0]).enumerate().map(|(i, (a, g))| {
                (f64::from(*g) * f64::from(w_norm[i % input]) + of_a[i / input] * f64::from(*a)) as f32
            });
        let db =
            b.iter().zip(grads[1]).enumerate().map(|(i, (b, g))| {
                (f64::from(*g) * lambda * factors[i % rank] + of_b[i % rank] * f64::from(*b)) as f32
            });
        vec![da.collect(), db.collect(), vec![dlambda as f32], Vec::new()]
    }
}

impl AdapterMethod for Delora {
    const PEFT_TYPE: &'static str = "DELORA";
    const NAME: &'static str = "DeLoRA";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;
    const FROZEN: &'static [&'static str] = &["delora_w_norm"];
    const STORED: Stored = Stored::F32;
    const HAS_STRENGTH: bool = true;
    const SETTINGS: &'static [&'static str] = &["rank", "targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let (rank, lambda) = (keys.whole("r", 1, 8)?, keys.number("delora_lambda", Some(15.0))?);
        Ok(Self { rank, lambda, targets: Vec::new() })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        begin_with(&[("r", settings.rank.into())], settings, model)
    }

    fn shapes(&self, _module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        vec![vec![self.rank, input], vec![out, self.rank], vec![1], vec![input]]
    }

    /// A uniform in `±1/sqrt(in)` (PEFT's Kaiming-uniform with a = sqrt 5), B zero, `lambda` as asked for.
    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        match part {
            0 => {
                let (mut rng, bound) = (Rng::new(mix(mix(seed, INIT), module as u64)), (spec.shape[1] as f32).sqrt());
                (0..spec.values()).map(|_| (rng.unit() * 2.0 - 1.0) / bound).collect()
            }
            2 => vec![self.lambda as f32],
            _ => vec![0.0; spec.values()],
        }
    }

    fn start_from(&self, part: &str, weight: &dyn LayerWeight) -> Result<Option<Vec<f32>>> {
        let [_, columns] = if part == PARTS[3] { weight.squares()? } else { return Ok(None) };
        Ok(Some(columns.iter().map(|square| square.sqrt() as f32).collect()))
    }

    fn plan(&self, _module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let ([out, input], rank) = (weight.shape(), self.rank);
        let (a, b) = (Of::Made(vec![rank, input]), Of::Made(vec![out, rank]));
        Ok(Plan::made(vec![Piece::LowRank { a, b, factor }], Directions { rank }))
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { rank: self.rank, targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({
             "delora_lambda": crate::adapter::peft::number(self.lambda),
             "lambda_pattern": {},
             "r": self.rank,

        })
    }

    fn describe(&self) -> (String, Value) {
        let keys = json!({"rank": self.rank});
        (format!("{} of rank {}", Self::NAME, self.rank), keys)
    }
}
