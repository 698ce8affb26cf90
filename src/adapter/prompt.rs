//! What prompt tuning and P-tuning have in common: embeddings of virtual tokens before a text, `prompt_embeddings` `[n, C]`,
//! and the numbers by which PEFT's configs name the model that they are for. A model reads them as it reads tokens; the
//! text's own have positions from `n` on.

use super::learned::embedding_ops;
use super::method::Settings;
use super::peft::{KeyUse, Keys, Use};
use super::tensor::TensorSpec;
use crate::error::{Error, ErrorCode, Result};
use Use::Honoured;
use pocketlora_models::{Model, Op};
use serde_json::{Value, json};

/// Name of the tensor.
pub(super) const EMBEDDINGS: &str = "prompt_embeddings";
/// Bound on virtual tokens and the other numbers: far beyond any use, and small enough for products of them.
pub(super) const MOST: usize = 1 << 20;
/// The keys of the numbers.
pub(super) const NUMBERS: [KeyUse; 5] = [
    ("num_attention_heads", Honoured, ""),
    ("num_layers", Honoured, ""),
    ("num_transformer_submodules", Honoured, ""),
    ("num_virtual_tokens", Honoured, ""),
    ("token_dim", Honoured, ""),
];

/// Virtual tokens for a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// How many (`num_virtual_tokens`).
    pub tokens: usize,
    /// Layers of the model (`num_layers`).
    pub layers: usize,
    /// Its attention heads (`num_attention_heads`).
    pub heads: usize,
    /// Width of an embedding (`token_dim`).
    pub width: usize,
}

/// A whole number of a config.
pub(super) fn whole(keys: &Keys<'_>, key: &str) -> Result<usize> {
    let number = keys.get(key).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
    number.filter(|n| (1..=MOST).contains(n)).ok_or_else(|| keys.wrong(key, "a whole number from 1 to 1048576"))
}

impl Prompt {
    pub(super) fn read(keys: &Keys<'_>) -> Result<Self> {
        if keys.get("num_transformer_submodules").is_some() && whole(keys, "num_transformer_submodules")? != 1 {
            return Err(keys.wrong("num_transformer_submodules", "1, for a model that only decodes"));
        }
        let [tokens, layers] = [whole(keys, "num_virtual_tokens")?, whole(keys, "num_layers")?];
        Ok(Self { tokens, layers, heads: whole(keys, "num_attention_heads")?, width: whole(keys, "token_dim")? })
    }

    /// Of the settings of a run.
    pub(super) fn begin(settings: &Settings, model: &dyn Model) -> Result<Self> {
        factor(model)
            .map_err(|got| Error::config("method", "another one, or a model that reads embeddings alone", got))?;
        let config = model.config();
        let (layers, heads, width) = (config.layers, config.heads, config.hidden_size);
        Ok(Self { tokens: settings.num_virtual_tokens, layers, heads, width })
    }

    /// The tensor on `model`.
    pub(super) fn shared(&self, model: &dyn Model) -> Result<Vec<TensorSpec>> {
        let (config, place) = (model.config(), || format!("tensor `{EMBEDDINGS}`"));
        let shown = |layers, width| format!("{layers} layers of width {width}");
        if (self.layers, self.width) != (config.layers, config.hidden_size) {
            let (own, got) = (shown(self.layers, self.width), shown(config.layers, config.hidden_size));
            let message = format!("expected a model of {own}, got {got}; use the base that the adapter was trained on");
            return Err(Error::new(ErrorCode::AdapterMismatch, place(), message));
        }
        factor(model).map_err(|got| {
            let message = format!("expected a model that reads embeddings alone, got {got}; use it with PEFT");
            Error::new(ErrorCode::AdapterMismatch, place(), message)
        })?;
        Ok(vec![TensorSpec { name: EMBEDDINGS.to_owned(), shape: vec![self.tokens, self.width] }])
    }

    pub(super) fn write(&self) -> Value {
        json!({
            "num_attention_heads": self.heads,
            "num_layers": self.layers,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": self.tokens,
            "token_dim": self.width,
        })
    }
}

/// What `model` multiplies the embeddings of tokens with, and not those that are handed to it as such: Gemma's are scaled
/// where they are looked up. Or what else it makes of tokens, which virtual ones have nothing for.
pub(super) fn factor(model: &dyn Model) -> Result<f32, String> {
    let ops = embedding_ops(model);
    let other = |op: &Op| matches!(op, Op::Embed { table } if *table != model.outline().embedding);
    let family = &model.config().model_type;
    if ops.iter().any(other) {
        return Err(format!("a `{family}`, whose layers read more of a token than its embedding"));
    }
    let scale = ops.iter().find_map(|op| if let Op::Scale { factor, .. } = op { Some(*factor) } else { None });
    Ok(scale.filter(|_| family.starts_with("gemma")).unwrap_or(1.0))
}
