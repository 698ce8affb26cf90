//! Qwen3 (Yang et al. 2025): a norm of each head of q and k before they are turned; upper layers may slide a window.

use crate::attention::{AttentionSpec, QkNorms};
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, Variant};
use crate::keys::Keys;
use crate::outline::Scaled;
use crate::windows::WindowKeys;
use crate::{Family, Model};

pub(crate) const FAMILY: Family =
    Family { model_type: "qwen3", honoured: &["attention_bias"], scaled: Scaled::QUERIES, build };

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let defaults = Defaults { kv_heads: Some(32), head_dim: Some(128), positions: 32768, ..Defaults::default() };
    let config = Config::read(keys, &defaults)?;
    let bias = keys.flag("attention_bias", false)?;
    let windows = WindowKeys::read(keys, Some(4096), false)?.upper(keys, config.layers)?;
    let eps = keys.share("rms_norm_eps", 1e-6)?;
    let norms = Some(QkNorms::of_heads(eps));
    let attention = AttentionSpec { qkv_bias: bias, o_bias: bias, norms, ..AttentionSpec::default() };
    let variant = Variant { attention, ..Variant::new(eps, windows) };
    decoder::build(keys, config, &variant)
}
