//! General questions with short answers, which show what a run makes a model forget.

use super::keep::asked;
use super::words::Words;
use crate::error::Result;
use crate::text::Text;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

const QUESTIONS: &str = include_str!("../../models/samples/general-questions.jsonl");
/// Most tokens of an answer: the questions are for a word or two.
pub(crate) const ANSWER: usize = 24;

#[derive(Deserialize)]
struct Line {
    question: String,
    answers: Vec<String>,
}

/// Says what the ids of each answer say.
pub(crate) type Reading = Arc<dyn Fn(&[Vec<u32>]) -> Result<Vec<String>> + Send + Sync>;

/// The questions, and how answers are read.
#[derive(Clone)]
pub struct Quiz {
    /// Tokens of each question.
    pub(crate) ids: Vec<Vec<u32>>,
    /// Tokens that end an answer.
    pub(crate) stop: Vec<u32>,
    /// Right answers to each.
    answers: Vec<Vec<String>>,
    reading: Reading,
}

/// Reads with a text that is held anyway or, for a run that holds none, with what its tokens below `vocab` say.
///
/// # Errors
/// The tokenizer cannot be asked.
pub(crate) fn reading(text: &Text, held: Option<Arc<Text>>, vocab: usize) -> Result<Reading> {
    if let Some(text) = held {
        return Ok(Arc::new(move |answers| answers.iter().map(|ids| text.tokenizer.decode(ids)).collect()));
    }
    let words = Words::of(&text.tokenizer, vocab)?;
    Ok(Arc::new(move |answers| Ok(answers.iter().map(|ids| words.say(ids)).collect())))
}

impl std::fmt::Debug for Quiz {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Quiz of {} questions", self.ids.len())
    }
}

/// Which of the questions were answered rightly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Known(u64);

impl Known {
    /// How many.
    #[must_use]
    pub fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// Those of them that were known before, too.
    #[must_use]
    pub fn still(self, before: Self) -> Self {
        Self(self.0 & before.0)
    }

    /// The share of what was known before that is not any more, in percent.
    #[must_use]
    pub fn lost_percent(self, before: Self) -> f64 {
        let lost = before.count() - self.still(before).count();
        100.0 * f64::from(lost) / f64::from(before.count().max(1))
    }
}

impl Quiz {
    /// The shipped questions that leave an answer room in `limit` tokens; nothing where the model has no template for
    /// chats, or where none fits.
    ///
    /// # Errors
    /// The template refuses a question.
    pub(crate) fn shipped(text: &Text, limit: usize, reading: Reading) -> Result<Option<Self>> {
        let stop = text.tokenizer.stop.clone();
        let mut out = Self { ids: Vec::new(), stop, answers: Vec::new(), reading };
        for line in QUESTIONS.lines().filter(|_| text.template.is_own()) {
            let line: Line = serde_json::from_str(line).expect("a test reads every line of the shipped samples");
            let ids = asked(text, &line.question)?;
            if !ids.is_empty() && ids.len() + ANSWER <= limit {
                out.ids.push(ids);
                out.answers.push(line.answers);
            }
        }
        Ok(Some(out).filter(|quiz| !quiz.ids.is_empty()))
    }

    /// Tokens of the longest question with its answer.
    pub(crate) fn longest_text(&self) -> usize {
        self.ids.iter().map(|ids| ids.len() + ANSWER).max().unwrap_or(0)
    }

    /// Questions asked.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether none is asked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Which of the answers are right; their last token may be one that ends them.
    pub(crate) fn judge(&self, answers: &[Vec<u32>]) -> Result<Known> {
        let said = |ids: &Vec<u32>| match ids.split_last() {
            Some((last, ids)) if self.stop.contains(last) => ids.to_vec(),
            _ => ids.clone(),
        };
        let texts = (self.reading)(&answers.iter().map(said).collect::<Vec<_>>())?;
        let right = texts.iter().zip(&self.answers).map(|(text, answers)| answers.iter().any(|a| says(text, a)));
        Ok(Known(right.enumerate().fold(0, |known, (i, right)| known | u64::from(right) << i)))
    }
}

/// Whether `text` has `word` in it as whole words, whatever the case of letters.
pub(crate) fn says(text: &str, word: &str) -> bool {
    let (text, word) = (text.to_lowercase(), word.to_lowercase());
    let part = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    let mut places = text.match_indices(&word).map(|(at, found)| (&text[..at], &text[at + found.len()..]));
    places.any(|(before, after)| !part(before.chars().next_back()) && !part(after.chars().next()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_words_are_right_whatever_their_case() {
        for (text, word, right) in [
            ("The capital of France is Paris.", "paris", true),
            ("5 + 3 = 8", "8", true),
            ("It is 18.", "8", false),
            ("whiteness", "white", false),
            ("White", "white", true),
            ("a D-major, then D", "D", true),
            ("", "D", false),
        ] {
            assert_eq!(says(text, word), right, "{text:?}, {word:?}");
        }
    }

    #[test]
    fn what_is_lost_is_a_share_of_what_was_known() {
        let (before, after) = (Known(0b1111), Known(0b1_0111));
        assert_eq!((after.count(), after.still(before).count(), after.lost_percent(before)), (4, 3, 25.0));
        assert_eq!(Known(0).lost_percent(Known(0)), 0.0);
    }

    #[test]
    fn the_shipped_questions_fit_into_a_number() {
        let lines = QUESTIONS.lines().map(|line| serde_json::from_str::<Line>(line).unwrap());
        assert_eq!(lines.filter(|line| !line.answers.is_empty()).count(), 40);
    }
}
