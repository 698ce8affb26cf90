//! EXAONE 4 (LG AI Research 2025): norms after both parts of a layer, and of each head of q and k; full layers between
//! sliding ones have no positions.

use crate::attention::{AttentionSpec, QkNorms};
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, POST_NORM, Variant};
use crate::keys::Keys;
use crate::rope::RopeKeys;
use crate::windows::{FULL, SLIDING, full_every, layer_types, windows_of};
use crate::{Family, Model};

pub(crate) const FAMILY: Family =
    Family { model_type: "exaone4", honoured: &["sliding_window_pattern"], scaled: None, build };

/// `sliding_window` where the file has none.
const WINDOW: Option<usize> = Some(4096);

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { kv_heads: Some(32), positions: 2048, ..Defaults::default() })?;
    let slides = keys.size_or("sliding_window", WINDOW)?.is_some();
    let types = kinds(keys, config.layers, slides)?;
    let rope = RopeKeys::of(&config).read(keys)?.of_both();
    let eps = keys.share("rms_norm_eps", 1e-5)?;
    let variant = Variant {
        attention: AttentionSpec { norms: Some(QkNorms::of_heads(eps)), ..AttentionSpec::default() },
        ropes: Some(types.iter().map(|kind| rope.clone().filter(|_| !slides || *kind == SLIDING)).collect()),
        norms: POST_NORM,
        ..Variant::new(eps, windows_of(keys, &types, WINDOW)?)
    };
    decoder::build(keys, config, &variant)
}

/// The kind of each layer: named, or all full without a window, or every so many of them.
fn kinds(keys: &Keys<'_>, layers: usize, slides: bool) -> Result<Vec<&'static str>, ConfigError> {
    match layer_types(keys, layers, &[FULL, SLIDING])? {
        Some(named) => Ok(named),
        None if slides => Ok(full_every(keys.optional_size("sliding_window_pattern")?.unwrap_or(4), layers)),
        None => Ok(vec![FULL; layers]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{config, refused_key};
    use serde_json::json;

    #[test]
    fn layers_slide_where_transformers_has_them_so() {
        let kinds = |change, slides| kinds(&Keys(&config("exaone4", &change)), 3, slides).unwrap();
        assert_eq!(kinds(json!({}), true), [SLIDING; 3]);
        assert_eq!(kinds(json!({"sliding_window_pattern": 2}), true), [SLIDING, FULL, SLIDING]);
        assert_eq!(kinds(json!({}), false), [FULL; 3]);
        let named = [FULL, FULL, SLIDING];
        assert_eq!(kinds(json!({"sliding_window_pattern": "LLLG", "layer_types": named}), true), named);
        let letters = json!({"sliding_window_pattern": "LLLG"});
        assert_eq!(refused_key("exaone4", &letters).as_deref(), Some("sliding_window_pattern"));
        let no_window = json!({"sliding_window": null, "layer_types": named});
        assert_eq!(refused_key("exaone4", &no_window).as_deref(), Some("sliding_window"));
    }
}
