//! Unigram (`tokenizer.ggml.model` = `t5`): SentencePiece's other model (Kudo 2018). A text is cut into the pieces whose scores,
//! which are logarithms of probabilities, have the greatest sum.

use super::spm::{CHARSMAP, EXTRA_SPACES, SPACE, SPACE_PREFIX, scores};
use super::{Model, Parts, Vocabulary};
use crate::error::Result;
use crate::format::gguf::value::{Metadata, Value as Found};
use serde_json::{Value, json};

/// What the Unigram model makes of the vocabulary.
pub(super) fn parts<'a>(vocabulary: &'a Vocabulary<'_>) -> Result<Parts<'a>> {
    let meta = vocabulary.meta;
    let mut normalizers = Vec::new();
    if let Some(table) = charsmap(meta)? {
        normalizers.push(json!({"type": "Precompiled", "precompiled_charsmap": base64(&table)}));
    }
    // What T5's file says where this one says nothing.
    if meta.bool(EXTRA_SPACES)?.unwrap_or(true) {
        normalizers.push(json!({"type": "Strip", "strip_left": true, "strip_right": true}));
        normalizers.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
    }
    let scheme = if meta.bool(SPACE_PREFIX)?.unwrap_or(true) { "always" } else { "never" };
    let spaces = json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": true});
    let unknown = vocabulary.named(super::UNK)?.map(|(id, _)| id);
    let pieces = vocabulary.tokens.iter().map(AsRef::as_ref).zip(scores(vocabulary)?).collect();
    Ok(Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: spaces.clone(),
        decoder: spaces,
        model: Model::Unigram { kind: "Unigram", unk_id: unknown, vocab: pieces, byte_fallback: false },
    })
}

/// SentencePiece's table of characters that are rewritten.
fn charsmap(meta: &Metadata) -> Result<Option<Vec<u8>>> {
    let Some(Found::Array(list)) = meta.get(CHARSMAP) else { return Ok(None) };
    let byte = |value: Result<Found>| match value? {
        Found::U8(byte) => Ok(byte),
        Found::I8(byte) => Ok(byte as u8),
        other => Err(meta.fail(CHARSMAP, "bytes", format_args!("{other:?}"))),
    };
    let bytes: Vec<u8> = list.values(meta.path(), &CHARSMAP).map(byte).collect::<Result<_>>()?;
    if bytes.is_empty() {
        return Ok(None);
    }
    // The size of a trie of words of 4 bytes, these, and what characters are rewritten to.
    let trie = bytes.first_chunk().map(|size| u32::from_le_bytes(*size) as usize).filter(|size| size % 4 == 0);
    let rest = trie.and_then(|size| bytes.get(4 + size..));
    if rest.is_none_or(|texts| std::str::from_utf8(texts).is_err()) {
        return Err(meta.fail(CHARSMAP, "a trie and texts", format_args!("{} other bytes", bytes.len())));
    }
    Ok(Some(bytes))
}

/// Base 64 (RFC 4648), as `tokenizer.json` has that table.
fn base64(bytes: &[u8]) -> Value {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let at = |i: usize| u32::from(three.get(i).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for digit in 0..4 {
            let known = digit <= three.len();
            text.push(if known { DIGITS[(bits >> (18 - 6 * digit)) as usize & 63].into() } else { '=' });
        }
    }
    Value::String(text)
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (plain, coded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }
}
