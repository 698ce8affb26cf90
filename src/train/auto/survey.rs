//! What records ask and answer, read before they are tokens.

use super::reword::reworded;
use crate::data::record::Record;
use crate::data::{self, Entry, Purpose, Unused};
use crate::error::Result;
use crate::rng::mix;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

/// Stream of random numbers for the choice of records.
const CHOICE: u64 = 6;
/// Records that are kept as text at most.
const KEPT: usize = 48;
/// Conflicts that are told one by one.
const TOLD: usize = 3;
/// Characters of a question that are shown.
const SHOWN: usize = 60;
/// Characters of a record that are looked at for its language.
const LOOKED_AT: usize = 300;

/// The same question with two answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The question, or its beginning.
    pub question: String,
    /// Lines of the file (from 1) that ask it; 0 where records are whole files.
    pub lines: [usize; 2],
    /// The two answers, or their beginnings.
    pub answers: [String; 2],
}

/// A record in numbers.
struct Row {
    /// None for a text.
    question: Option<u64>,
    answer: u64,
}

/// All records in numbers, and some as they are.
pub(crate) struct Survey {
    rows: Vec<Row>,
    /// Records whose question can be reworded, with their numbers in the data.
    pub(super) kept: Vec<(usize, Record)>,
    /// The beginnings of some records.
    plain: Vec<String>,
    conflicts: Vec<Conflict>,
    /// All conflicts, told or not.
    conflicting: usize,
    seed: u64,
}

/// What was first answered to a question.
struct First {
    answer: u64,
    line: usize,
    text: String,
    told: bool,
}

impl Survey {
    /// Reads the data at `path` as [`Dataset::open`](crate::Dataset::open) does; of a pipe, nothing.
    ///
    /// # Errors
    /// As there.
    pub fn read(path: &Path, seed: u64) -> Result<Self> {
        let seed = mix(seed, CHOICE);
        let mut out =
            Self { rows: Vec::new(), kept: Vec::new(), plain: Vec::new(), conflicts: Vec::new(), conflicting: 0, seed };
        // What comes through a pipe comes once.
        if !std::fs::metadata(path).is_ok_and(|meta| meta.is_file() || meta.is_dir()) {
            return Ok(out);
        }
        let (mut kept, mut plain) = (BTreeMap::new(), BTreeMap::new());
        let mut firsts: HashMap<u64, First> = HashMap::new();
        data::read(path, Purpose::Learn, &mut Unused::default(), &mut |entry, line, unused| {
            let record = match entry {
                Entry::Note(_, text) => Record::Text { text, start: 0 },
                Entry::Keys(fields) => match Record::new(fields, unused)? {
                    Some(record) => record,
                    None => return Ok(()),
                },
            };
            let number = out.rows.len();
            let (question, answer) = asked(&record);
            let row = Row { question: question.as_deref().map(normal_hash), answer: normal_hash(&answer) };
            if let (Some(asked), Some(question)) = (row.question, &question) {
                let first = firsts.entry(asked).or_insert_with(|| First {
                    answer: row.answer,
                    line,
                    text: beginning(&answer),
                    told: false,
                });
                if first.answer != row.answer && !std::mem::replace(&mut first.told, true) {
                    out.conflicting += 1;
                    if out.conflicts.len() < TOLD {
                        let answers = [first.text.clone(), beginning(&answer)];
                        let question = beginning(question.rsplit(BORDER).next().unwrap_or_default());
                        out.conflicts.push(Conflict { question, lines: [first.line, line], answers });
                    }
                }
            }
            // Those with the smallest numbers are some in no order.
            let draw = (mix(mix(seed, row.question.unwrap_or(row.answer)), row.answer), number);
            if plain.last_key_value().is_none_or(|(last, _)| plain.len() < KEPT / 2 || draw < *last) {
                let text = format!("{} {answer}", question.as_deref().unwrap_or_default().replace(BORDER, " "));
                plain.insert(draw, text.trim().chars().take(LOOKED_AT).collect::<String>());
                if plain.len() > KEPT / 2 {
                    plain.pop_last();
                }
            }
            let wanted = kept.last_key_value().is_none_or(|(last, _)| kept.len() < KEPT || draw < *last);
            if wanted && reworded(&record, 0).is_some() {
                kept.insert(draw, record);
                if kept.len() > KEPT {
                    kept.pop_last();
                }
            }
            out.rows.push(row);
            Ok(())
        })?;
        out.kept = kept.into_iter().map(|((_, number), record)| (number, record)).collect();
        out.plain = plain.into_values().collect();
        Ok(out)
    }

