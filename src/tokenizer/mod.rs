//! Text to token ids and back, by a Hugging Face `tokenizer.json`.

mod declared;
mod plain;
mod special;
mod stream;

pub(crate) use declared::tokens as declared_tokens;
pub use stream::TextStream;

use crate::error::{Error, ErrorCode, Result};
use crate::format::foreign;
pub(crate) use plain::SpecialTokens;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
pub(crate) use special::end_ids;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use tokenizers::{OffsetType, PreTokenizer as _};

/// What becomes of special tokens, such as `<|im_end|>`, that are written out in a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum SpecialText {
    /// Parsed in a text that is taken as it is, left as plain characters in the messages of a chat.
    #[default]
    Auto,
    /// Parsed wherever they stand.
    Parse,
    /// Left as plain characters wherever they stand; only the chat template's own are parsed.
    Text,
}

/// A model's tokenizer with the few ids that generation needs.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    /// Ids that end an answer.
    pub stop: Vec<u32>,
    /// Text of the special tokens that chat templates mention: `bos_token`, `eos_token`, ...
    pub special: Vec<(String, String)>,
    /// What becomes of special tokens in a text.
    pub special_text: SpecialText,
    /// Finds them.
    specials: SpecialTokens,
    /// What stands before every text.
    prefix: Vec<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json` and
    /// `config.json` for the special tokens; the last four may be absent.
    ///
    /// # Errors
    /// A file is missing or broken.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_parts(dir, dir, dir)
    }

    /// As [`Tokenizer::open`], with `tokenizer.json` in `vocabulary`, the two files that name special tokens in `special`,
    /// and the model's two in `model`: an adapter may bring some of them.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn open_parts(vocabulary: &Path, special: &Path, model: &Path) -> Result<Self> {
        let path = vocabulary.join("tokenizer.json");
        if !path.exists() {
            return Err(foreign::no_tokenizer(vocabulary));
        }
        let bytes = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        foreign::check(&path, &bytes, "a tokenizer")?;
        let mut inner = parse(&bytes).map_err(|e| {
            Error::format(&path, "file", "a tokenizer that crate `tokenizers` reads", shortened(&e)).caused_by(e)
        })?;
        // A stored file may cut or pad; a runtime that loses text silently would be wrong.
        inner.with_padding(None);
        let unlimited = inner.with_truncation(None);
        unlimited.map_err(|e| Error::format(&path, "truncation", "none", &e))?;

        declared::add(special, &mut inner)?;
        let names = special::Names::read(special, model, &inner)?;
        let specials = SpecialTokens::new(&inner, |token| token.special);
        let mut tokenizer = Self {
            inner,
            path,
            stop: names.stop,
            special: names.text,
            special_text: SpecialText::default(),
            specials,
            prefix: Vec::new(),
        };
        tokenizer.prefix = match names.adds_bos {
            Some(true) => tokenizer.bos().into_iter().collect(),
            Some(false) => Vec::new(),
            None => tokenizer.added_before()?,
        };
        Ok(tokenizer)
    }

    /// Ids of `text`, which is taken as it is. With `add_special`, what the tokenizer puts before every text (such as a
    /// beginning-of-sequence token) comes first, unless the text begins with it already. What it puts after a text is
    /// left out: a prompt goes on.
    ///
    /// # Errors
    /// The tokenizer cannot express the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let plain = self.plain_in(text);
        let ids: Vec<u32> = self.tokens(text, &plain, OffsetType::None)?.into_iter().map(|t| t.0).collect();
        if !add_special || self.starts_with_prefix(&ids) {
            return Ok(ids);
        }
        Ok([&self.prefix[..], &ids].concat())
    }

    /// Ids of a rendered chat, of which the bytes `plain` are no special tokens though they are written so.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_chat(&self, text: &str, plain: &[Range<usize>]) -> Result<Vec<u32>> {
        Ok(self.tokens(text, plain, OffsetType::None)?.into_iter().map(|t| t.0).collect())
    }

    /// Ids of `text`, each with the range of bytes that it came from. Of bytes that are one character, each has the whole
    /// character's range. `plain` as in [`Tokenizer::encode_chat`].
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_offsets(&self, text: &str, plain: &[Range<usize>]) -> Result<Vec<(u32, Range<usize>)>> {
        self.tokens(text, plain, OffsetType::Byte)
    }

    /// The bytes of a text, taken as it is, that are not parsed as special tokens though they are written so.
    #[must_use]
    pub fn plain_in(&self, text: &str) -> Vec<Range<usize>> {
        match self.special_text {
            SpecialText::Auto | SpecialText::Parse => Vec::new(),
            SpecialText::Text => self.specials.find(text),
        }
    }

    /// What it writes before every text, such as a beginning-of-sequence token.
    #[must_use]
    pub fn prefix_ids(&self) -> &[u32] {
        &self.prefix
    }

    /// Whether `ids` begin with what stands before every text; they do where that is nothing.
    #[must_use]
    pub fn starts_with_prefix(&self, ids: &[u32]) -> bool {
        ids.starts_with(&self.prefix)
    }

    /// Where `text` has special tokens written out.
    #[must_use]
    pub fn special_in(&self, text: &str) -> Vec<Range<usize>> {
        self.specials.find(text)
    }

    /// Finds special tokens, such as those that chat templates write between turns.
    pub(crate) fn specials(&self) -> SpecialTokens {
        self.specials.clone()
    }

    /// Finds these, and other added tokens that `template` writes itself.
    pub(crate) fn specials_and_those_in(&self, template: &str) -> SpecialTokens {
        SpecialTokens::new(&self.inner, |token| token.special || template.contains(&token.content))
    }

    /// All steps but the last, which adds special tokens: it may also cut spaces off the places of tokens.
    fn tokens(&self, text: &str, plain: &[Range<usize>], places: OffsetType) -> Result<Vec<(u32, Range<usize>)>> {
        let work = || {
            let mut parts = if plain.is_empty() {
                self.inner.get_added_vocabulary().extract_and_normalize(self.inner.get_normalizer(), text)
            } else {
                plain::extract(&self.inner, text, plain)?
            };
            if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut parts)?;
            }
            parts.tokenize(|part| tokenizers::Model::tokenize(self.inner.get_model(), part.get()))?;
            parts.into_encoding(None, 0, places)
        };
        let encoding = guarded(work).map_err(|e| self.failed(&e))?;
        let ranges = encoding.get_offsets().iter().map(|&(from, to)| from..to);
        Ok(encoding.get_ids().iter().copied().zip(ranges).collect())
    }

    /// What the tokenizer's last step puts before a text.
    fn added_before(&self) -> Result<Vec<u32>> {
        let all = guarded(|| self.inner.encode_fast("a", true)).map_err(|e| self.failed(&e))?;
        let alone = self.tokens("a", &[], OffsetType::None)?;
        let (all, first) = (all.get_ids(), alone.first().map(|t| t.0));
        // A text of no token leaves what comes before and after in one list, of which the end of a text is the latter.
        let end = first.map_or_else(
            || all.iter().position(|&id| Some(id) == self.eos()).unwrap_or(all.len()),
            |first| all.iter().position(|&id| id == first).unwrap_or(0),
        );
        Ok(all[..end].to_vec())
    }

    /// The token that begins a text.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.named("bos_token")
    }

    /// The token that ends a text.
    #[must_use]
    pub fn eos(&self) -> Option<u32> {
        self.named("eos_token")
    }

    fn named(&self, name: &str) -> Option<u32> {
        let (_, text) = self.special.iter().find(|(n, _)| n == name)?;
        self.inner.token_to_id(text)
    }

    /// The id of a token by its text.
    #[must_use]
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
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
        TextStream::new(self)
    }

    fn failed(&self, e: &tokenizers::Error) -> Error {
        let message = format!(
            "expected a tokenizer for any text, got {}; take tokenizer.json from where the model came from",
            shortened(e)
        );
        Error::new(ErrorCode::Data, format!("`{}`", self.path.display()), message)
    }
}

fn parse(bytes: &[u8]) -> tokenizers::Result<tokenizers::Tokenizer> {
    /// `tokenizers` panics where the JSON of a decoder is malformed, so it gets to see only JSON that is not.
    #[derive(Deserialize)]
    struct Checked {
        #[allow(dead_code, reason = "parsing it is the check")]
        decoder: Option<Value>,
        #[serde(default)]
        added_tokens: Vec<Added>,
        model: Option<Model>,
    }
    #[derive(Deserialize)]
    struct Added {
        id: u32,
        content: String,
    }
    #[derive(Deserialize)]
    struct Model {
        dropout: Option<f64>,
    }
    let checked: Checked = serde_json::from_slice(bytes)?;
    let tokenizer = if checked.model.and_then(|m| m.dropout).is_some_and(|p| p > 0.0 && p <= 1.0) {
        // Meant for the training of models from nothing: the same text would become other tokens each time.
        let mut json: Value = serde_json::from_slice(bytes)?;
        json["model"]["dropout"] = Value::Null;
        let bytes = serde_json::to_vec(&json)?;
        guarded(|| tokenizers::Tokenizer::from_bytes(bytes))?
    } else {
        guarded(|| tokenizers::Tokenizer::from_bytes(bytes))?
    };
    // The crate gives a token the next free id, whatever the file says: that is another row of the embedding.
    for Added { id, content } in checked.added_tokens {
        if tokenizer.token_to_id(&content) != Some(id) {
            let got = tokenizer.token_to_id(&content).map_or_else(|| "none".to_owned(), |id| id.to_string());
            return Err(
                format!("id {id} for the added token `{content}`, where the vocabulary has room for {got}").into()
            );
        }
    }
    Ok(tokenizer)
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

/// A JSON object, empty if the file is absent.
pub(crate) fn read_json(path: &Path) -> Result<Map<String, Value>> {
    match std::fs::read(path) {
        Ok(bytes) => foreign::parse_object(path, &bytes),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
        Err(e) => Err(Error::io("read", path, e)),
    }
}
