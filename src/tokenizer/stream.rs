//! Ids to text as they come.

use super::Tokenizer;
use crate::error::Result;

/// Turns ids into text as they come, holding back bytes that are not yet a whole character.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Bytes of the window's text already given out.
    shown: usize,
    /// Ids before this one are not decoded again.
    settled: usize,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), shown: 0, settled: 0 }
    }

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
