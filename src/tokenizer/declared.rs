//! Special tokens that only the files beside a tokenizer declare. They are made what they are said to be, as transformers
//! does at loading; else their text would be cut into characters.

use super::read_json;
use crate::error::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::path::Path;
use tokenizers::{AddedToken, Tokenizer};

/// Names that hold one token each.
const SINGLE: [&str; 7] = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];
/// Names that hold a list of them, or an object of names and tokens.
const LISTS: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// Adds what `dir` declares and `tokenizer` does not have yet.
///
/// # Errors
/// A beginning or an end of texts that the vocabulary does not have; a token whose id would be another than it is said to
/// be.
pub(super) fn add(dir: &Path, tokenizer: &mut Tokenizer) -> Result<()> {
    let (config, map) = (dir.join("tokenizer_config.json"), dir.join("special_tokens_map.json"));
    for path in [&config, &map] {
        let json = read_json(path)?;
        if json.get("split_special_tokens").is_some_and(|v| v == true) {
            let next = "set it to false, and give `SpecialText::Text` where special tokens are to be plain text";
            return Err(Error::unsupported(path, "`split_special_tokens: true`", next));
        }
        with_ids(path, &json, tokenizer)?;
        let single = SINGLE.iter().filter_map(|name| Some((*name, json.get(*name)?)));
        for (name, value) in single.chain(LISTS.iter().flat_map(|name| each(json.get(*name)).map(|v| (*name, v)))) {
            if let Some(token) = token(value, true) {
                named(path, name, token, tokenizer)?;
            }
        }
    }
    // The oldest form: an object of texts and ids.
    let path = dir.join("added_tokens.json");
    let mut added: Vec<(u64, String)> =
        read_json(&path)?.into_iter().filter_map(|(text, id)| Some((id.as_u64()?, text))).collect();
    added.sort_unstable();
    added.into_iter().try_for_each(|(id, text)| at(&path, id, AddedToken::from(text, false), tokenizer))
}

/// The text of all tokens that are added to a vocabulary by a file in `dir`, `tokenizer.json` among them.
///
/// # Errors
/// A file is broken.
pub(crate) fn tokens(dir: &Path) -> Result<BTreeSet<String>> {
    #[derive(Default, Deserialize)]
    struct Added {
        #[serde(default)]
        added_tokens: Vec<Value>,
    }
    let text = |value: &Value| token(value, true).map(|t| t.content);
    let path = dir.join("tokenizer.json");
    let added: Added = match std::fs::read(&path) {
        // What is wrong with it is said where it is opened.
        Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_default(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Added::default(),
        Err(e) => return Err(Error::io("read", &path, e)),
    };
    let mut all: BTreeSet<String> = added.added_tokens.iter().filter_map(text).collect();
    for file in ["tokenizer_config.json", "special_tokens_map.json"] {
        let json = read_json(&dir.join(file))?;
        let names = LISTS.iter().chain(&["added_tokens_decoder"]);
        all.extend(names.flat_map(|name| each(json.get(*name))).filter_map(text));
    }
    all.extend(read_json(&dir.join("added_tokens.json"))?.into_iter().map(|(text, _)| text));
    Ok(all)
}

/// `added_tokens_decoder`: tokens by their ids.
fn with_ids(path: &Path, json: &Map<String, Value>, tokenizer: &mut Tokenizer) -> Result<()> {
    let Some(tokens) = json.get("added_tokens_decoder").and_then(Value::as_object) else { return Ok(()) };
    let mut tokens: Vec<(u64, &Value)> = tokens.iter().filter_map(|(id, v)| Some((id.parse().ok()?, v))).collect();
    tokens.sort_unstable_by_key(|(id, _)| *id);
    for (id, value) in tokens {
        if let Some(token) = token(value, value.get("special").is_some_and(|v| v == true)) {
            at(path, id, token, tokenizer)?;
        }
    }
    Ok(())
}

fn each(value: Option<&Value>) -> impl Iterator<Item = &Value> {
    let list = value.and_then(Value::as_array).into_iter().flatten();
    list.chain(value.and_then(Value::as_object).into_iter().flat_map(Map::values))
}

/// A token given as text or as an object with `content`.
fn token(value: &Value, special: bool) -> Option<AddedToken> {
    let text = value.as_str().or_else(|| value.get("content")?.as_str()).filter(|t| !t.is_empty())?;
    let flag = |key: &str| value.get(key).and_then(Value::as_bool);
    let plain = AddedToken::from(text, special);
    let normalized = flag("normalized").unwrap_or(plain.normalized);
    let set = |key: &str| flag(key).unwrap_or(false);
    Some(plain.normalized(normalized).lstrip(set("lstrip")).rstrip(set("rstrip")).single_word(set("single_word")))
}

fn is_known(token: &AddedToken, tokenizer: &Tokenizer) -> bool {
    tokenizer.get_added_vocabulary().get_vocab().contains_key(&token.content)
}

fn named(path: &Path, name: &str, token: AddedToken, tokenizer: &mut Tokenizer) -> Result<()> {
    if is_known(&token, tokenizer) {
        return Ok(());
    }
    if tokenizer.token_to_id(&token.content).is_none() {
        return match name {
            "bos_token" | "eos_token" => {
                let expected = "a token of the vocabulary in tokenizer.json";
                Err(Error::format(path, format!("key `{name}`"), expected, format!("`{}`", token.content)))
            }
            // Nothing asks for the others by name.
            _ => Ok(()),
        };
    }
    tokenizer.add_special_tokens(&[token]);
    Ok(())
}

/// Adds `token`, whose id is to be `id`.
fn at(path: &Path, id: u64, token: AddedToken, tokenizer: &mut Tokenizer) -> Result<()> {
    let text = token.content.clone();
    if !is_known(&token, tokenizer) {
        if token.special {
            tokenizer.add_special_tokens(&[token]);
        } else {
            tokenizer.add_tokens(&[token]);
        }
    }
    match tokenizer.token_to_id(&text) {
        Some(found) if u64::from(found) == id => Ok(()),
        found => {
            let got = found.map_or_else(|| "none".to_owned(), |found| format!("`{found}`"));
            Err(Error::format(
                path,
                format!("token `{text}`"),
                format!("id {id}, as said there, in tokenizer.json"),
                got,
            ))
        }
    }
}
