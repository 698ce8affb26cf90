//! Keeps an answer from repeating itself without end.
//!
//! Small models fall into loops: "City of the City of the". DRY (Don't Repeat Yourself; settings as in llama.cpp) lowers
//! each token that would prolong a repetition, the more the longer it is already. Left to itself it also lowers what
//! rightly repeats: the next row of a table, a line of code, a name. So it sleeps here until the answer has ended in the
//! same text several times in a row, [`Dry::after`], and an answer that does not loop is the same with it and without.
//!
//! What may repeat for longer before it wakes: code, tables and markup; text without words, such as rules and rows of
//! zeros; and what stands in the prompt, which may be what was asked for. Prose that differs only in its numbers loops, too:
//! sentences soon, what may be counting, with a word or two, only after two hundred tokens, and rows of tables or data after
//! four hundred. Numbers alone may go on.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What keeps an answer from repeating itself: Don't Repeat Yourself (p-e-w 2024,
/// [text-generation-webui#5677](https://github.com/oobabooga/text-generation-webui/pull/5677)), asleep until it is needed.
/// Only the answer counts: what stands in the prompt may be said again.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dry {
    /// What is taken from the logit of a token that would prolong a repetition of the allowed length; 0 switches all of it
    /// off.
    pub multiplier: f32,
    /// What that grows by with each token of the repetition beyond the allowed length.
    pub base: f32,
    /// Tokens that may come again without a penalty.
    pub allowed_length: usize,
    /// Copies in a row at the answer's end that wake it, for the rest of the answer. 0 wakes it from the beginning, which
    /// is DRY as in llama.cpp, with its sequence breakers (line end, `:`, `"`, `*`).
    pub after: usize,
}

impl Dry {
    /// Does nothing.
    pub const OFF: Self = Self { multiplier: 0.0, ..Self::GUARD };
    /// Wakes at the third copy: what chats and `generate` use.
    pub const GUARD: Self = Self { multiplier: 0.8, base: 1.75, allowed_length: 2, after: 3 };

    /// Whether it does anything.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.multiplier > 0.0
    }

    /// Checks the ranges.
    pub(super) fn validate(&self) -> Result<()> {
        if !(0.0..=100.0).contains(&self.multiplier) {
            return Err(Error::config("dry-multiplier", "a number in `0 <= dry-multiplier <= 100`", self.multiplier));
        }
        if !(1.0..=100.0).contains(&self.base) {
            return Err(Error::config("dry-base", "a number in `1 <= dry-base <= 100`", self.base));
        }
        Ok(())
    }
}

/// How far back repetitions are looked for, in tokens: a page of text.
const WINDOW: usize = 1024;
/// Tokens that copies take together before they are a loop, where it is text like any other ..
const PLAIN: usize = 16;
/// .. where it stands in the prompt ..
const ASKED: usize = 64;
/// .. and where it is code, a table, or has no words.
const BUILT: usize = 96;
/// Words without which text that differs in its numbers may be counting, or a row of something.
const SENTENCE: usize = 4;
/// More is as good as forbidden, and stays a number.
const MOST: f32 = 1e4;

/// What a token is to the guard.
#[derive(Clone, Copy, Default)]
struct Kind {
    /// Has a letter, or a part of one.
    word: bool,
    /// Digits, and no letter.
    number: bool,
    /// A sign of code, tables and markup.
    built: bool,
    /// Ends a repetition in plain DRY.
    breaks: bool,
}

impl Kind {
    fn of(text: &str) -> Self {
        let has = |test: fn(char) -> bool| text.chars().any(test);
        let word = has(|c| c.is_alphabetic() || c == char::REPLACEMENT_CHARACTER);
        Self {
            word,
            number: !word && has(char::is_numeric),
            built: has(|c| "|<>{}[]=;`\\\t".contains(c)),
            breaks: has(|c| "\n:\"*".contains(c)),
        }
    }
}

/// Tokens, and for each distance how many of the last ones equal those so far before them.
#[derive(Default)]
struct Track {
    ids: Vec<u32>,
    runs: Vec<usize>,
}

impl Track {
    fn push(&mut self, id: u32) {
        if self.runs.len() < self.ids.len().min(WINDOW) {
            self.runs.push(0);
        }
        for (run, earlier) in self.runs.iter_mut().zip(self.ids.iter().rev()) {
            *run = if *earlier == id { *run + 1 } else { 0 };
        }
        self.ids.push(id);
    }

    /// The periods of which the end holds at least so many copies, with the tokens that these take.
    fn loops(&self, copies: usize) -> impl Iterator<Item = (usize, usize)> {
        let periods = self.runs.iter().zip(1..);
        periods.filter(move |(run, period)| **run >= (copies - 1) * period).map(|(run, period)| (period, run + period))
    }
}

/// Text of token ids.
type Decode = Box<dyn Fn(&[u32]) -> String + Send>;

