//! Tables: the first row names the columns, as keys name what an object holds.

use super::keys::{self, Fields};
use super::{Entry, MAX_RECORD, Sink, place, stream};
use crate::error::{Error, ErrorCode, Result};
use csv::StringRecord;
use serde_json::Value;
use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

/// What may stand between cells; where the first row leaves it open, the first does.
const SEPARATORS: [u8; 4] = *b",\t;|";
/// Longest first row, in bytes.
const HEADER: u64 = 1 << 16;

/// Gives every row; an empty cell is a key that is absent.
pub(super) fn read(mut reader: stream::Reader, sink: &mut Sink<'_, '_>) -> Result<()> {
    let mut head = Vec::new();
    (&mut reader).take(HEADER).read_to_end(&mut head).map_err(|e| stream::read_error(sink.path, e))?;
    // Excel tells its separator in a line of its own.
    let told =
        head.strip_prefix(b"sep=").and_then(|rest| Some((*rest.first()?, rest.iter().position(|b| *b == b'\n')? + 5)));
    let skipped = usize::from(told.is_some());
    let head = head.split_off(told.map_or(0, |(_, end)| end));
    let separator = told.map_or_else(|| separator(&head), |(separator, _)| separator);
    let path = sink.path;
    let broken = |e: csv::Error| {
        if let csv::ErrorKind::Io(_) = e.kind() {
            let csv::ErrorKind::Io(e) = e.into_kind() else { unreachable!("looked at") };
            return stream::read_error(path, e);
        }
        let line = e.position().map_or(0, |p| p.line() as usize + skipped);
        let message = match e.kind() {
            csv::ErrorKind::Utf8 { .. } => {
                "expected UTF-8, got other bytes, as files in Windows-1252 or Latin-1 have them; \
                                            convert the file: `iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW`"
                    .to_owned()
            }
            _ => format!(
                "expected a table in UTF-8 with as many cells in each row as columns, separated by {}, got an error: {e}; put \
                 cells that hold a separator in quotes",
                named(separator)
            ),
        };
        Error::new(ErrorCode::Data, place(path, line, 0), message).caused_by(e)
    };
    let (left, quoted) = (Rc::new(Cell::new(MAX_RECORD)), Rc::new(Cell::new(false)));
    let watched =
        Watched { inner: Box::new(io::Cursor::new(head).chain(reader)), left: left.clone(), quoted: quoted.clone() };
    let mut reader = csv::ReaderBuilder::new().delimiter(separator).trim(csv::Trim::Headers).from_reader(watched);
    let columns = reader.headers().map_err(broken)?.clone();
    let (mut row, mut lines) = (StringRecord::new(), 1);
    while reader.read_record(&mut row).map_err(broken)? {
        left.set(MAX_RECORD);
        lines = row.iter().map(|cell| cell.lines().count()).max().unwrap_or(1);
        if row.iter().all(|cell| cell.trim().is_empty()) {
            continue;
        }
        let line = row.position().map_or(0, |p| p.line() as usize + skipped);
        let cells = columns.iter().zip(&row).filter(|(_, cell)| !cell.is_empty());
        let keys = cells.map(|(column, cell)| (column.to_owned(), Value::String(cell.to_owned()))).collect();
        sink.give(Fields::new(keys).map(Entry::Keys), line, 0)?;
    }
    // The parser takes all that follows an open quote for one cell.
    if quoted.get() && lines > 1 {
        let line = reader.position().line() as usize + skipped;
        let message = "the last row has a quote that is not closed, which makes one cell of all that follows it; close it, or \
                       write a quote within a cell as `\"\"`";
        return Err(Error::new(ErrorCode::Data, place(path, line, 0), message));
    }
    Ok(())
}

/// Bounds what is read for one row, and knows whether a quote is open.
struct Watched {
    inner: stream::Reader,
    left: Rc<Cell<usize>>,
    quoted: Rc<Cell<bool>>,
}

impl Read for Watched {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let most = buf.len().min(self.left.get());
        if most == 0 && !buf.is_empty() {
            let message = format!("a row is longer than {MAX_RECORD} bytes; is a quote not closed?");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        let n = self.inner.read(&mut buf[..most])?;
        self.left.set(self.left.get() - n);
        let quotes = buf[..n].iter().filter(|b| **b == b'"').count();
        self.quoted.set(self.quoted.get() != (quotes % 2 == 1));
        Ok(n)
    }
}

fn named(separator: u8) -> String {
    if separator == b'\t' { "tabs".to_owned() } else { format!("`{}`", char::from(separator)) }
}

/// What separates the cells of the first row: that with which most of them are known keys, or which is there most often.
fn separator(head: &[u8]) -> u8 {
    let line = head.split(|b| matches!(b, b'\n' | b'\r')).next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let known = |separator: u8| {
        let cells: Vec<&str> = line.split(char::from(separator)).collect();
        let known = cells.iter().filter(|cell| keys::is_known(cell.trim().trim_matches('"'))).count();
        (known, cells.len())
    };
    // Of equals the last counts.
    SEPARATORS.into_iter().rev().max_by_key(|s| known(*s)).unwrap_or(b',')
}
