//! What is not ours, told by its content before anything of ours tries to parse it: a name that people know, and a
//! next step that works.
//!
//! [`content`] knows files by their bytes, [`quantization`] models by config and tensors, [`folder`] folders by what
//! lies in them. Each is one table.

mod content;
mod folder;
mod quantization;

pub(crate) use content::{content, looks_like_safetensors};
#[cfg(feature = "cli")]
pub(crate) use folder::no_tokenizer_inside;
pub(crate) use folder::{lone_weights, no_tokenizer, no_weights, not_a_model};
pub(crate) use quantization::{Wanted, check_config, check_names, check_tensors, is_harmless};

use super::safetensors::TensorFile;
use crate::error::{Error, ErrorCode, Result};
use serde_json::{Map, Value};
use std::fs;
use std::path::Path;

/// Refuses `bytes`, which begin the file at `path`, if they are a known content of another kind than `wanted`.
///
/// # Errors
/// They are.
pub(crate) fn check(path: &Path, bytes: &[u8], wanted: &str) -> Result<()> {
    content(bytes).map_or(Ok(()), |content| Err(content.error(path, wanted)))
}

/// Key in the metadata of the file that keeps a chat.
pub(crate) const CHAT: &str = "pocketlora-chat";
/// The same of a checkpoint, and what its files are called, the newer one first.
pub(crate) const CHECKPOINT: &str = "pocketlora";
pub(crate) const CHECKPOINTS: [&str; 2] = ["checkpoint.safetensors", "checkpoint.previous.safetensors"];

/// What `file` is, if it is one of ours that is neither a model nor an adapter: refused where `wanted` is expected.
///
/// # Errors
/// It is.
pub(crate) fn check_own(file: &TensorFile, wanted: &str) -> Result<()> {
    let has = |key| file.metadata().contains_key(key);
    let (what, next) = match () {
        () if has(CHAT) => ("a chat that `--state` keeps", "give it with `chat --state`, and the model with `-m`"),
        () if has(CHECKPOINT) => ("a checkpoint of a training run", RESUME),
        () => return Ok(()),
    };
    let message = format!("expected {wanted}, got {what}; {next}");
    Err(Error::new(ErrorCode::Config, format!("`{}`", file.path().display()), message))
}

/// What is done with a run that was stopped.
const RESUME: &str = "finish the run by the same `pocketlora train` with `--resume`, and its folder is an adapter";

/// The error for the folder `dir` of a run that was stopped, where `wanted` is expected; `None` where it is none.
pub(crate) fn stopped_run(dir: &Path, wanted: &str) -> Option<Error> {
    let stopped = CHECKPOINTS.iter().any(|name| dir.join(name).is_file());
    let message = format!("expected {wanted}, got the folder of a training run that was stopped; {RESUME}");
    stopped.then(|| Error::new(ErrorCode::Config, format!("`{}`", dir.display()), message))
}

/// `bytes` of the file at `path` as text, which may be a page of the web, but not a pointer to the text. A byte order mark
/// before it is no part of it.
///
/// # Errors
/// They are a pointer, or not UTF-8.
#[cfg(feature = "cli")]
pub(crate) fn text(path: &Path, bytes: Vec<u8>) -> Result<String> {
    match content(&bytes) {
        Some(content) if content.name.ends_with("pointer") => return Err(content.error(path, "a text")),
        _ => {}
    }
    let mut text = String::from_utf8(bytes).map_err(|e| match content(e.as_bytes()) {
        Some(content) => content.error(path, "a text"),
        None => {
            let at = e.utf8_error().valid_up_to();
            let message = format!(
                "expected text in UTF-8, got another encoding, at byte {at} at the latest; convert it, as from Latin-1: `iconv \
                 -f ISO-8859-1 -t UTF-8 OLD > NEW`"
            );
            Error::new(ErrorCode::Data, format!("`{}`", path.display()), message).caused_by(e)
        }
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

/// The JSON object in the file at `path`. A byte order mark before it is left out, as editors write them.
///
/// # Errors
/// The file cannot be read, is something else, or is a server's answer instead of the file.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    parse_object(path, &bytes)
}

/// As [`read_object`], of bytes that are in memory.
///
/// # Errors
/// As there.
pub(crate) fn parse_object(path: &Path, bytes: &[u8]) -> Result<Map<String, Value>> {
    check(path, bytes, "a JSON object")?;
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let map: Map<String, Value> = serde_json::from_slice(text)
        .or_else(|e| serde_json::from_slice(&with_infinity(text)).map_err(|_| e))
        .map_err(|e| Error::format(path, "JSON", "an object", &e).caused_by(e))?;
    match map.get("error").and_then(Value::as_str) {
        // What the hub answers where a model asks for access, saved under the file's name.
        Some(message) if map.len() == 1 => {
            let message: String = message.chars().take(200).collect();
            let got = format!("a server's answer, `{message}`");
            Err(Error::format(path, "content", "the file itself", got))
        }
        _ => Ok(map),
    }
}

/// JSON in which `Infinity`, as Python writes it, is the object that transformers 5 writes in its place. Configs of Mamba 2
/// have it as a bound that is none.
fn with_infinity(text: &[u8]) -> Vec<u8> {
    const NAME: &[u8] = b"Infinity";
    let (mut out, mut rest, mut quoted) = (Vec::with_capacity(text.len()), text, false);
    while let [first, behind @ ..] = rest {
        if !quoted && rest.starts_with(NAME) {
            out.extend(br#"{"__float__": "Infinity"}"#);
            rest = &rest[NAME.len()..];
            continue;
        }
        out.push(*first);
        rest = behind;
        match (first, behind) {
            (b'"', _) => quoted = !quoted,
            // What follows ends no string.
            (b'\\', [next, behind @ ..]) if quoted => {
                out.push(*next);
                rest = behind;
            }
            _ => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn infinity_is_read_where_it_is_no_text() {
        let read = |text: &str| parse_object(Path::new("config.json"), text.as_bytes()).map(Value::Object);
        let infinity = json!({"__float__": "Infinity"});
        let config = r#"{"limit": [0.0, Infinity], "name": "to \"Infinity\\", "last": Infinity}"#;
        let want = json!({"limit": [0.0, infinity], "name": "to \"Infinity\\", "last": infinity});
        assert_eq!(read(config).unwrap(), want);
        for broken in [r#"{"limit": -Infinity}"#, r#"{"limit": Infinity, }"#, r#"{"limit": Infinit}"#] {
            assert!(read(broken).is_err(), "{broken}");
        }
    }
}
