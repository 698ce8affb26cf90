//! Notes become questions and answers, from which a model learns more than from their text.
//!
//! Of each sentence the base model itself makes questions, which are checked (`asker`), and rules of grammar make others
//! (`templates`); the sentence is the answer. The material lies in the run's folder, is taken up after a kill, and may be
//! edited (`kept`). Nothing leaves the device.

mod asker;
mod clause;
mod kept;
mod notes;
mod recall;
mod templates;
mod unit;
mod words;

pub use kept::{Item, STUDY, Source};
pub use notes::{Note, Passage, read_notes};
pub use recall::{NotesRecall, recall};

use crate::data::record::Record;
use crate::engine::{Engine, Reader};
use crate::error::{Error, ErrorCode, Result};
use crate::eval::Likelihood;
use crate::train::Dataset;
use asker::Asker;
use kept::Kept;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use unit::{Rarity, Unit, units};

/// How material is made.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct StudyOptions {
    /// Time for the model's own questions; after it there are those of rules alone.
    pub time: Duration,
    /// Most questions about a sentence.
    pub questions: usize,
    /// Most questions that are kept out of training.
    pub held: usize,
}

impl Default for StudyOptions {
    fn default() -> Self {
        Self { time: Duration::from_secs(300), questions: 6, held: 24 }
    }
}

/// How far it is.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct StudyProgress {
    /// Sentences whose questions are made.
    pub sentences: usize,
    /// All sentences.
    pub of: usize,
    /// Questions so far.
    pub questions: usize,
}

/// Material that was made of notes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Study {
    /// Questions and answers.
    pub items: Vec<Item>,
    /// Sentences that they are about.
    pub sentences: usize,
    /// All of it lay there already.
    pub found: bool,
    /// Somebody edited what lay there.
    pub edited: bool,
}

impl Study {
    /// Questions that are kept out of training.
    pub fn held(&self) -> impl Iterator<Item = &Item> {
        self.items.iter().filter(|item| item.held)
    }

    /// How many are of a source and learned.
    #[must_use]
    pub fn count(&self, source: Source) -> usize {
        self.items.iter().filter(|item| !item.held && item.source == source).count()
    }

    /// What is learned: questions with their answers, as conversations.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn dataset(&self, reader: &Reader, path: &Path, max_tokens: usize) -> Result<Dataset> {
        let asked = self.items.iter().filter(|item| !item.held).map(|item| Record::Instruction {
            instruction: item.question.clone(),
            input: String::new(),
            output: item.answer.clone(),
        });
        reader.dataset_of(path, asked.collect(), max_tokens)
    }
}

/// Makes study material of `notes`, or takes up what lies in `folder` of them. `progress` may stop it: what is made by then
/// is kept in the folder.
///
/// # Errors
/// The model has no tokenizer, the folder cannot be written, earlier material has a broken line or no question to learn,
/// stopped, as an answer's.
pub fn make(
    engine: &Engine,
    notes: &[Note],
    folder: Option<&Path>,
    options: &StudyOptions,
    progress: &mut dyn FnMut(StudyProgress) -> bool,
) -> Result<Study> {
    let mut kept = Kept::open(folder, notes)?;
    let units = units(notes);
    if kept.is_finished() {
        let (sentences, edited) = (units.len(), kept.edited);
        if kept.items.iter().all(|item| item.held) {
            let file = folder.unwrap_or(Path::new("")).join(STUDY);
            let message = "expected at least one question to learn, got none; add lines, or delete the file to have it made \
                           anew";
            return Err(Error::new(ErrorCode::Data, format!("`{}`", file.display()), message));
        }
        return Ok(Study { items: kept.items, sentences, found: true, edited });
    }
    let edited = kept.edited && !kept.items.is_empty();
    let made = fill(engine, notes, &units, options, &mut kept, progress);
    if let Err(e) = made {
        kept.save()?;
        return Err(e);
    }
    hold_out(&mut kept.items, options.held);
    kept.finish()?;
    Ok(Study { items: kept.items, sentences: units.len(), found: false, edited })
}

/// Questions about sentences by rules alone, to look at: no model is needed.
#[must_use]
pub fn sample(notes: &[Note], sentences: usize) -> Vec<Item> {
    let units = units(notes);
    let rarity = Rarity::new(&units);
    let by_rules = |unit: &Unit<'_>| add_templates(unit, Vec::new(), &rarity, 4);
    units.iter().take(sentences).flat_map(by_rules).collect()
}

