//! Granite with windows (IBM 2026): three of four layers see a window, each layer turns by a base of its own or not at all,
//! and every head has a sink.

use crate::attention::AttentionSpec;
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{Decoder, Variant};
use crate::granite::{self, Factors, Granite};
use crate::keys::Keys;
use crate::rope::{Rope, RopeKeys};
use crate::windows::{FULL, SLIDING, layer_types, windows_of};
use crate::{Family, Model};

pub(crate) const FAMILY: Family =
    Family { model_type: "granite_swa", honoured: granite::FAMILY.honoured, scaled: None, build };

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let defaults = Defaults { kv_heads: Some(4), positions: 8192, tied_head: true, ..Defaults::default() };
    let config = Config::read(keys, &defaults)?;
    let factors = Factors::read(keys)?;
    let types = layer_types(keys, config.layers, &[FULL, SLIDING])?;
    let every_fourth = |i: usize| if i.is_multiple_of(4) { FULL } else { SLIDING };
    let types = types.unwrap_or_else(|| (0..config.layers).map(every_fourth).collect());
    let windows = windows_of(keys, &types, Some(128))?;
    let bias = keys.flag("attention_bias", false)?;
    let variant = Variant {
        attention: AttentionSpec {
            scale: Some(factors.attention),
            qkv_bias: bias,
            o_bias: bias,
            sinks: true,
            ..AttentionSpec::default()
        },
        ropes: Some(ropes(keys, &config)?),
        mlp_bias: keys.flag("mlp_bias", false)?,
        ..Variant::new(keys.share("rms_norm_eps", 1e-5)?, windows)
    };
    Ok(Box::new(Granite::new(Decoder::new(keys, config, &variant, &|_, _, _| None)?, factors)))
}

/// Angles of each layer: with the base that is listed for it, none where that is 0; without a list the same in all.
fn ropes(keys: &Keys<'_>, config: &Config) -> Result<Vec<Option<[Rope; 2]>>, ConfigError> {
    const KEY: &str = "layer_rope_theta";
    let Some(value) = keys.get(KEY) else { return Ok(RopeKeys::of(config).read(keys)?.everywhere(config)) };
    let wrong = || ConfigError::new(KEY, format!("a base, or 0, for each of {} layers", config.layers), value);
    let list = value.as_array().filter(|list| list.len() == config.layers).ok_or_else(wrong)?;
    let of_layer = |theta: &serde_json::Value| match theta.as_f64() {
        Some(0.0) => Ok(None),
        Some(theta) => Ok(RopeKeys { base: Some(theta), ..RopeKeys::of(config) }.read(keys)?.of_both()),
        None => Err(wrong()),
    };
    list.iter().map(of_layer).collect()
}

#[cfg(test)]
mod tests {
    use crate::testing::{config, refused_key};
    use serde_json::json;

    #[test]
    fn layers_turn_by_the_bases_that_are_listed() {
        let with = |change: serde_json::Value| {
            let mut all = json!({"num_attention_heads": 8, "num_key_value_heads": 8});
            all.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            all
        };
        let ropes = |change| crate::build(&config("granite_swa", &with(change))).unwrap().ropes().len();
        assert_eq!(ropes(json!({})), 1);
        assert_eq!(ropes(json!({"layer_rope_theta": [0, 1e4, 1e5]})), 2);
        assert_eq!(ropes(json!({"layer_rope_theta": [0, 0, 0]})), 0);
        for (change, key) in [
            (json!({"layer_rope_theta": [1e4]}), "layer_rope_theta"),
            (json!({"layer_rope_theta": [1e4, "no", 0]}), "layer_rope_theta"),
            (json!({"layer_rope_theta": [1e4, -1, 0]}), "layer_rope_theta"),
            (json!({"sliding_window": null}), "sliding_window"),
        ] {
            assert_eq!(refused_key("granite_swa", &with(change.clone())).as_deref(), Some(key), "{change}");
        }
    }
}
