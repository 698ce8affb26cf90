//! gpt-oss (OpenAI 2025): every other layer sees a window, every head has a sink, and a token goes through a few experts
//! with a clamped gate. Published files have the experts of a layer in one tensor, in MXFP4 or as columns; here each is a
//! pair of linear layers of its own, by the names under which bitsandbytes' 4 bits of it are in use (Unsloth).

use crate::attention::AttentionSpec;
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{Decoder, Variant};
use crate::feed_forward::{Mixture, check_experts};
use crate::keys::Keys;
use crate::op::{Expert, GateUp, Linear, Param, Routing, Scores};
use crate::outline::Builder;
use crate::rope::RopeKeys;
use crate::windows::{FULL, SLIDING, layer_types, windows_of};
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family {
    model_type: "gpt_oss",
    honoured: &["attention_bias", "num_local_experts", "num_experts"],
    scaled: None,
    build,
};

/// What the first config has for the scaling of positions where a file has no word of it.
const THETA: f64 = 150_000.0;

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let defaults = Defaults { kv_heads: Some(8), head_dim: Some(64), positions: 131_072, ..Defaults::default() };
    let config = Config::read(keys, &defaults)?;
    let types = layer_types(keys, config.layers, &[FULL, SLIDING])?;
    let by_turns = |i: usize| if i.is_multiple_of(2) { SLIDING } else { FULL };
    let types = types.unwrap_or_else(|| (0..config.layers).map(by_turns).collect());
    let windows = windows_of(keys, &types, Some(128))?;
    let (experts, top) = (keys.count_or("num_local_experts", 128)?, keys.count_or("num_experts_per_tok", 4)?);
    check_experts(experts, top, config.layers)?;
    let width = keys.size("intermediate_size")?;
    let (alpha, limit) = (keys.positive("swiglu_alpha", 1.702)? as f32, keys.positive("swiglu_limit", 7.0)? as f32);
    let bias = keys.flag("attention_bias", true)?;
    let rope = RopeKeys { theta: THETA, ..RopeKeys::of(&config) }.read(keys)?;
    let variant = Variant {
        attention: AttentionSpec { qkv_bias: bias, o_bias: bias, sinks: true, ..AttentionSpec::default() },
        ropes: Some(rope.everywhere(&config)),
        ..Variant::new(keys.share("rms_norm_eps", 1e-5)?, windows)
    };
    let mixture = |b: &mut Builder, at: &str, _| {
        let hidden = b.config.hidden_size;
        let router = b.router(&format!("{at}.router"), experts, hidden);
        let bias = b.vector(format!("{at}.router.bias"), experts);
        let expert = |e| Expert {
            inner: GateUp::ByTurns {
                layer: b.expert(&format!("{at}.experts.{GATE_UP}.{e}"), 2 * width, hidden),
                width,
                alpha,
                limit,
            },
            down: b.expert(&format!("{at}.experts.{DOWN}.{e}"), hidden, width),
        };
        Some(Mixture {
            router: Linear { bias: Some(bias), ..router },
            experts: (0..experts).map(expert).collect(),
            // The softmax of the chosen logits alone is that of all, divided by its sum.
            routing: Routing { top, scores: Scores::Softmax, normalize: true, factors: None::<Param> },
            scale: 1.0,
        })
    };
    Ok(Box::new(Decoder::new(keys, config, &variant, &mixture)?))
}

/// Modules of the experts.
const GATE_UP: &str = "gate_up_projs";
const DOWN: &str = "down_projs";

/// What the tensors of all experts are called, and what that of each is.
const STACKS: [(&str, &str, &str); 8] = [
    ("gate_up_proj", GATE_UP, "weight"),
    ("gate_up_proj_bias", GATE_UP, "bias"),
    ("gate_up_proj_blocks", GATE_UP, "mxfp4_blocks"),
    ("gate_up_proj_scales", GATE_UP, "mxfp4_scales"),
    ("down_proj", DOWN, "weight"),
    ("down_proj_bias", DOWN, "bias"),
    ("down_proj_blocks", DOWN, "mxfp4_blocks"),
    ("down_proj_scales", DOWN, "mxfp4_scales"),
];

/// What comes before and after an expert's number in the name of its part of the tensor `name`, if that holds such parts.
pub(crate) fn expert_names(name: &str) -> Option<(String, &'static str)> {
    let (at, stack) = name.rsplit_once(".experts.")?;
    let (_, module, part) = STACKS.iter().find(|(known, ..)| *known == stack)?;
    Some((format!("{at}.experts.{module}."), part))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::refused_key;
    use serde_json::json;

    #[test]
    fn experts_have_names_of_their_own() {
        let bias = Some(("model.layers.3.mlp.experts.down_projs.".to_owned(), "bias"));
        assert_eq!(expert_names("model.layers.3.mlp.experts.down_proj_bias"), bias);
        assert_eq!(expert_names("model.layers.3.mlp.experts.0.down_proj"), None);
        assert_eq!(expert_names("model.layers.3.mlp.down_proj"), None);
        for (change, key) in [
            (json!({"num_local_experts": 2}), "num_experts_per_tok"),
            (json!({"swiglu_limit": 0}), "swiglu_limit"),
            (json!({"layer_types": ["full_attention"]}), "layer_types"),
        ] {
            assert_eq!(refused_key("gpt_oss", &change).as_deref(), Some(key), "{change}");
        }
    }
}
