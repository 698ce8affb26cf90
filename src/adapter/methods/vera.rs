//! VeRA (Kopiczko et al. 2024): `y = x Wᵀ + b ((d (x Aᵀ)) Bᵀ)`. `A` `[r, in]` and `B` `[out, r]` are random and frozen, the first
//! columns and rows of one pair that all layers share; `d` `[r]` and `b` `[out]` are trained. Backward computes `x Aᵀ` and
//! the term once more. A file without the pair (`save_projection: false`) says by `projection_prng_key` how torch draws it; what is
//! saved here has it.

use crate::adapter::method::{AdapterMethod, Settings, begin_with, options_of, paths_of, targets_in};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{HostTensor, Stored, TensorSpec, Tensors};
use crate::adapter::torch_rng::TorchRng;
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, ErrorCode, Result};
use crate::rng::{Rng, mix};
use Use::{Default as OnlyDefault, Honoured, NoEffect};
use pocketlora_models::{Model, Param, Role};
use serde_json::{Value, json};

/// Stream of random numbers for the shared pair.
const INIT: u64 = 0x7665_7261;
const SHARED: [&str; 2] = ["base_model.vera_A", "base_model.vera_B"];

/// The keys of PEFT's VeRA configs (0.21).
const KEYS: &[KeyUse] = &[
    ("bias", Honoured, ""),
    ("d_initial", Honoured, ""),
    ("exclude_modules", Honoured, ""),
    ("fan_in_fan_out", OnlyDefault, "linear layers of the supported families are not transposed: set it to `false`"),
    ("init_weights", NoEffect, ""), // how it began
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("projection_prng_key", Honoured, ""),
    ("r", Honoured, ""),
    ("save_projection", Honoured, ""),
    ("target_modules", Honoured, ""),
    ("vera_dropout", NoEffect, ""),
];

/// Settings of VeRA.
#[derive(Clone, Debug, PartialEq)]
pub struct Vera {
    /// Rank (`r`).
    pub rank: usize,
    /// What `d` begins with (`d_initial`).
    pub d_initial: f64,
    /// What the pair is drawn with (`projection_prng_key`), where it is not in the file.
    pub drawn_by: Option<u64>,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
    /// The largest `in` and `out` of the adapted layers, where it is fresh.
    widest: Option<[usize; 2]>,
}

/// The largest `in` and `out` of the layers that `targets` name, for the method `name`.
///
/// # Errors
/// They name none.
pub(in crate::adapter) fn widest(model: &dyn Model, targets: &[String], name: &str) -> Result<[usize; 2]> {
    let named = |p: &&pocketlora_models::ParamSpec| {
        let names = |t: &String, path: &str| path == t || path.ends_with(&format!(".{t}"));
        let named = |path: &&str| targets.iter().any(|t| names(t, path));
        matches!(p.role, Role::Linear | Role::Head | Role::Embedding) && paths_of(model, p, targets).iter().any(named)
    };
    let shapes = model.params().iter().filter(named).map(|p| &p.shape);
    let widest = shapes.fold([0; 2], |[input, out], shape| [input.max(shape[1]), out.max(shape[0])]);
    if widest.contains(&0) {
        let message = "expected layers that `target_modules` names, got none; use the base that it was trained on";
        return Err(Error::new(ErrorCode::AdapterMismatch, name, message));
    }
    Ok(widest)
}

