//! Seed-OSS (ByteDance 2025): Llama with biases on q, k and v.

use crate::attention::AttentionSpec;
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, Variant};
use crate::keys::Keys;
use crate::windows;
use crate::{Family, Model};

pub(crate) const FAMILY: Family =
    Family { model_type: "seed_oss", honoured: &["attention_bias", "mlp_bias"], scaled: None, build };

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let defaults = Defaults { kv_heads: Some(8), head_dim: Some(128), positions: 524_288, ..Defaults::default() };
    let config = Config::read(keys, &defaults)?;
    let variant = Variant {
        attention: AttentionSpec {
            qkv_bias: keys.flag("attention_bias", true)?,
            o_bias: keys.flag("attention_out_bias", false)?,
            ..AttentionSpec::default()
        },
        mlp_bias: keys.flag("mlp_bias", false)?,
        ..Variant::new(keys.share("rms_norm_eps", 1e-6)?, windows::none(keys, &config)?)
    };
    decoder::build(keys, config, &variant)
}
