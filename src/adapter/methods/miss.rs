//! MiSS (Kang & Yin 2024), once called Bone: rows of `D` `[r, out]` are shared by the inputs, `y = x Wᵀ + f(x) D` where
//! `f(x)_k` is the sum of the `x_j` with `j mod r = k`. That is a low-rank term whose `A` is a pattern of ones, the same for
//! all layers of a width. With `init_weights: mini`, `D` is `[r, mini_r]` and repeats along the outputs. With `bat` it changes
//! the base's own blocks, `W + W b + b` in blocks of `r` by `r`: no few products give that, and it is merged only.

use crate::adapter::fold::Fold;
use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings, begin_with, options_of, targets_in};
use crate::adapter::peft::{Found, KeyUse, Keys, Use};
use crate::adapter::pieces::{Of, Piece, Plan, fold};
use crate::adapter::tensor::{Stored, TensorSpec, Tensors};
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, Result};
use Use::{Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};
use std::ops::Range;
use std::path::Path;

/// The keys of PEFT's MiSS configs (0.21).
const KEYS: &[KeyUse] = &[
    ("bias", Honoured, ""),
    ("exclude_modules", Honoured, ""),
    ("init_weights", Honoured, ""),
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("mini_r", Honoured, ""),
    ("miss_dropout", NoEffect, ""),
    ("r", Honoured, ""),
    ("target_modules", Honoured, ""),
];

/// What `init_weights` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `D` is as wide as the outputs.
    Balance,
    /// It repeats.
    Mini,
    /// It changes the base's own blocks.
    Bat,
}

/// Settings of MiSS.
#[derive(Clone, Debug, PartialEq)]
pub struct Miss {
    /// Rank (`r`).
    pub rank: usize,
    /// Width of a `D` that repeats (`mini_r`).
    pub mini_r: usize,
    /// Its form.
    pub form: Form,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

/// `B` `[out, r]` of `D` `[r, n]`, whose columns repeat until there are `out` of them.
struct Repeated {
    rank: usize,
    out: usize,
}

impl Map for Repeated {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let width = own[0].len() / self.rank;
        Ok(vec![(0..self.out * self.rank).map(|i| own[0][i % self.rank * width + i / self.rank % width]).collect()])
    }

    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let (width, mut grad) = (own[0].len() / self.rank, vec![0.0; own[0].len()]);
        for (i, g) in grads[0].iter().enumerate() {
            grad[i % self.rank * width + i / self.rank % width] += g;
        }
        vec![grad]
    }
}

/// `A` `[r, in]` with a one at `(k, j)` where `j mod r = k`.
fn pattern([rank, input]: [usize; 2]) -> Vec<f32> {
    (0..rank * input).map(|i| f32::from(u8::from(i % input % rank == i / input))).collect()
}

/// `W + W b + b` of a layer's blocks, `b` `[out / r, r, r]`.
struct Blocks {
    b: Vec<f32>,
    rank: usize,
}

impl Fold for Blocks {
    fn weight(&self, rows: Range<usize>, values: &mut [f32]) {
        let (rank, cols) = (self.rank, values.len() / rows.len().max(1));
        for (row, values) in rows.zip(values.chunks_exact_mut(cols.max(1))) {
            let b = &self.b[row / rank * rank * rank..][..rank * rank];
            for block in values.chunks_exact_mut(rank) {
                let old = block.to_vec();
                block.iter_mut().zip(&b[row % rank * rank..]).for_each(|(w, b)| *w += b);
                for (w, b) in old.iter().zip(b.chunks_exact(rank)) {
                    block.iter_mut().zip(b).for_each(|(new, b)| *new += w * b);
                }
            }
        }
    }
}

