//! Trainable tokens (PEFT): rows of single tokens in the embedding are trained, and nothing else. A file has the new rows,
//! though it calls them a delta; they stand in for the base's (`learned.rs`, `rows.rs`).

use crate::adapter::method::{AdapterMethod, EMBEDDING, Settings, targets_in};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::error::{Error, Result};
use Use::{Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};

/// The keys of PEFT's configs of trainable tokens (0.21).
const KEYS: &[KeyUse] = &[
    ("init_weights", NoEffect, ""), // how it began
    ("target_modules", Honoured, ""),
    ("token_indices", Honoured, ""),
];

/// Settings of trainable tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainableTokens {
    /// Their ids (`token_indices`).
    pub ids: Vec<u32>,
    /// Ends of the embedding's path.
    pub targets: Vec<String>,
}

impl AdapterMethod for TrainableTokens {
    const PEFT_TYPE: &'static str = "TRAINABLE_TOKENS";
    const NAME: &'static str = "trainable tokens";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &[];
    const STORED: Stored = Stored::F32;
    const ADDS_UP: bool = false;
    const SETTINGS: &'static [&'static str] = &["trainable-token-indices"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let ids = keys.ids("token_indices")?;
        if ids.is_empty() {
            return Err(keys.wrong("token_indices", "at least one token id"));
        }
        Ok(Self { ids, targets: Vec::new() })
    }

    fn begin(settings: &Settings, _model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let ids = settings.trainable_token_indices.clone();
        if ids.is_empty() {
            return Err(Error::config("trainable-token-indices", "the ids of the tokens to be trained", "none"));
        }
        let targets = vec![EMBEDDING.rsplit('.').next().unwrap_or(EMBEDDING).to_owned()];
        Ok((Self { ids, targets }, Vec::new()))
    }

    fn shapes(&self, _module: &str, _layer: [usize; 2]) -> Vec<Vec<usize>> {
        Vec::new()
    }

    fn start(&self, _spec: &TensorSpec, _part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        unreachable!("it has no tensors but those that stand in for the base's")
    }

    fn settings(&self, settings: Settings) -> Settings {
        Settings { trainable_token_indices: self.ids.clone(), ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({  "target_modules": self.targets, "token_indices": self.ids })
    }

    fn describe(&self) -> (String, Value) {
        let text = format!("{} trainable tokens", self.ids.len());
        (text, json!({"token_indices": self.ids}))
    }
}
