//! SentencePiece (`tokenizer.ggml.model` = `llama`): the file has a score for each token and no merges. Gemma 4 (`gemma4`) has
//! the merges, and is like it in all else.
//!
//! llama.cpp joins the neighbours whose union is the token of the highest score, the left ones first among equals, until
//! no union is a token. BPE does the same with a merge for every way to make a token of two, ranked by the token's
//! score.

use super::bpe;
use super::{Bpe, Model, Parts, TOKENS, TYPE_NORMAL, TYPE_UNDEFINED, TYPE_UNUSED, Vocabulary};
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::collections::HashMap;

const SCORES: &str = "tokenizer.ggml.scores";
pub(super) const SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
pub(super) const EXTRA_SPACES: &str = "tokenizer.ggml.remove_extra_whitespaces";
pub(super) const CHARSMAP: &str = "tokenizer.ggml.precompiled_charsmap";
/// SentencePiece's sign for a space.
pub(super) const SPACE: &str = "▁";

/// What SentencePiece makes of the vocabulary.
pub(super) fn parts<'a>(vocabulary: &'a Vocabulary<'_>) -> Result<Parts<'a>> {
    let prefix = vocabulary.meta.bool(SPACE_PREFIX)?.unwrap_or(true);
    pieces(vocabulary, prefix, merges(vocabulary)?)
}

/// The same with the merges of the file, and no space before a text.
pub(super) fn merged<'a>(vocabulary: &'a Vocabulary<'_>) -> Result<Parts<'a>> {
    pieces(vocabulary, false, bpe::merges(vocabulary)?)
}

fn pieces<'a>(vocabulary: &'a Vocabulary<'_>, prefix: bool, merges: Vec<(&'a str, &'a str)>) -> Result<Parts<'a>> {
    let meta = vocabulary.meta;
    if meta.get(CHARSMAP).is_some() {
        let what = format_args!("a table that rewrites characters (`{CHARSMAP}`)");
        return Err(Error::unsupported(meta.path(), what, "use the model's safetensors files"));
    }
    let replace = |from: Value, to: &str| json!({"type": "Replace", "pattern": from, "content": to});
    let mut normalizers = Vec::new();
    if meta.bool(EXTRA_SPACES)?.unwrap_or(false) {
        normalizers.push(json!({"type": "Strip", "strip_left": true, "strip_right": true}));
        normalizers.push(replace(json!({"Regex": " {2,}"}), " "));
    }
    // Text is normalized in the pieces that lie between added tokens, and llama.cpp puts a space before each of them.
    if prefix {
        normalizers.push(json!({"type": "Prepend", "prepend": SPACE}));
    }
    normalizers.push(replace(json!({"String": " "}), SPACE));
    let mut decoders =
        vec![replace(json!({"String": SPACE}), " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let bytes = (0..=u8::MAX).filter(|&byte| vocabulary.has_byte(byte)).count();
    let unknown = vocabulary.named("tokenizer.ggml.unknown_token_id")?.map(|(_, text)| text);
    if bytes < 256 && (bytes > 0 || unknown.is_none()) {
        let expected = "a token for each of 256 bytes, or none and an unknown token";
        return Err(meta.fail(TOKENS, expected, format_args!("tokens for {bytes} bytes")));
    }
    let model = Bpe::new(vocabulary, merges);
    Ok(Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: Model::Bpe(Bpe { byte_fallback: bytes == 256, unk_token: unknown, fuse_unk: true, ..model }),
    })
}

/// A score for each token.
pub(super) fn scores(vocabulary: &Vocabulary<'_>) -> Result<Vec<f32>> {
    let meta = vocabulary.meta;
    let scores = meta.required(SCORES, meta.floats(SCORES)?)?;
    if scores.len() != vocabulary.tokens.len() {
        let expected = format_args!("{} entries, as many as tokens", vocabulary.tokens.len());
        return Err(meta.fail(SCORES, expected, scores.len()));
    }
    Ok(scores)
}

/// Every way to make a token of two, the best token first.
fn merges<'a>(vocabulary: &'a Vocabulary<'_>) -> Result<Vec<(&'a str, &'a str)>> {
    let (meta, scores) = (vocabulary.meta, scores(vocabulary)?);
    let mergeable = |id: &usize| matches!(vocabulary.types[*id], TYPE_NORMAL | TYPE_UNUSED | TYPE_UNDEFINED);
    let ids: HashMap<&str, usize> =
        (0..scores.len()).filter(mergeable).map(|id| (vocabulary.tokens[id].as_ref(), id)).collect();
    let mut made: Vec<(f32, usize, &str, &str)> = Vec::new();
    let mut tokens = 0;
    for (&text, &id) in &ids {
        let before = made.len();
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if ids.contains_key(left) && ids.contains_key(right) {
                made.push((scores[id], id, left, right));
            }
        }
        tokens += usize::from(made.len() > before);
    }
    // Scores that are all the same are the placeholders of a converter that did not have them.
    if tokens > 1 && made.iter().all(|(score, ..)| *score == made[0].0) {
        let what = format_args!("a SentencePiece vocabulary whose tokens all have the score {}", made[0].0);
        return Err(Error::unsupported(meta.path(), what, "use the model's safetensors files"));
    }
    // Within a token, the longer left part first: as transformers' converter has it.
    made.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.2.len().cmp(&a.2.len())).then(a.1.cmp(&b.1)));
    Ok(made.into_iter().map(|(_, _, left, right)| (left, right)).collect())
}

impl Vocabulary<'_> {
    fn has_byte(&self, byte: u8) -> bool {
        let text = format!("<0x{byte:02X}>");
        self.ids.contains_key(text.as_str())
    }
}
