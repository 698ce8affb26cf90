//! A folder, read by what it holds: data files, or notes.

use super::{Each, Kind, Purpose, Sink, Unused, file, foreign, holds_records, place};
use crate::error::{Error, ErrorCode, Result};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Words in the name of a file or of a folder around it that tell what its records are for.
const LEARNED: [&str; 2] = ["train", "training"];
const HELD_OUT: [&str; 10] =
    ["valid", "validation", "val", "dev", "eval", "evaluation", "test", "testing", "heldout", "holdout"];
/// Those of the last that are taken for evaluation only where there are no others.
const TESTS: [&str; 2] = ["test", "testing"];
/// Files that tell about the others.
const ABOUT: [&str; 12] = [
    "readme",
    "license",
    "licence",
    "copying",
    "notice",
    "changelog",
    "changes",
    "authors",
    "citation",
    "contributing",
    "requirements",
    "code_of_conduct",
];
/// These are no notes, even among notes.
const LEGAL: [&str; 5] = ["license", "licence", "copying", "notice", "requirements"];

/// The files of a folder and the folders in it, by name, and what is neither: links to folders, which may lead in circles,
/// and the like. Hidden ones are left alone.
fn files(folder: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut found, mut others, mut folders) = (Vec::new(), Vec::new(), vec![folder.to_owned()]);
    while let Some(dir) = folders.pop() {
        for entry in fs::read_dir(&dir).map_err(|e| Error::io("read", &dir, e))? {
            let entry = entry.map_err(|e| Error::io("read", &dir, e))?;
            let (path, kind) = (entry.path(), entry.file_type().map_err(|e| Error::io("read", &entry.path(), e))?);
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() || fs::metadata(&path).is_ok_and(|meta| meta.is_file()) {
                found.push(path);
            } else {
                others.push(path);
            }
        }
    }
    found.sort_unstable();
    Ok((found, others))
}

/// Gives the records of a folder's data files or, where it has none, its notes.
pub(super) fn read(folder: &Path, purpose: Purpose, unused: &mut Unused, each: &mut Each<'_>) -> Result<()> {
    let (found, mut others) = files(folder)?;
    let (mut data, mut notes, mut foreign) = (Vec::new(), Vec::new(), Vec::new());
    for path in found {
        match Kind::of(&path) {
            Kind::Json | Kind::Table if is_data(&path)? => data.push(path),
            Kind::Note => notes.push(path),
            kind => {
                if kind == Kind::Foreign {
                    foreign.push(path.clone());
                }
                others.push(path);
            }
        }
    }
    let name = |path: &Path| path.strip_prefix(folder).unwrap_or(path).display().to_string();
    let read = if !data.is_empty() {
        others.append(&mut notes);
        let Splits { read, held_out, rest } = Splits::new(folder, data, purpose);
        if let Some(meant) = foreign.iter().find(|path| is_meant(folder, path, &read, purpose)) {
            return Err(not_read(meant));
        }
        unused.held_out.extend(held_out.iter().map(|path| path.display().to_string()));
        if purpose == Purpose::Evaluate {
            unused.measured.extend(read.iter().map(|path| path.display().to_string()));
        }
        others.extend(rest);
        one_form_each(folder, &read)?;
        read
    } else {
        let (legal, notes): (Vec<_>, Vec<_>) = notes.into_iter().partition(|path| is_called(path, &LEGAL));
        others.extend(legal);
        // A README beside data that cannot be read is not what the user means.
        if let Some(foreign) = foreign.first().filter(|_| notes.iter().all(|path| is_called(path, &ABOUT))) {
            return Err(not_read(foreign));
        }
        notes
    };
    others.sort_unstable();
    if read.is_empty() {
        let found = match others.len() {
            0 => "none".to_owned(),
            n => format!("{n} others, such as `{}`", name(&others[0])),
        };
        let message = format!(
            "expected data files (`.jsonl`, `.json`, `.csv`, `.tsv`) or notes (`.txt`, `.md`), got {found}; name another folder, \
             or the data file itself"
        );
        return Err(Error::new(ErrorCode::Data, place(folder, 0, 0), message));
    }
    others.iter().for_each(|path| unused.file(name(path)));
    for path in &read {
        // An empty note among notes says nothing.
        if Kind::of(path) == Kind::Note && fs::metadata(path).is_ok_and(|meta| meta.len() == 0) {
            continue;
        }
        file(path, &mut Sink { path, unused, each })?;
    }
    Ok(())
}

