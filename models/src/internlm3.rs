//! InternLM3 (Shanghai AI Laboratory 2025): Llama under another name.

use crate::attention::AttentionSpec;
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, Variant};
use crate::keys::Keys;
use crate::windows;
use crate::{Family, Model};

/// transformers' Llama knows `attention_bias`; the authors' own class has two keys in its place.
pub(crate) const FAMILY: Family =
    Family { model_type: "internlm3", honoured: &["attention_bias", "qkv_bias", "mlp_bias"], scaled: None, build };

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { positions: 32768, ..Defaults::default() })?;
    let bias = keys.flag("attention_bias", false)?;
    let both = keys.flag("bias", false)?;
    let variant = Variant {
        attention: AttentionSpec {
            qkv_bias: keys.flag("qkv_bias", bias)?,
            o_bias: both || bias,
            ..AttentionSpec::default()
        },
        mlp_bias: keys.flag("mlp_bias", both)?,
        ..Variant::new(keys.share("rms_norm_eps", 1e-6)?, windows::none(keys, &config)?)
    };
    decoder::build(keys, config, &variant)
}
