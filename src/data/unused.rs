//! What was found in data and is not used.

use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Keys that are told apart; a file may have a key of its own for each record.
const MAX_KEYS: usize = 256;
/// Names of files that are kept.
const MAX_FILES: usize = 64;
/// Names that a line of text has.
const SHOWN: usize = 8;

/// What was found in data and is not used, to be told to people: nothing is left out silently.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Unused {
    /// Keys that have no use, and how many records had them; those of a turn begin with `messages.`.
    pub keys: BTreeMap<String, usize>,
    /// Records whose weight, or that of all their answers, is 0.
    pub records: usize,
    /// Files of a folder that are kept for evaluation by their names (`valid`, `test`, ..).
    pub held_out: Vec<String>,
    /// Files of a folder that are read for evaluation.
    pub measured: Vec<String>,
    /// Other files of a folder that are not data, as far as names are kept.
    pub files: Vec<String>,
    /// Other files of a folder that are not data, all of them.
    pub files_in_all: usize,
}

impl Unused {
    /// One more record has `key`.
    pub(crate) fn key(&mut self, key: &str) {
        let short: String = key.chars().take(64).collect();
        let name = if self.keys.len() < MAX_KEYS || self.keys.contains_key(&short) { short } else { "..".to_owned() };
        *self.keys.entry(name).or_default() += 1;
    }

    /// A file is not data.
    pub(super) fn file(&mut self, name: String) {
        self.files_in_all += 1;
        if self.files.len() < MAX_FILES {
            self.files.push(name);
        }
    }

    /// The same in lines of text; none where all is used.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        if !self.keys.is_empty() {
            let keys = self.keys.iter().map(|(key, n)| format!("`{}` ({n})", key.escape_debug()));
            let _ = writeln!(out, "keys not used: {}", listed(keys, self.keys.len()));
        }
        if self.records > 0 {
            let _ = writeln!(out, "records not learned, for their weight is 0: {}", self.records);
        }
        if !self.held_out.is_empty() {
            let files = listed(self.held_out.iter().map(|f| format!("`{f}`")), self.held_out.len());
            let _ = writeln!(out, "kept for evaluation by name: {files}; give one as `--eval-data FILE`");
        }
        if !self.measured.is_empty() {
            let files = listed(self.measured.iter().map(|f| format!("`{f}`")), self.measured.len());
            let _ = writeln!(out, "read in the folder for evaluation: {files}");
        }
        if self.files_in_all > 0 {
            let files = listed(self.files.iter().map(|f| format!("`{f}`")), self.files_in_all);
            let _ = writeln!(out, "not read in the folder: {files}");
        }
        out
    }
}

fn listed(names: impl Iterator<Item = String>, all: usize) -> String {
    let mut names: Vec<String> = names.take(SHOWN).collect();
    if all > names.len() {
        names.push(format!("and {} more", all - names.len()));
    }
    names.join(", ")
}
