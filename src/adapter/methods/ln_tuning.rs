//! LN tuning (Zhao et al. 2023): the weights of norms are trained as they are, and nothing else. A file has them whole, as
//! `NORM.ln_tuning_layers.weight`; they stand in for the base's (`learned.rs`). Backward keeps a norm's input, as it does
//! without: `dw[c] = sum over t of dy[t, c] x[t, c] / rms(x[t])`.

use crate::adapter::learned::{norms_named, usual_norms};
use crate::adapter::method::{AUTO, AdapterMethod, Settings, targets_in};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::error::Result;
use Use::Honoured;
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};

/// The keys of PEFT's LN tuning configs (0.21).
const KEYS: &[KeyUse] = &[("exclude_modules", Honoured, ""), ("target_modules", Honoured, "")];

/// Settings of LN tuning.
#[derive(Clone, Debug, PartialEq)]
pub struct LnTuning {
    /// Ends of the norms' paths.
    pub targets: Vec<String>,
}

impl AdapterMethod for LnTuning {
    const PEFT_TYPE: &'static str = "LN_TUNING";
    const NAME: &'static str = "LN tuning";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &[];
    const STORED: Stored = Stored::F32;
    const ADDS_UP: bool = false;
    const SETTINGS: &'static [&'static str] = &["targets"];

    fn read(_keys: &Keys<'_>) -> Result<Self> {
        Ok(Self { targets: Vec::new() })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let targets = match &settings.targets[..] {
            [auto] if auto == AUTO || auto == "all" => usual_norms(model),
            given => given.to_vec(),
        };
        norms_named(model, &targets)?;
        Ok((Self { targets }, Vec::new()))
    }

    fn shapes(&self, _module: &str, _layer: [usize; 2]) -> Vec<Vec<usize>> {
        Vec::new()
    }

    fn start(&self, _spec: &TensorSpec, _part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        unreachable!("it has no tensors but those that stand in for the base's")
    }

    fn settings(&self, settings: Settings) -> Settings {
        Settings { targets: self.targets.clone(), ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({  "target_modules": self.targets })
    }

    fn describe(&self) -> (String, Value) {
        (Self::NAME.to_owned(), json!({}))
    }
}
