//! Keys of `config.json` that would change what a supported family computes, and how: one table, so that none is
//! forgotten. [`crate::Config`] reads all others that these families have.
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

/// Keys, the families that they would be unknown to (none named: all), and their neutral values.
const KEYS: &[(&str, &[&str], Neutral)] = &[
    ("hidden_act", &[], OneOf(&["silu", "swish"])),
    ("hidden_activation", &[], OneOf(&["silu", "swish"])),
    // Biases: `attention_bias` and `mlp_bias` are Llama's, and Qwen2 always has those of q, k and v.
    ("attention_bias", &["mistral"], False),
    ("mlp_bias", &["mistral", "qwen2"], False),
    ("qkv_bias", &["llama", "mistral"], False),
    ("use_bias", &[], False),
    ("lm_head_bias", &[], False),
    // Positions.
    ("partial_rotary_factor", &[], Is(1.0)),
    ("rotary_pct", &[], Is(1.0)),
    ("rope_ratio", &[], Is(1.0)),
    ("position_embedding_type", &[], OneOf(&["rope", "rotary"])),
    ("rope_interleaved", &[], False),
    ("rope_interleave", &[], False),
    ("no_rope_layers", &[], False),
    ("no_rope_layer_interval", &[], Is(0.0)),
    ("alibi", &[], False),
    ("mrope_section", &[], False),
    // Attention.
    ("attention_chunk_size", &[], Is(0.0)),
    ("attention_multiplier", &[], False),
    ("attn_logit_softcapping", &[], False),
    ("attn_output_gate", &[], False),
    ("attn_scale", &[], False),
    ("attn_temperature_tuning", &[], False),
    ("dual_chunk_attention_config", &[], False),
    ("is_causal", &[], True),
    ("num_kv_shared_layers", &[], Is(0.0)),
    ("use_bidirectional_attention", &[], False),
    ("clip_qkv", &[], False),
    ("kv_lora_rank", &[], Is(0.0)),
    ("q_lora_rank", &[], Is(0.0)),
    ("qk_layernorm", &[], False),
    ("qk_norm", &[], False),
    ("query_pre_attn_scalar", &[], False),
    ("sliding_window_pattern", &[], False),
    ("use_qk_norm", &[], False),
    // Scales of the residual stream and the logits (Granite, MiniCPM, Cohere, Gemma).
    ("dim_model_base", &[], False),
    ("embedding_multiplier", &[], Is(1.0)),
    ("embedding_scale", &[], Is(1.0)),
    ("final_logit_softcapping", &[], False),
    ("logit_scale", &[], Is(1.0)),
    ("logits_scaling", &[], Is(1.0)),
    ("lm_head_multiplier", &[], Is(1.0)),
    ("residual_multiplier", &[], Is(1.0)),
    ("residual_scale", &[], Is(1.0)),
    ("scale_depth", &[], False),
    ("scale_emb", &[], Is(1.0)),
    // Layers of another kind.
    ("is_encoder_decoder", &[], False),
    ("add_cross_attention", &[], False),
    ("num_experts", &[], Is(0.0)),
    ("num_local_experts", &[], Is(0.0)),
    ("n_routed_experts", &[], Is(0.0)),
    ("parallel_attn", &[], False),
    ("pruned_heads", &[], False),
    ("use_parallel_residual", &[], False),
    // Norms.
    ("norm_type", &[], OneOf(&["rms", "rmsnorm", "rms_norm", "RMSNorm"])),
    ("rms_norm_add_unit_offset", &[], False),
];

/// Refuses the first key whose value the family could not honour.
pub(crate) fn check(keys: &Keys<'_>, model_type: &str) -> Result<(), ConfigError> {
    for (key, families, neutral) in KEYS {
        let Some(value) = keys.get(key) else { continue };
        if (!families.is_empty() && !families.contains(&model_type)) || neutral.allows(value) {
            continue;
        }
        if matches!(neutral, OneOf(_)) && !value.is_string() {
            return Err(ConfigError::new(*key, "a name", value));
        }
        return Err(ConfigError::unsupported(*key, format!("{neutral} in a `{model_type}` model"), value));
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
