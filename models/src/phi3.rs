//! Phi-3 and Phi-4-mini (Abdin et al. 2024): q, k, v are one matrix, and so are gate and up; long texts may turn by angles
//! of their own, and only a part of each head turn.

use crate::attention::AttentionSpec;
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, Variant};
use crate::feed_forward::{FUSED, Inner};
use crate::keys::Keys;
use crate::op::Activation;
use crate::rope::RopeKeys;
use crate::windows;
use crate::{Family, Model};

pub(crate) const FAMILY: Family =
    Family { model_type: "phi3", honoured: &["partial_rotary_factor"], scaled: None, build };

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { positions: 4096, ..Defaults::default() })?;
    let rope = RopeKeys { partial: Some(1.0), ..RopeKeys::of(&config) }.read(keys)?;
    let windows = windows::one(keys, &config)?;
    let variant = Variant {
        attention: AttentionSpec { fused: true, ..AttentionSpec::default() },
        ropes: Some(rope.everywhere(&config)),
        mlp: Inner::FusedGate(Activation::Silu, FUSED),
        ..Variant::new(keys.share("rms_norm_eps", 1e-5)?, windows)
    };
    decoder::build(keys, config, &variant)
}
