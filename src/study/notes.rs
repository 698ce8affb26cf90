//! Notes as they lie in a folder: each a title, and passages of sentences that can be asked about one by one.
//!
//! Headings, list items and empty lines end a passage; lines that were broken to fit a page are joined. A passage may begin
//! with a label (`Saturday: ..`, `3 May. ..`), which then belongs to all of its sentences.

use super::words;
use crate::data::{self, Entry, Purpose, Unused, data_error};
use crate::error::Result;
use std::path::{Path, PathBuf};

/// Longest passage, in bytes: it stands in prompts as a whole.
const PASSAGE: usize = 900;
/// Longest title and label, in bytes.
const TITLE: usize = 90;
const LABEL: usize = 40;

/// A note.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Its path within the folder, or its name.
    pub name: String,
    /// Its first heading, or what its name says.
    pub title: String,
    /// The whole text.
    pub text: String,
    /// What can be asked about, in order.
    pub passages: Vec<Passage>,
    /// Written in English, as far as its small words tell.
    pub english: bool,
}

/// Sentences that belong together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passage {
    /// What it is about, as the note says in front of it: a heading, or a label.
    pub label: Option<String>,
    /// Its sentences, without the label.
    pub sentences: Vec<String>,
}

impl Passage {
    /// Label and sentences as one text.
    #[must_use]
    pub fn text(&self) -> String {
        let label = self.label.as_ref().map(|label| format!("{label}: ")).unwrap_or_default();
        label + &self.sentences.join(" ")
    }
}

/// Reads the notes at `path`, a folder of them or one; nothing where there is other data.
///
/// # Errors
/// As [`crate::train::Dataset::open`] has them.
pub fn read_notes(path: &Path) -> Result<Option<Vec<Note>>> {
    let (mut notes, mut unused, mut other) = (Vec::new(), Unused::default(), false);
    let read = data::read(path, Purpose::Learn, &mut unused, &mut |entry, _, _| match entry {
        Entry::Note(file, text) => {
            notes.push(Note::new(name_in(path, &file), text));
            Ok(())
        }
        Entry::Keys(_) => {
            other = true;
            Err(data_error("record", "enough was read"))
        }
    });
    if other || notes.is_empty() && read.is_ok() {
        return Ok(None);
    }
    read.map(|()| Some(notes))
}

fn name_in(folder: &Path, file: &Path) -> String {
    let inner = file.strip_prefix(folder).ok().filter(|inner| !inner.as_os_str().is_empty());
    let name = inner.map_or_else(|| file.file_name().map(PathBuf::from).unwrap_or_default(), Path::to_owned);
    name.to_string_lossy().replace('\\', "/")
}

impl Note {
    /// Takes a text apart.
    #[must_use]
    pub fn new(name: String, text: String) -> Self {
        let (blocks, english) = (blocks(&text), words::is_english(&text));
        let stem = Path::new(&name).file_stem().map(|stem| stem.to_string_lossy().replace(['_', '-'], " "));
        let (mut title, mut heading): (Option<String>, Option<String>) = (None, None);
        let (mut passages, count) = (Vec::new(), blocks.len());
        for (i, block) in blocks.into_iter().enumerate() {
            // A first line by itself that does not end as a sentence does is a title, too.
            let bare = i == 0 && count > 1 && block.text.len() <= TITLE && !ends_sentence(&block.text);
            if block.heading || bare {
                if title.is_none() {
                    title = Some(block.text);
                } else {
                    heading = Some(block.text);
                }
                continue;
            }
            add_passages(block.text, heading.as_deref(), english, &mut passages);
        }
        let title = title.or(stem).filter(|title| !title.trim().is_empty()).unwrap_or_else(|| name.clone());
        Self { name, title, text, passages, english }
    }

    /// A number that changes when the note does.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let hash = |hash: u64, byte: u8| crate::rng::mix(hash, u64::from(byte));
        format!("{:016x}", self.name.bytes().chain([0]).chain(self.text.bytes()).fold(self.text.len() as u64, hash))
    }
}

/// Lines that belong together, joined.
struct Block {
    text: String,
    heading: bool,
}

