//! Llama (Touvron et al. 2023): the decoder as it is.

use crate::attention::AttentionSpec;
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, Variant};
use crate::keys::Keys;
use crate::outline::Scaled;
use crate::windows::WindowKeys;
use crate::{Family, Model};

pub(crate) const FAMILY: Family =
    Family { model_type: "llama", honoured: &["attention_bias", "mlp_bias"], scaled: Scaled::KEYS, build };

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { positions: 2048, ..Defaults::default() })?;
    let bias = keys.flag("attention_bias", false)?;
    let variant = Variant {
        attention: AttentionSpec { qkv_bias: bias, o_bias: bias, ..AttentionSpec::default() },
        mlp_bias: keys.flag("mlp_bias", false)?,
        ..Variant::new(keys.share("rms_norm_eps", 1e-6)?, no_windows(keys, &config)?)
    };
    decoder::build(keys, config, &variant)
}

/// No layer has a window; a key for one, which transformers would not heed, was meant for another family.
fn no_windows(keys: &Keys<'_>, config: &Config) -> Result<Vec<Option<usize>>, ConfigError> {
    let given = WindowKeys::read(keys, None, true)?;
    // A window as long as the context hides nothing.
    if let Some(window) = given.window.filter(|&window| given.on && window < config.max_positions) {
        return Err(ConfigError::unsupported("sliding_window", "none, for Llama has no window (Mistral has)", window));
    }
    given.same(keys, config.layers, None)
}

#[cfg(test)]
mod tests {
    use crate::testing::{config, refused_key};
    use serde_json::json;

    #[test]
    fn no_layer_has_a_window() {
        let full = "full_attention";
        for change in [
            json!({}),
            json!({"sliding_window": null}),
            json!({"sliding_window": 512}),
            json!({"layer_types": [full, full, full]}),
        ] {
            assert_eq!(refused_key("llama", &change), None, "{change}");
        }
        for (change, key) in [
            (json!({"sliding_window": 16}), "sliding_window"),
            (json!({"layer_types": [full, full, "sliding_attention"]}), "layer_types"),
            (json!({"layer_types": [full, full]}), "layer_types"),
            (json!({"rotary_dim": 32}), "rotary_dim"),
            (json!({"qkv_bias": true}), "qkv_bias"),
        ] {
            assert_eq!(refused_key("llama", &change).as_deref(), Some(key), "{change}");
        }
        assert_eq!(refused_key("llama", &json!({"rotary_dim": 2})), None);
    }

    #[test]
    fn a_file_without_key_value_heads_has_as_many_as_heads() {
        assert_eq!(crate::build(&config("llama", &json!({}))).unwrap().config().kv_heads, 32);
    }
}
