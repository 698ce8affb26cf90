//! Decoders that differ from Llama in a detail each.

use super::Family;
use crate::error::{Error, Result};
use crate::format::gguf::config::Draft;
use crate::format::gguf::places::{Place, listed, same};

pub(super) const ALL: &[Family] = &[
    Family::new("ernie4_5", &[("ernie4_5", "Ernie4_5ForCausalLM")], ernie),
    Family {
        places: &[same("post_attention_layernorm", "post_attention_norm")],
        ..Family::new("seed_oss", &[("seed_oss", "SeedOssForCausalLM")], seed)
    },
    Family {
        places: &[same("self_attn.query_layernorm", "attn_q_norm"), same("self_attn.key_layernorm", "attn_k_norm")],
        ..Family::new("hunyuan-dense", &[("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM")], hunyuan)
    },
    Family {
        keys: &["logit_scale", "attention.sliding_window_pattern", "attention.layer_norm_epsilon"],
        ..Family::new("cohere2", &[("cohere2", "Cohere2ForCausalLM")], cohere)
    },
    Family { places: APERTUS, ..Family::new("apertus", &[("apertus", "ApertusForCausalLM")], apertus) },
];

/// Four numbers of each layer are in the metadata.
const APERTUS: &[Place] = &[
    same("attention_layernorm", "attn_norm"),
    same("feedforward_layernorm", "ffn_norm"),
    listed("mlp.act_fn.alpha_p", "xielu.alpha_p"),
    listed("mlp.act_fn.alpha_n", "xielu.alpha_n"),
    listed("mlp.act_fn.beta", "xielu.beta"),
    listed("mlp.act_fn.eps", "xielu.eps"),
];

fn ernie(d: &mut Draft<'_>) -> Result<()> {
    d.no_window()?;
    let head_dim = d.decoder()?;
    d.set("use_bias", d.keys.biased_queries());
    d.rope(head_dim)
}

fn seed(d: &mut Draft<'_>) -> Result<()> {
    d.no_window()?;
    let head_dim = d.decoder()?;
    d.biases();
    d.set("attention_out_bias", d.keys.has("blk.0.attn_output.bias"));
    d.rope(head_dim)
}

/// The base is as the converter raised it.
fn hunyuan(d: &mut Draft<'_>) -> Result<()> {
    d.no_window()?;
    let head_dim = d.decoder()?;
    d.set("attention_bias", d.keys.biased_queries());
    d.rope(head_dim)
}

/// Layer norms, windows in three of four layers, and no gate between attention and the feed-forward part.
fn cohere(d: &mut Draft<'_>) -> Result<()> {
    let heads = d.heads()?;
    d.kv_heads(heads)?;
    let head_dim = d.head_dim(heads)?;
    d.keys.same("attention.value_length", head_dim)?;
    d.feed_forward()?;
    d.epsilon("layer_norm_eps", "attention.layer_norm_epsilon")?;
    d.set("hidden_act", "silu");
    let scale = d.keys.factor("logit_scale", 1.0)?;
    d.set("logit_scale", scale);
    d.set("sliding_window", d.keys.size("attention.sliding_window")?);
    d.layer_types(4, false)?;
    d.rope(head_dim)
}

fn apertus(d: &mut Draft<'_>) -> Result<()> {
    d.no_window()?;
    let head_dim = d.decoder()?;
    d.biases();
    d.set("hidden_act", "xielu");
    d.set("qk_norm", true);
    for name in APERTUS.iter().filter_map(Place::key) {
        let meta = d.keys.meta();
        let found = match meta.floats(name) {
            // One number stands for all layers.
            Err(_) => meta.float(name)?.map(|_| d.layers),
            list => list?.map(|list| list.len()),
        };
        if found != Some(d.layers) {
            let expected = format!("a number for each of {} layers", d.layers);
            let got = found.map_or_else(|| "none".to_owned(), |n| n.to_string());
            return Err(Error::format(meta.path(), format_args!("metadata `{name}`"), expected, got));
        }
    }
    d.rope(head_dim)
}
