//! Supertuning: `W` plus trained values at a share of its places, which the file numbers in W's order; with `r` an ordinary LoRA
//! beside them. Backward reads the layer's input. Its places come from activations: it is used and trained on, not begun here.

use crate::adapter::method::{AUTO, AdapterMethod, Settings, targets_in};
use crate::adapter::peft::{Found, KeyUse, Keys, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, Result};
use Use::{Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

const PARTS: &[&str] =
    &["supertuning_values", "supertuning_indices", "supertuning_lora_A.weight", "supertuning_lora_B.weight"];

/// The keys of PEFT's supertuning configs (0.21).
const KEYS: &[KeyUse] = &[
    ("exclude_modules", Honoured, ""),
    ("init_weights", NoEffect, ""), // how it began
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("lora_alpha", Honoured, ""),
    ("lora_dropout", NoEffect, ""),
    ("r", Honoured, ""),
    ("save_precomputed_indices", Honoured, ""),
    ("select_top", Honoured, ""),
    ("sparsity", Honoured, ""),
    ("target_modules", Honoured, ""),
];

/// Settings of supertuning.
#[derive(Clone, Debug, PartialEq)]
pub struct Supertuning {
    /// Rank and alpha of the LoRA beside the values.
    pub lora: Option<(usize, f64)>,
    /// Share of places without a value (`sparsity`).
    pub sparsity: f64,
    /// How places were chosen (`select_top`).
    pub select_top: bool,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
    /// Values of each module.
    counts: BTreeMap<String, usize>,
}

impl AdapterMethod for Supertuning {
    const PEFT_TYPE: &'static str = "SUPERTUNING";
    const NAME: &'static str = "supertuning";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;
    const DIMENSIONS: &'static [usize] = &[1, 1, 2, 2];
    const FROZEN: &'static [&'static str] = &["supertuning_indices"];
    const PLACES: Option<(&'static str, bool)> = Some(("supertuning_indices", true));
    const STORED: Stored = Stored::F32;
    const HAS_STRENGTH: bool = true;
    const SETTINGS: &'static [&'static str] = &["targets"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        if keys.get("save_precomputed_indices") == Some(&Value::Bool(false)) {
            let what = "supertuning without its places (`save_precomputed_indices: false`)";
            return Err(Error::unsupported(keys.path, what, "save it with PEFT with `save_precomputed_indices=True`"));
        }
        let lora = match keys.get("r") {
            None => None,
            Some(_) => Some((keys.whole("r", 1, 8)?, keys.number("lora_alpha", Some(8.0))?)),
        };
        let select_top = keys.get("select_top").is_none() || keys.flag("select_top")?;
        let sparsity = keys.number("sparsity", Some(0.99))?;
        Ok(Self { lora, sparsity, select_top, targets: Vec::new(), counts: BTreeMap::new() })
    }

    fn check(&mut self, _path: &Path, found: &[Found]) -> Result<Vec<String>> {
        self.counts = found.iter().map(|module| (module.path.clone(), module.shapes[0][0])).collect();
        Ok(Vec::new())
    }

    fn begin(_settings: &Settings, _model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let expected =
            format!("a method that can be begun here, or `--init` with an adapter of PEFT (targets `{AUTO}`)");
        Err(Error::config("method", expected, "supertuning"))
    }

    fn parts(&self, _module: &str) -> &'static [&'static str] {
        if self.lora.is_some() { PARTS } else { &PARTS[..2] }
    }

    fn shapes(&self, module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        let count = self.counts.get(module).copied().unwrap_or_default();
        let mut shapes = vec![vec![count], vec![count]];
        if let Some((rank, _)) = self.lora {
            shapes.extend([vec![rank, input], vec![out, rank]]);
        }
        shapes
    }

    fn start(&self, spec: &TensorSpec, _part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        vec![0.0; spec.values()]
    }

    fn plan(&self, _module: &str, _weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let mut pieces = vec![Piece::Sparse { places: PARTS[1], flat: true, values: Of::Part(PARTS[0]), factor }];
        if let Some((rank, alpha)) = self.lora {
            let factor = factor * (alpha / rank as f64) as f32;
            pieces.push(Piece::LowRank { a: Of::Part(PARTS[2]), b: Of::Part(PARTS[3]), factor });
        }
        Ok(Plan::plain(pieces))
    }

    fn settings(&self, settings: Settings) -> Settings {
        Settings { targets: self.targets.clone(), ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({

            "lora_alpha": self.lora.map(|(_, alpha)| crate::adapter::peft::number(alpha)), "lora_dropout": 0.0,
            "r": self.lora.map(|(rank, _)| rank), "save_precomputed_indices": true, "select_top": self.select_top,
            "sparsity": self.sparsity,
        })
    }

    fn describe(&self) -> (String, Value) {
        let keys = json!({"sparsity": self.sparsity});
        (format!("{}, values at {:.1} % of the places", Self::NAME, 100.0 * (1.0 - self.sparsity)), keys)
    }
}
