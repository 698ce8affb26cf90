//! The text files beside a Hugging Face checkpoint, from GGUF metadata.

use super::tokenizer::Vocabulary;
use super::value::Metadata;
use crate::error::Result;
use crate::format::Sidecars;
use serde_json::{Map, Value, json};

const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const PAD: &str = "tokenizer.ggml.padding_token_id";
const UNK: &str = "tokenizer.ggml.unknown_token_id";

/// Control tokens that end an answer in the chat formats of the supported families. Files name at most one or two of
/// them under a key, and models emit any.
const END_OF_TURN: &[&str] = &["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>"];

/// Tokenizer, chat template and generation defaults; none of them where the file has no tokenizer.
///
/// # Errors
/// The tokenizer cannot be expressed, or its metadata contradict each other.
pub(super) fn build(meta: &Metadata) -> Result<Sidecars> {
    let Some(vocabulary) = Vocabulary::read(meta)? else { return Ok(Sidecars::default()) };
    let config = tokenizer_config(meta, &vocabulary)?;
    let generation = generation_config(&vocabulary)?;
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
    if let Some(template) = meta.string("tokenizer.chat_template")? {
        config.insert("chat_template".to_owned(), json!(template));
    }
    Ok(config)
}

fn generation_config(vocabulary: &Vocabulary<'_>) -> Result<Map<String, Value>> {
    let id = |key: &str| -> Result<Option<usize>> { Ok(vocabulary.named(key)?.map(|(id, _)| id)) };
    let mut ends: Vec<usize> = Vec::new();
    for key in [EOS, "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ends.extend(id(key)?);
    }
    for text in END_OF_TURN {
        ends.extend(vocabulary.tokens.iter().position(|t| t == text).filter(|&id| vocabulary.is_control(id)));
    }
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
    Ok(config)
}
