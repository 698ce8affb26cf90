//! Special tokens that are written out in a text and are meant as the characters they are.

use aho_corasick::{AhoCorasick, MatchKind};
use std::ops::Range;
use tokenizers::normalizer::Range as Part;
use tokenizers::{
    AddedToken, NormalizedString, Normalizer as _, OffsetReferential, OffsetType, PreTokenizedString, Result, Token,
    Tokenizer,
};

/// Finds added tokens of a tokenizer in a text.
#[derive(Clone, Debug)]
pub(crate) struct SpecialTokens(Option<AhoCorasick>);

impl SpecialTokens {
    /// Finds those that `is` is true of. Spaces and line ends are ordinary text, whatever a tokenizer has them for.
    pub(super) fn new(tokenizer: &Tokenizer, is: impl Fn(&AddedToken) -> bool) -> Self {
        let added = tokenizer.get_added_tokens_decoder();
        let texts: Vec<&str> =
            added.values().filter(|t| is(t) && !t.content.trim().is_empty()).map(|t| t.content.as_str()).collect();
        // It is refused only beyond billions of patterns.
        let finder = || AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&texts).ok();
        Self(if texts.is_empty() { None } else { finder() })
    }

    /// Where `text` has them written out: the leftmost, and of those the longest.
    pub fn find(&self, text: &str) -> Vec<Range<usize>> {
        self.0.iter().flat_map(|f| f.find_iter(text)).map(|m| m.range()).collect()
    }
}

/// The first steps of tokenizing `text`, up to where it is cut into words: added tokens are found, except in the bytes
/// `plain` (rising), and the rest is normalized.
pub(super) fn extract(tokenizer: &Tokenizer, text: &str, plain: &[Range<usize>]) -> Result<PreTokenizedString> {
    let (added, normalizer) = (tokenizer.get_added_vocabulary(), tokenizer.get_normalizer());
    // The same text with characters in those places that begin no token shows where the others are.
    let mut masked = text.as_bytes().to_vec();
    plain.iter().for_each(|range| masked[range.clone()].fill(b'\x01'));
    let masked = String::from_utf8(masked)?;
    let found = added.extract_and_normalize(normalizer, &masked);
    let decoder = added.get_added_tokens_decoder();
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for (_, (start, end), tokens) in found.get_splits(OffsetReferential::Original, OffsetType::Byte) {
        for token in tokens.iter().flatten() {
            let normalized = decoder.get(&token.id).is_some_and(|t| t.normalized);
            let list = if normalized { &mut after } else { &mut before };
            list.push((start..end, token.id, token.value.clone()));
        }
    }
    let mut parts = PreTokenizedString::from(text);
    parts.split(|_, part| Ok(cut(&part, &before)))?;
    // Some tokens are looked for only once what lies between the others was normalized.
    parts.split(|_, mut part| {
        if let Some(normalizer) = normalizer {
            normalizer.normalize(&mut part)?;
        }
        Ok(cut(&part, &after))
    })?;
    Ok(parts)
}

/// `part` cut at those of `tokens` (by their bytes in the whole text) that lie in it.
fn cut(part: &NormalizedString, tokens: &[(Range<usize>, u32, String)]) -> Vec<(NormalizedString, Option<Vec<Token>>)> {
    let (start, end) = part.offsets_original();
    let inside: Vec<_> = tokens.iter().filter(|(range, ..)| start <= range.start && range.end <= end).collect();
    if inside.is_empty() {
        return vec![(part.clone(), None)];
    }
    let slice = |from: usize, to: usize| part.slice(Part::Original(from - start..to - start));
    let (mut out, mut next) = (Vec::new(), start);
    for (range, id, value) in inside {
        out.extend(slice(next, range.start).map(|between| (between, None)));
        if let Some(piece) = slice(range.start, range.end) {
            let token = Token::new(*id, value.clone(), (0, piece.len()));
            out.push((piece, Some(vec![token])));
        }
        next = range.end;
    }
    out.extend(slice(next, end).map(|rest| (rest, None)));
    out
}
