//! What each token says, in far less memory than a tokenizer takes: enough to read short answers.

use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// The text of every token as it stands behind another one, end to end.
pub(super) struct Words {
    text: String,
    ends: Vec<u32>,
}

impl Words {
    /// Those of the tokens below `vocab`. A part of a character that several tokens spell is left out, and so are tokens that
    /// are no text.
    ///
    /// # Errors
    /// The tokenizer cannot be asked.
    pub fn of(tokenizer: &Tokenizer, vocab: usize) -> Result<Self> {
        let mut out = Self { text: String::new(), ends: Vec::with_capacity(vocab) };
        // Behind a letter a token keeps the space that it may begin with.
        let before = tokenizer.encode("a", false)?;
        let given = tokenizer.decode(&before)?;
        let mut ids = before.clone();
        for id in 0..vocab as u32 {
            ids.truncate(before.len());
            ids.push(id);
            let both = tokenizer.decode(&ids)?;
            out.text.extend(
                both.strip_prefix(&given).unwrap_or(&both).chars().filter(|c| *c != char::REPLACEMENT_CHARACTER),
            );
            out.ends.push(out.text.len() as u32);
        }
        out.text.shrink_to_fit();
        Ok(out)
    }

    /// What `ids` say.
    pub fn say(&self, ids: &[u32]) -> String {
        let at = |i: usize| self.ends.get(i).map_or(self.text.len(), |end| *end as usize);
        ids.iter().map(|&id| &self.text[if id == 0 { 0 } else { at(id as usize - 1) }..at(id as usize)]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_say_what_the_tokenizer_says() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat");
        let tokenizer = Tokenizer::open(&dir).unwrap();
        let words = Words::of(&tokenizer, 300).unwrap();
        let said = |text: &str| {
            let ids = tokenizer.encode(text, false).unwrap();
            (words.say(&ids), tokenizer.decode(&ids).unwrap())
        };
        for text in ["Paris is the capital of France.", "5 + 3 = 8", "two\nlines"] {
            let (words, whole) = said(text);
            assert_eq!(words.trim(), whole.trim(), "{text:?}");
        }
    }
}
