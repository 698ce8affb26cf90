//! Arcee's AFM (Arcee AI 2025): Llama with a squared ReLU in place of the gate.

use crate::attention::AttentionSpec;
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, Variant};
use crate::feed_forward::Inner;
use crate::keys::Keys;
use crate::op::Map;
use crate::windows;
use crate::{Family, Model};

pub(crate) const FAMILY: Family =
    Family { model_type: "arcee", honoured: &["hidden_act", "attention_bias", "mlp_bias"], scaled: None, build };

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { positions: 4096, ..Defaults::default() })?;
    keys.one_of("hidden_act", &["relu2"])?;
    let windows = windows::none(keys, &config)?;
    let bias = keys.flag("attention_bias", false)?;
    let variant = Variant {
        attention: AttentionSpec { qkv_bias: bias, o_bias: bias, ..AttentionSpec::default() },
        mlp: Inner::Plain(Map::SquaredRelu, ["up_proj", "down_proj"]),
        mlp_bias: keys.flag("mlp_bias", false)?,
        ..Variant::new(keys.share("rms_norm_eps", 1e-5)?, windows)
    };
    decoder::build(keys, config, &variant)
}
