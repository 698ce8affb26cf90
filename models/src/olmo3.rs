//! OLMo 3 (OLMo Team 2025): OLMo 2 with a window in three of four layers; the others turn by angles of their own.

use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, Variant};
use crate::keys::Keys;
use crate::olmo2;
use crate::rope::RopeKeys;
use crate::windows::{FULL, SLIDING, full_every, layer_types, windows_of};
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family { model_type: "olmo3", honoured: &["attention_bias"], scaled: None, build };

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { positions: 2048, ..Defaults::default() })?;
    let types = layer_types(keys, config.layers, &[FULL, SLIDING])?;
    let types = types.unwrap_or_else(|| full_every(4, config.layers));
    let plain = RopeKeys { theta: 5e5, ..RopeKeys::of(&config) };
    let full = RopeKeys { layers: Some(FULL), ..plain }.read(keys)?.of_both();
    let local = RopeKeys { layers: Some(SLIDING), scaled: false, ..plain }.read(keys)?.of_both();
    let ropes = types.iter().map(|kind| if *kind == FULL { full.clone() } else { local.clone() }).collect();
    let windows = windows_of(keys, &types, Some(4096))?;
    decoder::build(keys, config, &Variant { ropes: Some(ropes), ..olmo2::variant(keys, windows)? })
}
