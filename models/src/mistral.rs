//! Mistral (Jiang et al. 2023): a sliding window in every layer.

use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, Variant};
use crate::keys::Keys;
use crate::outline::Scaled;
use crate::windows::WindowKeys;
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family { model_type: "mistral", honoured: &[], scaled: Scaled::KEYS, build };

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { kv_heads: Some(8), positions: 4096 * 32, ..Defaults::default() })?;
    let variant = Variant::new(keys.share("rms_norm_eps", 1e-6)?, windows(keys, config.layers)?);
    decoder::build(keys, config, &variant)
}

/// All layers have the window, or none has.
fn windows(keys: &Keys<'_>, layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    let given = WindowKeys::read(keys, Some(4096), true)?;
    if !given.on && given.window.is_some() {
        return Err(ConfigError::unsupported("use_sliding_window", "`sliding_window` null where it is off", "false"));
    }
    given.same(keys, layers, given.window)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{config, refused_key};
    use serde_json::json;

    #[test]
    fn every_layer_has_the_window() {
        let cases = [
            (json!({}), [Some(4096); 3]),
            (json!({"sliding_window": null}), [None; 3]),
            (json!({"sliding_window": 16}), [Some(16); 3]),
        ];
        for (change, want) in cases {
            assert_eq!(windows(&Keys(&config("mistral", &change)), 3).unwrap(), want, "{change}");
        }
    }

    #[test]
    fn what_would_change_numbers_is_refused_by_name() {
        let (full, slide) = ("full_attention", "sliding_attention");
        let cases = [
            (json!({"sliding_window": 16, "use_sliding_window": false}), "use_sliding_window"),
            (json!({"sliding_window": 16, "layer_types": [full, slide, slide]}), "layer_types"),
            (json!({"attention_bias": true}), "attention_bias"),
        ];
        for (change, key) in cases {
            assert_eq!(refused_key("mistral", &change).as_deref(), Some(key), "{change}");
        }
    }

    #[test]
    fn a_file_without_key_value_heads_has_eight() {
        let heads = |change| crate::build(&config("mistral", &change)).unwrap().config().kv_heads;
        assert_eq!(heads(json!({})), 8);
        assert_eq!(heads(json!({"num_key_value_heads": null})), 32);
    }
}
