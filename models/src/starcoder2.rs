//! StarCoder2 (Lozhkov et al. 2024): layer norms, biases everywhere, GELU without a gate, a sliding window in every layer.

use crate::attention::AttentionSpec;
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, NormKind, Variant};
use crate::feed_forward::Inner;
use crate::keys::Keys;
use crate::op::Map;
use crate::windows;
use crate::{Family, Model};

pub(crate) const FAMILY: Family =
    Family { model_type: "starcoder2", honoured: &["hidden_act", "use_bias", "norm_type"], scaled: None, build };

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let defaults = Defaults { kv_heads: Some(2), positions: 4096, tied_head: true, ..Defaults::default() };
    let config = Config::read(keys, &defaults)?;
    keys.one_of("hidden_act", &["gelu_pytorch_tanh"])?;
    keys.one_of("norm_type", &["layer_norm"])?;
    let bias = keys.flag("use_bias", true)?;
    let windows = windows::one(keys, &config)?;
    let variant = Variant {
        attention: AttentionSpec { qkv_bias: bias, o_bias: bias, ..AttentionSpec::default() },
        mlp: Inner::Plain(Map::GeluTanh, ["c_fc", "c_proj"]),
        mlp_bias: bias,
        norm: NormKind::Layer,
        ..Variant::new(keys.share("norm_epsilon", 1e-5)?, windows)
    };
    decoder::build(keys, config, &variant)
}
