//! An answer cut into what it is made of while it comes: thoughts, what is said, and where it is to stop.

use crate::tokenizer::Tokenizer;

/// What stands before and after thoughts, in the families that write them.
const THOUGHTS: [(&str, &str); 3] =
    [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought", "<channel|>")];
/// What stands around calls of tools. Some tokenizers have these as special tokens, which no text shows.
const CALLS: [&str; 9] = [
    "<tool_call>",
    "</tool_call>",
    "<|tool_call|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "<|tool_call>",
    "<tool_call|>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
];

/// The special tokens of `tokenizer` that answers are shown with, by their ids.
pub(super) fn shown(tokenizer: &Tokenizer) -> Vec<(u32, &'static str)> {
    let names = THOUGHTS.iter().flat_map(|(open, close)| [*open, *close]).chain(CALLS).chain(["<|channel>"]);
    let special = |name: &&str| tokenizer.special_in(name).first().is_some_and(|range| range.len() == name.len());
    names.filter(special).filter_map(|name| Some((tokenizer.id(name)?, name))).collect()
}

/// Holds back what may be the beginning of a text at which an answer stops.
pub(super) struct Stops<'a> {
    texts: &'a [String],
    held: String,
}

impl<'a> Stops<'a> {
    /// Stops at the first of `texts`.
    pub fn new(texts: &'a [String]) -> Self {
        Self { texts, held: String::new() }
    }

