//! What data files hold: one object or note after the other, whatever the file's form and the names of its keys.
//!
//! `stream` unpacks and decodes, `foreign` refuses what is no text by its name, `json`, `table` and `folder` find records,
//! `keys` has the table of all keys, `messages` reads turns, and `record` makes of an object what is learned.

mod folder;
mod foreign;
mod json;
pub(crate) mod keys;
pub(crate) mod messages;
pub(crate) mod record;
mod stream;
mod table;
#[cfg(test)]
mod tests;
mod unused;
mod zstd;

pub use unused::Unused;

use crate::error::{Error, ErrorCode, Result};
use keys::Fields;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// Longest record, in bytes: far above any sample, far below what would exhaust a phone's memory. Tests need not write that
/// much.
const MAX_RECORD: usize = if cfg!(test) { 1 << 19 } else { 1 << 26 };

/// A record as a file holds it.
#[derive(Debug)]
pub(crate) enum Entry {
    /// An object of JSON, or a row of a table.
    Keys(Fields),
    /// A file of text, and where it lies.
    Note(PathBuf, String),
}

/// Takes a record, its line (0 where it is a whole file), and the place for what is left out.
pub(crate) type Each<'a> = dyn FnMut(Entry, usize, &mut Unused) -> Result<()> + 'a;

/// What data is read for, which tells what of a folder is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Learn,
    Evaluate,
}

/// Gives every record of the file or folder at `path` to `each`. Errors name the file and the line or row.
pub(crate) fn read(path: &Path, purpose: Purpose, unused: &mut Unused, each: &mut Each<'_>) -> Result<()> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
    if meta.is_dir() { folder::read(path, purpose, unused, each) } else { file(path, &mut Sink { path, unused, each }) }
}

/// Where the records of one file go.
struct Sink<'a, 'b> {
    path: &'a Path,
    unused: &'a mut Unused,
    each: &'a mut Each<'b>,
}

impl Sink<'_, '_> {
    /// Hands on an entry of line `line`; `item` counts within a list, from 1.
    fn give(&mut self, entry: Result<Entry>, line: usize, item: usize) -> Result<()> {
        let given = entry.and_then(|entry| (self.each)(entry, line, self.unused));
        given.map_err(|e| e.at(place(self.path, line, item)))
    }
}

/// A place in a file, as messages name it.
fn place(path: &Path, line: usize, item: usize) -> String {
    let path = path.display();
    match (line, item) {
        (0, _) => format!("`{path}`"),
        (_, 0) => format!("`{path}` line {line}"),
        _ => format!("`{path}` line {line} (item {item})"),
    }
}

/// Reads a file as its name and its first bytes ask for.
fn file(path: &Path, sink: &mut Sink<'_, '_>) -> Result<()> {
    let mut source = stream::open(path)?;
    let kind = Kind::of(path);
    if source.starts_json() && (kind != Kind::Note || holds_records(path)?) {
        return json::read(source.reader, sink);
    }
    match kind {
        Kind::Table => table::read(source.reader, sink),
        Kind::Note => note(source.reader, sink),
        Kind::Json | Kind::Foreign | Kind::Other => json::read(source.reader, sink),
    }
}

/// What a file's name says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Json,
    Table,
    Note,
    /// Data of a form that is not read.
    Foreign,
    Other,
}

impl Kind {
    fn of(path: &Path) -> Self {
        match extension(path).as_deref() {
            Some("json" | "jsonl" | "ndjson" | "jsonlines") => Self::Json,
            Some("csv" | "tsv" | "tab" | "psv") => Self::Table,
            Some("txt" | "text" | "md" | "markdown" | "rst" | "org" | "adoc") => Self::Note,
            Some(e) if foreign::EXTENSIONS.contains(&e) => Self::Foreign,
            _ => Self::Other,
        }
    }
}

/// The extension in lower case, that of compression not counted.
fn extension(path: &Path) -> Option<String> {
    let of = |path: &Path| Some(path.extension().and_then(OsStr::to_str)?.to_ascii_lowercase());
    let last = of(path)?;
    let stem = Path::new(path.file_stem()?);
    match last.as_str() {
        "gz" | "gzip" | "zst" | "zstd" => extension(stem),
        // Some systems add it to what they do not know.
        "txt" => of(stem).filter(|e| matches!(e.as_str(), "json" | "jsonl" | "ndjson" | "csv" | "tsv")).or(Some(last)),
        _ => Some(last),
    }
}

/// Whether the first record of a JSON file has a form that is known; of a file that is broken, yes, so that it is said.
fn holds_records(path: &Path) -> Result<bool> {
    let (mut unused, mut found) = (Unused::default(), None);
    let mut each = |entry: Entry, _: usize, _: &mut Unused| {
        found = Some(matches!(&entry, Entry::Keys(fields) if fields.have_a_form()));
        Err(data_error("record", "enough was read"))
    };
    let source = stream::open(path)?;
    let read = json::read(source.reader, &mut Sink { path, unused: &mut unused, each: &mut each });
    Ok(found.unwrap_or(read.is_err()))
}

/// A file of text; an empty one is none.
fn note(mut reader: stream::Reader, sink: &mut Sink<'_, '_>) -> Result<()> {
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut std::io::Read::take(&mut reader, MAX_RECORD as u64), &mut bytes)
        .map_err(|e| stream::read_error(sink.path, e))?;
    if bytes.len() == MAX_RECORD {
        let message = format!("expected a note below {MAX_RECORD} bytes, got a longer one; split the file");
        return Err(Error::new(ErrorCode::Data, place(sink.path, 0, 0), message));
    }
    match stream::utf8(&bytes) {
        Ok(text) if text.trim().is_empty() => Ok(()),
        text => sink.give(text.map(|text| Entry::Note(sink.path.to_owned(), text.to_owned())), 0, 0),
    }
}

pub(crate) fn data_error(item: &str, message: impl Into<String>) -> Error {
    Error::new(ErrorCode::Data, item, message)
}
