//! SHiRA (Bhardwaj et al. 2024): `W` plus trained values at `r (in + out)` places of each layer, which stay as they were drawn. The
//! file has the rows and columns of the places. Backward reads the layer's input.

use crate::adapter::method::{AdapterMethod, Settings, begin_with, options_of, targets_in};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, Result};
use crate::rng::{Rng, mix};
use Use::{Default as OnlyDefault, Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Stream of random numbers for places.
const INIT: u64 = 0x7368_6972;
const PLACES: &str = "shira_indices";

/// The keys of PEFT's SHiRA configs (0.21).
const KEYS: &[KeyUse] = &[
    ("exclude_modules", Honoured, ""),
    ("fan_in_fan_out", OnlyDefault, "linear layers of the supported families are not transposed: set it to `false`"),
    ("init_weights", NoEffect, ""), // how it began
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("mask_type", NoEffect, ""), // how places were chosen: they are in the file
    ("r", Honoured, ""),
    ("random_seed", Honoured, ""),
    ("target_modules", Honoured, ""),
];

/// Settings of SHiRA.
#[derive(Clone, Debug, PartialEq)]
pub struct Shira {
    /// Values for each input and output (`r`).
    pub rank: usize,
    /// What places are drawn with (`random_seed`).
    pub seed: u64,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

impl AdapterMethod for Shira {
    const PEFT_TYPE: &'static str = "SHIRA";
    const NAME: &'static str = "SHiRA";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &["shira_weight", PLACES];
    const FROZEN: &'static [&'static str] = &[PLACES];
    const PLACES: Option<(&'static str, bool)> = Some((PLACES, false));
    const STORED: Stored = Stored::F32;
    const HAS_STRENGTH: bool = true;
    const SETTINGS: &'static [&'static str] = &["rank", "targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let seed = keys.get("random_seed").map_or(Some(0), Value::as_u64);
        let seed = seed.ok_or_else(|| keys.wrong("random_seed", "a whole number from 0"))?;
        Ok(Self { rank: keys.whole("r", 1, 32)?, seed, targets: Vec::new() })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let (method, layers): (Self, Vec<Param>) = begin_with(&[("r", settings.rank.into())], settings, model)?;
        let shapes = layers.iter().map(|p| &model.params()[p.0 as usize].shape);
        // Places are drawn until there are enough of them; beyond half of all that takes long.
        match shapes.into_iter().find(|s| 2 * method.rank * (s[0] + s[1]) > s[0] * s[1]) {
            Some(shape) => {
                let most = shape[0] * shape[1] / (2 * (shape[0] + shape[1]));
                Err(Error::config("rank", format!("at most {most} for a layer `{shape:?}`"), method.rank))
            }
            None => Ok((method, layers)),
        }
    }

    fn shapes(&self, _module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        let values = self.rank * (out + input);
        vec![vec![values], vec![2, values]]
    }

    fn start(&self, spec: &TensorSpec, _part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        vec![0.0; spec.values()]
    }

    /// Places at random, in the order in which they lie. As in PEFT, layers of one shape have the same ones.
    fn start_from(&self, part: &str, weight: &dyn LayerWeight) -> Result<Option<Vec<f32>>> {
        let [out, input] = weight.shape();
        if part != PLACES {
            return Ok(None);
        }
        let mut rng = Rng::new(mix(mix(mix(self.seed, INIT), out as u64), input as u64));
        let mut places = BTreeSet::new();
        while places.len() < self.rank * (out + input) {
            places.insert(rng.below(out * input));
        }
        let (rows, cols): (Vec<f32>, Vec<f32>) =
            places.into_iter().map(|at| ((at / input) as f32, (at % input) as f32)).unzip();
        Ok(Some([rows, cols].concat()))
    }

    fn plan(&self, _module: &str, _weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let values = Of::Part("shira_weight");
        Ok(Plan::plain(vec![Piece::Sparse { places: PLACES, flat: false, values, factor }]))
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { rank: self.rank, targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({

             "mask_type": "random", "r": self.rank, "random_seed": self.seed,

        })
    }

    fn describe(&self) -> (String, Value) {
        let keys = json!({"rank": self.rank});
        (format!("{} of rank {}", Self::NAME, self.rank), keys)
    }
}
