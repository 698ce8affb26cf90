//! OLMo 2 (OLMo Team 2024): norms after both parts of a layer, and of all heads of q and of k together.

use crate::attention::{AttentionSpec, QkNorms};
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, POST_NORM, Variant};
use crate::keys::Keys;
use crate::windows;
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family { model_type: "olmo2", honoured: &["attention_bias"], scaled: None, build };

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { positions: 2048, ..Defaults::default() })?;
    let windows = windows::none(keys, &config)?;
    decoder::build(keys, config, &variant(keys, windows)?)
}

/// What OLMo 3 has as well.
pub(crate) fn variant(keys: &Keys<'_>, windows: Vec<Option<usize>>) -> Result<Variant, ConfigError> {
    let (eps, bias) = (keys.share("rms_norm_eps", 1e-5)?, keys.flag("attention_bias", false)?);
    let norms = Some(QkNorms { whole: true, ..QkNorms::of_heads(eps) });
    let attention = AttentionSpec { qkv_bias: bias, o_bias: bias, norms, ..AttentionSpec::default() };
    Ok(Variant { attention, norms: POST_NORM, ..Variant::new(eps, windows) })
}
