//! Keys of `config.json` that would change what a model computes, and the values under which they change nothing: one
//! table, so that none is forgotten. A family names those that it honours itself, or that mean nothing to it.
//!
//! What has no effect on a number: names (`architectures`, `auto_map`, `_name_or_path`, `transformers_version`), types
//! (`torch_dtype`, `dtype`), training (`initializer_range`), switches of programs (`use_cache`, `output_attentions`,
//! `pretraining_tp`, which splits products into equal sums), token ids (the tokenizer's concern) and keys that nobody
//! knows.

use crate::config::ConfigError;
use crate::keys::Keys;
use serde_json::Value;

/// The value under which a key changes nothing. `null` and an empty list or object always do so.
#[derive(Clone, Copy)]
enum Neutral {
    False,
    /// `true`, which is what all families do.
    True,
    /// This number; for a switch or a count, `false` and 0 are the same.
    Is(f64),
    OneOf(&'static [&'static str]),
}

use Neutral::{False, Is, OneOf, True};

/// Keys and their neutral values.
const KEYS: &[(&str, Neutral)] = &[
    ("hidden_act", OneOf(&["silu", "swish"])),
    ("hidden_activation", OneOf(&["silu", "swish"])),
    // Biases.
    ("attention_bias", False),
    ("mlp_bias", False),
    ("qkv_bias", False),
    ("use_bias", False),
    ("lm_head_bias", False),
    // Positions.
    ("partial_rotary_factor", Is(1.0)),
    ("rotary_pct", Is(1.0)),
    ("rope_ratio", Is(1.0)),
    ("position_embedding_type", OneOf(&["rope", "rotary"])),
    ("rope_interleaved", False),
    ("rope_interleave", False),
    ("no_rope_layers", False),
    ("no_rope_layer_interval", Is(0.0)),
    ("alibi", False),
    ("mrope_section", False),
    // Attention.
    ("attention_chunk_size", Is(0.0)),
    ("attention_multiplier", False),
    ("attn_logit_softcapping", False),
    ("attn_output_gate", False),
    ("attn_scale", False),
    ("attn_temperature_tuning", False),
    ("dual_chunk_attention_config", False),
    ("is_causal", True),
    ("num_kv_shared_layers", Is(0.0)),
    ("use_bidirectional_attention", False),
    ("clip_qkv", False),
    ("kv_lora_rank", Is(0.0)),
    ("q_lora_rank", Is(0.0)),
    ("qk_layernorm", False),
    ("qk_norm", False),
    ("query_pre_attn_scalar", False),
    ("sliding_window_pattern", False),
    ("use_qk_norm", False),
    // Scales of the residual stream and the logits.
    ("dim_model_base", False),
    ("embedding_multiplier", Is(1.0)),
    ("embedding_scale", Is(1.0)),
    ("final_logit_softcapping", False),
    ("logit_scale", Is(1.0)),
    ("logits_scaling", Is(1.0)),
    ("lm_head_multiplier", Is(1.0)),
    ("residual_multiplier", Is(1.0)),
    ("residual_scale", Is(1.0)),
    ("scale_depth", False),
    ("scale_emb", Is(1.0)),
    // Layers of another kind.
    ("is_encoder_decoder", False),
    ("add_cross_attention", False),
    ("num_experts", Is(0.0)),
    ("num_local_experts", Is(0.0)),
    ("n_routed_experts", Is(0.0)),
    ("parallel_attn", False),
    ("pruned_heads", False),
    ("use_parallel_residual", False),
    // Norms.
    ("norm_type", OneOf(&["rms", "rmsnorm", "rms_norm", "RMSNorm"])),
    ("rms_norm_add_unit_offset", False),
];

/// Refuses the first key whose value would have an effect in some model and has none here. `honoured` are the keys that
/// the family reads itself, or that have no meaning in it.
pub(crate) fn check(keys: &Keys<'_>, family: &str, honoured: &[&str]) -> Result<(), ConfigError> {
    for (key, neutral) in KEYS {
        let Some(value) = keys.get(key) else { continue };
        if honoured.contains(key) || neutral.allows(value) {
            continue;
        }
        if matches!(neutral, OneOf(_)) && !value.is_string() {
            return Err(ConfigError::new(*key, "a name", value));
        }
        return Err(ConfigError::unsupported(*key, format!("{neutral} in a `{family}` model"), value));
    }
    Ok(())
}

impl Neutral {
    fn allows(self, value: &Value) -> bool {
        match value {
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            Value::Bool(switch) => match self {
                OneOf(_) => false,
                True => *switch,
                False | Is(_) => !switch,
            },
            Value::Number(n) => matches!(self, Is(neutral) if n.as_f64() == Some(neutral)),
            Value::String(text) => matches!(self, OneOf(list) if list.contains(&text.as_str())),
            Value::Null => true,
        }
    }
}

impl std::fmt::Display for Neutral {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            False => f.write_str("nothing or false"),
            True => f.write_str("nothing or true"),
            Is(number) => write!(f, "nothing or {number}"),
            OneOf(list) => write!(f, "one of `{}`", list.join("`, `")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refused(config: &Value, honoured: &[&str]) -> Option<String> {
        let keys = Keys(config.as_object().unwrap());
        check(&keys, "some", honoured).err().map(|e| e.key)
    }

    #[test]
    fn what_would_change_numbers_is_refused_by_name() {
        for config in [
            json!({"hidden_act": "gelu"}),
            json!({"hidden_act": 1}),
            json!({"logits_scaling": 8.0}),
            json!({"partial_rotary_factor": 0.5}),
            json!({"num_local_experts": 8}),
            json!({"attention_bias": true}),
            json!({"mlp_bias": true}),
            json!({"attn_logit_softcapping": 50.0}),
            json!({"no_rope_layers": [1, 0, 1]}),
            json!({"is_causal": false}),
            json!({"use_bidirectional_attention": true}),
            json!({"rope_ratio": 8}),
            json!({"position_embedding_type": "absolute"}),
            json!({"norm_type": "layernorm"}),
            json!({"rms_norm_add_unit_offset": true}),
            json!({"num_kv_shared_layers": 2}),
            json!({"dual_chunk_attention_config": {"chunk_size": 8}}),
        ] {
            let key = config.as_object().unwrap().keys().next().unwrap();
            assert_eq!(refused(&config, &[]).as_ref(), Some(key), "{config}");
            assert_eq!(refused(&config, &[key]), None, "{config}");
        }
    }

    #[test]
    fn what_changes_nothing_is_read() {
        for config in [
            json!({"hidden_act": "swish", "logits_scaling": 1.0, "partial_rotary_factor": 1.0, "num_local_experts": 0}),
            json!({"mlp_bias": false, "residual_multiplier": null, "no_rope_layers": [], "use_qk_norm": false}),
            json!({"is_causal": true, "rope_ratio": 1, "position_embedding_type": "rope", "num_kv_shared_layers": 0}),
            json!({"norm_type": "rmsnorm", "dual_chunk_attention_config": null}),
            json!({"pretraining_tp": 2, "use_cache": false, "torch_dtype": "float16", "somebody's": {"key": 1}}),
        ] {
            assert_eq!(refused(&config, &[]), None, "{config}");
        }
    }
}
