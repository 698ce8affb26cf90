//! The Granite families: factors on embeddings, scores, what each part adds, and logits.

use super::Family;
use super::state_space::mamba;
use crate::error::Result;
use crate::format::gguf::config::Draft;
use crate::format::gguf::places::{Place, halves, same};

const FACTORS: &[&str] = &["embedding_scale", "residual_scale", "attention.scale", "logit_scale"];

pub(super) const ALL: &[Family] = &[
    Family { keys: FACTORS, ..Family::interleaved("granite", &[("granite", "GraniteForCausalLM")], granite) },
    Family {
        experts: true,
        varied: true,
        places: HYBRID,
        keys: FACTORS,
        ..Family::interleaved("granitehybrid", &[("granitemoehybrid", "GraniteMoeHybridForCausalLM")], hybrid)
    },
    Family {
        keys: &[
            "embedding_scale",
            "residual_scale",
            "attention.scale",
            "logit_scale",
            "attention.sliding_window_pattern",
            "attention.rope_pattern",
        ],
        ..Family::interleaved("granite_swa", &[("granite_swa", "GraniteSWAForCausalLM")], windows)
    },
];

const HYBRID: &[Place] = &[
    same("mamba.in_proj", "ssm_in"),
    same("mamba.conv1d", "ssm_conv1d"),
    same("mamba.A_log", "ssm_a"),
    same("mamba.D", "ssm_d"),
    same("mamba.dt_bias", "ssm_dt.bias"),
    same("mamba.norm", "ssm_norm"),
    same("mamba.out_proj", "ssm_out"),
    // Beside experts it is the one that all tokens go through.
    halves("shared_mlp.input_linear", ["ffn_gate_shexp", "ffn_up_shexp"]),
    halves("shared_mlp.input_linear", ["ffn_gate", "ffn_up"]),
    same("shared_mlp.output_linear", "ffn_down_shexp"),
    same("shared_mlp.output_linear", "ffn_down"),
    halves("block_sparse_moe.input_linear", ["ffn_gate_exps", "ffn_up_exps"]),
    same("block_sparse_moe.output_linear", "ffn_down_exps"),
    same("block_sparse_moe.router.layer", "ffn_gate_inp"),
];

/// Whether layers have positions at all: by this key, the hybrids say that they have none.
fn turns(d: &Draft<'_>) -> Result<bool> {
    Ok(d.keys.meta().bool(&d.keys.name("rope.scaling.finetuned"))? != Some(false))
}

fn granite(d: &mut Draft<'_>) -> Result<()> {
    d.no_window()?;
    if !turns(d)? {
        return Err(d.keys.refuse("a Granite model without positions"));
    }
    let head_dim = d.decoder()?;
    d.biases();
    d.factors(head_dim)?;
    d.rope(head_dim)
}

fn hybrid(d: &mut Draft<'_>) -> Result<()> {
    d.no_window()?;
    let head_dim = d.decoder()?;
    d.factors(head_dim)?;
    let kv_heads = d.kv_heads_of_layers()?;
    let kinds: Vec<&str> = kv_heads.iter().map(|heads| if *heads == 0 { "mamba" } else { "attention" }).collect();
    if let Some(first) = kv_heads.iter().position(|heads| *heads == 0) {
        mamba(d, first)?;
    }
    d.set("layer_types", kinds);
    d.set("position_embedding_type", if turns(d)? { "rope" } else { "nope" });
    let shared = d.keys.optional_size("expert_shared_feed_forward_length")?;
    d.set("shared_intermediate_size", shared.map_or_else(|| d.keys.size("feed_forward_length"), Ok)?);
    for (name, key) in [("num_local_experts", "expert_count"), ("num_experts_per_tok", "expert_used_count")] {
        let size = d.keys.optional_size(key)?.unwrap_or(0);
        d.set(name, size);
    }
    d.rope(head_dim)
}

/// Granite with windows: layers may have no positions, each by itself.
fn windows(d: &mut Draft<'_>) -> Result<()> {
    let head_dim = d.decoder()?;
    d.biases();
    d.factors(head_dim)?;
    d.set("sliding_window", d.keys.size("attention.sliding_window")?);
    d.layer_types(4, true)?;
    let theta = d.theta()?;
    if let Some(turned) = d.keys.switches("attention.rope_pattern", d.layers)? {
        let bases: Vec<f64> = turned.iter().map(|turned| if *turned { theta } else { 0.0 }).collect();
        d.set("layer_rope_theta", bases);
    }
    d.rope(head_dim)
}
