//! BEFT (biases alone): `y = x Wᵀ + b + c` with a trained `c` `[1, out]` on layers with a bias or without. Backward keeps nothing.

use crate::adapter::method::{AdapterMethod, Settings, begin_with, targets_in};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::adapter::weight::LayerWeight;
use crate::error::Result;
use Use::{Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};

/// The keys of PEFT's BEFT configs (0.21).
const KEYS: &[KeyUse] = &[
    ("exclude_modules", Honoured, ""),
    ("init_weights", NoEffect, ""), // how it began
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("target_modules", Honoured, ""),
];

/// Settings of BEFT.
#[derive(Clone, Debug, PartialEq)]
pub struct Beft {
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

impl AdapterMethod for Beft {
    const PEFT_TYPE: &'static str = "BEFT";
    const NAME: &'static str = "BEFT";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &["beft_bias"];
    const STORED: Stored = Stored::F32;
    const SETTINGS: &'static [&'static str] = &["targets"];

    fn read(_keys: &Keys<'_>) -> Result<Self> {
        Ok(Self { targets: Vec::new() })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        begin_with(&[], settings, model)
    }

    fn shapes(&self, _module: &str, [out, _]: [usize; 2]) -> Vec<Vec<usize>> {
        vec![vec![1, out]]
    }

    fn start(&self, spec: &TensorSpec, _part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        vec![0.0; spec.values()]
    }

    fn plan(&self, _module: &str, _weight: &dyn LayerWeight, _factor: f32) -> Result<Plan> {
        let shift = Some(Of::Part("beft_bias"));
        Ok(Plan::plain(vec![Piece::Output { scale: None, turn: None, shift }]))
    }

    fn settings(&self, settings: Settings) -> Settings {
        Settings { targets: self.targets.clone(), ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({})
    }

    fn describe(&self) -> (String, Value) {
        (Self::NAME.to_owned(), json!({}))
    }
}
