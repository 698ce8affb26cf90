//! HRA (Yuan et al. 2024): `y = W H x + b` with `H`, a chain of reflections `1 - 2 u uᵀ / |u|²` by the columns of `u` `[in, r]`,
//! the first one outermost; with `apply_GS` it is `1 - 2 Q Qᵀ`, `Q` the columns after Gram and Schmidt. Either is `1 + V U`
//! with `U` `[r, in]` the unit vectors and `V` `[in, r]`: `v_k = -2 (1 + v_1 u_1 + .. + v_{k-1} u_{k-1}) u_kᵀ`. The layer reads
//! `x + (x Uᵀ) Vᵀ`; backward computes `x Uᵀ` once more.

use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings, begin_with, options_of, targets_in};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, Result};
use crate::rng::normals;
use Use::{Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};

/// Stream of random numbers for fresh vectors.
const INIT: u64 = 0x6872_6100;

/// The keys of PEFT's HRA configs (0.21).
const KEYS: &[KeyUse] = &[
    ("apply_GS", Honoured, ""),
    ("bias", Honoured, ""),
    ("exclude_modules", Honoured, ""),
    ("init_weights", NoEffect, ""), // how it began
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("r", Honoured, ""),
    ("target_modules", Honoured, ""),
];

/// Settings of HRA.
#[derive(Clone, Debug, PartialEq)]
pub struct Hra {
    /// Reflections (`r`).
    pub rank: usize,
    /// Their vectors are made orthogonal first (`apply_GS`).
    pub orthogonal: bool,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

/// `U` and `V`.
struct Reflections {
    rank: usize,
    orthogonal: bool,
}

type Vectors = Vec<Vec<f64>>;

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn add(x: &mut [f64], factor: f64, y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += factor * y);
}

impl Reflections {
    fn columns(&self, u: &[f32]) -> Vectors {
        (0..self.rank).map(|k| u.iter().skip(k).step_by(self.rank).map(|u| f64::from(*u)).collect()).collect()
    }

    /// The unit vectors, with what each was before it got that length.
    fn units(&self, u: &[f32]) -> (Vectors, Vectors) {
        let (mut units, mut before): (Vectors, Vectors) = (Vec::new(), Vec::new());
        for mut u in self.columns(u) {
            for unit in units.iter().filter(|_| self.orthogonal) {
                let along = dot(unit, &u);
                add(&mut u, -along, unit);
            }
            let norm = dot(&u, &u).sqrt();
            units.push(u.iter().map(|u| if norm > 0.0 { u / norm } else { 0.0 }).collect());
            before.push(u);
        }
        (units, before)
    }

    /// The columns of V.
    fn answers(&self, units: &Vectors) -> Vectors {
        let mut all: Vectors = Vec::new();
        for (k, unit) in units.iter().enumerate() {
            let mut v = unit.clone();
            for (answer, other) in all.iter().zip(&units[..k]).filter(|_| !self.orthogonal) {
                add(&mut v, dot(other, unit), answer);
            }
            v.iter_mut().for_each(|v| *v *= -2.0);
            all.push(v);
        }
        all
    }
}

