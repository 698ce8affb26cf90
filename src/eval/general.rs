//! What a model knows in general: questions with short answers, and the loss on a general text.

use super::{Score, score_each, stopped};
use crate::engine::Engine;
use crate::error::Result;
use crate::generate::Greedy;
use crate::train::{Known, QUIZ_ANSWER, Quiz, general_text, reading};
use std::sync::Arc;

/// Questions that are answered at once.
const AT_ONCE: usize = 8;
/// Longest window of the general text, in tokens.
const WINDOW: usize = 256;

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct General {
    /// Questions asked; 0 where the model has no chat template, or no room for them.
    pub asked: usize,
    /// Those that were answered rightly.
    pub known: Known,
    /// Losses on the general text.
    pub text: Score,
}

/// Asks the model as it is with the attached adapters or, if `bare`, without them. `progress` hears of tokens done, and may
/// stop the work.
///
/// # Errors
/// The model has no tokenizer, its template refuses a question, its numbers are none, stopped, out of memory.
pub fn general(engine: &Engine, bare: bool, progress: &mut dyn FnMut(usize) -> bool) -> Result<General> {
    let (text, set) = (engine.text()?, engine.all());
    let set = if bare { engine.none()? } else { set };
    let adapters = &set.adapters;
    let limit = engine.own_tokens(adapters);
    let reader = Arc::clone(&text);
    let reading = reading(&text, Some(reader), engine.vocabulary())?;
    let quiz = Quiz::shipped(&text, limit, reading)?;
    let (mut asked, mut known) = (0, Known::default());
    if let Some(quiz) = quiz {
        asked = quiz.len();
        let mut answers = Vec::with_capacity(asked);
        for group in quiz.ids.chunks(AT_ONCE) {
            let on = engine.on(adapters);
            let _turn = on.turn.take();
            let greedy = Greedy {
                base: on.base,
                adapters,
                numbers: engine.numbers(),
                max_tokens: QUIZ_ANSWER,
                stop: &quiz.stop,
            };
            let given = greedy.answers(group, &mut || on.turn.without(|| progress(0)), &mut |_, _| Ok(()))?;
            let tokens: usize = group.iter().chain(&given).map(Vec::len).sum();
            answers.extend(given);
            if !on.turn.without(|| progress(tokens)) {
                return Err(stopped());
            }
        }
        known = quiz.judge(&answers)?;
    }
    let data = general_text(&text.tokenizer, WINDOW.min(limit))?;
    Ok(General { asked, known, text: score_each(engine, |_| Ok(Arc::clone(&set)), &data, progress)? })
}
