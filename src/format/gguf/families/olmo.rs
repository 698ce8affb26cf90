//! Families with norms behind the parts of a layer.

use super::Family;
use crate::error::Result;
use crate::format::gguf::config::Draft;
use crate::format::gguf::places::{Place, same};
use serde_json::{Map, Value, json};

pub(super) const ALL: &[Family] = &[
    Family {
        places: BEHIND,
        keys: &["attention.sliding_window_pattern", "rope.freq_base_swa", "rope.scaling.yarn_attn_factor"],
        ..Family::new("olmo2", &[("olmo2", "Olmo2ForCausalLM"), ("olmo3", "Olmo3ForCausalLM")], olmo)
    },
    Family {
        places: BEHIND,
        keys: &["attention.sliding_window_pattern", "rope.freq_base_swa"],
        ..Family::new("exaone4", &[("exaone4", "Exaone4ForCausalLM")], exaone4)
    },
];

const BEHIND: &[Place] =
    &[same("post_attention_layernorm", "post_attention_norm"), same("post_feedforward_layernorm", "post_ffw_norm")];

/// OLMo 3 is called `olmo2`, too; only the sliding window tells.
fn olmo(d: &mut Draft<'_>) -> Result<()> {
    let head_dim = d.decoder()?;
    d.biases();
    let Some(window) = d.window()? else { return d.rope(head_dim) };
    d.named("olmo3");
    d.set("sliding_window", window);
    d.layer_types(4, false)?;
    d.keys.same("rope.dimension_count", head_dim)?;
    let mut full = d.angles(head_dim)?;
    if full["rope_type"] == "yarn"
        && let Some(factor) = d.keys.positive("rope.scaling.yarn_attn_factor")?
    {
        full.insert("attention_factor".to_owned(), json!(factor));
    }
    let theta = d.keys.positive("rope.freq_base_swa")?.map_or_else(|| d.theta(), Ok)?;
    let sliding: Map<String, Value> =
        Map::from_iter([("rope_type".to_owned(), json!("default")), ("rope_theta".to_owned(), json!(theta))]);
    d.by_kind(full, sliding);
    Ok(())
}

/// Layers that see all have no positions where others slide.
fn exaone4(d: &mut Draft<'_>) -> Result<()> {
    let head_dim = d.decoder()?;
    let window = d.window()?;
    d.set("sliding_window", window);
    if window.is_some() {
        d.layer_types(4, false)?;
    }
    d.rope(head_dim)
}