impl Map for Reflections {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let (units, _) = self.units(own[0]);
        let answers = self.answers(&units);
        let u = units.iter().flatten().map(|u| *u as f32).collect();
        let v = (0..own[0].len()).map(|i| answers[i % self.rank][i / self.rank] as f32).collect();
        Ok(vec![u, v])
    }

    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let (rank, input) = (self.rank, own[0].len() / self.rank);
        let (units, before) = self.units(own[0]);
        let answers = self.answers(&units);
        let mut du: Vectors = grads[0].chunks(input).map(|row| row.iter().map(|g| f64::from(*g)).collect()).collect();
        let mut dv = self.columns(grads[1]);
        // v_k = -2 (u_k + sum over l < k of v_l (u_l . u_k))
        for k in (0..rank).rev() {
            let d: Vec<f64> = dv[k].iter().map(|d| -2.0 * d).collect();
            add(&mut du[k], 1.0, &d);
            for l in (0..k).filter(|_| !self.orthogonal) {
                let (along, dalong) = (dot(&units[l], &units[k]), dot(&answers[l], &d));
                add(&mut dv[l], along, &d);
                add(&mut du[l], dalong, &units[k]);
                add(&mut du[k], dalong, &units[l]);
            }
        }
        for k in (0..rank).rev() {
            // u = w / |w|
            let (unit, norm) = (&units[k], dot(&before[k], &before[k]).sqrt());
            let along = dot(unit, &du[k]);
            add(&mut du[k], -along, unit);
            du[k].iter_mut().for_each(|d| *d = if norm > 0.0 { *d / norm } else { 0.0 });
            if !self.orthogonal {
                continue;
            }
            // One step after the other took away what lay along an earlier unit vector: w' = w - (q . w) q.
            let mut w = before[k].clone();
            for l in (0..k).rev() {
                let q = &units[l];
                // What w was before this step has more of q in it; the first vector's own share is what tells.
                let share = dot(q, &self.partial(own[0], &units, k, l));
                add(&mut w, share, q);
                let dq_along = dot(q, &du[k]);
                let (dk, w_now) = (du[k].clone(), w.clone());
                add(&mut du[l], -dq_along, &w_now);
                add(&mut du[l], -share, &dk);
                add(&mut du[k], -dq_along, &units[l]);
            }
        }
        vec![(0..own[0].len()).map(|i| du[i % rank][i / rank] as f32).collect()]
    }
}

impl Reflections {
    /// Column `k` after the steps by the first `steps` unit vectors.
    fn partial(&self, u: &[f32], units: &Vectors, k: usize, steps: usize) -> Vec<f64> {
        let mut w: Vec<f64> = u.iter().skip(k).step_by(self.rank).map(|u| f64::from(*u)).collect();
        for unit in &units[..steps] {
            let along = dot(unit, &w);
            add(&mut w, -along, unit);
        }
        w
    }
}

impl AdapterMethod for Hra {
    const PEFT_TYPE: &'static str = "HRA";
    const NAME: &'static str = "HRA";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &["hra_u"];
    const STORED: Stored = Stored::F32;
    const SETTINGS: &'static [&'static str] = &["rank", "targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        Ok(Self { rank: keys.whole("r", 1, 8)?, orthogonal: keys.flag("apply_GS")?, targets: Vec::new() })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let (method, layers): (Self, Vec<Param>) = begin_with(&[("r", settings.rank.into())], settings, model)?;
        if method.orthogonal {
            return Err(Error::config("options", "no `apply_GS`, with which no adapter begins as the base", "true"));
        }
        if !method.rank.is_multiple_of(2) {
            return Err(Error::config("rank", "an even number with HRA, so that it begins as the base", method.rank));
        }
        Ok((method, layers))
    }

    fn shapes(&self, _module: &str, [_, input]: [usize; 2]) -> Vec<Vec<usize>> {
        vec![vec![input, self.rank]]
    }

    /// Each vector twice in a row, as in PEFT: two equal reflections are none.
    fn start(&self, spec: &TensorSpec, _part: usize, module: usize, seed: u64) -> Vec<f32> {
        let once = normals(&[seed, INIT, module as u64], 1.0, spec.values() / 2);
        once.into_iter().flat_map(|u| [u, u]).collect()
    }

    fn plan(&self, _module: &str, weight: &dyn LayerWeight, _factor: f32) -> Result<Plan> {
        let ([_, input], rank) = (weight.shape(), self.rank);
        let (u, v) = (Of::Made(vec![rank, input]), Of::Made(vec![input, rank]));
        Ok(Plan::made(vec![Piece::Reflect { u, v }], Reflections { rank, orthogonal: self.orthogonal }))
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { rank: self.rank, targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({
            "apply_GS": self.orthogonal,
              "r": self.rank,

        })
    }

    fn describe(&self) -> (String, Value) {
        let keys = json!({"rank": self.rank});
        (format!("{} of {} reflections", Self::NAME, self.rank), keys)
    }
}
