//! What a sample asks, told apart from the marks of the chat template around it.

use super::Mask;
use crate::chat::Message;
use std::ops::Range;

/// Tokens of the questions of a sample, and which of them make up a word.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Tokens of what is asked.
    pub tokens: Mask,
    /// Of those, the ones that go on with the word of the token before.
    pub within_words: Mask,
}

impl Asked {
    /// Finds what users say in `text`, of which `tokens` are the ids and places. Templates may trim it; what they print in
    /// another way is not found.
    pub(super) fn find(tokens: &[(u32, Range<usize>)], text: &str, messages: &[Message]) -> Self {
        let (mut places, mut from) = (Vec::new(), 0);
        for content in messages.iter().filter(|m| m.role == "user").filter_map(|m| m.content.as_deref()) {
            let content = content.trim();
            if let Some(at) = text[from..].find(content).filter(|_| !content.is_empty()) {
                let start = from + at;
                from = start + content.len();
                places.push(start..from);
            }
        }
        // A token may have the space before its word.
        let within = |t: &Range<usize>| places.iter().any(|p: &Range<usize>| p.start <= t.start + 1 && t.end <= p.end);
        let asked = |t: &Range<usize>| !t.is_empty() && within(t);
        // Bytes and not characters: a token may end inside of one.
        let space = |at: usize| text.as_bytes().get(at).is_some_and(u8::is_ascii_whitespace);
        // A word has the space before it, be that a token of its own or part of one, and is apart where no token has it.
        let goes_on = |i: usize| {
            let (t, before) = (&tokens[i].1, i.checked_sub(1).map(|i| &tokens[i].1));
            let opens = space(t.start) && !t.start.checked_sub(1).is_some_and(space);
            !opens && before.is_some_and(|before| asked(before) && before.end >= t.start)
        };
        Self {
            tokens: tokens.iter().map(|(_, t)| asked(t)).collect(),
            within_words: tokens.iter().enumerate().map(|(i, (_, t))| asked(t) && goes_on(i)).collect(),
        }
    }

    /// Tokens of what is asked.
    #[must_use]
    pub fn count(&self) -> usize {
        self.tokens.count()
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.tokens.heap_bytes() + self.within_words.heap_bytes()
    }
}
