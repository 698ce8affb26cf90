//! Helium (Kyutai 2025): Llama whose pairs are neighbours.

use crate::attention::AttentionSpec;
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, Variant};
use crate::keys::Keys;
use crate::rope::RopeKeys;
use crate::windows;
use crate::{Family, Model};

pub(crate) const FAMILY: Family =
    Family { model_type: "helium", honoured: &["attention_bias", "mlp_bias"], scaled: None, build };

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let defaults = Defaults { kv_heads: Some(20), head_dim: Some(128), positions: 4096, ..Defaults::default() };
    let config = Config::read(keys, &defaults)?;
    let windows = windows::none(keys, &config)?;
    let rope = RopeKeys { theta: 1e5, pairs: true, ..RopeKeys::of(&config) }.read(keys)?;
    let variant = Variant {
        attention: AttentionSpec { qkv_bias: keys.flag("attention_bias", false)?, ..AttentionSpec::default() },
        ropes: Some(rope.everywhere(&config)),
        mlp_bias: keys.flag("mlp_bias", false)?,
        ..Variant::new(keys.share("rms_norm_eps", 1e-8)?, windows)
    };
    decoder::build(keys, config, &variant)
}
