//! PVeRA (Fawole et al. 2025): VeRA whose inner scale is drawn anew for each token in training, from a normal distribution with
//! trained means and spreads; it is used with its means. Of the shared `A` `[2 r, in]` the first `r` rows give the means, of each `d`
//! `[2 r]` the first `r` values: `y = x Wᵀ + b ((d (x Aᵀ)) Bᵀ)`. It is trained with PEFT.

use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings, targets_in};
use crate::adapter::methods::vera::widest;
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, Result};
use Use::{Default as OnlyDefault, Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};

const PARTS: &[&str] = &["pvera_lambda_b", "pvera_lambda_d"];
const SHARED: [&str; 2] = ["base_model.pvera_A", "base_model.pvera_B"];

/// The keys of PEFT's PVeRA configs (0.21).
const KEYS: &[KeyUse] = &[
    ("bias", Honoured, ""),
    ("d_initial", NoEffect, ""), // how it began
    ("exclude_modules", Honoured, ""),
    ("fan_in_fan_out", OnlyDefault, "linear layers of the supported families are not transposed: set it to `false`"),
    ("generator_seed", NoEffect, ""), // of training
    ("init_weights", NoEffect, ""),   // how it began
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("projection_prng_key", NoEffect, ""), // what the shared pair was drawn with: it is in the file
    ("pvera_dropout", NoEffect, ""),
    ("r", Honoured, ""),
    ("sample_at_inference", OnlyDefault, "answers are made with the means here: set it to `false`"),
    ("save_projection", Honoured, ""),
    ("target_modules", Honoured, ""),
];

/// Settings of PVeRA.
#[derive(Clone, Debug, PartialEq)]
pub struct Pvera {
    /// Rank (`r`).
    pub rank: usize,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

/// The means of `d`.
struct Means {
    rank: usize,
}

impl Map for Means {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        Ok(vec![own[1][..self.rank].to_vec()])
    }

    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        vec![Vec::new(), [grads[0], &vec![0.0; own[1].len() - self.rank]].concat()]
    }
}

impl AdapterMethod for Pvera {
    const PEFT_TYPE: &'static str = "PVERA";
    const NAME: &'static str = "PVeRA";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;
    const SHARED: &'static [&'static str] = &SHARED;
    const FROZEN: &'static [&'static str] = &SHARED;
    const STORED: Stored = Stored::F32;
    const HAS_STRENGTH: bool = true;
    const SETTINGS: &'static [&'static str] = &["rank", "targets"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        if keys.get("save_projection").is_some() && !keys.flag("save_projection")? {
            let what = "PVeRA without its matrices (`save_projection: false`)";
            return Err(Error::unsupported(keys.path, what, "save it with PEFT with `save_projection=True`"));
        }
        Ok(Self { rank: keys.whole("r", 1, 256)?, targets: Vec::new() })
    }

    fn begin(_settings: &Settings, _model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        Err(Error::config("method", "`vera`, which is trained here; PVeRA is trained with PEFT", "pvera"))
    }

    fn shapes(&self, _module: &str, [out, _]: [usize; 2]) -> Vec<Vec<usize>> {
        vec![vec![out], vec![2 * self.rank]]
    }

    fn shared(&self, model: &dyn Model) -> Result<Vec<TensorSpec>> {
        let [input, out] = widest(model, &self.targets, Self::NAME)?;
        let shapes = [vec![2 * self.rank, input], vec![out, self.rank]];
        let spec = |(name, shape): (&&str, Vec<usize>)| TensorSpec { name: (*name).to_owned(), shape };
        Ok(SHARED.iter().zip(shapes).map(spec).collect())
    }

    fn start(&self, spec: &TensorSpec, _part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        vec![0.0; spec.values()]
    }

    fn plan(&self, _module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let ([out, input], rank) = (weight.shape(), self.rank);
        let piece = Piece::Scaled {
            a: Of::Corner(SHARED[0], [rank, input]),
            b: Of::Corner(SHARED[1], [out, rank]),
            inner: Of::Made(vec![rank]),
            outer: Of::Part(PARTS[0]),
            factor,
        };
        Ok(Plan::made(vec![piece], Means { rank }))
    }

    fn is_final(&self) -> Option<&'static str> {
        Some("what it draws in training is drawn by PEFT alone")
    }

    fn settings(&self, settings: Settings) -> Settings {
        Settings { rank: self.rank, targets: self.targets.clone(), ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({
            "d_initial": 0.1, "generator_seed": null, "projection_prng_key": 0, "pvera_dropout": 0.0, "r": self.rank,
            "sample_at_inference": false, "save_projection": true,
        })
    }

    fn describe(&self) -> (String, Value) {
        (format!("{} of rank {}, by its means", Self::NAME, self.rank), json!({"rank": self.rank}))
    }
}
