//! Ministral 3 (Mistral AI 2025): angles stretched by YaRN, and queries that grow along the text.

use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{self, Variant};
use crate::keys::Keys;
use crate::rope::{Growth, Rope, RopeKeys};
use crate::windows;
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family { model_type: "ministral3", honoured: &[], scaled: None, build };

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let defaults = Defaults { kv_heads: Some(8), head_dim: Some(128), positions: 262_144, ..Defaults::default() };
    let config = Config::read(keys, &defaults)?;
    let windows = windows::one(keys, &config)?;
    let more = &["llama_4_scaling_beta", "max_position_embeddings"];
    let rope_keys = RopeKeys { theta: 1e6, more, ..RopeKeys::of(&config) };
    let of_k = rope_keys.read(keys)?;
    let of_q = Rope { growth: Some(growth(&rope_keys, keys)?), ..of_k.clone() };
    let variant = Variant {
        ropes: Some(vec![Some([of_q, of_k]); config.layers]),
        ..Variant::new(keys.share("rms_norm_eps", 1e-5)?, windows)
    };
    decoder::build(keys, config, &variant)
}

fn growth(rope_keys: &RopeKeys, keys: &Keys<'_>) -> Result<Growth, ConfigError> {
    let nested = rope_keys.nested(keys)?;
    let nested = nested.ok_or_else(|| ConfigError::new("rope_parameters", "an object", "nothing"))?;
    let (beta, every) = ("llama_4_scaling_beta", "original_max_position_embeddings");
    nested.required_number(beta)?;
    Ok(Growth { beta: nested.positive(beta, 0.1)? as f32, every: nested.size(every)? })
}

#[cfg(test)]
mod tests {
    use crate::testing::{config, refused_key};
    use serde_json::json;

    #[test]
    fn queries_grow_at_every_multiple_of_the_original_context() {
        let rope = json!({"rope_type": "yarn", "factor": 4, "mscale": 1, "mscale_all_dim": 1,
            "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.5});
        for object in ["rope_parameters", "rope_scaling"] {
            let model = crate::build(&config("ministral3", &json!({object: rope}))).unwrap();
            let [of_q, of_k] = model.ropes() else { panic!("one table for queries, one for keys") };
            for (position, want) in [(0, 1.0), (15, 1.0), (16, 1.0 + 0.5 * 2f32.ln()), (40, 1.0 + 0.5 * 3f32.ln())] {
                assert!((of_q.factor(position) - want).abs() < 1e-6, "{position}: {}", of_q.factor(position));
                assert_eq!(of_k.factor(position), 1.0);
            }
        }
        for (change, key) in [
            (json!({}), "rope_parameters"),
            (json!({"rope_parameters": {"rope_type": "default"}}), "llama_4_scaling_beta"),
            (json!({"rope_parameters": {"llama_4_scaling_beta": 0.1}}), "original_max_position_embeddings"),
        ] {
            assert_eq!(refused_key("ministral3", &change).as_deref(), Some(key), "{change}");
        }
    }
}
