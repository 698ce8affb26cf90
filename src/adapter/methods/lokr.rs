//! LoKr (Yeh et al. 2024): `W + s w1 ⊗ w2` with `s = alpha / r`. The sides of W are cut in two factors each, as near to each other as
//! they go or by `decompose_factor`; `w1` has the smaller ones. `w2` is `w2_a w2_b` of rank `r` where that is smaller, and so is
//! `w1` with `decompose_both`. The layer's input is read as a small matrix: `w1 (x w2ᵀ)`, so that no large one is ever there.
//! Backward computes `x w2ᵀ` once more.

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
use std::collections::BTreeMap;

/// Stream of random numbers for fresh matrices.
const INIT: u64 = 0x6c6f_6b72;
const PARTS: &[&str] = &["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"];
/// The parts of a module by whether `w1` and `w2` are products.
const FORMS: [[&[&str]; 2]; 2] = [
    [&["lokr_w1", "lokr_w2"], &["lokr_w1", "lokr_w2_a", "lokr_w2_b"]],
    [&["lokr_w1_a", "lokr_w1_b", "lokr_w2"], &["lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"]],
];

/// The keys of PEFT's LoKr configs (0.21).
const KEYS: &[KeyUse] = &[
    ("alpha", Honoured, ""),
    ("alpha_pattern", OnlyDefault, RETRAIN),
    ("decompose_both", Honoured, ""),
    ("decompose_factor", Honoured, ""),
    ("exclude_modules", Honoured, ""),
    ("init_weights", NoEffect, ""), // how it began
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("module_dropout", NoEffect, ""),
    ("r", Honoured, ""),
    ("rank_dropout", NoEffect, ""),
    ("rank_dropout_scale", NoEffect, ""),
    ("rank_pattern", OnlyDefault, RETRAIN),
    ("target_modules", Honoured, ""),
    ("use_effective_conv2d", NoEffect, ""), // of layers that language models do not have
];

/// Settings of LoKr.
#[derive(Clone, Debug, PartialEq)]
pub struct Lokr {
    /// Rank (`r`) of what is a product.
    pub rank: usize,
    /// `alpha`.
    pub alpha: f64,
    /// `w1` may be a product, too (`decompose_both`).
    pub both: bool,
    /// The first factor of each side (`decompose_factor`), -1 for the one nearest to the root.
    pub factor: i64,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
    /// Whether `w1` and `w2` of a module are products.
    products: BTreeMap<String, [bool; 2]>,
}

/// The two factors of a side.
fn factors(side: usize, factor: i64) -> [usize; 2] {
    match usize::try_from(factor).ok().filter(|factor| *factor > 0) {
        Some(factor) if side.is_multiple_of(factor) => [factor, side / factor],
        most => {
            // As PEFT searches: larger first factors while their sum with the second gets no larger.
            let most = most.unwrap_or(side);
            let (mut small, mut large) = (1, side);
            for next in (2..=side).filter(|next| side.is_multiple_of(*next)) {
                if small >= large || next + side / next > small + large || next > most {
                    break;
                }
                (small, large) = (next, side / next);
            }
            [small.min(large), small.max(large)]
        }
    }
}

impl Lokr {
    /// The shapes `[a, b]` of `w1` and `[c, d]` of `w2`.
    fn sides(&self, [out, input]: [usize; 2]) -> [[usize; 2]; 2] {
        let ([a, c], [b, d]) = (factors(out, self.factor), factors(input, self.factor));
        [[a, b], [c, d]]
    }

    fn of_module(&self, module: &str) -> [bool; 2] {
        self.products.get(module).copied().unwrap_or_default()
    }
}

/// `w1` and `w2` where they are products.
struct Factors {
    rank: usize,
    products: [bool; 2],
}

impl Factors {
    /// Numbers of the parts that are the factors of each product.
    fn places(&self) -> Vec<usize> {
        match self.products {
            [false, false] => vec![],
            [false, true] => vec![1],
            [true, false] => vec![0],
            [true, true] => vec![0, 2],
        }
    }
}

impl Map for Factors {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let product = |at: usize| {
            let (a, b, width) = (own[at], own[at + 1], own[at + 1].len() / self.rank);
            let mut made = vec![0.0; a.len() / self.rank * width];
            for (row, a) in made.chunks_mut(width).zip(a.chunks(self.rank)) {
                for (a, b) in a.iter().zip(b.chunks(width)) {
                    row.iter_mut().zip(b).for_each(|(sum, b)| *sum += a * b);
                }
            }
            made
        };
        Ok(self.places().into_iter().map(product).collect())
    }

    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let mut all = vec![Vec::new(); own.len()];
        for (at, grad) in self.places().into_iter().zip(grads) {
            let (a, b, width) = (own[at], own[at + 1], own[at + 1].len() / self.rank);
            let mut da = vec![0.0; a.len()];
            let mut db = vec![0.0; b.len()];
            for (row, grad) in grad.chunks(width).enumerate() {
                for k in 0..self.rank {
                    let (at, b) = (row * self.rank + k, &b[k * width..][..width]);
                    da[at] = grad.iter().zip(b).map(|(g, b)| g * b).sum();
                    db[k * width..][..width].iter_mut().zip(grad).for_each(|(db, g)| *db += a[at] * g);
                }
            }
            (all[at], all[at + 1]) = (da, db);
        }
        all
    }
}

