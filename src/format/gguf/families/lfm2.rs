//! LFM2: short convolutions among layers of attention, and a last norm that llama.cpp counts to the embedding.

use super::Family;
use crate::error::Result;
use crate::format::gguf::config::{Draft, FULL};
use crate::format::gguf::places::{Place, expert, same};

pub(super) const ALL: &[Family] = &[
    Family { varied: true, places: PLACES, ..Family::new("lfm2", &[("lfm2", "Lfm2ForCausalLM")], lfm2) },
    Family {
        varied: true,
        experts: true,
        places: PLACES,
        keys: &["expert_gating_func", "expert_weights_scale"],
        ..Family::new("lfm2moe", &[("lfm2_moe", "Lfm2MoeForCausalLM")], lfm2_moe)
    },
];

const PLACES: &[Place] = &[
    same("model.embedding_norm", "token_embd_norm"),
    same("operator_norm", "attn_norm"),
    same("self_attn.out_proj", "attn_output"),
    same("self_attn.q_layernorm", "attn_q_norm"),
    same("self_attn.k_layernorm", "attn_k_norm"),
    same("conv.in_proj", "shortconv.in_proj"),
    same("conv.conv", "shortconv.conv"),
    same("conv.out_proj", "shortconv.out_proj"),
    same("ffn_norm", "ffn_norm"),
    same("feed_forward.w1", "ffn_gate"),
    same("feed_forward.w2", "ffn_down"),
    same("feed_forward.w3", "ffn_up"),
    same("feed_forward.gate", "ffn_gate_inp"),
    same("feed_forward.expert_bias", "exp_probs_b.bias"),
    expert("feed_forward.experts.{}.w1", "ffn_gate_exps"),
    expert("feed_forward.experts.{}.w2", "ffn_down_exps"),
    expert("feed_forward.experts.{}.w3", "ffn_up_exps"),
];

fn lfm2(d: &mut Draft<'_>) -> Result<()> {
    d.no_window()?;
    let head_dim = d.decoder()?;
    let kind = |heads: &usize| if *heads == 0 { "conv" } else { FULL };
    let kinds: Vec<&str> = d.kv_heads_of_layers()?.iter().map(kind).collect();
    d.set("layer_types", kinds);
    d.set("conv_L_cache", d.keys.size("shortconv.l_cache")?);
    d.set("conv_bias", false);
    d.rms_norm("norm_eps")?;
    d.set("block_auto_adjust_ff_dim", false);
    d.rope(head_dim)
}

fn lfm2_moe(d: &mut Draft<'_>) -> Result<()> {
    lfm2(d)?;
    d.experts(["num_experts", "num_experts_per_tok", "moe_intermediate_size"])?;
    let dense = d.keys.optional_size("leading_dense_block_count")?.unwrap_or(0);
    d.set("num_dense_layers", dense);
    // 2 is the sigmoid.
    if d.keys.optional_size("expert_gating_func")?.is_some_and(|kind| kind != 2) {
        return Err(d.keys.refuse("an LFM2 whose experts are not chosen by a sigmoid"));
    }
    d.set("use_expert_bias", d.keys.has(&format!("blk.{dense}.exp_probs_b.bias")));
    d.set("norm_topk_prob", true);
    let factor = d.keys.factor("expert_weights_scale", 1.0)?;
    d.set("routed_scaling_factor", factor);
    Ok(())
}