fn blocks(text: &str) -> Vec<Block> {
    let (mut out, mut open): (Vec<Block>, String) = (Vec::new(), String::new());
    let mut front = text.trim_start().starts_with("---\n");
    let close = |open: &mut String, out: &mut Vec<Block>| {
        if !open.trim().is_empty() {
            out.push(Block { text: std::mem::take(open), heading: false });
        }
        open.clear();
    };
    for (i, line) in text.trim_start_matches('\u{feff}').trim_start().lines().enumerate() {
        let line = line.trim();
        if front {
            // Settings of the program that the note was written with.
            front = i == 0 || line != "---";
            continue;
        }
        if line.starts_with("```") || line.starts_with("~~~") {
            close(&mut open, &mut out);
            continue;
        }
        let rule = line.len() >= 3 && line.bytes().all(|b| matches!(b, b'-' | b'=' | b'*' | b'_'));
        if rule && !open.is_empty() && matches!(line.as_bytes()[0], b'=' | b'-') && open.len() <= TITLE {
            out.push(Block { text: std::mem::take(&mut open), heading: true });
        } else if rule || line.is_empty() {
            close(&mut open, &mut out);
        } else if let Some(heading) = heading(line) {
            close(&mut open, &mut out);
            out.push(Block { text: heading, heading: true });
        } else {
            let item = item(line);
            if item.len() < line.len() || line.starts_with('|') {
                close(&mut open, &mut out);
            }
            if !open.is_empty() {
                open.push(' ');
            }
            open.push_str(&plain(item));
        }
    }
    close(&mut open, &mut out);
    out
}

fn heading(line: &str) -> Option<String> {
    let rest = line.trim_start_matches('#');
    let heading = rest.len() < line.len() && rest.starts_with(' ');
    heading.then(|| plain(rest.trim().trim_end_matches('#').trim())).filter(|text| !text.is_empty())
}

/// A line without the mark of a list's item.
fn item(line: &str) -> &str {
    let after = |mark: &str| line.strip_prefix(mark).map(str::trim_start);
    if let Some(rest) = ["- ", "* ", "+ ", "> ", "\u{2022} "].iter().find_map(|mark| after(mark)) {
        return ["[ ] ", "[x] ", "[X] "].iter().find_map(|mark| rest.strip_prefix(mark)).unwrap_or(rest);
    }
    let digits = line.bytes().take_while(u8::is_ascii_digit).count();
    let marked = (1..=3).contains(&digits) && (line[digits..].starts_with(". ") || line[digits..].starts_with(") "));
    if marked { line[digits + 2..].trim_start() } else { line }
}

/// Text without marks of Markdown that stand around words.
fn plain(text: &str) -> String {
    let text = text.replace("**", "").replace("__", "").replace('`', "");
    text.trim_matches(|c| c == '*' || c == '|').trim().to_owned()
}

fn ends_sentence(text: &str) -> bool {
    text.trim_end().ends_with(['.', '!', '?', ':', ';', '"', '\u{3002}'])
}

fn add_passages(text: String, heading: Option<&str>, english: bool, out: &mut Vec<Passage>) {
    let (own, rest) = label(&text);
    let mut sentences = sentences(rest);
    // A first sentence of a few words without a verb says what the others are about.
    let own = own.map(str::to_owned).or_else(|| {
        let first = sentences.first().filter(|first| english && sentences.len() > 1 && first.ends_with('.'))?;
        let count = first.split_whitespace().count();
        // A last word with the ending of a verb may be one that is not known.
        let doubtful = first.ends_with("s.") || first.ends_with("ed.");
        let short = first.len() <= LABEL && count <= 4 && !doubtful && !words::has_verb(first);
        short.then(|| sentences.remove(0).trim_end_matches('.').to_owned())
    });
    let label = match (heading, own) {
        (Some(heading), Some(own)) => Some(format!("{heading}, {own}")),
        (heading, own) => own.or_else(|| heading.map(str::to_owned)),
    };
    let mut open = Passage { label, sentences: Vec::new() };
    let mut bytes = 0;
    for sentence in sentences {
        if bytes > 0 && bytes + sentence.len() > PASSAGE {
            let label = open.label.clone();
            out.push(std::mem::replace(&mut open, Passage { label, sentences: Vec::new() }));
            bytes = 0;
        }
        bytes += sentence.len();
        open.sentences.push(sentence);
    }
    if !open.sentences.is_empty() {
        out.push(open);
    }
}

/// A label in front of a colon, and the text behind it.
fn label(text: &str) -> (Option<&str>, &str) {
    let Some((label, rest)) = text.split_once(": ") else { return (None, text) };
    let words = label.split_whitespace().count();
    let fits = label.len() <= LABEL && (1..=4).contains(&words) && !label.contains(['.', '!', '?', ';', ',']);
    if fits && !rest.trim().is_empty() { (Some(label.trim()), rest.trim_start()) } else { (None, text) }
}