impl AdapterMethod for Miss {
    const PEFT_TYPE: &'static str = "MISS";
    const NAME: &'static str = "MiSS";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &["miss_block"];
    const STORED: Stored = Stored::F16;
    const HAS_STRENGTH: bool = true;
    const SETTINGS: &'static [&'static str] = &["rank", "targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let form = match keys.get("init_weights") {
            None | Some(Value::Bool(_)) => Form::Balance,
            Some(Value::String(form)) if form == "mini" => Form::Mini,
            Some(Value::String(form)) if form == "bat" => Form::Bat,
            Some(_) => return Err(keys.wrong("init_weights", "true, false, `mini` or `bat`")),
        };
        Ok(Self { rank: keys.whole("r", 1, 64)?, mini_r: keys.whole("mini_r", 1, 1)?, form, targets: Vec::new() })
    }

    fn check(&mut self, path: &Path, found: &[Found]) -> Result<Vec<String>> {
        for module in found {
            let dimensions = if self.form == Form::Bat { 3 } else { 2 };
            if module.shapes[0].len() != dimensions {
                let (item, got) = (format!("module `{}`", module.path), format!("`{:?}`", module.shapes[0]));
                return Err(Error::format(path, item, format!("{dimensions} dimensions by `init_weights`"), got));
            }
        }
        Ok(Vec::new())
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let (method, layers): (Self, Vec<Param>) = begin_with(&[("r", settings.rank.into())], settings, model)?;
        if method.form == Form::Bat {
            return Err(Error::config("options", "another `init_weights`, for this one is merged only", "bat"));
        }
        for shape in layers.iter().map(|p| &model.params()[p.0 as usize].shape) {
            if method.form == Form::Mini && shape[0] % method.mini_r > 0 {
                let expected = format!("a `mini_r` that divides the {} outputs of every layer", shape[0]);
                return Err(Error::config("options", expected, method.mini_r));
            }
            if method.rank > shape[1] {
                return Err(Error::config("rank", format!("at most the {} inputs of a layer", shape[1]), method.rank));
            }
        }
        Ok((method, layers))
    }

    fn shapes(&self, _module: &str, [out, _]: [usize; 2]) -> Vec<Vec<usize>> {
        vec![match self.form {
            Form::Balance => vec![self.rank, out],
            Form::Mini => vec![self.rank, self.mini_r],
            Form::Bat => vec![out / self.rank, self.rank, self.rank],
        }]
    }

    fn start(&self, spec: &TensorSpec, _part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        vec![0.0; spec.values()]
    }

    fn plan(&self, module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let ([out, input], rank) = (weight.shape(), self.rank);
        if self.form == Form::Bat {
            let what = format!("to run MiSS with `init_weights: bat` on `{module}`");
            let next = "merge it into its base with `pocketlora merge`, and use the result as the model";
            return Err(Error::unsupported(Path::new("adapter"), what, next));
        }
        let (a, b) = (Of::Pattern("miss", [rank, input], pattern), Of::Made(vec![out, rank]));
        Ok(Plan::made(vec![Piece::LowRank { a, b, factor }], Repeated { rank, out }))
    }

    fn fold(&self, module: &str, layer: [usize; 2], tensors: &Tensors, factor: f32) -> Option<Box<dyn Fold>> {
        if self.form == Form::Bat {
            let whole = layer.iter().all(|n| n % self.rank == 0);
            let b = tensors[&format!("{module}.miss_block")].data.clone();
            return (whole && factor == 1.0).then(|| Box::new(Blocks { b, rank: self.rank }) as Box<dyn Fold>);
        }
        let plan = self.plan(module, &crate::adapter::pieces::NoWeight(layer), factor).ok()?;
        fold(Self::PARTS, &plan, module, tensors, layer)
    }

    fn is_final(&self) -> Option<&'static str> {
        (self.form == Form::Bat).then_some("`init_weights: bat` is merged only")
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { rank: self.rank, targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        let init: Value = match self.form {
            Form::Balance => true.into(),
            Form::Mini => "mini".into(),
            Form::Bat => "bat".into(),
        };
        json!({
              "init_weights": init,
             "mini_r": self.mini_r, "miss_dropout": 0.0, "r": self.rank,

        })
    }

    fn describe(&self) -> (String, Value) {
        let keys = json!({"rank": self.rank});
        (format!("{} of rank {}", Self::NAME, self.rank), keys)
    }
}
