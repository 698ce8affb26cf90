//! Files to records, one at a time: JSONL, tables and notes.

use super::{data_error, record::Record};
use crate::error::{Error, ErrorCode, Result};
use serde_json::{Map, Value};
use std::ffi::OsStr;
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// Longest line or note, in bytes: far above any sample, far below what would exhaust a phone's memory.
const MAX_RECORD: u64 = 1 << 26;
const BOM: &[u8] = b"\xef\xbb\xbf";

/// Gives every record of `path` to `each` and returns how many there were. Errors name the file and the line or row.
pub(super) fn records(path: &Path, each: &mut dyn FnMut(Record) -> Result<()>) -> Result<usize> {
    let meta = fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
    if meta.is_dir() {
        return folder(path, each);
    }
    match extension(path).as_deref() {
        Some("csv") => table(path, each),
        Some("txt" | "md") => Ok(usize::from(note(path, each)?)),
        _ => lines(path, each),
    }
}

fn extension(path: &Path) -> Option<String> {
    Some(path.extension().and_then(OsStr::to_str)?.to_ascii_lowercase())
}

fn at(path: &Path, what: impl Display, e: Error) -> Error {
    e.at(format_args!("`{}`{what}", path.display()))
}

fn lines(path: &Path, each: &mut dyn FnMut(Record) -> Result<()>) -> Result<usize> {
    let mut reader = BufReader::new(File::open(path).map_err(|e| Error::io("open", path, e))?);
    let (mut line, mut records) = (Vec::new(), 0);
    for number in 1u64.. {
        line.clear();
        let read =
            (&mut reader).take(MAX_RECORD).read_until(b'\n', &mut line).map_err(|e| Error::io("read", path, e))?;
        if read == 0 {
            break;
        }
        let bytes = if number == 1 { line.strip_prefix(BOM).unwrap_or(&line) } else { &line };
        if !bytes.trim_ascii().is_empty() {
            parse_line(bytes).and_then(&mut *each).map_err(|e| at(path, format_args!(" line {number}"), e))?;
            records += 1;
        }
    }
    Ok(records)
}

fn parse_line(bytes: &[u8]) -> Result<Record> {
    if bytes.len() as u64 >= MAX_RECORD {
        let message = format!("expected lines below {MAX_RECORD} bytes, got a longer one; put one object on a line");
        return Err(data_error("line", message));
    }
    let keys: Map<String, Value> = serde_json::from_str(utf8(bytes)?)
        .map_err(|e| data_error("JSON", format!("expected one object a line, got an error: {e}")).caused_by(e))?;
    Record::new(keys)
}

fn utf8(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).map_err(|e| {
        let message = format!("expected UTF-8, got another byte after {}; save the file as UTF-8", e.valid_up_to());
        data_error("text", message).caused_by(e)
    })
}

/// A table: its first row names the columns, as the keys of JSONL are named. An empty cell is a key that is absent.
fn table(path: &Path, each: &mut dyn FnMut(Record) -> Result<()>) -> Result<usize> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    // The reader skips a byte-order mark by itself.
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::Headers).from_reader(file);
    let broken = |e: csv::Error| {
        let line = e.position().map_or_else(String::new, |p| format!(" line {}", p.line()));
        let message = format!("expected a table in UTF-8 with as many cells in each row as columns, got an error: {e}");
        Error::new(ErrorCode::Data, format!("`{}`{line}", path.display()), message).caused_by(e)
    };
    let columns = reader.headers().map_err(broken)?.clone();
    let mut records = 0;
    for row in reader.records() {
        let row = row.map_err(broken)?;
        if row.iter().all(|cell| cell.trim().is_empty()) {
            continue;
        }
        let cells = columns.iter().zip(&row).filter(|(_, cell)| !cell.is_empty());
        let keys = cells.map(|(column, cell)| (column.to_owned(), Value::String(cell.to_owned()))).collect();
        let line = row.position().map_or(0, csv::Position::line);
        Record::new(keys).and_then(&mut *each).map_err(|e| at(path, format_args!(" line {line}"), e))?;
        records += 1;
    }
    Ok(records)
}

/// All notes in a folder and the folders in it, by name; hidden ones and links to folders are left alone.
fn folder(path: &Path, each: &mut dyn FnMut(Record) -> Result<()>) -> Result<usize> {
    let (mut notes, mut folders) = (Vec::new(), vec![path.to_owned()]);
    while let Some(dir) = folders.pop() {
        for entry in fs::read_dir(&dir).map_err(|e| Error::io("read", &dir, e))? {
            let entry = entry.map_err(|e| Error::io("read", &dir, e))?;
            let (path, kind) = (entry.path(), entry.file_type().map_err(|e| Error::io("read", &entry.path(), e))?);
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            match extension(&path).as_deref() {
                _ if hidden => (),
                _ if kind.is_dir() => folders.push(path),
                Some("txt" | "md") => notes.push(path),
                _ => (),
            }
        }
    }
    notes.sort_unstable();
    let read: Result<Vec<bool>> = notes.iter().map(|path: &PathBuf| note(path, each)).collect();
    let records = read?.into_iter().filter(|&read| read).count();
    if records == 0 {
        let message = "expected notes that end in `.txt` or `.md`, got none with text; name another folder";
        return Err(Error::new(ErrorCode::Data, format!("`{}`", path.display()), message));
    }
    Ok(records)
}

/// One note; an empty one is none.
fn note(path: &Path, each: &mut dyn FnMut(Record) -> Result<()>) -> Result<bool> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let mut bytes = Vec::new();
    file.take(MAX_RECORD).read_to_end(&mut bytes).map_err(|e| Error::io("read", path, e))?;
    if bytes.len() as u64 == MAX_RECORD {
        let message = format!("expected a note below {MAX_RECORD} bytes, got a longer one; split the file");
        return Err(Error::new(ErrorCode::Data, format!("`{}`", path.display()), message));
    }
    let text = utf8(bytes.strip_prefix(BOM).unwrap_or(&bytes)).map_err(|e| at(path, "", e))?;
    if text.trim().is_empty() {
        return Ok(false);
    }
    each(Record::Text { text: text.to_owned(), start: 0 }).map_err(|e| at(path, "", e))?;
    Ok(true)
}
