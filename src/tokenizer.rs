//! Text to token ids and back, by a Hugging Face `tokenizer.json`.

use crate::error::{Error, ErrorCode, Result};
use crate::format::foreign;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// A model's tokenizer with the few ids that generation needs.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    /// Ids that end an answer.
    pub stop: Vec<u32>,
    /// Text of the special tokens that chat templates mention: `bos_token`, `eos_token`, ...
    pub special: Vec<(String, String)>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and `tokenizer_config.json`, `generation_config.json` and `config.json` for the special
    /// tokens; the last three may be absent.
    ///
    /// # Errors
    /// A file is missing or broken.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        foreign::check(&path, &bytes, "a tokenizer")?;
        let mut inner = parse(&bytes).map_err(|e| {
            Error::format(&path, "file", "a tokenizer that crate `tokenizers` reads", shortened(&e)).caused_by(e)
        })?;
        // A stored file may cut or pad; a runtime that loses text silently would be wrong.
        inner.with_padding(None);
        let unlimited = inner.with_truncation(None);
        unlimited.map_err(|e| Error::format(&path, "truncation", "none", &e))?;

        let special = special_tokens(&dir.join("tokenizer_config.json"))?;

        let mut stop = Vec::new();
        for file in ["generation_config.json", "config.json"] {
            stop.extend(stop_ids(&dir.join(file))?);
        }
        stop.extend(special.iter().filter(|(n, _)| n == "eos_token").filter_map(|(_, t)| inner.token_to_id(t)));
        // Chat models end a turn with one of these, whatever their config says about the end of a text.
        stop.extend(
            ["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"].iter().filter_map(|t| inner.token_to_id(t)),
        );
        stop.sort_unstable();
        stop.dedup();
        Ok(Self { inner, path, stop, special })
    }

    /// Ids of `text`. Special tokens written out in it are parsed; with `add_special`, those that the tokenizer puts
    /// around a text (such as a beginning-of-sequence token) are added.
    ///
    /// # Errors
    /// The tokenizer cannot express the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode_fast(text, add_special)).map_err(|e| self.failed(&e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of `text` with the range of bytes that each came from.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = guarded(|| self.inner.encode(text, false)).map_err(|e| self.failed(&e))?;
        let ranges = encoding.get_offsets().iter().map(|&(from, to)| from..to);
        Ok(encoding.get_ids().iter().copied().zip(ranges).collect())
    }

    /// What the tokenizer puts before every text, such as a beginning-of-sequence token.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn prefix_ids(&self) -> Result<Vec<u32>> {
        self.encode("", true)
    }

    /// The token that ends a text.
    #[must_use]
    pub fn eos(&self) -> Option<u32> {
        let (_, text) = self.special.iter().find(|(name, _)| name == "eos_token")?;
        self.inner.token_to_id(text)
    }

    /// Text of `ids`, without special tokens.
    ///
    /// # Errors
    /// An id is unknown to the tokenizer.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        guarded(|| self.inner.decode(ids, true)).map_err(|e| self.failed(&e))
    }

    /// Text of `ids`, with special tokens.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn decode_with_special(&self, ids: &[u32]) -> Result<String> {
        guarded(|| self.inner.decode(ids, false)).map_err(|e| self.failed(&e))
    }

    /// Decodes a growing answer piece by piece.
    #[must_use]
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, ids: Vec::new(), shown: 0, settled: 0 }
    }

    fn failed(&self, e: &tokenizers::Error) -> Error {
        let message = format!("expected a tokenizer for any text, got {}; fetch the model again", shortened(e));
        Error::new(ErrorCode::Data, format!("`{}`", self.path.display()), message)
    }
}

fn parse(bytes: &[u8]) -> tokenizers::Result<tokenizers::Tokenizer> {
    /// `tokenizers` panics where the JSON of a decoder is malformed, so it gets to see only JSON that is not.
    #[derive(Deserialize)]
    struct Checked {
        #[allow(dead_code, reason = "parsing it is the check")]
        decoder: Option<Value>,
    }
    serde_json::from_slice::<Checked>(bytes)?;
    guarded(|| tokenizers::Tokenizer::from_bytes(bytes))
}

/// Runs `work` of crate `tokenizers`, which meets some absurd files with a panic, and makes an error of that.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    // A tokenizer keeps nothing between two calls but a cache, which may be left half updated.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(format!("a contradiction ({})", said.unwrap_or("a panic")).into())
    })
}

/// The message of an error that may quote what it met.
fn shortened(e: &impl std::fmt::Display) -> String {
    let text = e.to_string();
    match text.char_indices().nth(300) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// The named special tokens of a `tokenizer_config.json`: each a string, or an object with `content`.
fn special_tokens(path: &Path) -> Result<Vec<(String, String)>> {
    let config = read_json(path)?;
    let names = ["bos_token", "eos_token", "unk_token", "pad_token"];
    let given = names.iter().filter_map(|name| Some((*name, config.get(*name).filter(|v| !v.is_null())?)));
    let text = |(name, value): (&str, &Value)| {
        let text = value.as_str().or_else(|| value.get("content")?.as_str());
        let text = text.ok_or_else(|| Error::format(path, name, "a string or an object with `content`", "neither"))?;
        Ok((name.to_owned(), text.to_owned()))
    };
    given.map(text).collect()
}

/// `eos_token_id`: an id, or a list of ids.
fn stop_ids(path: &Path) -> Result<Vec<u32>> {
    let config = read_json(path)?;
    let list = match config.get("eos_token_id") {
        None | Some(Value::Null) => &[],
        Some(Value::Array(list)) => &list[..],
        Some(one) => std::slice::from_ref(one),
    };
    let id = |v: &Value| {
        let id = v.as_u64().and_then(|n| u32::try_from(n).ok());
        id.ok_or_else(|| Error::format(path, "eos_token_id", "a token id or a list of them", "something else"))
    };
    list.iter().map(id).collect()
}

/// A JSON object, empty if the file is absent.
pub(crate) fn read_json(path: &Path) -> Result<Map<String, Value>> {
    match std::fs::read(path) {
        Ok(bytes) => foreign::parse_object(path, &bytes),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
        Err(e) => Err(Error::io("read", path, e)),
    }
}

/// Turns ids into text as they come, holding back bytes that are not yet a whole character.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Bytes of the window's text already given out.
    shown: usize,
    /// Ids before this one are not decoded again.
    settled: usize,
}

impl TextStream<'_> {
    /// The text that `id` completes; empty while a character is still in pieces.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids[self.settled..])?;
        // An unfinished character decodes to the replacement character.
        if text.ends_with('\u{fffd}') || text.len() <= self.shown {
            return Ok(String::new());
        }
        let Some(piece) = text.get(self.shown..).map(str::to_owned) else { return Ok(String::new()) };
        self.shown = text.len();
        // Decoding restarts at the last id now and then, which keeps each step's work constant; the last id stays in
        // the window because some decoders treat the first one differently.
        if self.ids.len() - self.settled > 16 {
            self.settled = self.ids.len() - 1;
            self.shown = self.tokenizer.decode(&self.ids[self.settled..])?.len();
        }
        Ok(piece)
    }

    /// What was held back, at the end of an answer.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids[self.settled..])?;
        Ok(text.get(self.shown..).unwrap_or_default().to_owned())
    }
}
