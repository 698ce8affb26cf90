//! Sizes and constants of a model, from a Hugging Face `config.json`.

use crate::keys::{Keys, MAX_COUNT};
use crate::known;
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
    /// Sliding window of each layer, in tokens; a layer without one sees all.
    pub windows: Vec<Option<usize>>,
    /// Share of attention's weights that training drops.
    pub attention_dropout: f32,
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
        let defaults = Defaults::of(model_type);
        known::check(&keys, model_type)?;
        let kv_heads = match keys.optional_size("num_key_value_heads")? {
            None if !keys.has("num_key_value_heads") => defaults.kv_heads.unwrap_or(heads),
            given => given.unwrap_or(heads),
        };
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
        if let Some(rotated) = keys.get("rotary_dim").filter(|dim| dim.as_u64() != Some(head_dim as u64)) {
            let expected = format!("nothing or the whole head's {head_dim}");
            return Err(ConfigError::unsupported("rotary_dim", expected, rotated));
        }
        let eps = keys.number("rms_norm_eps", 1e-6)?;
        if !(0.0..1.0).contains(&eps) {
            return Err(ConfigError::new("rms_norm_eps", "a number from 0 to 1", eps));
        }
        let dropout = keys.number("attention_dropout", 0.0)?;
        if !(0.0..1.0).contains(&dropout) {
            return Err(ConfigError::new("attention_dropout", "a number from 0 to 1", dropout));
        }
        check_class(&keys)?;
        let layers = keys.count("num_hidden_layers")?;
        let max_positions = keys.optional_size("max_position_embeddings")?.unwrap_or(defaults.positions);
        Ok(Self {
            model_type: model_type.to_owned(),
            hidden_size,
            intermediate_size: keys.size("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab_size: keys.size("vocab_size")?,
            max_positions,
            rms_norm_eps: eps as f32,
            tied_head: keys.flag("tie_word_embeddings", false)?,
            attention_bias: keys.flag("attention_bias", false)?,
            mlp_bias: keys.flag("mlp_bias", false)?,
            attention_dropout: dropout as f32,
            windows: windows(&keys, model_type, layers, max_positions)?,
            rope: Rope::parse(&keys, head_dim, max_positions)?,
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

/// What transformers takes for keys that a file leaves out, where families differ.
struct Defaults {
    /// `num_key_value_heads`; none is as many as heads.
    kv_heads: Option<usize>,
    /// `max_position_embeddings`.
    positions: usize,
    /// `sliding_window`; `null` in the file is none.
    window: Option<usize>,
}

impl Defaults {
    fn of(model_type: &str) -> Self {
        match model_type {
            "mistral" => Self { kv_heads: Some(8), positions: 4096 * 32, window: Some(4096) },
            "qwen2" => Self { kv_heads: Some(32), positions: 32768, window: Some(4096) },
            _ => Self { kv_heads: None, positions: 2048, window: None },
        }
    }
}

/// The window of each layer: all of Mistral's have it; of Qwen2's, where it is switched on, those that `layer_types`
/// names or else those from `max_window_layers` on; none of Llama's.
fn windows(
    keys: &Keys<'_>,
    model_type: &str,
    layers: usize,
    max_positions: usize,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let window = match keys.optional_size("sliding_window")? {
        None if !keys.has("sliding_window") => Defaults::of(model_type).window,
        given => given,
    };
    let first = keys.index("max_window_layers")?;
    let qwen2 = model_type == "qwen2";
    let switched_on = keys.flag("use_sliding_window", !qwen2)?;
    if model_type == "mistral" && !switched_on && window.is_some() {
        return Err(ConfigError::unsupported("use_sliding_window", "`sliding_window` null where it is off", "false"));
    }
    // A window as long as the context hides nothing.
    let short = window.filter(|&w| w < max_positions);
    if model_type == "llama"
        && switched_on
        && let Some(window) = short
    {
        return Err(ConfigError::unsupported("sliding_window", "none, for Llama has no window (Mistral has)", window));
    }
    let slides = match model_type {
        "mistral" => 0..layers,
        "qwen2" if switched_on => first.unwrap_or(28).min(layers)..layers,
        _ => layers..layers,
    };
    let default: Vec<_> = (0..layers).map(|i| window.filter(|_| slides.contains(&i))).collect();
    let Some(types) = keys.get("layer_types") else { return Ok(default) };
    let expected = || format!("`full_attention` or `sliding_attention` for each of {layers} layers");
    let list = types.as_array().filter(|list| list.len() == layers);
    let list = list.ok_or_else(|| ConfigError::new("layer_types", expected(), types))?;
    let kind = |(i, kind): (usize, &Value)| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() && switched_on => Ok(window),
        Some("sliding_attention") => Err(ConfigError::new(
            "layer_types",
            "no sliding layer where no window is switched on",
            format!("layer {i}"),
        )),
        _ => Err(ConfigError::unsupported("layer_types", expected(), kind)),
    };
    let given = list.iter().enumerate().map(kind).collect::<Result<Vec<_>, _>>()?;
    // transformers reads the list for Qwen2 alone.
    if !qwen2 && given != default {
        return Err(ConfigError::new(
            "layer_types",
            format!("the same window in every layer of `{model_type}`"),
            types,
        ));
    }
    Ok(given)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(model_type: &str, change: Value) -> Result<Config, ConfigError> {
        let mut config = json!({"model_type": model_type, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 32, "vocab_size": 100, "max_position_embeddings": 512});
        let (Value::Object(map), Value::Object(change)) = (&mut config, change) else { unreachable!() };
        map.extend(change);
        Config::parse(map)
    }

    #[test]
    fn windows_are_where_transformers_has_them() {
        let (full, slide) = ("full_attention", "sliding_attention");
        let w = Some(16);
        let cases = [
            ("llama", json!({}), [None; 3]),
            ("llama", json!({"sliding_window": null}), [None; 3]),
            ("llama", json!({"sliding_window": 512}), [None; 3]),
            ("llama", json!({"layer_types": [full, full, full]}), [None; 3]),
            ("mistral", json!({}), [Some(4096); 3]),
            ("mistral", json!({"sliding_window": null}), [None; 3]),
            ("mistral", json!({"sliding_window": 16}), [w; 3]),
            ("qwen2", json!({"sliding_window": 16}), [None; 3]),
            ("qwen2", json!({"sliding_window": 16, "use_sliding_window": true}), [None; 3]),
            ("qwen2", json!({"sliding_window": 16, "use_sliding_window": true, "max_window_layers": 1}), [None, w, w]),
            (
                "qwen2",
                json!({"sliding_window": 16, "use_sliding_window": true, "layer_types": [slide, full, slide]}),
                [w, None, w],
            ),
        ];
        for (family, change, want) in cases {
            assert_eq!(parse(family, change.clone()).unwrap().windows, want, "{family} {change}");
        }
    }

    #[test]
    fn what_would_change_numbers_is_refused_by_name() {
        let cases = [
            ("llama", json!({"sliding_window": 16}), "sliding_window"),
            ("mistral", json!({"sliding_window": 16, "use_sliding_window": false}), "use_sliding_window"),
            (
                "mistral",
                json!({"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
                "layer_types",
            ),
            ("qwen2", json!({"layer_types": ["sliding_attention"]}), "layer_types"),
            ("qwen2", json!({"layer_types": ["sliding_attention", "full_attention", "full_attention"]}), "layer_types"),
            ("llama", json!({"hidden_act": "gelu"}), "hidden_act"),
            ("llama", json!({"logits_scaling": 8.0}), "logits_scaling"),
            ("llama", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            ("llama", json!({"num_local_experts": 8}), "num_local_experts"),
            ("mistral", json!({"attention_bias": true}), "attention_bias"),
            ("qwen2", json!({"mlp_bias": true}), "mlp_bias"),
            ("qwen2", json!({"attn_logit_softcapping": 50.0}), "attn_logit_softcapping"),
            ("llama", json!({"no_rope_layers": [1, 0, 1]}), "no_rope_layers"),
            ("llama", json!({"is_causal": false}), "is_causal"),
            ("llama", json!({"use_bidirectional_attention": true}), "use_bidirectional_attention"),
            ("llama", json!({"rotary_dim": 32}), "rotary_dim"),
            ("llama", json!({"rope_ratio": 8}), "rope_ratio"),
            ("llama", json!({"position_embedding_type": "absolute"}), "position_embedding_type"),
            ("llama", json!({"norm_type": "layernorm"}), "norm_type"),
            ("llama", json!({"rms_norm_add_unit_offset": true}), "rms_norm_add_unit_offset"),
            ("llama", json!({"num_kv_shared_layers": 2}), "num_kv_shared_layers"),
            ("qwen2", json!({"dual_chunk_attention_config": {"chunk_size": 8}}), "dual_chunk_attention_config"),
        ];
        for (family, change, key) in cases {
            match parse(family, change.clone()) {
                Err(e) => assert_eq!(e.key, key, "{change}: {e}"),
                Ok(_) => panic!("{family} {change} was accepted"),
            }
        }
    }

    #[test]
    fn what_changes_nothing_is_read() {
        for change in [
            json!({"hidden_act": "swish", "logits_scaling": 1.0, "partial_rotary_factor": 1.0, "num_local_experts": 0}),
            json!({"mlp_bias": false, "residual_multiplier": null, "no_rope_layers": [], "use_qk_norm": false}),
            json!({"is_causal": true, "rope_ratio": 1, "position_embedding_type": "rope", "num_kv_shared_layers": 0}),
            json!({"norm_type": "rmsnorm", "rotary_dim": 2, "dual_chunk_attention_config": null}),
            json!({"pretraining_tp": 2, "use_cache": false, "torch_dtype": "float16", "somebody's": {"key": 1}}),
        ] {
            parse("llama", change.clone()).unwrap_or_else(|e| panic!("{change}: {e}"));
        }
        assert_eq!(parse("llama", json!({})).unwrap().kv_heads, 32);
        assert_eq!(parse("mistral", json!({})).unwrap().kv_heads, 8);
        assert_eq!(parse("mistral", json!({"num_key_value_heads": null})).unwrap().kv_heads, 32);
    }
}
