//! Llama and its closest kin: the usual parts, and rows of heads in the order of interleaved RoPE.

use super::Family;
use crate::error::Result;
use crate::format::gguf::config::Draft;
use serde_json::{Value, json};

/// SmolLM3's layers without positions in llama.cpp: every so many.
pub(in crate::format::gguf) const NO_ROPE_EVERY: usize = 4;

pub(super) const ALL: &[Family] = &[
    // InternLM3 is written as Llama, and nothing tells it apart.
    Family::interleaved(
        "llama",
        &[("llama", "LlamaForCausalLM"), ("mistral", "MistralForCausalLM"), ("internlm3", "InternLM3ForCausalLM")],
        llama,
    ),
    Family::interleaved("arcee", &[("arcee", "ArceeForCausalLM")], arcee),
    Family::interleaved("smollm3", &[("smollm3", "SmolLM3ForCausalLM")], smollm3),
    Family {
        keys: &["attention.temperature_scale"],
        ..Family::interleaved(
            "mistral3",
            &[("ministral3", "Ministral3ForCausalLM"), ("mistral", "MistralForCausalLM")],
            mistral3,
        )
    },
];

/// Mistral is called `llama`, too; only the sliding window tells.
fn llama(d: &mut Draft<'_>) -> Result<()> {
    let head_dim = d.decoder()?;
    match d.window()? {
        Some(window) => {
            d.named("mistral");
            d.set("sliding_window", window);
        }
        None => d.biases(),
    }
    d.rope(head_dim)
}

/// A squared ReLU without a gate.
fn arcee(d: &mut Draft<'_>) -> Result<()> {
    d.no_window()?;
    let head_dim = d.decoder()?;
    d.biases();
    d.set("hidden_act", "relu2");
    d.rope(head_dim)
}

fn smollm3(d: &mut Draft<'_>) -> Result<()> {
    d.no_window()?;
    let head_dim = d.decoder()?;
    let turned = |i: usize| u8::from(!i.is_multiple_of(NO_ROPE_EVERY));
    d.set("no_rope_layer_interval", NO_ROPE_EVERY);
    d.set("no_rope_layers", (1..=d.layers).map(turned).collect::<Vec<_>>());
    d.set("use_sliding_window", false);
    d.rope(head_dim)
}

/// Ministral 3, whose queries grow along the text; the Mistral Small of the same architecture is a Mistral without a window.
fn mistral3(d: &mut Draft<'_>) -> Result<()> {
    d.no_window()?;
    let head_dim = d.decoder()?;
    d.set("sliding_window", Value::Null);
    let Some(beta) = d.keys.positive("attention.temperature_scale")? else {
        d.named("mistral");
        return d.rope(head_dim);
    };
    d.keys.same("rope.dimension_count", head_dim)?;
    let mut rope = d.angles(head_dim)?;
    rope.insert("llama_4_scaling_beta".to_owned(), json!(beta));
    d.everywhere(rope)
}