fn fill(
    engine: &Engine,
    notes: &[Note],
    units: &[Unit<'_>],
    options: &StudyOptions,
    kept: &mut Kept,
    progress: &mut dyn FnMut(StudyProgress) -> bool,
) -> Result<()> {
    let start = Instant::now();
    let rarity = Rarity::new(units);
    let all: Vec<Vec<String>> = units.iter().map(|unit| words::content_words(unit.text)).collect();
    let (text, set) = (engine.text()?, engine.none()?);
    let likelihood = || Likelihood::new(engine, &text, Arc::clone(&set));
    let mut asker = Asker::new(engine, [likelihood()?, likelihood()?], &rarity, &all)?;
    let stopped = || Error::new(ErrorCode::Cancelled, "study", "stopped");
    let mut sentences = 0;
    for note in notes {
        for part in 0..note.passages.len() {
            let of_part: Vec<&Unit<'_>> =
                units.iter().filter(|u| u.part == part && std::ptr::eq(u.note, note)).collect();
            if part < kept.done(note) {
                sentences += of_part.len();
                continue;
            }
            let mut items = Vec::new();
            for unit in of_part {
                let mut tell = |items: usize| {
                    progress(StudyProgress { sentences, of: units.len(), questions: kept.items.len() + items })
                };
                if !tell(items.len()) {
                    return Err(stopped());
                }
                // Rules need no time; the model has what it was given.
                let (mut asked, mut going) = (Vec::new(), true);
                if note.english && start.elapsed() < options.time {
                    let keep_going = &mut || {
                        going = tell(items.len());
                        going && start.elapsed() < options.time
                    };
                    asked = asker.ask(unit, keep_going)?;
                }
                if !going {
                    return Err(stopped());
                }
                items.extend(add_templates(unit, asked, &rarity, options.questions));
                sentences += 1;
            }
            items.extend(whole(note, part));
            if part == 0 && start.elapsed() < options.time {
                items.extend(asker.summary(note)?);
            }
            kept.add(note, part, items)?;
        }
    }
    Ok(())
}

/// A passage of several sentences, word for word.
fn whole(note: &Note, part: usize) -> Option<Item> {
    let passage = &note.passages[part];
    let about = match &passage.label {
        Some(label) => format!("say about \"{label}\""),
        None if note.passages.len() == 1 => "say".to_owned(),
        None => format!("say in part {}", part + 1),
    };
    (passage.sentences.len() > 1).then(|| Item {
        note: Some(note.name.clone()),
        part: Some(part),
        question: format!("What does my note \"{}\" {about}?", note.title),
        answer: passage.text(),
        source: Source::Template,
        ..Item::default()
    })
}

/// The model's questions, and those of rules up to `most` in all.
fn add_templates(unit: &Unit<'_>, asked: Vec<Item>, rarity: &Rarity, most: usize) -> Vec<Item> {
    let mut items = asked;
    for ask in templates::questions(unit, &|word| rarity.of(word)) {
        let again = items.iter().any(|item| item.question.eq_ignore_ascii_case(&ask.question));
        if items.len() < most && !again {
            items.push(Item { key: ask.key, ..Item::new(unit, ask.question, Source::Template) });
        }
    }
    items
}

/// Marks at most `most` questions to be asked afterwards: of answers that have other questions as well, spread over all.
fn hold_out(items: &mut [Item], most: usize) {
    let mut choices: Vec<usize> = Vec::new();
    let mut start = 0;
    while start < items.len() {
        let same = items[start..].iter().take_while(|item| item.answer == items[start].answer).count();
        let group = start..start + same;
        // The model's own are nearest to what people ask.
        let asks = |i: &usize, source| items[*i].source == source && items[*i].key.is_some();
        let first = |source| group.clone().find(|i| asks(i, source));
        if same >= 4 && !items[group.clone()].iter().any(|item| item.held) {
            choices.extend(first(Source::Model).or_else(|| first(Source::Template)));
        }
        start += same;
    }
    // Few sentences need their questions to be learned.
    let most = most.min(choices.len().div_ceil(3).max(4));
    let step = choices.len().div_ceil(most.max(1)).max(1);
    for i in choices.into_iter().step_by(step).take(most) {
        items[i].held = true;
    }
}
