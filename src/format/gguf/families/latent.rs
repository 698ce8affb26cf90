//! Families with latent attention: keys and values come of one vector of low rank.

use super::Family;
use crate::error::Result;
use crate::format::gguf::config::Draft;
use crate::format::gguf::places::{Place, latent, same};

pub(super) const ALL: &[Family] = &[
    Family { places: PARTS, keys: RANKS, ..Family::new("minicpm3", &[("minicpm3", "MiniCPM3ForCausalLM")], minicpm3) },
    Family {
        places: PARTS,
        keys: RANKS,
        // DeepSeek's own models have experts in nearly all layers; those that have none are Youtu's.
        ..Family::new("deepseek2", &[("youtu", "YoutuForCausalLM")], youtu)
    },
];

const RANKS: &[&str] = &[
    "attention.q_lora_rank",
    "attention.kv_lora_rank",
    "attention.key_length_mla",
    "attention.value_length_mla",
    "rope.scaling.attn_factor",
];

const PARTS: &[Place] = &[
    same("self_attn.q_a_proj", "attn_q_a"),
    same("self_attn.q_a_layernorm", "attn_q_a_norm"),
    same("self_attn.q_b_proj", "attn_q_b"),
    same("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    same("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
    latent("self_attn.kv_b_proj", ["attn_k_b", "attn_v_b"]),
    same("self_attn.kv_b_proj", "attn_kv_b"),
];

/// What MiniCPM3's factors are tuned to, which llama.cpp has in its code and no file says.
const SCALE_EMB: f64 = 12.0;
const SCALE_DEPTH: f64 = 1.4;
const DIM_MODEL_BASE: usize = 256;

fn minicpm3(d: &mut Draft<'_>) -> Result<()> {
    let head = d.keys.size("attention.key_length")?;
    let heads = d.keys.size("attention.head_count")?;
    // No key has it.
    let output = d.keys.shape("blk.0.attn_output.weight").and_then(|shape| shape.last().copied());
    widths(d, head, output.unwrap_or(d.hidden) / heads)?;
    d.set("scale_emb", SCALE_EMB);
    d.set("scale_depth", SCALE_DEPTH);
    d.set("dim_model_base", DIM_MODEL_BASE);
    Ok(())
}

fn youtu(d: &mut Draft<'_>) -> Result<()> {
    let head = d.keys.size("attention.key_length_mla")?;
    let value = d.keys.size("attention.value_length_mla")?;
    d.set("rope_interleave", true);
    widths(d, head, value)
}

/// The parts of a query and a key of width `head`, and values of width `value`.
fn widths(d: &mut Draft<'_>, head: usize, value: usize) -> Result<()> {
    d.no_window()?;
    let heads = d.heads()?;
    d.set("num_key_value_heads", heads);
    d.feed_forward()?;
    d.rms_norm("rms_norm_eps")?;
    d.set("hidden_act", "silu");
    let turned = d.keys.size("rope.dimension_count")?;
    let Some(plain) = head.checked_sub(turned).filter(|plain| *plain > 0) else {
        return Err(d.keys.fail("rope.dimension_count", format_args!("less than the {head} of a head"), turned));
    };
    let rank = d.keys.optional_size("attention.q_lora_rank")?;
    d.set("q_lora_rank", rank);
    for (key, size) in [
        ("kv_lora_rank", d.keys.size("attention.kv_lora_rank")?),
        ("qk_nope_head_dim", plain),
        ("qk_rope_head_dim", turned),
        ("v_head_dim", value),
        // As transformers has it.
        ("head_dim", turned),
    ] {
        d.set(key, size);
    }
    let rope = d.angles(turned)?;
    d.everywhere(rope)
}