/// Words that end in a full stop without ending a sentence.
const SHORT: &[&str] = &[
    "mr", "mrs", "ms", "dr", "prof", "st", "no", "nr", "vs", "etc", "e.g", "i.e", "approx", "jr", "sr", "fig", "vol",
    "p", "pp", "ca", "inc", "ltd", "co", "dept", "mt", "jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept",
    "oct", "nov", "dec", "z.b", "bzw", "usw", "str",
];

/// The sentences of a text.
#[must_use]
pub fn sentences(text: &str) -> Vec<String> {
    let (mut out, mut start) = (Vec::new(), 0);
    let chars: Vec<(usize, char)> = text.char_indices().collect();
    let mut i = 0;
    while i < chars.len() {
        let (at, c) = chars[i];
        let wide = matches!(c, '\u{3002}' | '\u{ff01}' | '\u{ff1f}' | '\u{0964}');
        if wide || matches!(c, '.' | '!' | '?') {
            let mut end = i + 1;
            while end < chars.len() && matches!(chars[end].1, '.' | '!' | '?' | '"' | ')' | '\u{201d}' | '\u{bb}') {
                end += 1;
            }
            let to = chars.get(end).map_or(text.len(), |c| c.0);
            let spaced = chars.get(end).is_none_or(|c| c.1.is_whitespace());
            let next = text[to..].trim_start().chars().next();
            let begins = next.is_none_or(|c| !c.is_lowercase());
            let word = text[start..at].rsplit(char::is_whitespace).next().unwrap_or_default();
            let word = word.trim_start_matches(|c: char| !c.is_alphanumeric()).to_lowercase();
            let initial = word.chars().count() == 1 && word.chars().all(char::is_alphabetic);
            let cut_short = c == '.' && end == i + 1 && (SHORT.contains(&word.as_str()) || initial);
            if wide || spaced && begins && !cut_short {
                push(&text[start..to], &mut out);
                start = to;
            }
            i = end;
        } else {
            i += 1;
        }
    }
    push(&text[start..], &mut out);
    out
}

fn push(sentence: &str, out: &mut Vec<String>) {
    let sentence = sentence.split_whitespace().collect::<Vec<_>>().join(" ");
    if sentence.chars().any(char::is_alphanumeric) {
        out.push(sentence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_end_where_people_end_them() {
        let text = "Mr. Bell pays 3.50 a day. He left at 7.15 p.m. on Monday! \"Really?\" No. 4 is e.g. blue";
        assert_eq!(
            sentences(text),
            ["Mr. Bell pays 3.50 a day.", "He left at 7.15 p.m. on Monday!", "\"Really?\"", "No. 4 is e.g. blue"]
        );
        assert_eq!(sentences("\u{732b}\u{3002}\u{72ac}\u{3002}").len(), 2);
        assert!(sentences(" .. ").is_empty());
    }

    #[test]
    fn a_note_is_its_title_and_passages_with_labels() {
        let text = "# Boats\n\nThe red boat leaks. It was\nbuilt in 1950.\n\n- Monday: paint the hull. Buy rope.\n- The mast. \
                    It broke in May.\n\n## Crew\n\nTom steers.\n";
        let note = Note::new("boats.md".into(), text.into());
        assert_eq!((note.title.as_str(), note.english), ("Boats", true));
        let got: Vec<_> = note.passages.iter().map(|p| (p.label.as_deref(), p.sentences.join("|"))).collect();
        let expected = [
            (None, "The red boat leaks.|It was built in 1950."),
            (Some("Monday"), "paint the hull.|Buy rope."),
            (Some("The mast"), "It broke in May."),
            (Some("Crew"), "Tom steers."),
        ];
        assert_eq!(got, expected.map(|(label, text)| (label, text.to_owned())));
        assert_eq!(Note::new("shopping-list.txt".into(), "milk".into()).title, "shopping list");
        let long = Note::new("a".into(), "A sentence of some length stands here. ".repeat(100));
        assert!(long.passages.len() > 3 && long.passages.iter().all(|p| p.text().len() <= PASSAGE + 100));
    }

    #[test]
    fn notes_are_told_from_data() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("b.txt", "Two words.");
        write("a.md", "# A\n\nText.");
        write("empty.txt", "");
        let names = |path: &Path| read_notes(path).unwrap().map(|notes| notes.into_iter().map(|n| n.name).collect());
        assert_eq!(names(dir.path()), Some(vec!["a.md".to_owned(), "b.txt".to_owned()]));
        assert_eq!(names(&dir.path().join("b.txt")), Some(vec!["b.txt".to_owned()]));
        write("c.jsonl", "{\"text\": \"t\"}\n");
        assert_eq!(names(dir.path()), None);
    }
}
