//! The keys of an architecture that say how it computes, and what is done with each: those of `{arch}.rope.*` and
//! `{arch}.attention.*` that no row names are refused, so that a new one is not overlooked.

use super::families::Family;
use super::value::{Metadata, Value};
use crate::error::{Error, Result};

enum Use {
    /// Read where the architecture's sizes and scalings are.
    Read,
    /// Has no effect on these architectures.
    Nothing,
    /// Only with one of these values, which change nothing.
    Only(&'static [f64]),
    OnlyTrue,
    OnlyText(&'static str),
}

use Use::{Nothing, Only, OnlyText, OnlyTrue, Read};

const KEYS: &[(&str, Use)] = &[
    ("rope.dimension_count", Read),
    ("rope.freq_base", Read),
    ("rope.scale_linear", Read),
    ("rope.scaling.type", Read),
    ("rope.scaling.factor", Read),
    ("rope.scaling.original_context_length", Read),
    ("rope.scaling.yarn_beta_fast", Read),
    ("rope.scaling.yarn_beta_slow", Read),
    ("rope.scaling.yarn_log_multiplier", Read),
    ("rope.scaling.finetuned", Nothing),
    ("rope.scaling.alpha", Only(&[0.0])),
    ("rope.scaling.attn_factor", Only(&[1.0])),
    ("rope.scaling.yarn_attn_factor", Only(&[1.0])),
    // -1 is llama.cpp's sign for the default, which is 1 for YaRN.
    ("rope.scaling.yarn_ext_factor", Only(&[-1.0, 1.0])),
    ("attention.head_count", Read),
    ("attention.head_count_kv", Read),
    ("attention.key_length", Read),
    ("attention.value_length", Read),
    ("attention.layer_norm_rms_epsilon", Read),
    ("attention.sliding_window", Read),
    // Of LayerNorm, which these have not.
    ("attention.layer_norm_epsilon", Nothing),
    ("attention.causal", OnlyTrue),
    ("attention.clamp_kqv", Only(&[0.0])),
    ("attention.max_alibi_bias", Only(&[0.0])),
    ("attention.scale", Only(&[0.0])),
    ("attention.output_scale", Only(&[0.0, 1.0])),
    ("attention.value_scale", Only(&[0.0, 1.0])),
    ("attention.temperature_scale", Only(&[0.0])),
    ("attention.temperature_length", Only(&[0.0])),
    ("expert_weights_norm", OnlyTrue),
    ("expert_weights_scale", Only(&[0.0, 1.0])),
    // 1 is the softmax.
    ("expert_gating_func", Only(&[0.0, 1.0])),
    ("expert_shared_count", Only(&[0.0])),
    ("attn_logit_softcapping", Only(&[0.0])),
    ("final_logit_softcapping", Only(&[0.0])),
    ("logit_scale", Only(&[0.0, 1.0])),
    ("residual_scale", Only(&[0.0, 1.0])),
    ("embedding_scale", Only(&[0.0, 1.0])),
    ("use_parallel_residual", Only(&[0.0])),
    ("hidden_activation", OnlyText("silu")),
    // Rows of q and k are in the converter's order, not in that of the original files from before it.
    ("tensor_data_layout", OnlyText("Meta AI original pth")),
];

/// Refuses the first key that could not be honoured in `family`, which may read further ones.
pub(super) fn check(meta: &Metadata, family: &Family) -> Result<()> {
    let arch = family.name;
    let prefix = format!("{arch}.");
    for (key, value) in meta.iter() {
        let Some(name) = key.strip_prefix(&prefix) else { continue };
        let row = KEYS.iter().find(|(known, _)| *known == name).map(|(_, usage)| usage);
        let honoured = match row {
            _ if family.keys.contains(&name) => true,
            Some(Read | Nothing) => true,
            Some(Only(values)) => number(value).is_some_and(|x| values.contains(&x)),
            Some(OnlyTrue) => *value == Value::Bool(true),
            Some(OnlyText(text)) => matches!(value, Value::String(got) if got == text),
            None => !name.starts_with("rope.") && !name.starts_with("attention."),
        };
        if !honoured {
            let shown = match value {
                Value::Array(list) => format!("a list of {}", list.len()),
                Value::String(text) => text.chars().take(60).collect(),
                other => number(other).map_or_else(|| format!("{other:?}"), |x| x.to_string()),
            };
            let what = format_args!("`{key}` = {shown} in architecture `{arch}`");
            return Err(Error::unsupported(meta.path(), what, "use the model's safetensors files"));
        }
    }
    Ok(())
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Bool(switch) => Some(f64::from(u8::from(*switch))),
        other => other.as_f64().or_else(|| other.as_u64().map(|n| n as f64)),
    }
}
