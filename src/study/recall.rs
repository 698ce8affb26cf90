//! What was learned: questions that were kept out of training, asked.

use super::kept::Item;
use crate::chat::Message;
use crate::engine::{Cancel, Engine};
use crate::error::{Error, ErrorCode, Result};
use crate::generate::{Finish, Sampling};
use std::ops::ControlFlow;

/// Most tokens of an answer.
const ANSWER_TOKENS: usize = 64;

/// How many questions were answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct NotesRecall {
    /// Questions that were asked.
    pub asked: usize,
    /// Answers that hold the words that were asked for.
    pub held: usize,
    /// Answers that equal the one that was taught, but for case and spaces.
    pub exact: usize,
}

/// Asks every one of `items` with the adapters that are attached, each in a conversation of its own, always taking the
/// likeliest token. `progress` hears of each answer.
///
/// # Errors
/// As [`crate::Chat::reply`]; stopped.
pub fn recall<'i>(
    engine: &Engine,
    items: impl Iterator<Item = &'i Item>,
    cancel: Cancel,
    progress: &mut dyn FnMut(&Item, &str),
) -> Result<NotesRecall> {
    let mut chat = engine.chat()?;
    chat.max_tokens = ANSWER_TOKENS;
    chat.sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    chat.set_cancel_token(cancel);
    let mut found = NotesRecall::default();
    let folded = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
    for item in items {
        let messages = [Message::new("user", &item.question)];
        let answer = chat.reply(&messages, &mut |_: &str| ControlFlow::Continue(()))?;
        if answer.generated.finish == Finish::Cancelled {
            return Err(Error::new(ErrorCode::Cancelled, "study", "stopped"));
        }
        found.asked += 1;
        found.held += usize::from(item.is_answered_by(&answer.text));
        found.exact += usize::from(folded(&answer.text) == folded(&item.answer));
        progress(item, &answer.text);
    }
    Ok(found)
}
