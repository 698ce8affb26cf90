//! What the files beside a tokenizer say about its special tokens.

use super::read_json;
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;
use tokenizers::Tokenizer;

/// Tokens that chat templates know by name.
const NAMES: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];
/// Files that name them, the newer first.
const FILES: [&str; 2] = ["tokenizer_config.json", "special_tokens_map.json"];
/// Chat models end a turn with one of these, whatever their config says about the end of a text.
const TURN_ENDS: [&str; 7] =
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|endofturn|>"];

/// The special tokens by their names, and what follows from them.
pub(super) struct Names {
    /// Name and text.
    pub text: Vec<(String, String)>,
    /// Ids that end an answer, rising.
    pub stop: Vec<u32>,
    /// Whether a text begins with `bos_token`, where a file says so.
    pub adds_bos: Option<bool>,
}

impl Names {
    /// `tokenizer_config.json` counts before the older `special_tokens_map.json`, as in transformers. A beginning or an
    /// end that neither of these in `special` names (nor says to be none) is the model's, by the same files in `model`, or
    /// that of `generation_config.json` or `config.json` there.
    pub fn read(special: &Path, model: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let mut files = Vec::new();
        for path in [special, model].iter().flat_map(|dir| FILES.map(|file| dir.join(file))) {
            let json = read_json(&path)?;
            files.push((path, json));
        }
        // Of several ends some may be of other tokenizers, but with none of them no answer would end.
        let known = |given: &[u32]| given.iter().any(|id| tokenizer.id_to_token(*id).is_some());
        let [bos, eos] = [configured(model, "bos_token_id", |_| true)?, configured(model, "eos_token_id", known)?];
        let mut text = Vec::new();
        for name in NAMES {
            let by_id = match name {
                "bos_token" => bos.first(),
                "eos_token" => eos.first(),
                _ => None,
            };
            let mut named = None;
            for (path, json) in &files {
                named = named.or(text_of(json, name, path)?);
            }
            let silent = files.iter().all(|(_, json)| !json.contains_key(name)) || name == "eos_token";
            let by_id = || by_id.filter(|_| silent).and_then(|&id| tokenizer.id_to_token(id));
            text.extend(named.or_else(by_id).map(|text| (name.to_owned(), text)));
        }
        let mut stop = eos;
        stop.extend(text.iter().filter(|(n, _)| n == "eos_token").filter_map(|(_, t)| tokenizer.token_to_id(t)));
        stop.extend(TURN_ENDS.iter().filter_map(|t| tokenizer.token_to_id(t)));
        stop.sort_unstable();
        stop.dedup();
        // As in transformers: who says one of the two has said both.
        let adds_bos = files.iter().find_map(|(_, json)| {
            let adds = |key: &str| json.get(key).and_then(Value::as_bool);
            adds("add_bos_token").or(adds("add_eos_token").map(|_| false))
        });
        Ok(Self { text, stop, adds_bos })
    }
}

/// The ids under `key` in the model's configuration. Where a file gives some, they must be `known`.
fn configured(model: &Path, key: &str, known: impl Fn(&[u32]) -> bool) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for file in ["generation_config.json", "config.json"] {
        let path = model.join(file);
        let json = read_json(&path)?;
        // Models that see and hear keep the text model's settings in a part of their own.
        let inner = json.get("text_config").and_then(Value::as_object);
        for object in [Some(&json), inner].into_iter().flatten() {
            let given = ids_of(object, key, &path)?;
            if let (Some(id), false) = (given.first(), known(&given)) {
                return Err(Error::format(&path, key, "the id of a token in tokenizer.json", format!("`{id}`")));
            }
            ids.extend(given);
        }
    }
    Ok(ids)
}

/// Ids that end an answer of the model in `dir`, by its configuration alone: a chat template may have more.
///
/// # Errors
/// A file is broken.
pub(crate) fn end_ids(dir: &Path) -> Result<Vec<u32>> {
    configured(dir, "eos_token_id", |_| true)
}

/// A token's text: a string, or an object with `content`.
fn text_of(json: &Map<String, Value>, name: &str, path: &Path) -> Result<Option<String>> {
    let Some(value) = json.get(name).filter(|v| !v.is_null()) else { return Ok(None) };
    let text = value.as_str().or_else(|| value.get("content")?.as_str());
    let text = text.ok_or_else(|| Error::format(path, name, "a string or an object with `content`", "neither"))?;
    Ok(Some(text.to_owned()))
}

/// An id, or a list of ids.
fn ids_of(json: &Map<String, Value>, key: &str, path: &Path) -> Result<Vec<u32>> {
    let list = match json.get(key) {
        None | Some(Value::Null) => &[],
        Some(Value::Array(list)) => &list[..],
        Some(one) => std::slice::from_ref(one),
    };
    let id = |v: &Value| {
        let id = v.as_u64().and_then(|n| u32::try_from(n).ok());
        id.ok_or_else(|| Error::format(path, key, "a token id or a list of them", "something else"))
    };
    list.iter().map(id).collect()
}
