//! Whether samples begin and end as the model was trained to see them.

use crate::tokenizer::Tokenizer;
use serde::Serialize;
use std::collections::BTreeSet;

/// How the samples of a data set begin and end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Checks {
    /// Conversations, rendered by the chat template.
    pub chats: usize,
    /// Texts, taken as they are.
    pub texts: usize,
    /// Of both, those that begin with the beginning-of-text token.
    pub begun: usize,
    /// Those that begin with two of it.
    pub begun_twice: usize,
    /// Those in which no token is learned at which generation stops.
    pub unended: usize,
    /// Those tokens.
    pub ends: BTreeSet<u32>,
    /// Answers of which the chat template leaves a part out.
    pub shortened: usize,
    /// Keys of turns that the chat template leaves out, such as `assistant.reasoning_content`.
    pub left_out: BTreeSet<String>,
}

impl Checks {
    /// Looks at the first tokens of a conversation or text.
    pub(super) fn begin(&mut self, ids: &[u32], tokenizer: &Tokenizer) {
        let Some(bos) = tokenizer.bos() else { return };
        self.begun += usize::from(ids.first() == Some(&bos));
        // Some models begin every turn with the token that begins a text.
        self.begun_twice += usize::from(ids.starts_with(&[bos, bos]));
    }

    /// Looks at the learned tokens of its end.
    pub(super) fn end(&mut self, learned: impl Iterator<Item = u32>, tokenizer: &Tokenizer) {
        let ends: Vec<u32> = learned.filter(|id| tokenizer.stop.contains(id)).collect();
        self.unended += usize::from(ends.is_empty());
        self.ends.extend(ends);
    }
}
