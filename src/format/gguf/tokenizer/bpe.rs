//! Byte-level BPE (`tokenizer.ggml.model` = `gpt2`): the file has merges and names the split into words.

use super::pre::Pre;
use super::{Bpe, Model, PRE, Parts, TOKENS, Vocabulary};
use crate::error::{Error, Result};
use crate::format::gguf::value::Metadata;
use serde_json::json;
use std::collections::HashSet;

const MERGES: &str = "tokenizer.ggml.merges";

/// The pre-tokenizer that the file names.
///
/// # Errors
/// It names none, or one that cannot be expressed. llama.cpp guesses where the name is missing, and says that answers
/// will be worse; a guess that nobody sees has no place in a library.
pub(super) fn pre(meta: &Metadata) -> Result<Pre> {
    let advice = "use the model's safetensors files, or convert it with a llama.cpp of today";
    let Some(name) = meta.string(PRE)? else {
        return Err(Error::unsupported(meta.path(), format_args!("a tokenizer without `{PRE}`"), advice));
    };
    Pre::of(name).map_err(|kind| match kind {
        Some(kind) => {
            let what = format_args!("pre-tokenizer `{name}` ({PRE}): {kind}");
            Error::unsupported(meta.path(), what, "use the model's safetensors files")
        }
        None => {
            let known: Vec<_> = Pre::names().collect();
            let next = format!("`{}` can be read; use the model's safetensors files", known.join("`, `"));
            Error::unsupported(meta.path(), format_args!("pre-tokenizer `{name}` ({PRE})"), next)
        }
    })
}

/// What byte-level BPE makes of the vocabulary.
pub(super) fn parts<'a>(vocabulary: &'a Vocabulary<'_>, pre: Pre) -> Result<Parts<'a>> {
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    Ok(Parts {
        normalizer: pre.normalizer(),
        pre_tokenizer: pre.pre_tokenizer(),
        decoder: bytes,
        model: Model::Bpe(Bpe { ignore_merges: pre.ignores_merges, ..Bpe::new(vocabulary, merges(vocabulary)?) }),
    })
}

/// The merges as pairs, each checked, for the loader of `tokenizer.json` names no file in its errors.
pub(super) fn merges<'a>(vocabulary: &'a Vocabulary<'_>) -> Result<Vec<(&'a str, &'a str)>> {
    let meta = vocabulary.meta;
    let known: HashSet<&str> = vocabulary.tokens.iter().map(AsRef::as_ref).collect();
    let lines = meta.required(MERGES, meta.strings(MERGES)?)?;
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
            meta.fail(MERGES, format_args!("two tokens of `{TOKENS}` whose union is a token"), got)
        })?);
    }
    Ok(merges)
}
