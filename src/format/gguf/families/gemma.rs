//! The Gemma families: norms with 1 added (until the fourth), and layers of two kinds.

use super::Family;
use crate::error::{Error, Result};
use crate::format::gguf::config::{Draft, FULL, share};
use crate::format::gguf::places::{Place, halves, same};
use crate::format::gguf::rope::FREQS;
use serde_json::{Map, Value, json};

pub(super) const ALL: &[Family] = &[
    Family {
        plus_one: true,
        places: AROUND,
        keys: &["attention.sliding_window_pattern", "attn_logit_softcapping", "final_logit_softcapping"],
        ..Family::new("gemma2", &[("gemma2", "Gemma2ForCausalLM")], gemma2)
    },
    Family {
        plus_one: true,
        places: AROUND,
        keys: &["attention.sliding_window_pattern", "rope.freq_base_swa"],
        ..Family::new("gemma3", &[("gemma3_text", "Gemma3ForCausalLM")], gemma3)
    },
    Family {
        experts: true,
        varied: true,
        places: FOUR,
        keys: &[
            "attention.sliding_window_pattern",
            "attention.shared_kv_layers",
            "attention.key_length_swa",
            "attention.value_length_swa",
            "rope.freq_base_swa",
            "rope.dimension_count_swa",
            "final_logit_softcapping",
        ],
        ..Family::new("gemma4", &[("gemma4_text", "Gemma4ForCausalLM")], gemma4)
    },
];

const AROUND: &[Place] = &[
    same("post_attention_layernorm", "post_attention_norm"),
    same("pre_feedforward_layernorm", "ffn_norm"),
    same("post_feedforward_layernorm", "post_ffw_norm"),
];

const FOUR: &[Place] = &[
    same("model.embed_tokens_per_layer", "per_layer_token_embd"),
    same("model.per_layer_model_projection", "per_layer_model_proj"),
    same("model.per_layer_projection_norm", "per_layer_proj_norm"),
    same("post_attention_layernorm", "post_attention_norm"),
    same("pre_feedforward_layernorm", "ffn_norm"),
    same("post_feedforward_layernorm", "post_ffw_norm"),
    same("pre_feedforward_layernorm_2", "pre_ffw_norm_2"),
    same("post_feedforward_layernorm_1", "post_ffw_norm_1"),
    same("post_feedforward_layernorm_2", "post_ffw_norm_2"),
    same("per_layer_input_gate", "inp_gate"),
    same("per_layer_projection", "proj"),
    same("post_per_layer_input_norm", "post_norm"),
    same("layer_scalar", "layer_output_scale.weight"),
    same("router.proj", "ffn_gate_inp"),
    same("router.scale", "ffn_gate_inp.scale"),
    same("router.per_expert_scale", "ffn_down_exps.scale"),
    same("experts.gate_up_proj", "ffn_gate_up_exps.weight"),
    halves("experts.gate_up_proj", ["ffn_gate_exps.weight", "ffn_up_exps.weight"]),
    same("experts.down_proj", "ffn_down_exps.weight"),
];

/// What a score is divided by the root of: llama.cpp knows the models that do otherwise by their layers.
fn scalar(d: &mut Draft<'_>, head_dim: usize, other: usize) -> Result<()> {
    let heads = d.keys.size("attention.head_count")?;
    d.set("query_pre_attn_scalar", if d.layers == other { d.hidden / heads } else { head_dim });
    Ok(())
}

/// The type that they are published in, which no GGUF file names: their embedding's factor is rounded to it, and what lies
/// between their layers may be too large for f16.
fn published(d: &mut Draft<'_>) {
    d.set("torch_dtype", "bfloat16");
}

