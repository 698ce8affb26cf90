//! The text files beside a Hugging Face checkpoint, from GGUF metadata.

use super::tokenizer::{BOS, EOS, UNK, Vocabulary};
use super::value::Metadata;
use crate::error::Result;
use crate::format::Sidecars;
use serde_json::{Map, Value, json};

const PAD: &str = "tokenizer.ggml.padding_token_id";
pub(super) const TEMPLATE: &str = "tokenizer.chat_template";

/// Sampling that the file recommends, as Hugging Face's `generation_config.json` calls it. llama.cpp's other
/// `general.sampling.*` name samplers that have no counterpart there.
const SAMPLING: &[(&str, &str)] = &[
    ("temperature", "general.sampling.temp"),
    ("top_p", "general.sampling.top_p"),
    ("min_p", "general.sampling.min_p"),
    ("repetition_penalty", "general.sampling.penalty_repeat"),
];

/// Tokenizer, chat template and generation defaults; none of them where the file has no tokenizer.
///
/// # Errors
/// The tokenizer cannot be expressed, or its metadata contradict each other.
pub(super) fn build(meta: &Metadata) -> Result<Sidecars> {
    let Some(vocabulary) = Vocabulary::read(meta)? else { return Ok(Sidecars::default()) };
    let config = tokenizer_config(meta, &vocabulary)?;
    let generation = generation_config(meta, &vocabulary)?;
    Ok(Sidecars {
        files: vec![
            ("tokenizer.json".to_owned(), vocabulary.to_json()?),
            ("tokenizer_config.json".to_owned(), pretty(config)),
            ("generation_config.json".to_owned(), pretty(generation)),
        ],
    })
}

fn pretty(map: Map<String, Value>) -> Vec<u8> {
    format!("{:#}\n", Value::Object(map)).into_bytes()
}

fn tokenizer_config(meta: &Metadata, vocabulary: &Vocabulary<'_>) -> Result<Map<String, Value>> {
    let mut config = Map::new();
    config.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    for (key, name) in [("bos_token", BOS), ("eos_token", EOS), ("unk_token", UNK), ("pad_token", PAD)] {
        if let Some((_, text)) = vocabulary.named(name)? {
            config.insert(key.to_owned(), json!(text));
        }
    }
    if let Some(arch) = meta.string("general.architecture")?
        && let Some(context) = meta.uint(&format!("{arch}.context_length"))?
    {
        config.insert("model_max_length".to_owned(), json!(context));
    }
    config.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
    if let Some(templates) = templates(meta)? {
        config.insert("chat_template".to_owned(), templates);
    }
    Ok(config)
}

/// The chat template: a text or, where there are named ones beside it, a list of all with their names.
fn templates(meta: &Metadata) -> Result<Option<Value>> {
    let default = meta.string(TEMPLATE)?;
    let prefix = format!("{TEMPLATE}.");
    let names = meta.iter().filter_map(|(key, _)| Some((key, key.strip_prefix(&prefix)?)));
    let mut list: Vec<Value> = default.iter().map(|text| json!({"name": "default", "template": text})).collect();
    for (key, name) in names {
        if let Some(text) = meta.string(key)? {
            list.push(json!({"name": name, "template": text}));
        }
    }
    Ok(match list.len() {
        0 => None,
        1 if default.is_some() => default.map(|text| json!(text)),
        _ => Some(Value::Array(list)),
    })
}

fn generation_config(meta: &Metadata, vocabulary: &Vocabulary<'_>) -> Result<Map<String, Value>> {
    let id = |key: &str| -> Result<Option<usize>> { Ok(vocabulary.named(key)?.map(|(id, _)| id)) };
    let mut ends: Vec<usize> = Vec::new();
    for key in [EOS, "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ends.extend(id(key)?);
    }
    ends.extend(vocabulary.ends());
    // The one under EOS stays first: single-ended readers take it.
    let mut seen = std::collections::HashSet::new();
    ends.retain(|&end| seen.insert(end));
    let mut config = Map::new();
    for (key, value) in [("bos_token_id", id(BOS)?), ("pad_token_id", id(PAD)?)] {
        if let Some(value) = value {
            config.insert(key.to_owned(), json!(value));
        }
    }
    match ends[..] {
        [] => None,
        [end] => config.insert("eos_token_id".to_owned(), json!(end)),
        _ => config.insert("eos_token_id".to_owned(), json!(ends)),
    };
    for (name, key) in SAMPLING {
        if let Some(value) = meta.float(key)? {
            config.insert((*name).to_owned(), json!(value));
        }
    }
    if let Some(top_k) = meta.uint("general.sampling.top_k")? {
        config.insert("top_k".to_owned(), json!(top_k));
    }
    Ok(config)
}