    /// The beginnings of some records.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.plain.iter().map(String::as_str)
    }

    /// Whether any record asks.
    pub fn asks(&self) -> bool {
        self.rows.iter().any(|row| row.question.is_some())
    }

    /// Questions in wordings of which the answer has three at least: no twins, and some of them can be done without.
    /// By answer, in no order.
    fn wordings(&self) -> Vec<Vec<usize>> {
        let mut times: HashMap<u64, usize> = HashMap::new();
        self.rows.iter().filter_map(|row| row.question).for_each(|q| *times.entry(q).or_default() += 1);
        let mut groups: BTreeMap<u64, Vec<(u64, usize)>> = BTreeMap::new();
        for (number, row) in self.rows.iter().enumerate() {
            if let Some(question) = row.question.filter(|q| times[q] == 1) {
                let draw = mix(self.seed, question);
                groups.entry(mix(self.seed, row.answer)).or_default().push((draw, number));
            }
        }
        let groups = groups.into_values().filter(|group| group.len() > 2).map(|mut group| {
            group.sort_unstable();
            group.into_iter().map(|(_, number)| number).collect()
        });
        groups.collect()
    }

    /// Records that are not learned but watched: of answers in several wordings some of these; of many records some; of
    /// few none, for then each is needed.
    pub fn left_out(&self) -> BTreeSet<usize> {
        let groups = self.wordings();
        let asked = self.rows.iter().filter(|row| row.question.is_some()).count();
        if asked > 0 && 2 * groups.iter().map(Vec::len).sum::<usize>() >= asked {
            let most = (self.rows.len() / 12).clamp(1, 32);
            let rounds = groups.iter().map(|group| group.len() / 3).max().unwrap_or(0);
            let one = |round: usize| groups.iter().filter(move |g| round < g.len() / 3).map(move |g| g[round]);
            return (0..rounds).flat_map(one).take(most).collect();
        }
        // From here on a fiftieth is enough to tell, and not missed. A text tells less, but there is no other way.
        let (least, share) = if asked > 0 { (1000, 50) } else { (100, 20) };
        if self.rows.len() < least {
            return BTreeSet::new();
        }
        let most = (self.rows.len() / share).min(64);
        let mut twins: HashMap<(Option<u64>, u64), usize> = HashMap::new();
        self.rows.iter().for_each(|row| *twins.entry((row.question, row.answer)).or_default() += 1);
        let alone = self.rows.iter().enumerate().filter(|(_, row)| twins[&(row.question, row.answer)] == 1);
        let mut drawn: Vec<_> =
            alone.map(|(number, row)| (mix(mix(self.seed, row.answer), row.question.unwrap_or(0)), number)).collect();
        drawn.sort_unstable();
        drawn.into_iter().take(most).map(|(_, number)| number).collect()
    }

    /// Whether there are many answers in more than two wordings each.
    pub fn has_wordings(&self) -> bool {
        2 * self.wordings().iter().map(Vec::len).sum::<usize>() >= self.rows.len().max(1)
    }

    /// Whether anything can tell that a run gets no better.
    pub fn can_watch(&self) -> bool {
        !self.kept.is_empty() || !self.left_out().is_empty()
    }

    /// What to say of conflicts in the file at `path`, if there are any.
    pub fn conflict_text(&self, path: &Path) -> Option<String> {
        let one = |c: &Conflict| {
            let [first, second] = &c.answers;
            let place = match c.lines {
                [0, _] | [_, 0] => String::new(),
                [a, b] => format!("lines {a} and {b}: "),
            };
            format!("{place}`{}` is answered `{first}` and `{second}`", c.question)
        };
        let told: Vec<String> = self.conflicts.iter().map(one).collect();
        let more = self.conflicting - told.len();
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        let text = format!(
            "`{}` answers the same question in different ways, of which a model can learn one: {}{more}; correct one of \
             each, or take it out",
            path.display(),
            told.join("; ")
        );
        (self.conflicting > 0).then_some(text)
    }
}

/// Between the turns of what comes before an answer.
const BORDER: char = '\u{1}';

