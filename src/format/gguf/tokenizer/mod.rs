//! A Hugging Face `tokenizer.json` from the vocabulary and names in GGUF metadata: byte-level BPE, SentencePiece and Unigram.
//!
//! What llama.cpp reads of `tokenizer.ggml.*` and a model of these kinds has no use for: `token_type_count`,
//! `cls_token_id`, `mask_token_id` and `seperator_token_id` (encoders), `fim_*` (marks of infilling, which are in the
//! vocabulary as they are), `add_space_prefix` beside BPE (SentencePiece's alone).

mod bpe;
mod pre;
mod spm;
mod unigram;

pub(super) use pre::pre_name;

use super::value::Metadata;
use crate::error::{Error, Result};
use serde::ser::{Serialize, Serializer};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::HashMap;

pub(super) const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
pub(super) const BOS: &str = "tokenizer.ggml.bos_token_id";
pub(super) const EOS: &str = "tokenizer.ggml.eos_token_id";
pub(super) const UNK: &str = "tokenizer.ggml.unknown_token_id";

// `tokenizer.ggml.token_type`, llama.cpp's `llama_token_type`. The type of bytes (6) says nothing that their text does
// not.
const TYPE_UNDEFINED: u64 = 0;
const TYPE_NORMAL: u64 = 1;
const TYPE_UNKNOWN: u64 = 2;
const TYPE_CONTROL: u64 = 3;
const TYPE_USER_DEFINED: u64 = 4;
const TYPE_UNUSED: u64 = 5;

/// Tokens that end an answer, by their text. Files name at most one or two of them under a key and give many another
/// type than control, so llama.cpp goes by the text, too.
const ENDS: &[&str] = &[
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<turn|>",
    "<end_of_utterance>",
    "</s>",
    "<eos>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    ByteLevel,
    SentencePiece,
    /// As SentencePiece, with merges.
    Merged,
    Unigram,
}

/// The vocabulary, borrowed from the map.
pub(super) struct Vocabulary<'a> {
    meta: &'a Metadata,
    kind: Kind,
    /// Token texts by id; byte-level ones in GPT-2's alphabet.
    tokens: Vec<Cow<'a, str>>,
    ids: HashMap<Cow<'a, str>, usize>,
    types: Vec<u64>,
}

