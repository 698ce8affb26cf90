//! Ministral (Mistral AI 2024): Mistral whose layers may be full between the sliding ones.

use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, Variant};
use crate::keys::Keys;
use crate::windows::WindowKeys;
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family { model_type: "ministral", honoured: &[], scaled: None, build };

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { kv_heads: Some(8), positions: 4096 * 32, ..Defaults::default() })?;
    let window = WindowKeys::read(keys, Some(4096), true)?;
    let named = window.named(keys, config.layers)?;
    let windows = named.unwrap_or_else(|| vec![window.window; config.layers]);
    decoder::build(keys, config, &Variant::new(keys.share("rms_norm_eps", 1e-6)?, windows))
}
