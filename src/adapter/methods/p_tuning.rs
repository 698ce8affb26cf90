//! P-tuning (Liu et al. 2021): prompt tuning whose embeddings a small network makes while it is trained (`encoder.rs`). A
//! file has what that network gave, `prompt_embeddings`, and is served as prompt tuning is; the network itself is not in it,
//! so that training goes on from a checkpoint, and not from a file. PEFT's LSTM is used from files alone.

use crate::adapter::encoder::{encoded, specs};
use crate::adapter::forms::Prefix;
use crate::adapter::held::{Loader, TensorId};
use crate::adapter::method::{AdapterMethod, Settings};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::prompt::{EMBEDDINGS, NUMBERS, Prompt, whole};
use crate::adapter::tensor::{HostTensor, Stored, TensorSpec, Tensors};
use crate::error::Result;
use crate::rng::{Rng, mix};
use Use::{Honoured, NoEffect};
use pocketlora_kernels::Backend;
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};

/// The keys of PEFT's P-tuning configs (0.21).
const KEYS: &[KeyUse] = &[
    ("encoder_dropout", NoEffect, ""), // of training
    ("encoder_hidden_size", Honoured, ""),
    ("encoder_num_layers", Honoured, ""),
    ("encoder_reparameterization_type", Honoured, ""),
    NUMBERS[0],
    NUMBERS[1],
    NUMBERS[2],
    NUMBERS[3],
    NUMBERS[4],
];

/// Settings of P-tuning.
#[derive(Clone, Debug, PartialEq)]
pub struct PTuning {
    /// Its virtual tokens.
    pub prompt: Prompt,
    /// The kind of network that made them, as PEFT names it.
    pub encoder: String,
    /// Its width.
    pub hidden: usize,
    /// Layers of an LSTM.
    pub encoder_layers: usize,
    /// The network is there: it is in training.
    pub(crate) encodes: bool,
}

/// Stream of random numbers for the network.
const INIT: u64 = 7;

impl PTuning {
    /// Makes of the network's tensors what it gives.
    pub(crate) fn finish(&mut self, tensors: &mut Tensors) {
        if std::mem::take(&mut self.encodes) {
            let tensor = HostTensor { shape: vec![self.prompt.tokens, self.prompt.width], data: encoded(tensors) };
            *tensors = Tensors::from([(EMBEDDINGS.to_owned(), tensor)]);
        }
    }
}

impl AdapterMethod for PTuning {
    const PEFT_TYPE: &'static str = "P_TUNING";
    const NAME: &'static str = "P-tuning";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &[];
    const SHARED: &'static [&'static str] = &[EMBEDDINGS];
    const STORED: Stored = Stored::F32;
    const ADDS_UP: bool = false;
    const SETTINGS: &'static [&'static str] = &["num-virtual-tokens", "encoder-hidden-size"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let prompt = Prompt::read(keys)?;
        let encoder = keys.text("encoder_reparameterization_type")?.unwrap_or_else(|| "MLP".to_owned());
        let number = |key: &str, usual| keys.get(key).map_or(Ok(usual), |_| whole(keys, key));
        let (hidden, encoder_layers) = (number("encoder_hidden_size", prompt.width)?, number("encoder_num_layers", 2)?);
        Ok(Self { prompt, encoder, hidden, encoder_layers, encodes: false })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let (prompt, hidden) = (Prompt::begin(settings, model)?, settings.encoder_hidden_size);
        Ok((Self { prompt, encoder: "MLP".to_owned(), hidden, encoder_layers: 2, encodes: true }, Vec::new()))
    }

    fn shapes(&self, _module: &str, _layer: [usize; 2]) -> Vec<Vec<usize>> {
        Vec::new()
    }

    fn shared(&self, model: &dyn Model) -> Result<Vec<TensorSpec>> {
        let own = self.prompt.shared(model)?;
        Ok(if self.encodes { specs(self.prompt.tokens, self.prompt.width, self.hidden) } else { own })
    }

    /// As torch begins: embeddings normal, layers uniform in `±1/sqrt(in)`.
    fn start(&self, spec: &TensorSpec, _part: usize, module: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(mix(mix(seed, INIT), module as u64));
        if !spec.name.starts_with("mlp_head") {
            return (0..spec.values()).map(|_| rng.normal()).collect();
        }
        let first = spec.name.starts_with("mlp_head.0");
        let bound = (if first { self.prompt.width } else { self.hidden } as f32).sqrt().recip();
        rng.uniforms(bound, spec.values())
    }

    fn in_attention<B: Backend>(&self, load: &mut Loader<'_, B>) -> Result<Option<Prefix>> {
        // Of a network nobody reads this number.
        let values = if self.encodes { TensorId::none() } else { load.matrix(EMBEDDINGS)? };
        Ok(Some(Prefix::of_embeddings(self.prompt.tokens, values)))
    }

    fn is_final(&self) -> Option<&'static str> {
        (!self.encodes).then_some("the network that made its embeddings is not in its file")
    }

    fn settings(&self, settings: Settings) -> Settings {
        Settings { num_virtual_tokens: self.prompt.tokens, encoder_hidden_size: self.hidden, ..settings }
    }

    fn write(&self) -> Value {
        let mut config = self.prompt.write();
        config["encoder_dropout"] = json!(0.0);
        config["encoder_hidden_size"] = json!(self.hidden);
        config["encoder_num_layers"] = json!(self.encoder_layers);
        config["encoder_reparameterization_type"] = json!(self.encoder);
        config
    }

    fn describe(&self) -> (String, Value) {
        let text = format!("{} with {} virtual tokens", Self::NAME, self.prompt.tokens);
        (text, json!({"num_virtual_tokens": self.prompt.tokens}))
    }
}