impl<'a> Vocabulary<'a> {
    /// The vocabulary of the file, or none where it has no tokenizer at all.
    ///
    /// # Errors
    /// The tokenizer is of a kind that cannot be expressed, or its lists contradict each other.
    pub(super) fn read(meta: &'a Metadata) -> Result<Option<Self>> {
        let Some(kind) = kind(meta)? else { return Ok(None) };
        let texts = meta.required(TOKENS, meta.strings(TOKENS)?)?;
        let types = meta.uints(TYPES)?.unwrap_or_else(|| vec![TYPE_NORMAL; texts.len()]);
        if types.len() != texts.len() {
            return Err(meta.fail(TYPES, format_args!("{} entries, as many as tokens", texts.len()), types.len()));
        }
        // Padding of a vocabulary may have no text; each such token gets one of its own, as in llama.cpp.
        let text = |(id, text): (usize, &'a str)| {
            if text.is_empty() { Cow::Owned(format!("[EMPTY_{id}]")) } else { Cow::Borrowed(text) }
        };
        let tokens: Vec<_> = texts.into_iter().enumerate().map(text).collect();
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, text) in tokens.iter().enumerate() {
            if let Some(first) = ids.insert(text.clone(), id) {
                return Err(meta.fail(TOKENS, "every token once", format_args!("`{text}` as {first} and {id}")));
            }
        }
        let vocabulary = Self { meta, kind, tokens, ids, types };
        vocabulary.refuse_switches()?;
        Ok(Some(vocabulary))
    }

    /// Switches that would change the ids, and that neither kind has.
    fn refuse_switches(&self) -> Result<()> {
        for key in ["add_sep_token", "normalizer.lowercase", "normalizer.strip_accents"] {
            let key = format!("tokenizer.ggml.{key}");
            if self.meta.bool(&key)? == Some(true) {
                let what = format_args!("`{key}`, which encoders have,");
                return Err(Error::unsupported(self.meta.path(), what, "use the model's safetensors files"));
            }
        }
        let key = "tokenizer.ggml.suppress_tokens";
        match self.meta.get(key) {
            Some(super::Value::Array(list)) if list.is_empty() => Ok(()),
            None => Ok(()),
            Some(_) => {
                let what = format_args!("a list of tokens that are never sampled (`{key}`)");
                Err(Error::unsupported(self.meta.path(), what, "use the model's safetensors files"))
            }
        }
    }

    /// The id under `key` and its text, where given or, for SentencePiece, where llama.cpp has a default.
    pub(super) fn named(&self, key: &str) -> Result<Option<(usize, &str)>> {
        let default = match (self.kind, key) {
            (Kind::SentencePiece, UNK) => Some(0),
            (Kind::SentencePiece, BOS) => Some(1),
            (Kind::SentencePiece, EOS) => Some(2),
            (Kind::Unigram, EOS) => Some(1),
            (Kind::Unigram, UNK) => Some(2),
            _ => None,
        };
        let given = self.meta.uint(key)?;
        let Some(id) = given.or(default.filter(|&id| id < self.tokens.len())) else { return Ok(None) };
        match self.tokens.get(id) {
            Some(text) => Ok(Some((id, text))),
            None => Err(self.meta.fail(key, format_args!("an id below {}", self.tokens.len()), id)),
        }
    }

    /// Tokens whose text says that they end an answer.
    pub(super) fn ends(&self) -> Vec<usize> {
        let has = |text: &str| self.ids.contains_key(text);
        // Where a turn ends with another mark, this one ends only a part of it.
        let part =
            (has("<|return|>") && has("<|call|>")) || (has("<|flush|>") && (has("<|call|>") || has("<|calls|>")));
        ENDS.iter()
            .filter(|&&text| !(part && text == "<|end|>"))
            .filter_map(|&text| self.ids.get(text).copied())
            .collect()
    }

    /// Whether a token is a mark, not text.
    fn is_control(&self, id: usize) -> bool {
        matches!(self.types[id], TYPE_CONTROL | TYPE_UNKNOWN) || ENDS.contains(&self.tokens[id].as_ref())
    }

    /// The bytes of `tokenizer.json`.
    ///
    /// # Errors
    /// The pre-tokenizer is not known, or merges or scores do not fit the vocabulary.
    pub(super) fn to_json(&self) -> Result<Vec<u8>> {
        let (parts, adds_bos) = match self.kind {
            Kind::ByteLevel => {
                let pre = bpe::pre(self.meta)?;
                (bpe::parts(self, pre)?, pre.adds_bos)
            }
            Kind::SentencePiece => (spm::parts(self)?, true),
            Kind::Merged => (spm::merged(self)?, true),
            Kind::Unigram => (unigram::parts(self)?, false),
        };
        let file = TokenizerFile {
            version: "1.0",
            truncation: (),
            padding: (),
            added_tokens: self.added_tokens(),
            post_processor: self.post_processor(adds_bos)?,
            parts,
        };
        serde_json::to_vec(&file).map_err(|e| {
            self.meta.fail(TOKENS, "a vocabulary that can be written as JSON", "something else").caused_by(e)
        })
    }

    /// Tokens that are found in text before it is split into words.
    fn added_tokens(&self) -> Vec<Value> {
        let added = |(id, text): (usize, &Cow<'_, str>)| {
            let special = self.is_control(id);
            (special || self.types[id] == TYPE_USER_DEFINED).then(|| {
                json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": special})
            })
        };
        self.tokens.iter().enumerate().filter_map(added).collect()
    }

    /// Adds BOS and EOS around the text where the file asks for it.
    fn post_processor(&self, adds_bos: bool) -> Result<Value> {
        let wanted = |switch: &str, id: &str, default: bool| {
            if !self.meta.bool(switch)?.unwrap_or(default) {
                return Ok(None);
            }
            self.named(id).and_then(|token| self.meta.required(id, token)).map(Some)
        };
        let bos = match self.kind {
            // The first files of Gemma 4 say that it is not added; llama.cpp adds it, as the model's own tokenizer does.
            Kind::Merged => Some(self.named(BOS).and_then(|token| self.meta.required(BOS, token))?),
            _ => wanted("tokenizer.ggml.add_bos_token", BOS, adds_bos)?,
        };
        let eos = wanted("tokenizer.ggml.add_eos_token", EOS, self.kind == Kind::Unigram)?;
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

/// The kind of tokenizer, or none where the file has no tokenizer.
fn kind(meta: &Metadata) -> Result<Option<Kind>> {
    let name = match meta.string(MODEL)? {
        None | Some("none" | "no_vocab") => return Ok(None),
        Some("gpt2") => return Ok(Some(Kind::ByteLevel)),
        Some("llama") => return Ok(Some(Kind::SentencePiece)),
        Some("gemma4") => return Ok(Some(Kind::Merged)),
        Some("t5") => return Ok(Some(Kind::Unigram)),
        Some(name) => name,
    };
    let kind = match name {
        "bert" => "WordPiece",
        "rwkv" => "RWKV's greedy matching",
        "plamo2" => "PLaMo 2's own",
        "hybriddna" => "DNA in groups of letters",
        "whitespace" => "whole words",
        _ => "unknown",
    };
    Err(Error::unsupported(
        meta.path(),
        format_args!("tokenizer model `{name}` ({MODEL}; its kind: {kind})"),
        "byte-level BPE (`gpt2`), SentencePiece (`llama`, `gemma4`) and Unigram (`t5`) can be read; use the model's safetensors files",
    ))
}

/// `tokenizer.json`; unit fields are written as null.
#[derive(serde::Serialize)]
struct TokenizerFile<'a> {
    version: &'static str,
    truncation: (),
    padding: (),
    added_tokens: Vec<Value>,
    post_processor: Value,
    #[serde(flatten)]
    parts: Parts<'a>,
}

/// What the kinds differ in.
#[derive(serde::Serialize)]
struct Parts<'a> {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Model<'a>,
}

/// What cuts a text into tokens.
#[derive(serde::Serialize)]
#[serde(untagged)]
enum Model<'a> {
    Bpe(Bpe<'a>),
    Unigram {
        #[serde(rename = "type")]
        kind: &'static str,
        unk_id: Option<usize>,
        vocab: Vec<(&'a str, f32)>,
        byte_fallback: bool,
    },
}

#[derive(serde::Serialize)]
struct Bpe<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    dropout: (),
    unk_token: Option<&'a str>,
    continuing_subword_prefix: (),
    end_of_word_suffix: (),
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: Ids<'a>,
    merges: Vec<(&'a str, &'a str)>,
}

impl<'a> Bpe<'a> {
    fn new(vocabulary: &'a Vocabulary<'_>, merges: Vec<(&'a str, &'a str)>) -> Self {
        Self {
            kind: "BPE",
            dropout: (),
            unk_token: None,
            continuing_subword_prefix: (),
            end_of_word_suffix: (),
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: false,
            vocab: Ids(&vocabulary.tokens),
            merges,
        }
    }
}

/// A list of tokens, written as a map from each to its position.
struct Ids<'a>(&'a [Cow<'a, str>]);

impl Serialize for Ids<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().enumerate().map(|(id, token)| (token, id)))
    }
}
