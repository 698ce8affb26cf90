//! GLM-4 (Zhipu AI 2025): norms before and after both parts of a layer; half of each head turns, in pairs of neighbours;
//! gate and up are one matrix.

use crate::attention::AttentionSpec;
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, NormNames, Variant};
use crate::feed_forward::{FUSED, Inner};
use crate::keys::Keys;
use crate::op::Activation;
use crate::rope::RopeKeys;
use crate::windows;
use crate::{Family, Model};

pub(crate) const FAMILY: Family =
    Family { model_type: "glm4", honoured: &["attention_bias", "partial_rotary_factor"], scaled: None, build };

const NORMS: NormNames = [
    [Some("input_layernorm"), Some("post_self_attn_layernorm")],
    [Some("post_attention_layernorm"), Some("post_mlp_layernorm")],
];

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let defaults = Defaults { kv_heads: Some(2), head_dim: Some(128), positions: 131_072, ..Defaults::default() };
    let config = Config::read(keys, &defaults)?;
    let windows = windows::none(keys, &config)?;
    let rope = RopeKeys { partial: Some(0.5), pairs: true, ..RopeKeys::of(&config) }.read(keys)?;
    let variant = Variant {
        attention: AttentionSpec { qkv_bias: keys.flag("attention_bias", true)?, ..AttentionSpec::default() },
        ropes: Some(rope.everywhere(&config)),
        mlp: Inner::FusedGate(Activation::Silu, FUSED),
        norms: NORMS,
        ..Variant::new(keys.share("rms_norm_eps", 1.5625e-7)?, windows)
    };
    decoder::build(keys, config, &variant)
}
