//! Families whose matrices are joined in Hugging Face's checkpoints and in llama.cpp's files alike.

use super::Family;
use crate::error::Result;
use crate::format::gguf::config::Draft;
use crate::format::gguf::places::{Place, same};

pub(super) const ALL: &[Family] = &[
    Family {
        places: PHI,
        keys: &["rope.scaling.attn_factor"],
        ..Family::new("phi3", &[("phi3", "Phi3ForCausalLM")], phi3)
    },
    Family {
        places: GLM,
        keys: &["rope.dimension_sections"],
        ..Family::new("glm4", &[("glm4", "Glm4ForCausalLM")], glm4)
    },
];

const PHI: &[Place] = &[same("self_attn.qkv_proj", "attn_qkv"), same("mlp.gate_up_proj", "ffn_up")];

const GLM: &[Place] = &[
    same("post_self_attn_layernorm", "post_attention_norm"),
    same("post_mlp_layernorm", "post_ffw_norm"),
    same("mlp.gate_up_proj", "ffn_up"),
];

/// Phi-3 and Phi-4-mini. llama.cpp leaves the window out where it computes, but not in its files.
fn phi3(d: &mut Draft<'_>) -> Result<()> {
    let head_dim = d.decoder()?;
    d.set("sliding_window", d.window()?.filter(|window| *window < d.context));
    if let Some(original) = d.keys.optional_size("rope.scaling.original_context_length")? {
        d.set("original_max_position_embeddings", original);
    }
    d.partial_rope(head_dim)
}

fn glm4(d: &mut Draft<'_>) -> Result<()> {
    d.no_window()?;
    // Files with sections have the rows of q and k in another order.
    if d.keys.meta().get(&d.keys.name("rope.dimension_sections")).is_some() {
        return Err(d.keys.refuse("a GLM-4 that sees pictures"));
    }
    let head_dim = d.decoder()?;
    d.set("attention_bias", d.keys.biased_queries());
    d.partial_rope(head_dim)
}
