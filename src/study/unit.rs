//! A sentence of a note with what it takes to understand it alone.

use super::clause::Clause;
use super::notes::Note;
use super::templates;
use super::words::{self, Kind, Word};
use std::collections::HashMap;

/// A sentence that is asked about.
#[derive(Clone, Debug)]
pub struct Unit<'n> {
    pub note: &'n Note,
    /// Number of its passage in the note.
    pub part: usize,
    /// Its number among all sentences of all notes.
    pub number: usize,
    pub label: Option<&'n str>,
    /// The sentences before it in its passage.
    pub earlier: &'n [String],
    pub text: &'n str,
}

/// Words at the beginning of a sentence that point to the one before.
const POINTING: [&str; 14] =
    ["he", "she", "it", "they", "this", "that", "these", "those", "his", "her", "its", "their", "then", "there"];

impl Unit<'_> {
    /// The sentence as an answer that can be understood by itself: with its label, and with the sentence that it points to.
    pub fn answer(&self) -> String {
        let first = words::words_of(self.text).next().unwrap_or_default();
        let points = POINTING.contains(&first.as_str());
        let before = self.earlier.last().filter(|_| points).map(|text| format!("{text} "));
        let label = self.label.map(|label| format!("{label}: ")).unwrap_or_default();
        format!("{label}{}{}", before.unwrap_or_default(), self.text)
    }

    /// What the pronoun that the sentence begins with stands for, most likely: for `she` the last name before, for `it`
    /// what the last sentence was about, or what it brought up where it was about somebody: Mira has a boat.
    pub fn referent(&self) -> Option<String> {
        let first = words::words_of(self.text).next().unwrap_or_default();
        let person = matches!(first.as_str(), "he" | "she");
        if !person && !matches!(first.as_str(), "it" | "they") {
            return None;
        }
        let label = self.label.filter(|label| !person && self.earlier.is_empty() && label.starts_with("The "));
        if let Some(label) = label {
            return Some(templates::phrase(&words::tagged(label)));
        }
        self.earlier.iter().rev().find_map(|sentence| {
            let tagged = words::tagged(sentence);
            let chunks = templates::chunks(&tagged);
            let last = |named: bool| {
                let fits = |chunk: &&[Word<'_>]| !named || chunk.iter().any(|word| word.kind == Kind::Name);
                chunks.iter().copied().rev().find(fits).map(templates::phrase)
            };
            if person {
                return last(true);
            }
            let bare = chunks.first().is_some_and(|subject| subject[0].kind != Kind::Determiner);
            let brought_up = chunks.iter().skip(1).rev().find(|chunk| matches!(&*chunk[0].lower, "a" | "an"));
            if let Some(thing) = brought_up.filter(|thing| first == "it" && bare && thing.len() > 1) {
                return Some(format!("the {}", templates::phrase(&thing[1..])));
            }
            match Clause::of(&tagged) {
                Some(clause) if clause.imperative => last(false),
                Some(clause) => clause.own_subject(),
                None => None,
            }
        })
    }

    /// What a question adds to say what it is about.
    pub fn label_about(&self) -> String {
        match self.label {
            Some(label) if label.chars().count() <= 24 && self.number.is_multiple_of(2) => format!(" ({label})"),
            _ => String::new(),
        }
    }
}

/// All sentences of `notes`.
pub fn units(notes: &[Note]) -> Vec<Unit<'_>> {
    let mut out = Vec::new();
    for note in notes {
        for (part, passage) in note.passages.iter().enumerate() {
            for (i, text) in passage.sentences.iter().enumerate() {
                let (label, number) = (passage.label.as_deref(), out.len());
                out.push(Unit { note, part, number, label, earlier: &passage.sentences[..i], text });
            }
        }
    }
    out
}

/// How many sentences have each word.
pub struct Rarity {
    counts: HashMap<String, usize>,
    units: usize,
}

impl Rarity {
    pub fn new(units: &[Unit<'_>]) -> Self {
        let mut counts = HashMap::new();
        for unit in units {
            words::content_words(unit.text).into_iter().for_each(|word| *counts.entry(word).or_default() += 1);
        }
        Self { counts, units: units.len() }
    }

    /// Higher for words that few sentences have, 0 for words that none has.
    pub fn of(&self, word: &str) -> f64 {
        self.counts.get(word).map_or(0.0, |n| (1.0 + self.units as f64 / *n as f64).ln())
    }

    /// How well `unit` fits the words of `question`: those that both have, the rarer the more.
    pub fn fit(&self, question: &[String], unit: &[String]) -> f64 {
        question.iter().filter(|word| unit.contains(word)).map(|word| self.of(word)).sum()
    }
}
