//! General prompts and questions, as a model's tokens.

use crate::chat::Message;
use crate::error::Result;
use crate::text::Text;
use serde::Deserialize;

const PROMPTS: &str = include_str!("../../../models/samples/general-prompts.jsonl");
/// Prompts that a run answers at most: a stretch of the file has all kinds and several languages.
const MOST: usize = 64;
/// Most tokens of a held answer.
pub(crate) const ANSWER: usize = 32;

#[derive(Deserialize)]
struct Line {
    prompt: String,
}

/// What the adapted model is held on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompts {
    /// Tokens of each.
    pub(crate) ids: Vec<Vec<u32>>,
    /// Tokens that end an answer.
    pub(crate) stop: Vec<u32>,
    /// Prompts that are too long.
    pub(crate) left_out: usize,
}

impl Prompts {
    /// The shipped ones, as `text` asks; where the model has no template for chats, as beginnings of texts. What leaves
    /// an answer no room in `limit` tokens, or has an id beyond `vocab`, is left out.
    ///
    /// # Errors
    /// The template refuses a question.
    pub(crate) fn shipped(text: &Text, limit: usize, vocab: usize) -> Result<Self> {
        let mut out = Self { stop: text.tokenizer.stop.clone(), ..Self::default() };
        for line in PROMPTS.lines().take(MOST) {
            let line: Line = serde_json::from_str(line).expect("a test reads every line of the shipped samples");
            let ids = asked(text, &line.prompt)?;
            if ids.is_empty() || ids.len() + ANSWER > limit || ids.iter().any(|id| *id as usize >= vocab) {
                out.left_out += 1;
            } else {
                out.ids.push(ids);
            }
        }
        Ok(out)
    }
}

/// A question as the model is asked, in a conversation of its own.
///
/// # Errors
/// The template refuses it.
pub(crate) fn asked(text: &Text, question: &str) -> Result<Vec<u32>> {
    if !text.template.is_own() {
        return text.tokenizer.encode(question, true);
    }
    let prompt = text.template.render(&[Message::new("user", question)], None, true)?;
    text.tokenizer.encode_chat(&prompt.text, &prompt.plain)
}
