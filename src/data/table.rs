//! Tables: the first row names the columns, as keys name what an object holds.

use super::keys::{self, Fields};
use super::{Entry, MAX_RECORD, Sink, place, stream};
use crate::error::{Error, ErrorCode, Result};
use csv::StringRecord;
use serde_json::Value;
use std::cell::{Cell, RefCell};
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
    let quotes = Rc::new(RefCell::new(Quotes::new(separator)));
    let broken = |e: csv::Error| {
        if let Some((line, message)) = quotes.borrow_mut().wrong.take() {
            return Error::new(ErrorCode::Data, place(path, line + skipped, 0), message);
        }
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
    let left = Rc::new(Cell::new(MAX_RECORD));
    let watched =
        Watched { inner: Box::new(io::Cursor::new(head).chain(reader)), left: left.clone(), quotes: quotes.clone() };
    let mut reader = csv::ReaderBuilder::new().delimiter(separator).trim(csv::Trim::Headers).from_reader(watched);
    let columns = reader.headers().map_err(broken)?.clone();
    let mut row = StringRecord::new();
    // pandas writes an empty cell as `NaN` where it is told to; JSON's is empty, too.
    let missing = |cell: &str| cell.is_empty() || matches!(cell.trim(), "NaN" | "nan");
    while reader.read_record(&mut row).map_err(broken)? {
        left.set(MAX_RECORD);
        if row.iter().all(|cell| missing(cell) || cell.trim().is_empty()) {
            continue;
        }
        let line = row.position().map_or(0, |p| p.line() as usize + skipped);
        let cells = columns.iter().zip(&row).filter(|(_, cell)| !missing(cell));
        let keys = cells.map(|(column, cell)| (column.to_owned(), Value::String(cell.to_owned()))).collect();
        sink.give(Fields::new(keys).map(Entry::Keys), line, 0)?;
    }
    Ok(())
}

/// Bounds what is read for one row, and looks at its quotes.
struct Watched {
    inner: stream::Reader,
    left: Rc<Cell<usize>>,
    quotes: Rc<RefCell<Quotes>>,
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
        let mut quotes = self.quotes.borrow_mut();
        buf[..n].iter().for_each(|byte| quotes.step(*byte));
        if n == 0 {
            quotes.end();
        }
        match quotes.wrong {
            Some(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "quotes")),
            None => Ok(n),
        }
    }
}

/// Finds quotes that were meant as text: the parser takes whole rows for one cell behind them.
struct Quotes {
    separator: u8,
    at: At,
    line: usize,
    after_return: bool,
    /// Line of the last quote that opened a cell, and whether there was a separator and a line's end since.
    opened: (usize, bool, bool),
    /// The first line in which something is wrong, and what.
    wrong: Option<(usize, String)>,
}

#[derive(Clone, Copy, PartialEq)]
enum At {
    Start,
    Plain,
    Quoted,
    /// Behind a quote within a quoted cell.
    Closed,
}

impl Quotes {
    fn new(separator: u8) -> Self {
        Self { separator, at: At::Start, line: 1, after_return: false, opened: (1, false, false), wrong: None }
    }

    fn step(&mut self, byte: u8) {
        let ends = matches!(byte, b'\r' | b'\n');
        self.at = match self.at {
            At::Quoted if byte == b'"' => At::Closed,
            At::Closed if byte == b'"' => At::Quoted,
            At::Quoted => {
                self.opened.1 |= byte == self.separator;
                self.opened.2 |= ends;
                At::Quoted
            }
            at => {
                if at == At::Closed && byte != self.separator && !ends {
                    self.refuse("a cell begins with a quote here, which is closed before the cell ends");
                }
                if at == At::Closed && self.separator == b'\t' && self.opened.1 && self.opened.2 {
                    self.refuse("a cell begins with a quote here, and what follows up to the next quote has a tab and a line's end");
                }
                match byte {
                    _ if byte == self.separator || ends => At::Start,
                    b'"' if at == At::Start => {
                        self.opened = (self.line, false, false);
                        At::Quoted
                    }
                    _ => At::Plain,
                }
            }
        };
        self.line += usize::from(byte == b'\r' || byte == b'\n' && !self.after_return);
        self.after_return = byte == b'\r';
    }

    /// The table ends.
    fn end(&mut self) {
        match self.at {
            At::Quoted => self.refuse("a cell begins with a quote here, which is not closed"),
            At::Closed => self.step(b'\n'),
            At::Start | At::Plain => {}
        }
    }

    fn refuse(&mut self, what: &str) {
        let message = format!(
            "{what}; where it belongs to the text, put the whole cell in quotes and write each quote within it twice (`\"\"`)"
        );
        self.wrong.get_or_insert((self.opened.0, message));
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
