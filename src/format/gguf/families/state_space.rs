//! Mamba 2, and Falcon-H1, which has it beside attention in each layer.

use super::Family;
use crate::error::Result;
use crate::format::gguf::config::Draft;
use crate::format::gguf::places::{Place, same};

pub(super) const ALL: &[Family] = &[
    Family {
        layer: "backbone.layers.",
        places: MAMBA,
        ..Family::new("mamba2", &[("mamba2", "Mamba2ForCausalLM")], mamba2)
    },
    // The converter has its factors in the weights.
    Family {
        folded: true,
        places: FALCON,
        ..Family::new("falcon-h1", &[("falcon_h1", "FalconH1ForCausalLM")], falcon)
    },
];

const MAMBA: &[Place] = &[
    same("backbone.embeddings", "token_embd"),
    same("backbone.norm_f", "output_norm"),
    same("norm", "attn_norm"),
    same("mixer.in_proj", "ssm_in"),
    same("mixer.conv1d", "ssm_conv1d"),
    same("mixer.A_log", "ssm_a"),
    same("mixer.D", "ssm_d"),
    same("mixer.dt_bias", "ssm_dt.bias"),
    same("mixer.norm", "ssm_norm"),
    same("mixer.out_proj", "ssm_out"),
];

const FALCON: &[Place] = &[
    same("model.final_layernorm", "output_norm"),
    same("mamba.in_proj", "ssm_in"),
    same("mamba.conv1d", "ssm_conv1d"),
    same("mamba.A_log", "ssm_a"),
    same("mamba.D", "ssm_d"),
    same("mamba.dt_bias", "ssm_dt.bias"),
    same("mamba.norm", "ssm_norm"),
    same("mamba.out_proj", "ssm_out"),
    // Without an end, alone of all.
    same("pre_ff_layernorm.weight", "ffn_norm"),
    same("pre_ff_layernorm", "ffn_norm"),
    same("feed_forward.gate_proj", "ffn_gate"),
    same("feed_forward.up_proj", "ffn_up"),
    same("feed_forward.down_proj", "ffn_down"),
];

/// Sizes of state spaces.
struct Sizes {
    heads: usize,
    head_dim: usize,
    groups: usize,
    state: usize,
    taps: usize,
    inner: usize,
}

fn sizes(d: &Draft<'_>) -> Result<Sizes> {
    let (inner, heads) = (d.keys.size("ssm.inner_size")?, d.keys.size("ssm.time_step_rank")?);
    if inner % heads != 0 {
        return Err(d.keys.fail("ssm.inner_size", format_args!("a multiple of {heads} heads"), inner));
    }
    Ok(Sizes {
        heads,
        head_dim: inner / heads,
        groups: d.keys.size("ssm.group_count")?,
        state: d.keys.size("ssm.state_size")?,
        taps: d.keys.size("ssm.conv_kernel")?,
        inner,
    })
}

/// Sets the sizes as hybrid families call them; the layer `first` has a state space.
pub(super) fn mamba(d: &mut Draft<'_>, first: usize) -> Result<()> {
    let sizes = sizes(d)?;
    for (key, size) in [
        ("mamba_n_heads", sizes.heads),
        ("mamba_d_head", sizes.head_dim),
        ("mamba_n_groups", sizes.groups),
        ("mamba_d_state", sizes.state),
        ("mamba_d_conv", sizes.taps),
        ("mamba_d_ssm", sizes.inner),
        ("mamba_expand", sizes.inner.div_ceil(d.hidden)),
    ] {
        d.set(key, size);
    }
    d.set("mamba_conv_bias", d.keys.has(&format!("blk.{first}.ssm_conv1d.bias")));
    d.set("mamba_proj_bias", false);
    Ok(())
}

fn mamba2(d: &mut Draft<'_>) -> Result<()> {
    let sizes = sizes(d)?;
    if sizes.inner % d.hidden != 0 {
        return Err(d.keys.fail("ssm.inner_size", format_args!("a multiple of {}", d.hidden), sizes.inner));
    }
    for (key, size) in [
        ("num_heads", sizes.heads),
        ("head_dim", sizes.head_dim),
        ("n_groups", sizes.groups),
        ("state_size", sizes.state),
        ("conv_kernel", sizes.taps),
        ("expand", sizes.inner / d.hidden),
    ] {
        d.set(key, size);
    }
    d.rms_norm("layer_norm_epsilon")?;
    d.set("hidden_act", "silu");
    d.set("use_conv_bias", d.keys.has("blk.0.ssm_conv1d.bias"));
    d.set("use_bias", false);
    Ok(())
}

/// Every factor is 1, for the weights have them.
fn falcon(d: &mut Draft<'_>) -> Result<()> {
    d.no_window()?;
    let head_dim = d.decoder()?;
    mamba(d, 0)?;
    d.set("attention_bias", d.keys.biased_queries());
    d.set("mamba_rms_norm", d.keys.has("blk.0.ssm_norm.weight"));
    d.set("mamba_norm_before_gate", false);
    d.rope(head_dim)
}
