//! Sizes and constants of a model, from a Hugging Face `config.json`.

use crate::rope::Rope;
use serde_json::{Map, Value};
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

/// Upper bound on every size: beyond any model, small enough that products of two cannot overflow.
const MAX_SIZE: usize = 1 << 24;
/// Upper bound on the number of layers, heads and the width of a head.
const MAX_COUNT: usize = 4096;

/// What the supported families share.
#[derive(Clone, Debug)]
pub struct Config {
    /// Family.
    pub model_type: String,
    /// Width of the residual stream (`C`).
    pub hidden_size: usize,
    /// Width of the feed-forward layer (`F`).
    pub intermediate_size: usize,
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
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// The head is the embedding.
    pub tied_head: bool,
    /// q, k, v and o have biases (`attention_bias`).
    pub attention_bias: bool,
    /// gate, up and down have biases (`mlp_bias`).
    pub mlp_bias: bool,
    /// Sliding window in tokens, if any layer uses one.
    pub window: Option<usize>,
    /// First layer that uses the window (`max_window_layers`, Qwen2).
    pub window_from: usize,
    /// Which layers use the window, where the config lists them (`layer_types`, Qwen2).
    pub layer_windows: Option<Vec<bool>>,
    /// Rotary embedding.
    pub rope: Rope,
}

impl Config {
    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// The first key that is missing, of the wrong type, out of range or in contradiction with another.
    pub fn parse(json: &Map<String, Value>) -> Result<Self, ConfigError> {
        let keys = Keys(json);
        let model_type = keys.text("model_type")?.unwrap_or_default();
        let heads = keys.count("num_attention_heads")?;
        let hidden_size = keys.size("hidden_size")?;
        let kv_heads = keys.optional_size("num_key_value_heads")?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(ConfigError::new("num_key_value_heads", format!("a divisor of {heads} heads"), kv_heads));
        }
        let head_dim = match keys.optional_size("head_dim")? {
            Some(dim) => dim,
            None if hidden_size % heads == 0 => hidden_size / heads,
            None => return Err(ConfigError::new("hidden_size", format!("a multiple of {heads} heads"), hidden_size)),
        };
        if head_dim % 2 != 0 || head_dim > MAX_COUNT {
            return Err(ConfigError::new("head_dim", format!("an even number up to {MAX_COUNT}"), head_dim));
        }
        // Two names for one function.
        let activation = keys.text("hidden_act")?.unwrap_or("silu");
        if !matches!(activation, "silu" | "swish") {
            return Err(ConfigError::unsupported("hidden_act", "`silu`", activation));
        }
        let eps = keys.number("rms_norm_eps", 1e-6)?;
        if !(0.0..1.0).contains(&eps) {
            return Err(ConfigError::new("rms_norm_eps", "a number from 0 to 1", eps));
        }
        check_class(&keys)?;
        let qwen2 = model_type == "qwen2";
        // Only Qwen2 has the switch, and there it is off unless said otherwise. The width is 4096 in both families where
        // the key is absent; `null` is none.
        let windowed = keys.flag("use_sliding_window", !qwen2)?;
        let usual_window = (model_type != "llama" && !json.contains_key("sliding_window")).then_some(4096);
        let layers = keys.count("num_hidden_layers")?;
        Ok(Self {
            model_type: model_type.to_owned(),
            hidden_size,
            intermediate_size: keys.size("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab_size: keys.size("vocab_size")?,
            max_positions: keys.optional_size("max_position_embeddings")?.unwrap_or(2048),
            rms_norm_eps: eps as f32,
            tied_head: keys.flag("tie_word_embeddings", false)?,
            attention_bias: keys.flag("attention_bias", false)?,
            mlp_bias: keys.flag("mlp_bias", false)?,
            window: if windowed { keys.optional_size("sliding_window")?.or(usual_window) } else { None },
            window_from: keys.index("max_window_layers")?.unwrap_or(if qwen2 { 28 } else { 0 }),
            layer_windows: if qwen2 { layer_windows(&keys, layers)? } else { None },
            rope: Rope::parse(&keys, head_dim)?,
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

/// `layer_types`: what it lists goes before `max_window_layers`.
fn layer_windows(keys: &Keys<'_>, layers: usize) -> Result<Option<Vec<bool>>, ConfigError> {
    let key = "layer_types";
    let Some(value) = keys.get(key) else { return Ok(None) };
    let list = value.as_array().ok_or_else(|| ConfigError::new(key, "a list of names", value))?;
    if list.len() != layers {
        return Err(ConfigError::new(key, format!("one name for each of {layers} layers"), list.len()));
    }
    let windowed = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => Err(ConfigError::unsupported(key, "`full_attention` or `sliding_attention`", kind)),
    };
    list.iter().map(windowed).collect::<Result<_, _>>().map(Some)
}

/// Typed access to the keys of a JSON object; `null` counts as absent.
pub(crate) struct Keys<'a>(&'a Map<String, Value>);

impl<'a> Keys<'a> {
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<Keys<'a>>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Keys(map))),
            Some(other) => Err(ConfigError::new(key, "an object", other)),
        }
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(ConfigError::new(key, "a string", other)),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(ConfigError::new(key, "true or false", other)),
        }
    }

    pub(crate) fn number(&self, key: &str, default: f64) -> Result<f64, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| ConfigError::new(key, "a number", value)),
        }
    }

    pub(crate) fn required_number(&self, key: &str) -> Result<f64, ConfigError> {
        if self.get(key).is_none() {
            return Err(ConfigError::new(key, "a number", "nothing"));
        }
        self.number(key, 0.0)
    }

    /// As [`Keys::optional_size`], where nothing is a size too.
    fn index(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        if self.get(key).and_then(Value::as_u64) == Some(0) { Ok(Some(0)) } else { self.optional_size(key) }
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=MAX_SIZE).contains(n));
        size.map(Some).ok_or_else(|| ConfigError::new(key, format!("a whole number from 1 to {MAX_SIZE}"), value))
    }

    fn count(&self, key: &str) -> Result<usize, ConfigError> {
        let count = self.size(key)?;
        if count > MAX_COUNT {
            return Err(ConfigError::new(key, format!("at most {MAX_COUNT}"), count));
        }
        Ok(count)
    }

    fn size(&self, key: &str) -> Result<usize, ConfigError> {
        self.optional_size(key)?.ok_or_else(|| ConfigError::new(key, "a whole number", "nothing"))
    }
}