/// Everything before the last answer of a record, and that answer; a text is an answer without a question.
fn asked(record: &Record) -> (Option<String>, String) {
    match record {
        Record::Chat { messages, from, .. } => {
            let last = (*from..messages.len()).rfind(|i| messages[*i].role == "assistant" && messages[*i].learned);
            let content = |i: usize| messages[i].content.clone().unwrap_or_default();
            let at = last.unwrap_or(messages.len() - 1);
            let turns: Vec<String> = (0..at).map(content).collect();
            (Some(turns.join(&BORDER.to_string())), content(at))
        }
        Record::Instruction { instruction, input, output } if input.is_empty() => {
            (Some(instruction.clone()), output.clone())
        }
        Record::Instruction { instruction, input, output } => (Some(format!("{instruction}\n{input}")), output.clone()),
        Record::Text { text, start: 0 } => (None, text.clone()),
        Record::Text { text, start } => (Some(text[..*start].to_owned()), text[*start..].to_owned()),
    }
}

/// The same for what differs alone in spaces, capitals and the mark at its end; fixed, for a choice depends on it.
fn normal_hash(text: &str) -> u64 {
    let words = text
        .trim_end_matches(|c: char| c.is_whitespace() || matches!(c, '.' | '?' | '!'))
        .split_whitespace()
        .map(str::to_lowercase);
    words.fold(1, |hash, word| word.bytes().fold(mix(hash, 256), |hash, byte| mix(hash, u64::from(byte))))
}

fn beginning(text: &str) -> String {
    let text = text.trim();
    let mut short: String = text.chars().take(SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(SHOWN).is_some() {
        short.push('\u{2026}');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    fn survey(lines: impl IntoIterator<Item = (String, String)>) -> Survey {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.jsonl");
        let line = |(q, a)| serde_json::json!({ "prompt": q, "response": a }).to_string();
        std::fs::write(&path, lines.into_iter().map(line).collect::<Vec<_>>().join("\n")).unwrap();
        Survey::read(&path, 3).unwrap()
    }

    fn pair(q: impl ToString, a: impl ToString) -> (String, String) {
        (q.to_string(), a.to_string())
    }

    #[test]
    fn conflicts_name_both_lines_and_repetitions_are_none() {
        let lines = [("Who?", "Ann"), ("Where?", "Here"), ("who ", " ann."), ("WHO", "Bob"), ("Who?", "Cid")];
        let found = survey(lines.map(|(q, a)| pair(q, a)));
        let text = found.conflict_text(Path::new("d.jsonl")).unwrap();
        assert!(text.contains("lines 1 and 4") && text.contains("`Ann` and `Bob`") && !text.contains("Here"), "{text}");
        assert_eq!(found.conflicting, 1);
        assert!(survey((0..9).map(|i| pair(i, i))).conflict_text(Path::new("x")).is_none());
        let many = survey((0..20).map(|i| pair(i / 2, i)));
        assert!(many.conflict_text(Path::new("x")).unwrap().contains("and 7 more"));
    }

    #[test]
    fn of_answers_in_several_wordings_some_wordings_are_left_out_and_no_answer_loses_all() {
        let facts = survey((0..72).map(|i| pair(format!("{} in words {}", i / 3, i % 3), format!("answer {}", i / 3))));
        let left = facts.left_out();
        assert_eq!(left.len(), 6);
        let answers: BTreeSet<usize> = left.iter().map(|i| i / 3).collect();
        assert_eq!(answers.len(), 6, "{left:?}");
        assert_eq!(facts.left_out(), left);
        // Few labels with many questions each.
        let labels = survey((0..80).map(|i| pair(format!("message {i}"), format!("label {}", i % 4))));
        assert_eq!(labels.left_out().len(), 6);
        assert!(labels.has_wordings() && facts.has_wordings());
        // A wording that is there twice would be learned all the same.
        let twins = survey((0..72).map(|i| pair(format!("{}", i / 2), format!("answer {}", i / 24))));
        assert!(twins.left_out().is_empty());
    }

    #[test]
    fn few_records_are_all_learned_and_of_many_some_are_watched() {
        let sums = |n: usize| survey((0..n).map(|i| pair(format!("{i} + 1"), i + 1)));
        assert!(sums(150).left_out().is_empty() && sums(150).can_watch() && !sums(150).has_wordings());
        assert_eq!(sums(2000).left_out().len(), 40);
        assert_eq!(sums(10_000).left_out().len(), 64);
        assert_eq!(sums(10_000).kept.len(), KEPT);
    }
}
