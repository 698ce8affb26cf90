//! Special tokens that are written out in a message: they are carried through a chat template between two marks, so that
//! afterwards they are known from the template's own.

use super::Message;
use crate::tokenizer::SpecialTokens;
use serde_json::Value;
use std::ops::Range;

/// Noncharacters of Unicode: no text has a use for them.
const START: char = '\u{fdd0}';
const END: char = '\u{fdd1}';

/// Whether it is one of them.
pub(super) fn is_mark(c: char) -> bool {
    matches!(c, START | END)
}

/// A rendered conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// As the model reads it.
    pub text: String,
    /// Bytes that are plain text though they are written like special tokens.
    pub plain: Vec<Range<usize>>,
}

/// What of a conversation's texts would be taken for special tokens.
pub(super) struct Marker {
    /// In what the assistant says. It writes thoughts and calls of tools with tokens of their own.
    pub assistant: SpecialTokens,
    /// In all other texts.
    pub others: SpecialTokens,
}

impl Marker {
    /// The messages and tools with marks, if they need any.
    pub fn mark(&self, messages: &[Message], tools: Option<&Value>) -> Option<(Vec<Message>, Option<Value>)> {
        let found = messages.iter().any(|m| {
            let tokens = self.of(&m.role);
            m.content.as_ref().is_some_and(|c| needs(tokens, c)) || m.extra.values().any(|v| any(tokens, v))
        });
        if !found && !tools.is_some_and(|t| any(&self.others, t)) {
            return None;
        }
        let message = |m: &Message| {
            let tokens = self.of(&m.role);
            let mut marked = m.clone();
            marked.content = m.content.as_ref().map(|c| mark(tokens, c));
            marked.extra.values_mut().for_each(|v| mark_value(tokens, v));
            marked
        };
        let tools = tools.map(|t| {
            let mut marked = t.clone();
            mark_value(&self.others, &mut marked);
            marked
        });
        Some((messages.iter().map(message).collect(), tools))
    }

    fn of(&self, role: &str) -> &SpecialTokens {
        if role == "assistant" { &self.assistant } else { &self.others }
    }
}

fn needs(tokens: &SpecialTokens, text: &str) -> bool {
    text.contains([START, END]) || !tokens.find(text).is_empty()
}

fn any(tokens: &SpecialTokens, value: &Value) -> bool {
    match value {
        Value::String(text) => needs(tokens, text),
        Value::Array(list) => list.iter().any(|v| any(tokens, v)),
        Value::Object(map) => map.values().any(|v| any(tokens, v)),
        _ => false,
    }
}

fn mark_value(tokens: &SpecialTokens, value: &mut Value) {
    match value {
        Value::String(text) => *text = mark(tokens, text),
        Value::Array(list) => list.iter_mut().for_each(|v| mark_value(tokens, v)),
        Value::Object(map) => map.values_mut().for_each(|v| mark_value(tokens, v)),
        _ => {}
    }
}

fn mark(tokens: &SpecialTokens, text: &str) -> String {
    // Marks that somebody wrote could free what lies between them.
    let text = text.replace([START, END], "");
    let (mut out, mut next) = (String::with_capacity(text.len() + 16), 0);
    for range in tokens.find(&text) {
        out.push_str(&text[next..range.start]);
        out.push(START);
        out.push_str(&text[range.clone()]);
        out.push(END);
        next = range.end;
    }
    out + &text[next..]
}

/// Takes the marks out of a rendered text; `places` in it, which rise, move along.
pub(super) fn unmark(text: &str, places: &mut [&mut usize]) -> Rendered {
    let (mut out, mut plain) = (String::with_capacity(text.len()), Vec::new());
    let (mut next, mut open, mut place) = (0, None, 0);
    let marks = text.match_indices([START, END]).chain(std::iter::once((text.len(), "")));
    for (at, mark) in marks {
        while place < places.len() && *places[place] <= at {
            *places[place] = out.len() + places[place].saturating_sub(next);
            place += 1;
        }
        out.push_str(&text[next..at]);
        next = at + mark.len();
        // A template may have cut between two marks. What is left of the token has the other's effect alone.
        if mark.starts_with(START) {
            open = Some(out.len());
        } else if let Some(start) = open.take().filter(|_| !mark.is_empty()) {
            plain.push(start..out.len());
        }
    }
    Rendered { text: out, plain }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_go_and_places_move_along() {
        let text = format!("ab{START}<s>{END}cd{END}e{START}");
        let mut places = [0, 1, 2, 5, 11, 13, 18, text.len()];
        let [a, b, c, d, e, f, g, h] = &mut places;
        let rendered = unmark(&text, &mut [a, b, c, d, e, f, g, h]);
        assert_eq!((rendered.text.as_str(), &rendered.plain[..]), ("ab<s>cde", std::slice::from_ref(&(2..5))));
        assert_eq!(places, [0, 1, 2, 2, 5, 7, 8, 8], "{places:?}");
    }
}
