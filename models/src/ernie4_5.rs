//! ERNIE 4.5 (Baidu 2025), dense: Llama whose pairs are neighbours.

use crate::attention::AttentionSpec;
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, Variant};
use crate::keys::Keys;
use crate::rope::RopeKeys;
use crate::windows;
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family { model_type: "ernie4_5", honoured: &["use_bias"], scaled: None, build };

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let defaults =
        Defaults { kv_heads: Some(2), head_dim: Some(128), positions: 131_072, tied_head: true, ..Defaults::default() };
    let config = Config::read(keys, &defaults)?;
    let windows = windows::none(keys, &config)?;
    let rope = RopeKeys { theta: 5e5, pairs: true, ..RopeKeys::of(&config) }.read(keys)?;
    let bias = keys.flag("use_bias", false)?;
    let variant = Variant {
        attention: AttentionSpec { qkv_bias: bias, o_bias: bias, ..AttentionSpec::default() },
        ropes: Some(rope.everywhere(&config)),
        mlp_bias: bias,
        ..Variant::new(keys.share("rms_norm_eps", 1e-5)?, windows)
    };
    decoder::build(keys, config, &variant)
}
