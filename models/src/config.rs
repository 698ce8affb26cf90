//! What all families read of a Hugging Face `config.json`, and the error for a key that cannot be.

use crate::keys::{Keys, MAX_COUNT};
use serde_json::Value;
use std::fmt::Display;

/// A key of `config.json` that is missing or unusable.
#[derive(Debug, thiserror::Error)]
#[error("key `{key}`: expected {expected}, got `{got}`")]
pub struct ConfigError {
    /// The key.
    pub key: String,
    /// What would have been right.
    pub expected: String,
    /// What was found.
    pub got: String,
    /// The key is sound, but asks for a model that is not among those that are built here.
    pub unsupported: bool,
}

impl ConfigError {
    pub(crate) fn new(key: impl Into<String>, expected: impl Display, got: impl Display) -> Self {
        // What a file holds instead of a number may be as long as the file.
        let got: String = got.to_string().chars().take(100).collect();
        Self { key: key.into(), expected: expected.to_string(), got, unsupported: false }
    }

    /// The same for a sound key that asks for another model than those here.
    pub(crate) fn unsupported(key: impl Into<String>, expected: impl Display, got: impl Display) -> Self {
        Self { unsupported: true, ..Self::new(key, expected, got) }
    }
}

/// What the rest of the program may know of a model's `config.json`. All else is the family's own concern.
#[derive(Clone, Debug)]
pub struct Config {
    /// Family.
    pub model_type: String,
    /// Width of the residual stream (`C`).
    pub hidden_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding (`V`).
    pub vocab_size: usize,
    /// Longest context the model was made for, in tokens.
    pub max_positions: usize,
    /// The head is the embedding.
    pub tied_head: bool,
    /// Share of attention's weights that training drops.
    pub attention_dropout: f32,
}

/// What a family takes for keys that a file leaves out, as transformers does. Where a key may be `null`, this has a
/// meaning of its own: as many key/value heads as heads, and a head's width of `hidden_size / heads`.
#[derive(Default)]
pub(crate) struct Defaults {
    /// `num_key_value_heads`; none is as many as heads.
    pub(crate) kv_heads: Option<usize>,
    /// `head_dim`; none is `hidden_size / heads`.
    pub(crate) head_dim: Option<usize>,
    /// `max_position_embeddings`.
    pub(crate) positions: usize,
    /// `tie_word_embeddings`.
    pub(crate) tied_head: bool,
    /// `num_attention_heads`; without one the file must say it.
    pub(crate) heads: Option<usize>,
    /// `vocab_size`; without one the file must say it.
    pub(crate) vocab: Option<usize>,
}

impl Config {
    /// Reads and checks the keys that all families have.
    ///
    /// # Errors
    /// The first key that is missing, of the wrong type, out of range or in contradiction with another.
    pub(crate) fn read(keys: &Keys<'_>, defaults: &Defaults) -> Result<Self, ConfigError> {
        check_class(keys)?;
        // Switches that some families heed, and none takes for anything else.
        for switch in ["attention_bias", "mlp_bias"] {
            keys.flag(switch, false)?;
        }
        let heads = defaults
            .heads
            .map_or_else(|| keys.count("num_attention_heads"), |n| keys.count_or("num_attention_heads", n))?;
        let hidden_size = keys.size("hidden_size")?;
        let kv_heads = keys.size_or("num_key_value_heads", defaults.kv_heads)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(ConfigError::new("num_key_value_heads", format!("a divisor of {heads} heads"), kv_heads));
        }
        let head_dim = match keys.size_or("head_dim", defaults.head_dim)? {
            Some(dim) => dim,
            None if hidden_size % heads == 0 => hidden_size / heads,
            None => return Err(ConfigError::new("hidden_size", format!("a multiple of {heads} heads"), hidden_size)),
        };
        if head_dim % 2 != 0 || head_dim > MAX_COUNT {
            return Err(ConfigError::new("head_dim", format!("an even number up to {MAX_COUNT}"), head_dim));
        }
        Ok(Self {
            model_type: keys.text("model_type")?.unwrap_or_default().to_owned(),
            hidden_size,
            layers: keys.count("num_hidden_layers")?,
            heads,
            kv_heads,
            head_dim,
            vocab_size: defaults
                .vocab
                .map_or_else(|| keys.size("vocab_size"), |n| Ok(keys.optional_size("vocab_size")?.unwrap_or(n)))?,
            max_positions: keys.optional_size("max_position_embeddings")?.unwrap_or(defaults.positions),
            tied_head: keys.flag("tie_word_embeddings", defaults.tied_head)?,
            attention_dropout: keys.share("attention_dropout", 0.0)?,
        })
    }
}

/// Classes that share a family's name, but have another head than a language model's.
fn check_class(keys: &Keys<'_>) -> Result<(), ConfigError> {
    let classes = keys.get("architectures").and_then(Value::as_array);
    let Some(class) = classes.and_then(|c| c.first()).and_then(Value::as_str) else { return Ok(()) };
    if class.ends_with("ForCausalLM") || class.ends_with("LMHeadModel") {
        return Ok(());
    }
    Err(ConfigError::unsupported("architectures", "a language model (`..ForCausalLM`)", class))
}