fn gemma2(d: &mut Draft<'_>) -> Result<()> {
    published(d);
    let head_dim = d.decoder()?;
    d.json.remove("hidden_act");
    d.set("hidden_activation", "gelu_pytorch_tanh");
    d.set("sliding_window", d.window()?.unwrap_or(4096));
    d.layer_types(2, false)?;
    scalar(d, head_dim, 46)?;
    for (key, default) in [("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)] {
        let cap = d.keys.factor(key, default)?;
        d.set(key, cap);
    }
    d.rope(head_dim)
}

fn gemma3(d: &mut Draft<'_>) -> Result<()> {
    published(d);
    let head_dim = d.decoder()?;
    d.json.remove("hidden_act");
    d.set("hidden_activation", "gelu_pytorch_tanh");
    match d.window()? {
        Some(_) => d.layer_types(6, false)?,
        None => d.set("layer_types", vec![FULL; d.layers]),
    }
    d.set("sliding_window", d.window()?);
    scalar(d, head_dim, 62)?;
    d.set("attention_bias", d.keys.biased_queries());
    d.keys.same("rope.dimension_count", head_dim)?;
    let local = local_theta(d)?;
    d.set("rope_local_base_freq", local);
    let full = d.angles(head_dim)?;
    d.everywhere(full.clone())?;
    d.by_kind(full, plain(local));
    Ok(())
}

/// The base of layers with a window, which the converter of the third does not write.
fn local_theta(d: &Draft<'_>) -> Result<f64> {
    Ok(d.keys.positive("rope.freq_base_swa")?.unwrap_or(10_000.0))
}

/// Angles of this base, not stretched.
fn plain(theta: f64) -> Map<String, Value> {
    Map::from_iter([("rope_type".to_owned(), json!("default")), ("rope_theta".to_owned(), json!(theta))])
}

fn gemma4(d: &mut Draft<'_>) -> Result<()> {
    published(d);
    d.heads()?;
    d.rms_norm("rms_norm_eps")?;
    d.set("hidden_activation", "gelu_pytorch_tanh");
    let (wide, head_dim) = (d.keys.size("attention.key_length")?, d.keys.size("attention.key_length_swa")?);
    for (key, size) in [
        ("attention.value_length", wide),
        ("rope.dimension_count", wide),
        ("attention.value_length_swa", head_dim),
        ("rope.dimension_count_swa", head_dim),
    ] {
        d.keys.same(key, size)?;
    }
    d.set("head_dim", head_dim);
    let Some(slides) = d.keys.switches("attention.sliding_window_pattern", d.layers)? else {
        return Err(d.keys.fail("attention.sliding_window_pattern", "a list of layers", "none"));
    };
    d.layer_types(1, false)?;
    d.set("sliding_window", d.keys.size("attention.sliding_window")?);
    let kv_heads = d.kv_heads_of_layers()?;
    let narrow = slides.iter().zip(&kv_heads).find(|(slides, _)| **slides).map(|(_, heads)| *heads);
    d.set("num_key_value_heads", narrow.unwrap_or(kv_heads[0]));
    let full = |(i, (_, heads)): (usize, (&bool, &usize))| {
        (i.to_string(), json!({"head_dim": wide, "num_key_value_heads": heads}))
    };
    let full: Map<String, Value> =
        slides.iter().zip(&kv_heads).enumerate().filter(|(_, (slides, _))| !**slides).map(full).collect();
    d.set("per_layer_config", full);
    let shared = d.keys.optional_size("attention.shared_kv_layers")?.unwrap_or(0);
    d.set("num_kv_shared_layers", shared);
    // Full layers without a matrix for values have keys in their place.
    let full = slides.iter().position(|slides| !slides);
    let has = |i: usize, name: &str| d.keys.has(&format!("blk.{i}.{name}.weight"));
    let same = full.is_some_and(|i| !has(i, "attn_v") && !has(i, "attn_qkv"));
    d.set("attention_k_eq_v", same);
    feed_forward(d, shared)?;
    let inputs = d.keys.optional_size("embedding_length_per_layer_input")?.unwrap_or(0);
    d.set("hidden_size_per_layer_input", inputs);
    if let Some(shape) = d.keys.shape("per_layer_token_embd.weight") {
        d.set("vocab_size_per_layer_input", shape[0]);
    }
    let cap = d.keys.factor("final_logit_softcapping", 0.0)?;
    d.set("final_logit_softcapping", Some(cap).filter(|cap| *cap > 0.0));
    let has_experts = d.keys.optional_size("expert_count")?.is_some();
    d.set("enable_moe_block", has_experts);
    if has_experts {
        d.experts(["num_experts", "top_k_experts", "moe_intermediate_size"])?;
    }
    let local = local_theta(d)?;
    let mut angles = plain(d.theta()?);
    angles.insert("rope_type".to_owned(), json!("proportional"));
    angles.insert("partial_rotary_factor".to_owned(), json!(turned(d, wide)?));
    d.by_kind(angles, plain(local));
    Ok(())
}

/// Sets the width inside the feed-forward part, which may be twice as wide in layers that share keys and values.
fn feed_forward(d: &mut Draft<'_>, shared: usize) -> Result<()> {
    const KEY: &str = "feed_forward_length";
    let Some(widths) = d.keys.sizes(KEY, d.layers)? else { return d.feed_forward() };
    let (own, width) = (d.layers.saturating_sub(shared), widths[0]);
    let wide = widths.get(own).is_some_and(|last| *last != width);
    let expected = |i: usize| if wide && i >= own { width.saturating_mul(2) } else { width };
    if let Some(i) = (0..widths.len()).find(|i| widths[*i] != expected(*i)) {
        return Err(d.keys.fail(KEY, format_args!("{} in layer {i}", expected(i)), widths[i]));
    }
    d.set("intermediate_size", width);
    d.set("use_double_wide_mlp", wide);
    Ok(())
}

/// The share of a full layer's head that turns: the others' divisors are too large for any angle.
fn turned(d: &Draft<'_>, head_dim: usize) -> Result<f64> {
    let file = d.keys.file;
    let Some(freqs) = file.tensors.iter().find(|t| t.name == FREQS) else { return Ok(1.0) };
    let fail =
        |expected: String| Error::format(file.metadata.path(), format_args!("tensor `{FREQS}`"), expected, "others");
    if freqs.shape != [head_dim / 2] {
        return Err(fail(format!("shape [{}]", head_dim / 2)));
    }
    let mut stored = vec![0.0; head_dim / 2];
    file.read_rows(freqs, 0..1, &mut stored);
    let pairs = stored.iter().take_while(|x| **x == 1.0).count();
    if pairs == 0 || stored[pairs..].iter().any(|x| *x < 1e29) {
        return Err(fail("divisors of 1, then of 1e30".to_owned()));
    }
    Ok(share(pairs, stored.len()))
}