/// Watches one answer, beside a [`Sampler`](super::Sampler). A [`Decoder`](crate::Decoder) has its own.
pub struct Guard {
    dry: Dry,
    decode: Decode,
    prompt: Vec<u32>,
    kinds: Vec<Kind>,
    exact: Track,
    /// The same with all numbers alike.
    loose: Track,
    /// Backticks in a row at the end, and whether three of them have begun a block of code.
    ticks: usize,
    fenced: bool,
    awake: bool,
}

impl Guard {
    /// For the answer to `prompt`, if `dry` does anything. `decode` tells words from signs; without a tokenizer, all are words.
    #[must_use]
    pub fn new(dry: Dry, prompt: &[u32], decode: impl Fn(&[u32]) -> String + Send + 'static) -> Option<Self> {
        dry.is_on().then(|| Self {
            dry,
            decode: Box::new(decode),
            prompt: prompt.to_vec(),
            kinds: Vec::new(),
            exact: Track::default(),
            loose: Track::default(),
            ticks: 0,
            fenced: false,
            awake: dry.after == 0,
        })
    }

    /// Sees the next token of the answer.
    pub fn accept(&mut self, id: u32) {
        let text = (self.decode)(&[id]);
        for c in text.chars() {
            self.ticks = if c == '`' { self.ticks + 1 } else { 0 };
            self.fenced ^= self.ticks == 3;
        }
        let kind = Kind::of(&text);
        self.kinds.push(kind);
        self.exact.push(id);
        self.loose.push(if kind.number { u32::MAX } else { id });
        if self.dry.after == 0 && kind.breaks {
            self.exact.runs.fill(0);
        }
        self.awake |= self.has_looped();
    }

    /// Lowers the logits of tokens that would go on with a loop.
    pub fn apply(&self, logits: &mut [f32]) {
        if !self.awake {
            return;
        }
        let Dry { multiplier, base, allowed_length, after } = self.dry;
        let mut longest = BTreeMap::new();
        let nexts = self.exact.ids.iter().zip(&self.kinds).rev();
        for ((exact, loose), (next, kind)) in self.exact.runs.iter().zip(&self.loose.runs).zip(nexts) {
            // Another number does not make it another text, but may itself come again.
            let run = *if after == 0 || kind.number { exact } else { loose };
            if run >= allowed_length {
                longest.entry(*next).and_modify(|most: &mut usize| *most = run.max(*most)).or_insert(run);
            }
        }
        for (next, run) in longest {
            if let Some(logit) = logits.get_mut(next as usize) {
                *logit -= (multiplier * base.powf((run - allowed_length) as f32)).min(MOST);
            }
        }
    }

    /// Whether the answer ends in a loop, by the shortest text that is repeated.
    fn has_looped(&self) -> bool {
        let after = self.dry.after;
        if after == 0 {
            return false;
        }
        let mut exact = self.exact.loops(after).filter(|(_, tokens)| *tokens >= PLAIN);
        // A copy more: that other numbers follow may be the point of it.
        let mut loose = self.loose.loops(after + 1).filter(|(_, tokens)| *tokens >= 2 * PLAIN);
        let words = |period: usize| self.last(period).iter().filter(|kind| kind.word).count();
        exact.next().is_some_and(|(period, tokens)| tokens >= self.bearable(period))
            || loose.next().is_some_and(|(period, tokens)| match words(period) {
                0 => false,
                _ if self.is_built(period) => tokens >= 4 * BUILT,
                1..SENTENCE => tokens >= 2 * BUILT,
                _ => tokens >= 2 * self.bearable(period),
            })
    }

    /// Whether the last `period` tokens are code, a table, or markup.
    fn is_built(&self, period: usize) -> bool {
        self.fenced || self.last(period).iter().any(|kind| kind.built)
    }

    /// Tokens that copies of the last `period` may take together.
    fn bearable(&self, period: usize) -> usize {
        let worded = self.last(period).iter().any(|kind| kind.word);
        match !worded || self.is_built(period) {
            true => BUILT,
            false if self.is_in_prompt(period) => ASKED,
            false => PLAIN,
        }
    }

    fn last(&self, period: usize) -> &[Kind] {
        &self.kinds[self.kinds.len() - period..]
    }

    /// Whether the words of the last `period` tokens stand in the prompt, whichever of them begins.
    fn is_in_prompt(&self, period: usize) -> bool {
        let ids = &self.exact.ids;
        // The words at the ends may be parts.
        let (twice, prompt) =
            (words(&(self.decode)(&ids[ids.len() - 2 * period..])), words(&(self.decode)(&self.prompt)));
        let count = twice.len() / 2;
        count > 0 && twice.windows(count).any(|copy| prompt.windows(count).any(|there| there == copy))
    }
}

