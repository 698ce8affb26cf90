//! Models for more than text, of which the text model alone is run: their `config.json` nests the text model's, and their
//! files hold its weights under longer names, beside towers for pictures and sound.

use serde_json::{Map, Value};

/// A kind of such models, and the kind of text model in it where the nested config does not say.
const WRAPPERS: &[(&str, &str)] =
    &[("gemma3", "gemma3_text"), ("gemma4", "gemma4_text"), ("mistral3", "mistral"), ("qwen3_5", "qwen3_5_text")];

/// Keys of the outer config that are about the text model, too.
const SHARED: &[&str] = &["dtype", "torch_dtype", "tie_word_embeddings", "quantization_config"];

/// What stands before the text model's names, and what it stands for.
const PREFIXES: &[(&str, &str)] = &[
    ("model.language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
];

/// Parts that a text does not go through: towers, what leads from them to the text model, and layers that guess several
/// tokens at once.
const PARTS: &[&str] = &[
    "audio_tower",
    "embed_audio",
    "embed_vision",
    "mtp",
    "multi_modal_projector",
    "vision_model",
    "vision_tower",
    "visual",
];

/// The config of the text model in a model for more than text; none where `config` is no such model's.
#[must_use]
pub fn text_config(config: &Map<String, Value>) -> Option<Map<String, Value>> {
    let outer = config.get("model_type")?.as_str()?;
    let (_, inner) = WRAPPERS.iter().find(|(name, _)| *name == outer)?;
    let mut text = config.get("text_config")?.as_object()?.clone();
    text.entry("model_type").or_insert_with(|| (*inner).into());
    for key in SHARED {
        if let Some(value) = config.get(*key).filter(|value| !value.is_null()) {
            text.entry(*key).or_insert_with(|| value.clone());
        }
    }
    Some(text)
}

/// Families whose first files leave out what all their names begin with.
const BARE: &[(&str, &str)] = &[("gpt2", "transformer.")];

/// Families of which transformers saves a part of a name in another spelling than the first files have.
const SPELLINGS: &[(&str, &str, &str)] = &[("olmo_hybrid", ".post_attention_layernorm.", ".feedforward_layer_norm.")];

/// The name that the tensor `name` of a model that `config` describes has here, if it is another: files may leave out what
/// all names begin with, or spell a part in another way.
#[must_use]
pub fn full_name(config: &Map<String, Value>, name: &str) -> Option<String> {
    let family = config.get("model_type")?.as_str()?;
    if let Some((_, old, new)) = SPELLINGS.iter().find(|(spelt, old, _)| *spelt == family && name.contains(old)) {
        return Some(name.replacen(old, new, 1));
    }
    let (_, prefix) = BARE.iter().find(|(bare, _)| *bare == family)?;
    (!name.starts_with(prefix) && !name.starts_with("lm_head.")).then(|| format!("{prefix}{name}"))
}

/// What comes before and after the number of a matrix in its name, where the tensor `name` of a model that `config` describes
/// holds matrices, or vectors, that are parameters of their own here.
#[must_use]
pub fn parts_of(config: &Map<String, Value>, name: &str) -> Option<(String, &'static str)> {
    let family = config.get("model_type")?.as_str()?;
    if family == crate::gpt_oss::FAMILY.model_type { crate::gpt_oss::expert_names(name) } else { None }
}

/// What a tensor of a model for more than text is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wrapped<'n> {
    /// The text model's, under the name that it has in a text model by itself.
    Text(String),
    /// Of a part that text does not go through, with the part's name.
    Part(&'n str),
}

/// What the tensor `name` of such a model is.
#[must_use]
pub fn wrapped(name: &str) -> Wrapped<'_> {
    let inner = name.strip_prefix("model.").unwrap_or(name);
    let part = inner.split('.').next().unwrap_or_default();
    if PARTS.contains(&part) {
        return Wrapped::Part(part);
    }
    let renamed = PREFIXES.iter().find_map(|(long, short)| Some(format!("{short}{}", name.strip_prefix(long)?)));
    Wrapped::Text(renamed.unwrap_or_else(|| name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_text_model_has_its_own_names() {
        for name in
            ["model.language_model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"]
        {
            assert_eq!(wrapped(name), Wrapped::Text("model.layers.0.mlp.up_proj.weight".to_owned()));
        }
        for name in ["lm_head.weight", "language_model.lm_head.weight"] {
            assert_eq!(wrapped(name), Wrapped::Text("lm_head.weight".to_owned()));
        }
        assert_eq!(wrapped("model.vision_tower.layers.0.weight"), Wrapped::Part("vision_tower"));
        assert_eq!(wrapped("mtp.layers.0.weight"), Wrapped::Part("mtp"));
        // What nobody knows is refused later, under its own name.
        assert_eq!(wrapped("model.memory.weight"), Wrapped::Text("model.memory.weight".to_owned()));
    }

    #[test]
    fn names_without_their_beginning_are_whole() {
        let config = |family: &str| json!({"model_type": family}).as_object().unwrap().clone();
        let full = |family, name| full_name(&config(family), name);
        assert_eq!(full("gpt2", "h.0.ln_1.weight").as_deref(), Some("transformer.h.0.ln_1.weight"));
        let norm = "model.layers.1.post_attention_layernorm.weight";
        assert_eq!(full("olmo_hybrid", norm).as_deref(), Some("model.layers.1.feedforward_layer_norm.weight"));
        assert_eq!(full("llama", norm), None);
        for (family, name) in [("gpt2", "transformer.wte.weight"), ("gpt2", "lm_head.weight"), ("llama", "norm.weight")]
        {
            assert_eq!(full(family, name), None, "{family} {name}");
        }
    }

    #[test]
    fn the_text_config_takes_from_the_outer_one_what_it_lacks() {
        let config = |value: Value| value.as_object().unwrap().clone();
        let outer = config(json!({"model_type": "gemma3", "torch_dtype": "bfloat16", "tie_word_embeddings": null,
            "text_config": {"hidden_size": 64}}));
        let text = json!({"model_type": "gemma3_text", "torch_dtype": "bfloat16", "hidden_size": 64});
        assert_eq!(text_config(&outer), Some(config(text)));
        let outer = config(json!({"model_type": "mistral3", "tie_word_embeddings": false,
            "text_config": {"model_type": "ministral3", "tie_word_embeddings": true}}));
        assert_eq!(text_config(&outer), Some(config(json!({"model_type": "ministral3", "tie_word_embeddings": true}))));
        assert_eq!(text_config(&config(json!({"model_type": "llava", "text_config": {}}))), None);
        assert_eq!(text_config(&config(json!({"model_type": "gemma3"}))), None);
    }
}
