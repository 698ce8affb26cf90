//! SmolLM3 (Hugging Face 2025): every fourth layer has no positions (NoPE, Yang et al. 2025); layers may slide a window.

use crate::attention::AttentionSpec;
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, Variant};
use crate::keys::Keys;
use crate::rope::RopeKeys;
use crate::windows::WindowKeys;
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family {
    model_type: "smollm3",
    honoured: &["attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"],
    scaled: None,
    build,
};

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let defaults = Defaults { kv_heads: Some(4), positions: 32768, tied_head: true, ..Defaults::default() };
    let config = Config::read(keys, &defaults)?;
    let turned = turned(keys, config.layers)?;
    let windows = windows(keys, &turned)?;
    let rope = RopeKeys { theta: 2e6, ..RopeKeys::of(&config) }.read(keys)?.of_both();
    let bias = keys.flag("attention_bias", false)?;
    let variant = Variant {
        attention: AttentionSpec { qkv_bias: bias, o_bias: bias, ..AttentionSpec::default() },
        ropes: Some(turned.iter().map(|turned| rope.clone().filter(|_| *turned)).collect()),
        mlp_bias: keys.flag("mlp_bias", false)?,
        ..Variant::new(keys.share("rms_norm_eps", 1e-6)?, windows)
    };
    decoder::build(keys, config, &variant)
}

/// Whether each layer has positions: listed, or all but every so many.
fn turned(keys: &Keys<'_>, layers: usize) -> Result<Vec<bool>, ConfigError> {
    let every = keys.optional_size("no_rope_layer_interval")?.unwrap_or(4);
    match keys.indices("no_rope_layers")? {
        None => Ok((1..=layers).map(|i| !i.is_multiple_of(every)).collect()),
        Some(list) if list.len() >= layers => Ok(list[..layers].iter().map(|&turned| turned != 0).collect()),
        Some(list) => {
            Err(ConfigError::new("no_rope_layers", format!("a number for each of {layers} layers"), list.len()))
        }
    }
}

/// The window of each layer: as `layer_types` says, or, where windows are on, that of the layers without positions.
fn windows(keys: &Keys<'_>, turned: &[bool]) -> Result<Vec<Option<usize>>, ConfigError> {
    let given = WindowKeys::read(keys, None, false)?;
    let named = given.named(keys, turned.len())?;
    let window = |turned: &bool| given.window.filter(|_| given.on && !turned);
    Ok(named.unwrap_or_else(|| turned.iter().map(window).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{config, refused_key};
    use serde_json::json;

    #[test]
    fn layers_have_positions_and_windows_where_transformers_has_them() {
        let layers = |change| {
            let config = config("smollm3", &change);
            let turned = turned(&Keys(&config), 3).unwrap();
            let windows = windows(&Keys(&config), &turned).unwrap();
            (turned, windows)
        };
        assert_eq!(layers(json!({})), (vec![true; 3], vec![None; 3]));
        let change = json!({"no_rope_layer_interval": 2, "use_sliding_window": true, "sliding_window": 8});
        assert_eq!(layers(change), (vec![true, false, true], vec![None, Some(8), None]));
        let change = json!({"no_rope_layers": [0, 1, 1, 0], "sliding_window": 8});
        assert_eq!(layers(change), (vec![false, true, true], vec![None; 3]));
        let short = json!({"no_rope_layers": [1, 0]});
        assert_eq!(refused_key("smollm3", &short).as_deref(), Some("no_rope_layers"));
    }
}
