//! Study material in a run's folder: `study.jsonl`, a question with its answer in each line, to be read and edited; and
//! `study.state.json`, which remembers what notes it was made of and how far it is.

use super::notes::Note;
use super::unit::Unit;
use crate::error::{Error, ErrorCode, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Name of the material in a run's folder.
pub const STUDY: &str = "study.jsonl";
const STATE: &str = "study.state.json";
/// Time between two times that it is written.
const PACE: Duration = Duration::from_secs(2);

/// Who wrote a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The base model, and it passed the checks.
    Model,
    /// A rule of grammar.
    Template,
    /// Somebody who edited the file.
    #[default]
    #[serde(other)]
    User,
}

/// A line: what is asked and what is answered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// The note that it is of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Number of its passage in the note.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<usize>,
    /// What is asked.
    pub question: String,
    /// What is learned.
    pub answer: String,
    /// Words of the answer that the question asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Who wrote it.
    #[serde(default)]
    pub source: Source,
    /// Of a model's question, nats a token by which the passage makes the key likelier; of a summary, the share of its
    /// words that stand in the note.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    /// Kept out of training, to be asked afterwards.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub held: bool,
}

impl Item {
    /// A question that the sentence of `unit` answers.
    pub(super) fn new(unit: &Unit<'_>, question: String, source: Source) -> Self {
        let (note, part) = (Some(unit.note.name.clone()), Some(unit.part));
        Self { note, part, question, answer: unit.answer(), source, ..Self::default() }
    }

    /// Whether `answer` is as good as this one's: the words that were asked for are in it, or all of it is.
    #[must_use]
    pub fn is_answered_by(&self, answer: &str) -> bool {
        let expected = self.key.as_ref().unwrap_or(&self.answer).to_lowercase();
        answer.to_lowercase().contains(expected.trim_end_matches('.'))
    }
}

/// How far the material of a note is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Progress {
    fingerprint: String,
    done: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    notes: BTreeMap<String, Progress>,
    /// The material is complete.
    finished: bool,
    /// Of the lines as they were written: others were edited.
    lines: String,
}

/// The material of a run, in memory and, where there is a folder, on disk.
pub struct Kept {
    folder: Option<PathBuf>,
    state: State,
    /// Its lines.
    pub items: Vec<Item>,
    /// Somebody changed lines since they were written.
    pub edited: bool,
    saved: Instant,
}

impl Kept {
    /// Takes up what lies in `folder` of these `notes`; what is of other notes, or was not finished, is left out.
    ///
    /// # Errors
    /// A file cannot be read, or a line is no question with an answer.
    pub fn open(folder: Option<&Path>, notes: &[Note]) -> Result<Self> {
        let mut kept = Self {
            folder: folder.map(Path::to_owned),
            state: State::default(),
            items: Vec::new(),
            edited: false,
            saved: Instant::now(),
        };
        let Some(path) = folder.map(|dir| dir.join(STUDY)).filter(|path| path.exists()) else { return Ok(kept) };
        let text = fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
        let state = fs::read(path.with_file_name(STATE)).ok();
        let mut state: State = state.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let prints: BTreeMap<&str, String> =
            notes.iter().map(|note| (note.name.as_str(), note.fingerprint())).collect();
        let all = state.notes.len();
        state
            .notes
            .retain(|name, progress| prints.get(name.as_str()).is_some_and(|print| *print == progress.fingerprint));
        state.finished &= state.notes.len() == all && all == notes.len();
        kept.edited = state.lines != hash(&text);
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let item = parse(line).map_err(|e| e.at(format!("`{}` line {}", path.display(), i + 1)))?;
            let current = match (&item.note, item.part) {
                (Some(note), part) => {
                    state.notes.get(note).is_some_and(|p| part.unwrap_or(0) < p.done || part.is_none() && p.done > 0)
                }
                (None, _) => true,
            };
            if current || item.source == Source::User {
                kept.items.push(item);
            }
        }
        kept.state = state;
        Ok(kept)
    }

    /// Whether all of it is there.
    pub fn is_finished(&self) -> bool {
        self.state.finished
    }

    /// Passages of `note` whose questions are there.
    pub fn done(&self, note: &Note) -> usize {
        self.state.notes.get(&note.name).map_or(0, |progress| progress.done)
    }

    /// Adds the questions of a note's next passage.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn add(&mut self, note: &Note, part: usize, items: Vec<Item>) -> Result<()> {
        self.items.extend(items);
        self.state.notes.insert(note.name.clone(), Progress { fingerprint: note.fingerprint(), done: part + 1 });
        if self.saved.elapsed() >= PACE { self.save() } else { Ok(()) }
    }

    /// Writes it as complete.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn finish(&mut self) -> Result<()> {
        self.state.finished = true;
        self.save()
    }

    /// Writes what there is.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save(&mut self) -> Result<()> {
        self.saved = Instant::now();
        let Some(folder) = &self.folder else { return Ok(()) };
        crate::format::create_folder(folder)?;
        let line = |item: &Item| serde_json::to_string(item).expect("texts and numbers are JSON") + "\n";
        let text: String = self.items.iter().map(line).collect();
        // The lines first: a kill between the two leaves lines that the state does not know, and they are made again.
        crate::format::write_bytes(&folder.join(STUDY), text.as_bytes())?;
        self.state.lines = hash(&text);
        let state = serde_json::to_vec_pretty(&self.state).expect("texts and numbers are JSON");
        crate::format::write_bytes(&folder.join(STATE), &state)
    }
}

