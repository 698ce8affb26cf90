//! HiRA (Huang et al. 2025): `y = x (W + W * (B A))ᵀ + b`, element by element, with `A` `[r, in]` and `B` `[out, r]`: the change has
//! as many ranks as the weight. It is made in tiles of a few outputs while it is used (`hadamard.rs`), which costs a second product
//! with the layer, in f32: answers get slower than with other methods, and merging helps. Backward makes the tiles once more.

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
const INIT: u64 = 0x6869_7261;
const PARTS: &[&str] = &["hira_A", "hira_B"];

/// The keys of PEFT's HiRA configs (0.21).
const KEYS: &[KeyUse] = &[
    ("exclude_modules", Honoured, ""),
    ("fan_in_fan_out", OnlyDefault, "linear layers of the supported families are not transposed: set it to `false`"),
    ("hira_dropout", NoEffect, ""), // of training
    ("init_weights", NoEffect, ""), // how it began
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("r", Honoured, ""),
    ("rank_pattern", OnlyDefault, RETRAIN),
    ("target_modules", Honoured, ""),
];

/// Settings of HiRA.
#[derive(Clone, Debug, PartialEq)]
pub struct Hira {
    /// Rank (`r`).
    pub rank: usize,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

impl AdapterMethod for Hira {
    const PEFT_TYPE: &'static str = "HIRA";
    const NAME: &'static str = "HiRA";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;
    const STORED: Stored = Stored::F32;
    const HAS_STRENGTH: bool = true;
    // Merged one after the other, the second would multiply what the first has changed.
    const ADDS_UP: bool = false;
    const SETTINGS: &'static [&'static str] = &["rank", "targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        Ok(Self { rank: keys.whole("r", 1, 32)?, targets: Vec::new() })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        begin_with(&[("r", settings.rank.into())], settings, model)
    }

    fn shapes(&self, _module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        vec![vec![self.rank, input], vec![out, self.rank]]
    }

    /// A uniform in `±1/sqrt(in)`, B zero.
    fn start(&self, spec: &TensorSpec, part: usize, module: usize, seed: u64) -> Vec<f32> {
        if part > 0 {
            return vec![0.0; spec.values()];
        }
        let bound = (spec.shape[1] as f32).sqrt().recip();
        Rng::new(mix(mix(seed, INIT), module as u64)).uniforms(bound, spec.values())
    }

    fn plan(&self, _module: &str, _weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        Ok(Plan::plain(vec![Piece::Hadamard { a: Of::Part(PARTS[0]), b: Of::Part(PARTS[1]), factor }]))
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { rank: self.rank, targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({"hira_dropout": 0.0, "r": self.rank})
    }

    fn describe(&self) -> (String, Value) {
        (format!("{} of rank {}", Self::NAME, self.rank), json!({"rank": self.rank}))
    }
}
