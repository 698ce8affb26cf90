//! Gemma 2 (Gemma Team 2024): Gemma's decoder with bounds on scores and logits; every second layer sees a window.

use crate::attention::AttentionSpec;
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{Decoder, Variant};
use crate::gemma::{self, Gemma};
use crate::keys::Keys;
use crate::outline::Scaled;
use crate::windows::{FULL, SLIDING, full_every, layer_types, windows_of};
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family {
    model_type: "gemma2",
    honoured: &[
        "hidden_activation",
        "hidden_act",
        "attention_bias",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ],
    scaled: Scaled::QUERIES,
    build,
};

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let defaults =
        Defaults { kv_heads: Some(4), head_dim: Some(256), positions: 8192, tied_head: true, ..Defaults::default() };
    let config = Config::read(keys, &defaults)?;
    keys.one_of("hidden_activation", &["gelu_pytorch_tanh"])?;
    let bias = keys.flag("attention_bias", false)?;
    let types = layer_types(keys, config.layers, &[FULL, SLIDING])?;
    let types = types.unwrap_or_else(|| full_every(2, config.layers));
    let windows = windows_of(keys, &types, Some(4096))?;
    let bound = |key: &str, default| Ok(keys.positive_or(key, Some(default))?.map(|cap| cap as f32));
    let attention = AttentionSpec {
        scale: Some((keys.positive("query_pre_attn_scalar", 256.0)? as f32).sqrt().recip()),
        softcap: bound("attn_logit_softcapping", 50.0)?,
        qkv_bias: bias,
        o_bias: bias,
        ..AttentionSpec::default()
    };
    let variant = Variant { attention, ..gemma::variant(keys.share("rms_norm_eps", 1e-6)?, windows) };
    let decoder = Decoder::new(keys, config, &variant, &|_, _, _| None)?;
    Ok(Box::new(Gemma::new(keys, decoder, bound("final_logit_softcapping", 30.0)?)?))
}

#[cfg(test)]
mod tests {
    use crate::testing::{config, refused_key};
    use serde_json::json;

    #[test]
    fn a_bound_of_null_is_none() {
        let plain = |change| crate::build(&config("gemma2", &change)).unwrap().plain_head().is_some();
        assert!(!plain(json!({})));
        assert!(plain(json!({"final_logit_softcapping": null})));
    }

    #[test]
    fn what_would_change_numbers_is_refused_by_name() {
        for (change, key) in [
            (json!({"attn_logit_softcapping": 0}), "attn_logit_softcapping"),
            (json!({"final_logit_softcapping": "30"}), "final_logit_softcapping"),
            (json!({"hidden_activation": "silu"}), "hidden_activation"),
            (json!({"sliding_window": null}), "sliding_window"),
            (json!({"use_bidirectional_attention": true}), "use_bidirectional_attention"),
        ] {
            assert_eq!(refused_key("gemma2", &change).as_deref(), Some(key), "{change}");
        }
    }
}
