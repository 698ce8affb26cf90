//! The Qwen families. In Qwen3-Next and Qwen3.5, most layers are a gated delta net, whose tensors llama.cpp orders anew.

use super::Family;
use crate::error::Result;
use crate::format::gguf::config::{Draft, FULL};
use crate::format::gguf::places::Tiled::{Columns, Each, Rows, Tail};
use crate::format::gguf::places::{Place, by_head, expert, half_expert, older, same, tiled};
use serde_json::json;

pub(super) const ALL: &[Family] = &[
    Family::new("qwen2", &[("qwen2", "Qwen2ForCausalLM")], qwen2),
    Family::new("qwen3", &[("qwen3", "Qwen3ForCausalLM")], qwen3),
    Family {
        experts: true,
        places: EXPERTS,
        ..Family::new("qwen3moe", &[("qwen3_moe", "Qwen3MoeForCausalLM")], qwen3_moe)
    },
    Family {
        experts: true,
        plus_one: true,
        places: NEXT,
        keys: &["attention.recurrent_layers"],
        ..Family::new("qwen3next", &[("qwen3_next", "Qwen3NextForCausalLM")], qwen3_next)
    },
    Family {
        plus_one: true,
        places: FIVE,
        // Text has the same position in all sections.
        keys: &["attention.recurrent_layers", "rope.dimension_sections"],
        ..Family::new("qwen35", &[("qwen3_5_text", "Qwen3_5ForCausalLM")], qwen3_5)
    },
];

const EXPERTS: &[Place] = &[
    expert("mlp.experts.{}.gate_proj", "ffn_gate_exps"),
    expert("mlp.experts.{}.up_proj", "ffn_up_exps"),
    expert("mlp.experts.{}.down_proj", "ffn_down_exps"),
];

const NEXT: &[Place] = &[
    same("post_attention_layernorm", "post_attention_norm"),
    by_head("linear_attn.in_proj_qkvz", ["attn_qkv", "attn_gate"]),
    older("linear_attn.in_proj_qkvz", "ssm_in"),
    same("linear_attn.in_proj_ba", "ssm_ba"),
    same("linear_attn.conv1d", "ssm_conv1d"),
    same("linear_attn.A_log", "ssm_a"),
    same("linear_attn.dt_bias", "ssm_dt.bias"),
    same("linear_attn.norm", "ssm_norm"),
    same("linear_attn.out_proj", "ssm_out"),
    expert("mlp.experts.{}.gate_proj", "ffn_gate_exps"),
    expert("mlp.experts.{}.up_proj", "ffn_up_exps"),
    half_expert("mlp.experts.{}.gate_proj", "ffn_gate_up_exps", 0),
    half_expert("mlp.experts.{}.up_proj", "ffn_gate_up_exps", 1),
    expert("mlp.experts.{}.down_proj", "ffn_down_exps"),
    same("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
    same("mlp.shared_expert.up_proj", "ffn_up_shexp"),
    same("mlp.shared_expert.down_proj", "ffn_down_shexp"),
    same("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
];

const FIVE: &[Place] = &[
    same("post_attention_layernorm", "post_attention_norm"),
    tiled("linear_attn.in_proj_qkv", "attn_qkv", Tail),
    tiled("linear_attn.in_proj_z", "attn_gate", Rows),
    tiled("linear_attn.in_proj_b", "ssm_beta", Each),
    tiled("linear_attn.in_proj_a", "ssm_alpha", Each),
    tiled("linear_attn.conv1d", "ssm_conv1d", Tail),
    tiled("linear_attn.A_log", "ssm_a", Each),
    tiled("linear_attn.dt_bias", "ssm_dt.bias", Each),
    same("linear_attn.norm", "ssm_norm"),
    tiled("linear_attn.out_proj", "ssm_out", Columns),
];

fn qwen2(d: &mut Draft<'_>) -> Result<()> {
    d.no_window()?;
    let head_dim = d.decoder()?;
    d.set("use_sliding_window", false);
    d.rope(head_dim)
}

fn qwen3(d: &mut Draft<'_>) -> Result<()> {
    d.set("attention_bias", d.keys.biased_queries());
    qwen2(d)
}

fn qwen3_moe(d: &mut Draft<'_>) -> Result<()> {
    d.no_window()?;
    let heads = d.heads()?;
    d.kv_heads(heads)?;
    let head_dim = d.head_dim(heads)?;
    d.keys.same("attention.value_length", head_dim)?;
    d.rms_norm("rms_norm_eps")?;
    d.set("hidden_act", "silu");
    d.set("attention_bias", d.keys.biased_queries());
    d.set("use_sliding_window", false);
    all_sparse(d)?;
    d.rope(head_dim)
}

/// All layers have experts in llama.cpp's models, and their weights are divided by their sum.
fn all_sparse(d: &mut Draft<'_>) -> Result<()> {
    // Of dense layers, of which there are none.
    d.set("intermediate_size", d.keys.optional_size("feed_forward_length")?.unwrap_or(d.hidden));
    d.experts(["num_experts", "num_experts_per_tok", "moe_intermediate_size"])?;
    d.set("norm_topk_prob", true);
    d.set("decoder_sparse_step", 1);
    d.set("mlp_only_layers", json!([]));
    Ok(())
}

fn qwen3_next(d: &mut Draft<'_>) -> Result<()> {
    all_sparse(d)?;
    let shared = d.keys.size("expert_shared_feed_forward_length")?;
    d.set("shared_expert_intermediate_size", shared);
    hybrid(d)
}

fn qwen3_5(d: &mut Draft<'_>) -> Result<()> {
    d.feed_forward()?;
    hybrid(d)
}

/// What the families with delta nets share.
fn hybrid(d: &mut Draft<'_>) -> Result<()> {
    d.no_window()?;
    let heads = d.heads()?;
    d.kv_heads(heads)?;
    let head_dim = d.head_dim(heads)?;
    d.rms_norm("rms_norm_eps")?;
    d.set("hidden_act", "silu");
    let every = d.keys.optional_size("full_attention_interval")?.unwrap_or(4);
    let listed = d.keys.switches("attention.recurrent_layers", d.layers)?;
    let recurrent = listed.unwrap_or_else(|| (1..=d.layers).map(|i| !i.is_multiple_of(every)).collect());
    let kind = |recurrent: &bool| if *recurrent { "linear_attention" } else { FULL };
    d.set("layer_types", recurrent.iter().map(kind).collect::<Vec<_>>());
    let values = d.keys.size("ssm.time_step_rank")?;
    let inner = d.keys.size("ssm.inner_size")?;
    if inner % values != 0 {
        return Err(d.keys.fail("ssm.inner_size", format_args!("a multiple of {values} heads"), inner));
    }
    for (key, size) in [
        ("linear_conv_kernel_dim", d.keys.size("ssm.conv_kernel")?),
        ("linear_key_head_dim", d.keys.size("ssm.state_size")?),
        ("linear_num_key_heads", d.keys.size("ssm.group_count")?),
        ("linear_num_value_heads", values),
        ("linear_value_head_dim", inner / values),
    ] {
        d.set(key, size);
    }
    d.partial_rope(head_dim)
}
