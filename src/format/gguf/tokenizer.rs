//! A Hugging Face `tokenizer.json` from the vocabulary, merges and names in GGUF metadata.
//!
//! Only byte-level BPE (`tokenizer.ggml.model` = `gpt2`). GGUF names the split into words (`tokenizer.ggml.pre`)
//! instead of describing it; the descriptions here are those of the models' published `tokenizer.json`.

use super::value::Metadata;
use crate::error::{Error, Result};
use serde::ser::{Serialize, Serializer};
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

// `tokenizer.ggml.token_type`, llama.cpp's `llama_token_type`; the others are ordinary vocabulary.
const TYPE_UNKNOWN: u64 = 2;
const TYPE_CONTROL: u64 = 3;
const TYPE_USER_DEFINED: u64 = 4;

/// Words of Llama 3: contractions, letters with one leading symbol, up to three digits, punctuation, white space.
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words of Qwen 2: as Llama 3's, but every digit alone.
const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A known way to split text into words before merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pre {
    Gpt2,
    SmolLm,
    Llama3,
    Qwen2,
}

impl Pre {
    fn read(meta: &Metadata) -> Result<Self> {
        let names = "`smollm`, `gpt-2`, `llama-bpe` and `qwen2` can be read; use the model's own tokenizer.json";
        match meta.string(PRE)? {
            Some("gpt-2") => Ok(Self::Gpt2),
            Some("smollm") => Ok(Self::SmolLm),
            Some("llama-bpe" | "llama3" | "llama-v3") => Ok(Self::Llama3),
            Some("qwen2" | "deepseek-r1-qwen") => Ok(Self::Qwen2),
            Some(other) => Err(Error::unsupported(meta.path(), format_args!("pre-tokenizer `{other}` ({PRE})"), names)),
            None => Err(Error::unsupported(meta.path(), format_args!("a tokenizer without `{PRE}`"), names)),
        }
    }

    fn normalizer(self) -> Value {
        if self == Self::Qwen2 { json!({"type": "NFC"}) } else { Value::Null }
    }

    fn pre_tokenizer(self) -> Value {
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let split = |words: &str| json!({"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": false});
        let both = |first: Value, second: Value| json!({"type": "Sequence", "pretokenizers": [first, second]});
        match self {
            Self::Gpt2 => bytes(true),
            Self::SmolLm => both(json!({"type": "Digits", "individual_digits": true}), bytes(true)),
            Self::Llama3 => both(split(LLAMA3_WORDS), bytes(false)),
            Self::Qwen2 => both(split(QWEN2_WORDS), bytes(false)),
        }
    }

    /// Llama 3's tokenizer takes a word that is in the vocabulary as it is, even where merges would not make it.
    fn ignores_merges(self) -> bool {
        self == Self::Llama3
    }

    /// Whether the text starts with BOS when the file does not say. Files of Llama 3 from before mid-2025 do not, and
    /// its own tokenizer adds it; llama.cpp has the same default.
    fn adds_bos(self) -> bool {
        self == Self::Llama3
    }
}

/// The vocabulary, borrowed from the map.
pub(super) struct Vocabulary<'a> {
    meta: &'a Metadata,
    /// Token texts in the byte-level alphabet, by id.
    pub(super) tokens: Vec<&'a str>,
    types: Vec<u64>,
}

impl<'a> Vocabulary<'a> {
    /// The vocabulary of the file, or none where it has no tokenizer at all.
    ///
    /// # Errors
    /// The tokenizer is of another kind than byte-level BPE, or its lists contradict each other.
    pub(super) fn read(meta: &'a Metadata) -> Result<Option<Self>> {
        match meta.string(MODEL)? {
            Some("gpt2") => {}
            None | Some("none" | "no_vocab") => return Ok(None),
            Some(other) => {
                return Err(Error::unsupported(
                    meta.path(),
                    format_args!("tokenizer model `{other}` ({MODEL})"),
                    "byte-level BPE (`gpt2`) can be read; use the model's own tokenizer.json",
                ));
            }
        }
        let tokens = meta.required(TOKENS, meta.strings(TOKENS)?)?;
        let types = meta.uints(TYPES)?.unwrap_or_else(|| vec![1; tokens.len()]);
        if types.len() != tokens.len() {
            return Err(meta.fail(TYPES, format_args!("{} entries, as many as tokens", tokens.len()), types.len()));
        }
        Ok(Some(Self { meta, tokens, types }))
    }

    /// The id under `key` and its text, where given.
    pub(super) fn named(&self, key: &str) -> Result<Option<(usize, &'a str)>> {
        let Some(id) = self.meta.uint(key)? else { return Ok(None) };
        match self.tokens.get(id) {
            Some(&text) => Ok(Some((id, text))),
            None => Err(self.meta.fail(key, format_args!("an id below {}", self.tokens.len()), id)),
        }
    }

    /// Whether a token is a mark, not text.
    pub(super) fn is_control(&self, id: usize) -> bool {
        matches!(self.types.get(id), Some(&(TYPE_CONTROL | TYPE_UNKNOWN)))
    }

