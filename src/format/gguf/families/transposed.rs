//! Families whose checkpoints have matrices as `[in, out]`, or layer norms: OpenAI's, and StarCoder2.

use super::Family;
use crate::error::Result;
use crate::format::gguf::config::Draft;
use crate::format::gguf::places::{Place, expert, same, turns};
use serde_json::json;

const EPSILON: &str = "attention.layer_norm_epsilon";

pub(super) const ALL: &[Family] = &[
    Family {
        layer: "transformer.h.",
        places: GPT2,
        keys: &[EPSILON],
        ..Family::new("gpt2", &[("gpt2", "GPT2LMHeadModel")], gpt2)
    },
    Family {
        places: &[same("mlp.c_fc", "ffn_up"), same("mlp.c_proj", "ffn_down")],
        keys: &[EPSILON],
        ..Family::new("starcoder2", &[("starcoder2", "Starcoder2ForCausalLM")], starcoder)
    },
    Family {
        experts: true,
        places: GPT_OSS,
        keys: &["attention.sliding_window_pattern", "rope.freq_base_swa"],
        ..Family::new("gpt-oss", &[("gpt_oss", "GptOssForCausalLM")], gpt_oss)
    },
];

const GPT2: &[Place] = &[
    same("transformer.wte", "token_embd"),
    same("transformer.wpe", "position_embd"),
    same("transformer.ln_f", "output_norm"),
    same("ln_1", "attn_norm"),
    same("ln_2", "ffn_norm"),
    same("attn.c_attn", "attn_qkv"),
    same("attn.c_proj", "attn_output"),
    same("mlp.c_fc", "ffn_up"),
    same("mlp.c_proj", "ffn_down"),
];

const GPT_OSS: &[Place] = &[
    same("post_attention_layernorm", "post_attention_norm"),
    same("mlp.router", "ffn_gate_inp"),
    turns("mlp.experts.gate_up_projs.{}", ["ffn_gate_exps", "ffn_up_exps"]),
    expert("mlp.experts.down_projs.{}", "ffn_down_exps"),
];

/// The config's names are GPT-2's own.
fn gpt2(d: &mut Draft<'_>) -> Result<()> {
    for key in ["hidden_size", "num_hidden_layers", "max_position_embeddings"] {
        d.json.remove(key);
    }
    let heads = d.keys.size("attention.head_count")?;
    for (key, size) in [
        ("n_embd", d.hidden),
        ("n_layer", d.layers),
        ("n_head", heads),
        ("n_positions", d.context),
        ("n_inner", ffn(d)?),
    ] {
        d.set(key, size);
    }
    d.set("activation_function", "gelu_new");
    d.epsilon("layer_norm_epsilon", EPSILON)
}

/// What is inside the feed-forward part: the converter writes four times the width, whatever it is.
fn ffn(d: &Draft<'_>) -> Result<usize> {
    let rows = d.keys.shape("blk.0.ffn_up.weight").map(|shape| shape[0]);
    rows.map_or_else(|| d.keys.size("feed_forward_length"), Ok)
}

/// The converter leaves the window out.
fn starcoder(d: &mut Draft<'_>) -> Result<()> {
    let heads = d.heads()?;
    d.kv_heads(heads)?;
    let head_dim = d.head_dim(heads)?;
    d.keys.same("attention.value_length", head_dim)?;
    d.feed_forward()?;
    d.epsilon("norm_epsilon", EPSILON)?;
    d.set("hidden_act", "gelu_pytorch_tanh");
    d.set("use_bias", d.keys.biased_queries());
    d.set("sliding_window", d.window()?);
    d.rope(head_dim)
}

fn gpt_oss(d: &mut Draft<'_>) -> Result<()> {
    let heads = d.heads()?;
    d.kv_heads(heads)?;
    let head_dim = d.head_dim(heads)?;
    d.keys.same("attention.value_length", head_dim)?;
    d.rms_norm("rms_norm_eps")?;
    d.set("hidden_act", "silu");
    d.experts(["num_local_experts", "num_experts_per_tok", "intermediate_size"])?;
    d.set("attention_bias", d.keys.biased_queries());
    d.set("sliding_window", d.keys.size("attention.sliding_window")?);
    d.layer_types(2, false)?;
    d.keys.same("rope.dimension_count", head_dim)?;
    let mut rope = d.angles(head_dim)?;
    if rope["rope_type"] == "yarn" {
        // Published models do not round where the ramp begins and ends.
        rope.insert("truncate".to_owned(), json!(false));
    }
    d.everywhere(rope)
}
