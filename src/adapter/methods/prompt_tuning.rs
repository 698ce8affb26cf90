//! Prompt tuning (Lester et al. 2021): trained embeddings of virtual tokens stand before those of the text, see `prompt.rs`.
//! They begin as those of a text (`prompt_tuning_init_text`), cut or repeated to their number, or of tokens by chance.
//! Backward passes the gradient of the first layer's input on to them; their own outputs are not learned from.

use crate::adapter::forms::Prefix;
use crate::adapter::held::Loader;
use crate::adapter::method::{AdapterMethod, Settings};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::prompt::{EMBEDDINGS, NUMBERS, Prompt};
use crate::adapter::tensor::{Stored, TensorSpec};
use crate::error::Result;
use Use::{Honoured, NoEffect};
use pocketlora_kernels::Backend;
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};

/// The keys of PEFT's prompt tuning configs (0.21).
const KEYS: &[KeyUse] = &[
    NUMBERS[0],
    NUMBERS[1],
    NUMBERS[2],
    NUMBERS[3],
    ("prompt_tuning_init", Honoured, ""),
    ("prompt_tuning_init_text", Honoured, ""),
    NUMBERS[4],
    ("tokenizer_kwargs", NoEffect, ""),       // how it began
    ("tokenizer_name_or_path", NoEffect, ""), // the same
];

/// Settings of prompt tuning.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptTuning {
    /// Its virtual tokens.
    pub prompt: Prompt,
    /// As what they began, as PEFT names it: `RANDOM`, `SAMPLE_VOCAB` or `TEXT`.
    pub init: String,
    /// As the embeddings of which text.
    pub init_text: Option<String>,
}

impl AdapterMethod for PromptTuning {
    const PEFT_TYPE: &'static str = "PROMPT_TUNING";
    const NAME: &'static str = "prompt tuning";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &[];
    const SHARED: &'static [&'static str] = &[EMBEDDINGS];
    const STORED: Stored = Stored::F32;
    const ADDS_UP: bool = false;
    const SETTINGS: &'static [&'static str] = &["num-virtual-tokens"];
    const IN_TRAINING: &'static [&'static str] = &["prompt-init-text"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let init = keys.text("prompt_tuning_init")?.unwrap_or_else(|| "RANDOM".to_owned());
        Ok(Self { prompt: Prompt::read(keys)?, init, init_text: keys.text("prompt_tuning_init_text")? })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let init_text = settings.prompt_init_text.clone();
        let init = if init_text.is_some() { "TEXT" } else { "SAMPLE_VOCAB" }.to_owned();
        Ok((Self { prompt: Prompt::begin(settings, model)?, init, init_text }, Vec::new()))
    }

    fn shapes(&self, _module: &str, _layer: [usize; 2]) -> Vec<Vec<usize>> {
        Vec::new()
    }

    fn shared(&self, model: &dyn Model) -> Result<Vec<TensorSpec>> {
        self.prompt.shared(model)
    }

    /// Zeros until the base is asked (`begun.rs`).
    fn start(&self, spec: &TensorSpec, _part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        vec![0.0; spec.values()]
    }

    fn in_attention<B: Backend>(&self, load: &mut Loader<'_, B>) -> Result<Option<Prefix>> {
        Ok(Some(Prefix::of_embeddings(self.prompt.tokens, load.matrix(EMBEDDINGS)?)))
    }

    fn settings(&self, settings: Settings) -> Settings {
        Settings { num_virtual_tokens: self.prompt.tokens, ..settings }
    }

    fn write(&self) -> Value {
        let mut config = self.prompt.write();
        config["prompt_tuning_init"] = json!(self.init);
        config["prompt_tuning_init_text"] = json!(self.init_text);
        config["tokenizer_kwargs"] = Value::Null;
        config["tokenizer_name_or_path"] = Value::Null;
        config
    }

    fn describe(&self) -> (String, Value) {
        let text = format!("{} with {} virtual tokens", Self::NAME, self.prompt.tokens);
        (text, json!({"num_virtual_tokens": self.prompt.tokens}))
    }
}