impl AdapterMethod for Vera {
    const PEFT_TYPE: &'static str = "VERA";
    const NAME: &'static str = "VeRA";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &["vera_lambda_b", "vera_lambda_d"];
    const SHARED: &'static [&'static str] = &SHARED;
    const FROZEN: &'static [&'static str] = &SHARED;
    const STORED: Stored = Stored::F32;
    const HAS_STRENGTH: bool = true;
    const SETTINGS: &'static [&'static str] = &["rank", "targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let drawn = keys.get("save_projection").is_some() && !keys.flag("save_projection")?;
        let key = keys.get("projection_prng_key").map_or(Some(0), Value::as_u64);
        let key = key.ok_or_else(|| keys.wrong("projection_prng_key", "a whole number from 0"))?;
        let (rank, d_initial) = (keys.whole("r", 1, 256)?, keys.number("d_initial", Some(0.1))?);
        Ok(Self { rank, d_initial, drawn_by: drawn.then_some(key), targets: Vec::new(), widest: None })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let (mut method, layers): (Self, _) = begin_with(&[("r", settings.rank.into())], settings, model)?;
        let shapes = layers.iter().map(|p| &model.params()[p.0 as usize].shape);
        if method.drawn_by.take().is_some() {
            let expected = "no `save_projection: false`: without A and B nothing but their seed says what they are";
            return Err(Error::config("options", expected, "false"));
        }
        method.widest = Some(shapes.fold([0; 2], |[input, out], s| [input.max(s[1]), out.max(s[0])]));
        Ok((method, layers))
    }

    fn shapes(&self, _module: &str, [out, _]: [usize; 2]) -> Vec<Vec<usize>> {
        vec![vec![out], vec![self.rank]]
    }

    fn shared(&self, model: &dyn Model) -> Result<Vec<TensorSpec>> {
        let widest = self.widest.map_or_else(|| widest(model, &self.targets, Self::NAME), Ok)?;
        let shapes = [vec![self.rank, widest[0]], vec![widest[1], self.rank]];
        let spec = |(name, shape): (&&str, Vec<usize>)| TensorSpec { name: (*name).to_owned(), shape };
        Ok(SHARED.iter().zip(shapes).map(spec).collect())
    }

    fn draws(&self) -> bool {
        self.drawn_by.is_some()
    }

    /// As PEFT draws it: A, then B, Kaiming-uniform.
    fn drawn(&self, model: &dyn Model) -> Result<Tensors> {
        let Some(key) = self.drawn_by else { return Ok(Tensors::new()) };
        let mut rng = TorchRng::new(key);
        let one = |TensorSpec { name, shape }: TensorSpec| {
            let bound = (2.0 / shape[1] as f64).sqrt() * 3_f64.sqrt();
            let data = rng.uniforms(bound as f32, shape.iter().product());
            (name, HostTensor { shape, data })
        };
        Ok(self.shared(model)?.into_iter().map(one).collect())
    }

    /// A and B uniform in `±sqrt(3 / columns)` (PEFT's Kaiming-uniform), `d` as asked for, `b` zero.
    fn start(&self, spec: &TensorSpec, _part: usize, _module: usize, seed: u64) -> Vec<f32> {
        let Some(at) = SHARED.iter().position(|name| *name == spec.name) else {
            let first = if spec.name.ends_with("vera_lambda_d") { self.d_initial as f32 } else { 0.0 };
            return vec![first; spec.values()];
        };
        let mut rng = Rng::new(mix(mix(seed, INIT), at as u64));
        let bound = (3.0 / spec.shape[1] as f32).sqrt();
        rng.uniforms(bound, spec.values())
    }

    fn plan(&self, _module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let [out, input] = weight.shape();
        Ok(Plan::plain(vec![Piece::Scaled {
            a: Of::Corner(SHARED[0], [self.rank, input]),
            b: Of::Corner(SHARED[1], [out, self.rank]),
            inner: Of::Part("vera_lambda_d"),
            outer: Of::Part("vera_lambda_b"),
            factor,
        }]))
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { rank: self.rank, targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({
             "d_initial": self.d_initial,
              "projection_prng_key": 0, "r": self.rank,
            "save_projection": true,  "vera_dropout": 0.0,
        })
    }

    fn describe(&self) -> (String, Value) {
        let keys = json!({"rank": self.rank});
        (format!("{} of rank {}", Self::NAME, self.rank), keys)
    }
}
