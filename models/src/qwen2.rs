//! Qwen2 (Yang et al. 2024): biases on q, k and v; upper layers may slide a window.

use crate::attention::AttentionSpec;
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, Variant};
use crate::keys::Keys;
use crate::outline::Scaled;
use crate::windows::WindowKeys;
use crate::{Family, Model};

/// Biases are the family's own, whatever these keys say.
pub(crate) const FAMILY: Family =
    Family { model_type: "qwen2", honoured: &["attention_bias", "qkv_bias"], scaled: Scaled::QUERIES, build };

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { kv_heads: Some(32), positions: 32768, ..Defaults::default() })?;
    let windows = WindowKeys::read(keys, Some(4096), false)?.upper(keys, config.layers)?;
    let attention = AttentionSpec { qkv_bias: true, ..AttentionSpec::default() };
    let variant = Variant { attention, ..Variant::new(keys.share("rms_norm_eps", 1e-6)?, windows) };
    decoder::build(keys, config, &variant)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{config, refused_key};
    use serde_json::json;

    #[test]
    fn windows_are_where_transformers_has_them() {
        let (full, slide, w) = ("full_attention", "sliding_attention", Some(16));
        let cases = [
            (json!({"sliding_window": 16}), [None; 3]),
            (json!({"sliding_window": 16, "use_sliding_window": true}), [None; 3]),
            (json!({"sliding_window": 16, "use_sliding_window": true, "max_window_layers": 1}), [None, w, w]),
            (
                json!({"sliding_window": 16, "use_sliding_window": true, "layer_types": [slide, full, slide]}),
                [w, None, w],
            ),
        ];
        for (change, want) in cases {
            let config = config("qwen2", &change);
            let keys = Keys(&config);
            let windows = WindowKeys::read(&keys, Some(4096), false).unwrap().upper(&keys, 3).unwrap();
            assert_eq!(windows, want, "{change}");
        }
    }

    #[test]
    fn what_would_change_numbers_is_refused_by_name() {
        let cases = [
            (json!({"layer_types": ["sliding_attention"]}), "layer_types"),
            (json!({"layer_types": ["sliding_attention", "full_attention", "full_attention"]}), "layer_types"),
            (json!({"mlp_bias": true}), "mlp_bias"),
        ];
        for (change, key) in cases {
            assert_eq!(refused_key("qwen2", &change).as_deref(), Some(key), "{change}");
        }
    }
}