    /// The bytes of `tokenizer.json`.
    ///
    /// # Errors
    /// The pre-tokenizer is not known, a token occurs twice, or a merge does not fit the vocabulary.
    pub(super) fn to_json(&self) -> Result<Vec<u8>> {
        let pre = Pre::read(self.meta)?;
        let file = TokenizerFile {
            version: "1.0",
            truncation: (),
            padding: (),
            added_tokens: self.added_tokens(),
            normalizer: pre.normalizer(),
            pre_tokenizer: pre.pre_tokenizer(),
            post_processor: self.post_processor(pre)?,
            decoder: json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
            model: Bpe {
                kind: "BPE",
                dropout: (),
                unk_token: (),
                continuing_subword_prefix: (),
                end_of_word_suffix: (),
                fuse_unk: false,
                byte_fallback: false,
                ignore_merges: pre.ignores_merges(),
                vocab: Ids(&self.tokens),
                merges: self.merges()?,
            },
        };
        serde_json::to_vec(&file).map_err(|e| {
            self.meta.fail(TOKENS, "a vocabulary that can be written as JSON", "something else").caused_by(e)
        })
    }

    /// Tokens that are found in text before it is split into words.
    fn added_tokens(&self) -> Vec<Value> {
        let added = |(id, text): (usize, &&str)| {
            let special = self.is_control(id);
            (special || self.types[id] == TYPE_USER_DEFINED).then(|| {
                json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": special})
            })
        };
        self.tokens.iter().enumerate().filter_map(added).collect()
    }

    /// The merges as pairs, each checked, for the loader of `tokenizer.json` names no file in its errors.
    fn merges(&self) -> Result<Vec<(&'a str, &'a str)>> {
        let known: HashSet<&str> = self.tokens.iter().copied().collect();
        if known.len() != self.tokens.len() {
            let mut first = HashMap::new();
            let twice = self.tokens.iter().enumerate().find_map(|(id, t)| first.insert(t, id).map(|a| (t, a, id)));
            let got = twice.map(|(t, a, b)| format!("`{t}` as {a} and {b}")).unwrap_or_default();
            return Err(self.meta.fail(TOKENS, "every token once", got));
        }
        let lines = self.meta.required(MERGES, self.meta.strings(MERGES)?)?;
        let mut joined = String::new();
        let mut merges = Vec::with_capacity(lines.len());
        for (i, line) in lines.iter().enumerate() {
            let parts = line.split_once(' ').filter(|(a, b)| {
                joined.clear();
                joined.push_str(a);
                joined.push_str(b);
                known.contains(a) && known.contains(b) && known.contains(joined.as_str())
            });
            merges.push(parts.ok_or_else(|| {
                let got = format_args!("`{line}` as number {i}");
                self.meta.fail(MERGES, "two tokens whose union is a token", got)
            })?);
        }
        Ok(merges)
    }

    /// Adds BOS and EOS around the text where the file asks for it.
    fn post_processor(&self, pre: Pre) -> Result<Value> {
        let wanted = |switch: &str, id: &str, default: bool| {
            if !self.meta.bool(switch)?.unwrap_or(default) {
                return Ok(None);
            }
            self.named(id).and_then(|token| self.meta.required(id, token)).map(Some)
        };
        let bos = wanted("tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id", pre.adds_bos())?;
        let eos = wanted("tokenizer.ggml.add_eos_token", "tokenizer.ggml.eos_token_id", false)?;
        if bos.is_none() && eos.is_none() {
            return Ok(Value::Null);
        }
        let mark = |token: &Option<(usize, &str)>, segment: u8| {
            token.map(|(_, text)| json!({"SpecialToken": {"id": text, "type_id": segment}}))
        };
        let text = |name: &str, segment: u8| {
            let sequence = json!({"Sequence": {"id": name, "type_id": segment}});
            [mark(&bos, segment), Some(sequence), mark(&eos, segment)].into_iter().flatten()
        };
        let tokens: serde_json::Map<String, Value> = [bos, eos]
            .into_iter()
            .flatten()
            .map(|(id, text)| (text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]})))
            .collect();
        Ok(json!({
            "type": "TemplateProcessing",
            "single": text("A", 0).collect::<Vec<_>>(),
            "pair": text("A", 0).chain(text("B", 1)).collect::<Vec<_>>(),
            "special_tokens": tokens,
        }))
    }
}

/// `tokenizer.json`; unit fields are written as null.
#[derive(serde::Serialize)]
struct TokenizerFile<'a> {
    version: &'static str,
    truncation: (),
    padding: (),
    added_tokens: Vec<Value>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Bpe<'a>,
}

#[derive(serde::Serialize)]
struct Bpe<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    dropout: (),
    unk_token: (),
    continuing_subword_prefix: (),
    end_of_word_suffix: (),
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: Ids<'a>,
    merges: Vec<(&'a str, &'a str)>,
}

/// A list of tokens, written as a map from each to its position.
struct Ids<'a>(&'a [&'a str]);

impl Serialize for Ids<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().enumerate().map(|(id, token)| (token, id)))
    }
}