/// Whether a file of JSON or a table is data, not settings or facts about the data.
fn is_data(path: &Path) -> Result<bool> {
    let json = super::extension(path).is_some_and(|e| e == "json");
    Ok(!json || !is_called(path, &["dataset_info", "dataset_infos", "dataset_dict", "state"]) && holds_records(path)?)
}

/// Refuses a file of a form that is not read.
fn not_read(path: &Path) -> Error {
    super::stream::open(path).err().unwrap_or_else(|| {
        let message = "expected JSONL, CSV, TSV or notes, got a file of another form; convert it to JSONL";
        Error::new(ErrorCode::Data, place(path, 0, 0), message)
    })
}

/// Whether a name within `folder` has one of `words` in it.
fn has(folder: &Path, path: &Path, words: &[&str]) -> bool {
    let name = path.strip_prefix(folder).unwrap_or(path).to_string_lossy().to_lowercase();
    let mut parts = name.split(|c: char| !c.is_alphabetic());
    parts.any(|part| words.contains(&part))
        || name.replace(['_', '-'], "").split(['/', '\\', '.']).any(|part| words.contains(&part))
}

/// Whether a file that cannot be read is what the user means rather than the files that are `read`.
fn is_meant(folder: &Path, path: &Path, read: &[PathBuf], purpose: Purpose) -> bool {
    let (learned, held_out) = (has(folder, path, &LEARNED), has(folder, path, &HELD_OUT));
    let any = |words: &[&str]| read.iter().any(|path| has(folder, path, words));
    match purpose {
        Purpose::Learn if any(&LEARNED) => false,
        // Pictures, sounds and settings lie beside data; tables do not, unless they are data.
        Purpose::Learn => {
            learned || !held_out && (foreign::is_table(path) || any(&HELD_OUT) && !foreign::is_settings(path))
        }
        Purpose::Evaluate => held_out && !learned && !any(&HELD_OUT),
    }
}

/// What is read of a folder for a purpose, what is kept for evaluation, and what belongs to neither where names tell those
/// two apart.
struct Splits {
    read: Vec<PathBuf>,
    held_out: Vec<PathBuf>,
    rest: Vec<PathBuf>,
}

impl Splits {
    fn new(folder: &Path, data: Vec<PathBuf>, purpose: Purpose) -> Self {
        let (learned, rest): (Vec<_>, Vec<_>) = data.into_iter().partition(|path| has(folder, path, &LEARNED));
        let (held_out, rest): (Vec<_>, Vec<_>) = rest.into_iter().partition(|path| has(folder, path, &HELD_OUT));
        if purpose == Purpose::Evaluate && !held_out.is_empty() {
            // What a run is to be judged by in the end is not what it is watched by.
            let (tests, valid): (Vec<_>, Vec<_>) = held_out.into_iter().partition(|path| has(folder, path, &TESTS));
            let (read, others) = if valid.is_empty() { (tests, Vec::new()) } else { (valid, tests) };
            return Self { read, held_out: Vec::new(), rest: [learned, rest, others].concat() };
        }
        match (learned.is_empty(), rest.is_empty()) {
            (false, _) => Self { read: learned, held_out, rest },
            (true, false) => Self { read: rest, held_out, rest: Vec::new() },
            // Only held-out data: that is what was asked for.
            (true, true) => Self { read: held_out, held_out: Vec::new(), rest: Vec::new() },
        }
    }
}

/// Refuses files that differ in their extension alone: most likely they hold the same records.
fn one_form_each(folder: &Path, data: &[PathBuf]) -> Result<()> {
    let mut seen: BTreeMap<PathBuf, &Path> = BTreeMap::new();
    for path in data {
        let mut stem = path.with_extension("");
        if Kind::of(&stem) != Kind::Other {
            stem.set_extension("");
        }
        if let Some(first) = seen.insert(stem, path) {
            let message = format!(
                "expected the data in one form, got `{}` and `{}`; name one of the two files, or take the other out of the folder",
                first.display(),
                path.display()
            );
            return Err(Error::new(ErrorCode::Data, place(folder, 0, 0), message));
        }
    }
    Ok(())
}

/// Whether a file's name begins with one of `words`, as `LICENSE-MIT.txt` does.
fn is_called(path: &Path, words: &[&str]) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    words.iter().any(|word| name.strip_prefix(word).is_some_and(|rest| !rest.starts_with(char::is_alphanumeric)))
}