    /// What of the answer is certain with `piece`, and whether it stops there.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let texts = || self.texts.iter().filter(|text| !text.is_empty());
        if let Some(at) = texts().filter_map(|text| self.held.find(text.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = texts().map(|text| overlap(&self.held, text)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, at the end.
    pub fn finish(self) -> String {
        self.held
    }
}

/// Bytes at the end of `text` that `wanted` begins with.
fn overlap(text: &str, wanted: &str) -> usize {
    let most = text.len().min(wanted.len().saturating_sub(1));
    (1..=most).rev().find(|&n| wanted.is_char_boundary(n) && text.ends_with(&wanted[..n])).unwrap_or(0)
}

/// Where an answer is.
enum Place {
    /// Before its first word: thoughts may begin here.
    Start,
    /// In thoughts that end with this.
    Thoughts(&'static str),
    /// Behind thoughts, before the first word.
    Behind,
    /// In what is said.
    Said,
}

/// Tells thoughts from what is said.
pub(super) struct Thoughts {
    place: Place,
    held: String,
    /// What was thought.
    pub thoughts: String,
    /// What was said.
    pub said: String,
}

impl Thoughts {
    /// For an answer that follows `prompt`, which some templates end within thoughts.
    pub fn after(prompt: &str) -> Self {
        let end = prompt.trim_end();
        let place = match THOUGHTS.iter().find(|(open, _)| end.ends_with(open)) {
            Some((_, close)) => Place::Thoughts(close),
            None => Place::Start,
        };
        Self { place, held: String::new(), thoughts: String::new(), said: String::new() }
    }

    /// All that follows is said.
    pub fn none() -> Self {
        Self { place: Place::Said, held: String::new(), thoughts: String::new(), said: String::new() }
    }

    /// What is thought and what is said with `piece`.
    pub fn push(&mut self, piece: &str) -> [String; 2] {
        self.held.push_str(piece);
        let [mut thought, mut said] = [String::new(), String::new()];
        loop {
            match self.place {
                Place::Start => {
                    let begun = self.held.trim_start();
                    if let Some((open, close)) = THOUGHTS.iter().find(|(open, _)| begun.starts_with(open)) {
                        self.held = begun[open.len()..].to_owned();
                        self.place = Place::Thoughts(close);
                    } else if THOUGHTS.iter().any(|(open, _)| open.starts_with(begun)) {
                        break;
                    } else {
                        self.place = Place::Said;
                    }
                }
                Place::Thoughts(close) => {
                    if self.thoughts.is_empty() && thought.is_empty() {
                        self.held = self.held.trim_start().to_owned();
                    }
                    let Some(at) = self.held.find(close) else {
                        let rest = self.held.split_off(self.held.len() - overlap(&self.held, close));
                        thought.push_str(&std::mem::replace(&mut self.held, rest));
                        break;
                    };
                    thought.push_str(&self.held[..at]);
                    self.held.drain(..at + close.len());
                    self.place = Place::Behind;
                }
                Place::Behind => {
                    self.held = self.held.trim_start().to_owned();
                    if self.held.is_empty() {
                        break;
                    }
                    self.place = Place::Said;
                }
                Place::Said => {
                    said.push_str(&std::mem::take(&mut self.held));
                    break;
                }
            }
        }
        self.add(&thought, &said);
        [thought, said]
    }

    /// What was held back, at the end.
    pub fn finish(&mut self) -> [String; 2] {
        let rest = std::mem::take(&mut self.held);
        let parts = match self.place {
            Place::Thoughts(_) => [rest, String::new()],
            Place::Behind => [String::new(), String::new()],
            Place::Start | Place::Said => [String::new(), rest],
        };
        self.add(&parts[0], &parts[1]);
        parts
    }

    fn add(&mut self, thought: &str, said: &str) {
        self.thoughts.push_str(thought);
        self.said.push_str(said);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thoughts_are_told_from_what_is_said_however_they_come() {
        for (prompt, answer, thoughts, said) in [
            ("", "<think>\na < b\n</think>\n\nYes.", "a < b\n", "Yes."),
            ("user<think>\n", "so </thin, and </think>No.", "so </thin, and ", "No."),
            ("<think>\n\n</think>\n\n", "Plain <think> word", "", "Plain <think> word"),
            ("", " \n[THINK]x[/THINK]y", "x", "y"),
            ("", "<|channel>thought\nx<channel|>y", "x", "y"),
            ("", "<thin", "", "<thin"),
            ("", "<think>cut", "cut", ""),
            ("", "  two spaces", "", "  two spaces"),
        ] {
            for size in 1..=answer.len() {
                let mut parts = Thoughts::after(prompt);
                let mut shown = [String::new(), String::new()];
                let pieces = answer.as_bytes().chunks(size).map(|piece| std::str::from_utf8(piece).unwrap());
                for piece in
                    pieces.map(|piece| parts.push(piece)).collect::<Vec<_>>().into_iter().chain([parts.finish()])
                {
                    shown.iter_mut().zip(piece).for_each(|(all, piece)| all.push_str(&piece));
                }
                assert_eq!((&*parts.thoughts, &*parts.said), (thoughts, said), "{answer:?} by {size}");
                assert_eq!(shown, [thoughts, said], "{answer:?} by {size}");
            }
        }
    }

    #[test]
    fn an_answer_stops_before_the_first_of_its_stop_texts() {
        let texts = ["\n\n".to_owned(), "User:".to_owned(), "ü!".to_owned()];
        for (answer, said, stopped) in [
            ("one\ntwo\n\nthree", "one\ntwo", true),
            ("Us and User: more", "Us and ", true),
            ("grün ü ü! x", "grün ü ", true),
            ("ends with Use", "ends with Use", false),
        ] {
            for size in [1, 2, 3, 100] {
                let (mut stops, mut all, mut hit) = (Stops::new(&texts), String::new(), false);
                let letters: Vec<char> = answer.chars().collect();
                for piece in letters.chunks(size).map(|piece| piece.iter().collect::<String>()) {
                    let (piece, end) = stops.push(&piece);
                    all.push_str(&piece);
                    hit = end;
                    if end {
                        break;
                    }
                }
                all.push_str(&stops.finish());
                assert_eq!((all.as_str(), hit), (said, stopped), "{answer:?} by {size}");
            }
        }
    }
}