fn words(text: &str) -> Vec<String> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    /// Tokens are words with the space before them, signs, and line ends.
    struct Words(Arc<Mutex<Vec<String>>>);

    impl Words {
        fn ids(&self, text: &str) -> Vec<u32> {
            let mut known = self.0.lock().unwrap();
            let mut pieces: Vec<String> = Vec::new();
            for c in text.chars() {
                match pieces.last_mut() {
                    Some(last) if c.is_alphanumeric() && last.ends_with(|l: char| l.is_alphanumeric() || l == ' ') => {
                        last.push(c);
                    }
                    _ => pieces.push(c.to_string()),
                }
            }
            let mut id = |piece: String| {
                let at = known.iter().position(|known| *known == piece).unwrap_or(known.len());
                if at == known.len() {
                    known.push(piece);
                }
                at as u32
            };
            pieces.into_iter().map(&mut id).collect()
        }

        /// What a guard takes from each token of `answer`, before it comes.
        fn penalties(&self, dry: Dry, prompt: &str, answer: &str) -> Vec<f32> {
            let (prompt, answer) = (self.ids(prompt), self.ids(answer));
            let known = Arc::clone(&self.0);
            let decode = move |ids: &[u32]| ids.iter().map(|id| known.lock().unwrap()[*id as usize].clone()).collect();
            let mut guard = Guard::new(dry, &prompt, decode).unwrap();
            let taken = |id: &u32| {
                let mut logits = vec![0.0; 1000];
                guard.apply(&mut logits);
                guard.accept(*id);
                -logits[*id as usize]
            };
            answer.iter().map(taken).collect()
        }
    }

    fn penalties(dry: Dry, prompt: &str, answer: &str) -> Vec<f32> {
        Words(Arc::default()).penalties(dry, prompt, answer)
    }

    #[test]
    fn loops_are_made_unlikely_from_the_copy_after_the_third() {
        let numbered: String = (10..40).map(|i| format!("{i}. A good book about the sea.\n")).collect();
        for (name, text, from) in [
            ("words", "It is the largest".to_owned() + &" City of the".repeat(12), 16 + 3),
            ("lines", "He sat down and said nothing at all.\n".repeat(5), 3 * 10),
            ("numbered", numbered, 4 * 10),
            ("items", (10..80).map(|i| format!("{i}. Tea\n")).collect(), 2 * BUILT),
            ("question", " Why is that so?".repeat(30), ASKED),
        ] {
            let taken = penalties(Dry::GUARD, "Why is that so?", &text);
            let first = taken.iter().position(|p| *p > 0.0);
            assert!(first.is_some_and(|first| first >= from && first <= from + 4), "{name}: {first:?}, not {from}");
            assert!(taken.last().is_some_and(|last| *last > 5.0), "{name}: {taken:?}");
        }
    }

    #[test]
    fn what_rightly_repeats_is_left_alone() {
        let count: String = (1..60).map(|i| format!("{i}, ")).collect();
        let rows: String = (1..9).map(|i| format!("| day {i} | sun | sun | sun |\n")).collect();
        let code = "```python\n".to_owned() + &"    print(\"hello\")\n".repeat(5) + "```";
        let days: String =
            ["Mon", "Tues", "Wednes", "Thurs", "Fri"].map(|d| format!("- {d}day is a day of work.\n")).concat();
        for (name, prompt, text) in [
            ("counting", "Count.", count),
            ("counting in words", "Count.", (1..50).map(|i| format!("{i} sheep\n")).collect()),
            ("a table", "A table.", format!("| day | a | b | c |\n{}|\n{rows}", "| --- ".repeat(4))),
            ("code", "Code.", code),
            ("a list", "A list.", days),
            ("objects", "JSON.", (1..18).map(|i| format!("  {{\"num\": {i}, \"next\": {}}},\n", i + 1)).collect()),
            ("rows", "A table.", (1..25).map(|i| format!("| {i} | times three is | {} |\n", 3 * i)).collect()),
            ("sums", "Add.", (1..80).map(|i| format!("{i} + 2, ")).collect()),
            ("markup", "A table.", "<tr><td></td></tr>\n".repeat(4)),
            ("zeros", "Zeros.", "0, ".repeat(25)),
            ("a chorus", "A song.", "Choo choo goes the train, and all of us along.\n".repeat(3)),
            ("a wish", "Write \"hello\" 20 times.", "hello ".repeat(20)),
            ("laughter", "Laugh.", "ha ".repeat(5)),
        ] {
            let taken = penalties(Dry::GUARD, prompt, &text);
            assert!(taken.iter().all(|p| *p == 0.0), "{name}: {taken:?}");
        }
    }

    #[test]
    fn plain_dry_grows_with_the_repetition_and_stops_at_breakers() {
        let dry = Dry { after: 0, ..Dry::GUARD };
        let taken = penalties(dry, "x", " a b c d e a b c d e");
        let grown = [0.8, 0.8 * 1.75, 0.8 * 1.75 * 1.75];
        assert!(taken[..7].iter().all(|p| *p == 0.0), "{taken:?}");
        assert!(taken[7..].iter().zip(grown).all(|(p, want)| (p - want).abs() < 1e-4), "{taken:?}");
        assert_eq!(penalties(dry, "x", " a b\n c d\n a b\n c d\n").iter().filter(|p| **p > 0.0).count(), 2);
        assert!(penalties(dry, " a b c d e", " a b c d e").iter().all(|p| *p == 0.0), "the prompt's words are free");
        let long = penalties(dry, "x", &" a".repeat(2000));
        assert!(long.iter().all(|p| p.is_finite()) && long[1999] == MOST, "{:?}", long.last());
    }
}