impl AdapterMethod for Lokr {
    const PEFT_TYPE: &'static str = "LOKR";
    const NAME: &'static str = "LoKr";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;
    const FIRSTS: &'static [usize] = &[0, 1];
    const STORED: Stored = Stored::F32;
    const HAS_STRENGTH: bool = true;
    const SETTINGS: &'static [&'static str] = &["rank", "alpha", "targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let (rank, alpha) = (keys.whole("r", 1, 8)?, keys.number("alpha", Some(8.0))?);
        let factor = keys.number("decompose_factor", Some(-1.0))?;
        if factor.fract() != 0.0 || factor == 0.0 || !(-1.0..=65536.0).contains(&factor) {
            return Err(keys.wrong("decompose_factor", "-1, or a whole number from 1"));
        }
        let (both, factor, targets) = (keys.flag("decompose_both")?, factor as i64, Vec::new());
        Ok(Self { rank, alpha, both, factor, targets, products: BTreeMap::new() })
    }

    fn note_parts(&mut self, module: &str, there: &[&'static str]) {
        self.products.insert(module.to_owned(), ["lokr_w1_a", "lokr_w2_a"].map(|part| there.contains(&part)));
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let config = [("r", settings.rank.into()), ("alpha", crate::adapter::peft::number(settings.alpha))];
        let (mut method, layers): (Self, Vec<Param>) = begin_with(&config, settings, model)?;
        for spec in layers.iter().map(|p| &model.params()[p.0 as usize]) {
            let [first, second] = method.sides([spec.shape[0], spec.shape[1]]).map(|sides| sides.into_iter().max());
            let small = |most: Option<usize>| 2 * method.rank < most.unwrap_or_default();
            let products = [method.both && small(first), small(second)];
            method.products.insert(spec.module().to_owned(), products);
        }
        Ok((method, layers))
    }

    fn parts(&self, module: &str) -> &'static [&'static str] {
        let [first, second] = self.of_module(module).map(usize::from);
        FORMS[first][second]
    }

    fn shapes(&self, module: &str, layer: [usize; 2]) -> Vec<Vec<usize>> {
        let of = |([rows, cols], product): ([usize; 2], bool)| match product {
            true => vec![vec![rows, self.rank], vec![self.rank, cols]],
            false => vec![vec![rows, cols]],
        };
        self.sides(layer).into_iter().zip(self.of_module(module)).flat_map(of).collect()
    }

    /// `w1` zero, or its first factor; the others uniform in `±1/sqrt(columns)` (PEFT's Kaiming-uniform with a = sqrt 5).
    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        if spec.name.ends_with("lokr_w1") || spec.name.ends_with("lokr_w1_a") {
            return vec![0.0; spec.values()];
        }
        let mut rng = Rng::new(mix(mix(mix(seed, INIT), module as u64), part as u64));
        let bound = (spec.shape[1] as f32).sqrt().recip();
        rng.uniforms(bound, spec.values())
    }

    fn plan(&self, module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let ([shape, right], products) = (self.sides(weight.shape()), self.of_module(module));
        let of =
            |product: bool, part, shape: [usize; 2]| if product { Of::Made(shape.to_vec()) } else { Of::Part(part) };
        let (left, right) = (of(products[0], "lokr_w1", shape), of(products[1], "lokr_w2", right));
        let factor = factor * (self.alpha / self.rank as f64) as f32;
        let pieces = vec![Piece::Kronecker { left, right, shape, factor }];
        Ok(Plan::made(pieces, Factors { rank: self.rank, products }))
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { rank: self.rank, alpha: self.alpha, targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({
            "alpha": crate::adapter::peft::number(self.alpha),  "decompose_both": self.both,
            "decompose_factor": self.factor,
              "r": self.rank,
            "rank_dropout_scale": false,
            "use_effective_conv2d": false,
        })
    }

    fn describe(&self) -> (String, Value) {
        let keys = json!({"rank": self.rank, "alpha": self.alpha});
        (format!("{} of rank {}, alpha {}", Self::NAME, self.rank, self.alpha), keys)
    }
}
