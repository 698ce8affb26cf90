//! Cartridges (Eyuboglu et al. 2025): prefix tuning that begins as the keys and values of a text, of which the first
//! `num_frozen_tokens` rows are never moved: attention leans on a text's first tokens whatever they are. A file is as that of
//! prefix tuning, `prompt_embeddings` `[n, 2 layers kv_width]`, but that keys of a text are turned already.

use super::prefix_tuning::{EMBEDDINGS, PrefixTuning};
use crate::adapter::forms::Prefix;
use crate::adapter::held::Loader;
use crate::adapter::method::{AdapterMethod, Settings};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::prompt::NUMBERS;
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::error::{Error, Result};
use Use::Honoured;
use pocketlora_kernels::Backend;
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};

/// The keys of PEFT's cartridge configs (0.21).
const KEYS: &[KeyUse] =
    &[NUMBERS[0], ("num_frozen_tokens", Honoured, ""), NUMBERS[1], NUMBERS[2], NUMBERS[3], NUMBERS[4]];

/// Settings of a cartridge.
#[derive(Clone, Debug, PartialEq)]
pub struct Cartridge {
    /// Keys and values.
    pub prefix: PrefixTuning,
    /// Of these the first ones are not moved (`num_frozen_tokens`).
    pub frozen: usize,
}

impl AdapterMethod for Cartridge {
    const PEFT_TYPE: &'static str = "CARTRIDGE";
    const NAME: &'static str = "cartridge";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &[];
    const SHARED: &'static [&'static str] = &[EMBEDDINGS];
    const STORED: Stored = Stored::F32;
    const ADDS_UP: bool = false;
    const SETTINGS: &'static [&'static str] = &["num-virtual-tokens", "num-frozen-tokens"];
    const IN_TRAINING: &'static [&'static str] = &["prompt-init-text"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let prefix = PrefixTuning::of_numbers(keys)?;
        let frozen = keys.get("num_frozen_tokens").map_or(Some(1), Value::as_u64);
        let frozen = frozen.map(|n| n as usize).filter(|n| *n < prefix.tokens);
        let frozen = frozen.ok_or_else(|| keys.wrong("num_frozen_tokens", "fewer than `num_virtual_tokens`"))?;
        Ok(Self { prefix, frozen })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let (prefix, layers) = PrefixTuning::begin(settings, model)?;
        let frozen = settings.num_frozen_tokens;
        if frozen >= prefix.tokens {
            let expected = format!("fewer than the {} virtual tokens", prefix.tokens);
            return Err(Error::config("num-frozen-tokens", expected, frozen));
        }
        Ok((Self { prefix, frozen }, layers))
    }

    fn shapes(&self, _module: &str, _layer: [usize; 2]) -> Vec<Vec<usize>> {
        Vec::new()
    }

    fn shared(&self, model: &dyn Model) -> Result<Vec<TensorSpec>> {
        self.prefix.shared(model)
    }

    /// Zeros until the base has read a text (`begun.rs`).
    fn start(&self, spec: &TensorSpec, _part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        vec![0.0; spec.values()]
    }

    fn in_attention<B: Backend>(&self, load: &mut Loader<'_, B>) -> Result<Option<Prefix>> {
        self.prefix.in_attention(load)
    }

    fn fixed_rows(&self) -> usize {
        self.frozen
    }

    fn settings(&self, settings: Settings) -> Settings {
        Settings { num_virtual_tokens: self.prefix.tokens, num_frozen_tokens: self.frozen, ..settings }
    }

    fn write(&self) -> Value {
        let PrefixTuning { tokens, layers, heads, width, .. } = &self.prefix;
        json!({
            "num_attention_heads": heads,
            "num_frozen_tokens": self.frozen,
            "num_layers": layers,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": tokens,
            "token_dim": width,
        })
    }

    fn describe(&self) -> (String, Value) {
        let text = format!("{} of {} tokens", Self::NAME, self.prefix.tokens);
        (text, json!({"num_virtual_tokens": self.prefix.tokens}))
    }
}
