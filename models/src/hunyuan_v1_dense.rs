//! HunYuan (Tencent 2025), dense: norms of each head of q and k after they are turned, by angles whose base may be raised.

use crate::attention::{AttentionSpec, QkNorms};
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, Variant};
use crate::keys::Keys;
use crate::rope::RopeKeys;
use crate::windows;
use crate::{Family, Model};

/// The norms are the family's own, whatever two of these keys say, and experts are another family's.
pub(crate) const FAMILY: Family = Family {
    model_type: "hunyuan_v1_dense",
    honoured: &["attention_bias", "use_qk_norm", "qk_norm", "num_experts"],
    scaled: None,
    build,
};

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { positions: 2048, ..Defaults::default() })?;
    let windows = windows::none(keys, &config)?;
    // All but the first have no effect.
    let more = &["alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"];
    let rope = RopeKeys { more, ..RopeKeys::of(&config) }.read(keys)?;
    let (eps, bias) = (keys.share("rms_norm_eps", 1e-5)?, keys.flag("attention_bias", false)?);
    let names = ["query_layernorm", "key_layernorm"];
    let norms = Some(QkNorms { names, after_rope: true, ..QkNorms::of_heads(eps) });
    let variant = Variant {
        attention: AttentionSpec { qkv_bias: bias, o_bias: bias, norms, ..AttentionSpec::default() },
        ropes: Some(rope.everywhere(&config)),
        ..Variant::new(eps, windows)
    };
    decoder::build(keys, config, &variant)
}
