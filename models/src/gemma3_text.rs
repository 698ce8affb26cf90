//! Gemma 3 (Gemma Team 2025), text: Gemma's decoder with norms of each head of q and k; most layers see a window and turn
//! by angles of their own.

use crate::attention::{AttentionSpec, QkNorms};
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{Decoder, Variant};
use crate::gemma::{self, Gemma};
use crate::keys::Keys;
use crate::outline::Scaled;
use crate::rope::RopeKeys;
use crate::windows::{FULL, SLIDING, full_every, layer_types, windows_of};
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family {
    model_type: "gemma3_text",
    honoured: &["hidden_activation", "attention_bias", "query_pre_attn_scalar", "sliding_window_pattern"],
    scaled: Scaled::QUERIES,
    build,
};

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    // Published configs of Gemma 3 4B leave most of it out.
    let defaults = Defaults {
        heads: Some(8),
        kv_heads: Some(4),
        head_dim: Some(256),
        positions: 131_072,
        tied_head: true,
        vocab: Some(262_208),
    };
    let config = Config::read(keys, &defaults)?;
    keys.one_of("hidden_activation", &["gelu_pytorch_tanh"])?;
    let (eps, bias) = (keys.share("rms_norm_eps", 1e-6)?, keys.flag("attention_bias", false)?);
    let types = kinds(keys, config.layers)?;
    let windows = windows_of(keys, &types, Some(4096))?;
    let plain = RopeKeys::of(&config);
    let full = RopeKeys { theta: 1e6, layers: Some(FULL), ..plain }.read(keys)?.of_both();
    let local = RopeKeys { theta_key: "rope_local_base_freq", scaled: false, layers: Some(SLIDING), ..plain };
    let local = local.read(keys)?.of_both();
    let attention = AttentionSpec {
        scale: Some((keys.positive("query_pre_attn_scalar", 256.0)? as f32).sqrt().recip()),
        qkv_bias: bias,
        o_bias: bias,
        norms: Some(QkNorms { plus_one: true, ..QkNorms::of_heads(eps) }),
        ..AttentionSpec::default()
    };
    let ropes = types.iter().map(|kind| if *kind == FULL { full.clone() } else { local.clone() }).collect();
    let variant = Variant { attention, ropes: Some(ropes), ..gemma::variant(eps, windows) };
    Ok(Box::new(Gemma::new(keys, Decoder::new(keys, config, &variant, &|_, _, _| None)?, None)?))
}

/// The kind of each layer: named, or every sixth full, or as often as `sliding_window_pattern` says.
fn kinds(keys: &Keys<'_>, layers: usize) -> Result<Vec<&'static str>, ConfigError> {
    let every = keys.optional_size("sliding_window_pattern")?.unwrap_or(6);
    let named = layer_types(keys, layers, &[FULL, SLIDING])?;
    Ok(named.unwrap_or_else(|| full_every(every, layers)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{config, refused_key};
    use serde_json::json;

    #[test]
    fn layers_are_full_where_transformers_has_them_so() {
        let kinds = |change| kinds(&Keys(&config("gemma3_text", &change)), 7).unwrap();
        let full = |kinds: Vec<&str>| (0..7).filter(|&i| kinds[i] == FULL).collect::<Vec<_>>();
        assert_eq!(full(kinds(json!({}))), [5]);
        assert_eq!(full(kinds(json!({"sliding_window_pattern": 2}))), [1, 3, 5]);
    }

    #[test]
    fn what_would_change_numbers_is_refused_by_name() {
        for (change, key) in [
            (json!({"final_logit_softcapping": 30.0}), "final_logit_softcapping"),
            (json!({"hidden_activation": "silu"}), "hidden_activation"),
            (json!({"sliding_window": null}), "sliding_window"),
            (json!({"query_pre_attn_scalar": 0}), "query_pre_attn_scalar"),
            (json!({"use_bidirectional_attention": true}), "use_bidirectional_attention"),
        ] {
            assert_eq!(refused_key("gemma3_text", &change).as_deref(), Some(key), "{change}");
        }
    }
}