fn parse(line: &str) -> Result<Item> {
    let item: Item = serde_json::from_str(line).map_err(|e| {
        let message =
            "expected a JSON object with `question` and `answer`, got something else; mend the line or take it out";
        Error::new(ErrorCode::Data, "study material", message).caused_by(e)
    })?;
    if item.question.trim().is_empty() || item.answer.trim().is_empty() {
        let message = "expected a question and an answer, got an empty one; write it, or take the line out";
        return Err(Error::new(ErrorCode::Data, "study material", message));
    }
    Ok(item)
}

fn hash(text: &str) -> String {
    format!("{:016x}", text.bytes().fold(text.len() as u64, |hash, byte| crate::rng::mix(hash, u64::from(byte))))
}

#[cfg(test)]
mod tests {
    use super::super::unit::units;
    use super::*;

    #[test]
    fn what_is_kept_is_taken_up_with_edits_and_without_what_changed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Some(dir.path());
        let mut notes = vec![
            Note::new("a.md".into(), "One is here. Two is there.\n\nThree is gone.".into()),
            Note::new("b.md".into(), "Four.".into()),
        ];
        let mut kept = Kept::open(folder, &notes).unwrap();
        let items = |notes: &[Note], part: usize| -> Vec<Item> {
            let of_part = units(notes).into_iter().filter(|u| u.part == part && u.note.name == "a.md");
            of_part.map(|u| Item::new(&u, format!("{}?", u.text), Source::Template)).collect()
        };
        kept.add(&notes[0], 0, items(&notes, 0)).unwrap();
        kept.save().unwrap();
        // A kill after more lines, before the state.
        let path = dir.path().join(STUDY);
        let text = fs::read_to_string(&path).unwrap();
        let more = serde_json::to_string(&items(&notes, 1)[0]).unwrap();
        fs::write(&path, format!("{text}{more}\n")).unwrap();
        let kept = Kept::open(folder, &notes).unwrap();
        assert_eq!((kept.items.len(), kept.done(&notes[0]), kept.is_finished()), (2, 1, false));

        let mut kept = kept;
        kept.add(&notes[0], 1, items(&notes, 1)).unwrap();
        kept.add(&notes[1], 0, vec![Item { note: Some("b.md".into()), ..items(&notes, 0)[0].clone() }]).unwrap();
        kept.finish().unwrap();
        let whole = Kept::open(folder, &notes).unwrap();
        assert!(whole.is_finished() && !whole.edited && whole.items == kept.items);

        let text = fs::read_to_string(&path).unwrap().replacen("One is here.?", "Which one?", 1);
        fs::write(&path, text + "{\"question\": \"mine\", \"answer\": \"yes\"}\n").unwrap();
        let edited = Kept::open(folder, &notes).unwrap();
        assert!(edited.is_finished() && edited.edited);
        assert_eq!(
            (edited.items[0].question.as_str(), edited.items.last().unwrap().source),
            ("Which one?", Source::User)
        );

        notes[1] = Note::new("b.md".into(), "Five.".into());
        let changed = Kept::open(folder, &notes).unwrap();
        assert!(!changed.is_finished() && changed.done(&notes[1]) == 0 && changed.done(&notes[0]) == 2);
        assert_eq!(changed.items.iter().filter(|i| i.note.as_deref() == Some("b.md")).count(), 0);
    }

    #[test]
    fn a_broken_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for line in ["{\"question\": \"q\"}", "nonsense", "{\"question\": \"\", \"answer\": \"a\"}"] {
            fs::write(dir.path().join(STUDY), format!("{{\"question\": \"q\", \"answer\": \"a\"}}\n{line}\n")).unwrap();
            let error = Kept::open(Some(dir.path()), &[]).err().unwrap().to_string();
            assert!(error.contains("study.jsonl` line 2"), "{error}");
        }
    }
}
