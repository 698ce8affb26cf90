//! JSON in all its files: an object a line, objects one after the other, a list of objects, or a list under a key.
//!
//! A scanner cuts the text into records, so that one record at a time is in memory however the file is written, and
//! each has its line. Whether a record is JSON is then up to `serde_json`.

use super::keys::{self, Fields};
use super::{Entry, MAX_RECORD, Sink, data_error, place, stream};
use crate::error::{Error, ErrorCode, Result};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use std::fmt;
use std::io::Read as _;
use std::path::Path;

/// Keys under which files have their list of records.
pub(super) const LISTS: [&str; 9] =
    ["data", "train", "rows", "examples", "instances", "records", "samples", "items", "dataset"];

/// Gives every record of `reader`.
pub(super) fn read(reader: stream::Reader, sink: &mut Sink<'_, '_>) -> Result<()> {
    let mut scanner =
        Scanner { reader, path: sink.path, buffer: vec![0; 1 << 16], at: 0, len: 0, line: 1, start: 1, skip: false };
    loop {
        scanner.space()?;
        match scanner.peek()? {
            None => return Ok(()),
            Some(b'{') => scanner.object(sink)?,
            Some(b'[') => {
                scanner.advance();
                scanner.list(sink, 0)?;
            }
            Some(b',') => {
                return Err(scanner.error(
                    "expected one object a line, got a comma between objects; remove it, or put all in `[` and `]`",
                ));
            }
            Some(other) => {
                let got = char::from(other).escape_default().to_string();
                return Err(scanner.error(&format!(
                    "expected one object a line or a list of objects, got `{got}`; tables are read from files that end in `.csv` or \
                     `.tsv`, texts from `.txt` or `.md`"
                )));
            }
        }
    }
}

/// An object whose keys are given once.
pub(super) struct Object(pub Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut entries = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, Once>()? {
                    entries.push((key, value.0));
                }
                Ok(Object(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Any value, in all of whose objects each key is given once: of two, `serde_json` keeps the last without a word.
pub(super) struct Once(pub Value);

/// What is said of the others.
pub(super) const TWICE: &str = "is given twice in one object; take one out";

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Once;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_unit<E>(self) -> Result<Once, E> {
                Ok(Once(Value::Null))
            }

            fn visit_bool<E>(self, value: bool) -> Result<Once, E> {
                Ok(Once(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Once, E> {
                Ok(Once(value.into()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Once, E> {
                Ok(Once(value.into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Once, E> {
                Ok(Once(value.into()))
            }

            fn visit_str<E>(self, value: &str) -> Result<Once, E> {
                Ok(Once(value.into()))
            }

            fn visit_string<E>(self, value: String) -> Result<Once, E> {
                Ok(Once(value.into()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Once, A::Error> {
                let mut values = Vec::new();
                while let Some(Once(value)) = list.next_element()? {
                    values.push(value);
                }
                Ok(Once(values.into()))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Once, A::Error> {
                let mut values = serde_json::Map::new();
                while let Some((key, Once(value))) = object.next_entry::<String, Once>()? {
                    if values.contains_key(&key) {
                        let key: String = key.chars().take(40).collect();
                        return Err(A::Error::custom(format!("the key `{}` {TWICE}", key.escape_debug())));
                    }
                    values.insert(key, value);
                }
                Ok(Once(values.into()))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

struct Scanner<'a> {
    reader: stream::Reader,
    path: &'a Path,
    buffer: Vec<u8>,
    at: usize,
    len: usize,
    /// Line of the next byte.
    line: usize,
    /// Line in which the record began.
    start: usize,
    /// What is copied is not kept.
    skip: bool,
}

impl Scanner<'_> {
    fn peek(&mut self) -> Result<Option<u8>> {
        while self.at == self.len {
            match self.reader.read(&mut self.buffer) {
                Ok(0) => return Ok(None),
                Ok(n) => (self.at, self.len) = (0, n),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(stream::read_error(self.path, e)),
            }
        }
        Ok(Some(self.buffer[self.at]))
    }

    fn advance(&mut self) {
        self.line += usize::from(self.buffer[self.at] == b'\n');
        self.at += 1;
    }

    fn need(&mut self) -> Result<u8> {
        match self.peek()? {
            Some(byte) => {
                self.advance();
                Ok(byte)
            }
            None => {
                let message = format!(
                    "the file ends in line {} within this record or list: it is cut off, or a bracket is not closed; correct it, \
                     or fetch it again",
                    self.line
                );
                Err(Error::new(ErrorCode::Data, format!("{}: JSON", place(self.path, self.start, 0)), message))
            }
        }
    }

    fn error(&self, message: &str) -> Error {
        Error::new(ErrorCode::Data, format!("{}: JSON", place(self.path, self.line, 0)), message)
    }

    /// Passes over what stands between records: also byte order marks, which come into the middle where files were joined.
    fn space(&mut self) -> Result<()> {
        loop {
            match self.peek()? {
                Some(byte) if byte.is_ascii_whitespace() => self.advance(),
                Some(byte) if byte == stream::BOM[0] => {
                    for byte in stream::BOM {
                        if self.peek()? != Some(*byte) {
                            return Err(self.error("expected JSON, got something else; correct it"));
                        }
                        self.advance();
                    }
                }
                _ => return Ok(()),
            }
        }
    }

    fn push(&self, out: &mut Vec<u8>, byte: u8) -> Result<()> {
        if self.skip {
            return Ok(());
        }
        if out.len() >= MAX_RECORD {
            let message = format!("expected records below {MAX_RECORD} bytes, got a longer one; split it");
            return Err(Error::new(ErrorCode::Data, format!("{}: record", place(self.path, self.start, 0)), message));
        }
        out.push(byte);
        Ok(())
    }

    /// Copies one value as it is written.
    fn value(&mut self, out: &mut Vec<u8>) -> Result<()> {
        match self.peek()? {
            Some(b'{' | b'[') => {
                let byte = self.need()?;
                self.push(out, byte)?;
                self.rest(out)
            }
            Some(b'"') => self.string(out),
            Some(b) if b.is_ascii_alphabetic() => self.word(out),
            _ => {
                while self.peek()?.is_some_and(|b| !b.is_ascii_whitespace() && !b",]}".contains(&b)) {
                    let byte = self.need()?;
                    if byte.is_ascii_alphabetic() {
                        self.at -= 1;
                        self.word(out)?;
                    } else {
                        self.push(out, byte)?;
                    }
                }
                Ok(())
            }
        }
    }

    /// Copies what remains of the innermost list or object, whose first byte was copied.
    fn rest(&mut self, out: &mut Vec<u8>) -> Result<()> {
        let mut depth = 1usize;
        while depth > 0 {
            match self.peek()? {
                Some(b'"') => self.string(out)?,
                Some(b) if b.is_ascii_alphabetic() => self.word(out)?,
                _ => {
                    let byte = self.need()?;
                    match byte {
                        b'{' | b'[' => depth += 1,
                        b'}' | b']' => depth -= 1,
                        _ => {}
                    }
                    self.push(out, byte)?;
                }
            }
        }
        Ok(())
    }

    fn string(&mut self, out: &mut Vec<u8>) -> Result<()> {
        let quote = self.need()?;
        self.push(out, quote)?;
        loop {
            if self.peek()? == Some(b'\n') {
                return Err(
                    self.error("a text in quotes does not end in its line; write line breaks within it as `\\n`")
                );
            }
            let byte = self.need()?;
            self.push(out, byte)?;
            match byte {
                b'"' => return Ok(()),
                b'\\' => {
                    let escaped = self.need()?;
                    self.push(out, escaped)?;
                }
                _ => {}
            }
        }
    }

    /// A word out of quotes. Python writes an empty cell as `NaN`, which is as good as `null`.
    fn word(&mut self, out: &mut Vec<u8>) -> Result<()> {
        let mut word = Vec::new();
        while word.len() < 16 && self.peek()?.is_some_and(|b| b.is_ascii_alphabetic()) {
            word.push(self.need()?);
        }
        match &word[..] {
            b"NaN" => word = b"null".to_vec(),
            b"Infinity" => {
                return Err(self.error("`Infinity` is Python's, not JSON's; write a number, a text or `null`"));
            }
            b"None" | b"True" | b"False" => {
                return Err(self.error("this is Python's notation, not JSON; write the file with `json.dumps`"));
            }
            _ => {}
        }
        word.into_iter().try_for_each(|byte| self.push(out, byte))
    }

    /// Gives the records of a list up to its end; `item` of them were given.
    fn list(&mut self, sink: &mut Sink<'_, '_>, mut item: usize) -> Result<()> {
        let mut out = Vec::new();
        loop {
            self.space()?;
            if item > 0 && self.peek()? == Some(b',') {
                self.advance();
                self.space()?;
            } else if item > 0 && !matches!(self.peek()?, None | Some(b']')) {
                return Err(self.error(&format!("expected `,` or `]` after item {item}, got something else")));
            }
            match self.peek()? {
                // After a comma, too: nothing is lost by one too many.
                None | Some(b']') => return self.need().map(drop),
                _ => {}
            }
            item += 1;
            self.start = self.line;
            out.clear();
            self.value(&mut out)?;
            self.give(&out, self.start, item, sink)?;
        }
    }

    /// Gives the object that comes next or, where it has a list of records under one of [`LISTS`], these.
    fn object(&mut self, sink: &mut Sink<'_, '_>) -> Result<()> {
        self.start = self.line;
        let start = self.line;
        let brace = self.need()?;
        let mut out = vec![brace];
        // Anything unusual is copied up to the end, and what is wrong with it said by the parser.
        loop {
            self.white(&mut out)?;
            if self.peek()? != Some(b'"') {
                break;
            }
            let from = out.len();
            self.string(&mut out)?;
            let key: String = serde_json::from_slice(&out[from..]).unwrap_or_default();
            self.white(&mut out)?;
            if self.peek()? != Some(b':') {
                break;
            }
            let colon = self.need()?;
            self.push(&mut out, colon)?;
            self.white(&mut out)?;
            if self.peek()? == Some(b'[') && LISTS.iter().any(|list| keys::same(list, &key)) {
                let (from, bracket) = (from, self.need()?);
                let after = out.len();
                self.push(&mut out, bracket)?;
                self.white(&mut out)?;
                if self.peek()? == Some(b'{') {
                    let (first, line) = (out.len(), self.line);
                    self.value(&mut out)?;
                    let object: Option<Object> = serde_json::from_slice(&out[first..]).ok();
                    let before = [&out[..from], b"\"\":0}"].concat();
                    let before: Object = serde_json::from_slice(&before).unwrap_or(Object(Vec::new()));
                    if object.is_some_and(|o| !keys::is_turn(&o.0)) && !before.0.iter().any(|(k, _)| keys::is_known(k))
                    {
                        return self.wrapped(&key, before, (&out[first..], line), sink);
                    }
                }
                debug_assert!(after < out.len());
                self.rest(&mut out)?;
            } else {
                self.value(&mut out)?;
            }
            self.white(&mut out)?;
            if self.peek()? != Some(b',') {
                break;
            }
            let comma = self.need()?;
            self.push(&mut out, comma)?;
        }
        self.rest(&mut out)?;
        self.give(&out, start, 0, sink)
    }

    fn white(&mut self, out: &mut Vec<u8>) -> Result<()> {
        while self.peek()?.is_some_and(|b| b.is_ascii_whitespace()) {
            let byte = self.need()?;
            self.push(out, byte)?;
        }
        Ok(())
    }

    /// Gives the list under `list`, whose first item was read, and looks through what else the object around it has.
    fn wrapped(&mut self, list: &str, before: Object, first: (&[u8], usize), sink: &mut Sink<'_, '_>) -> Result<()> {
        self.give(first.0, first.1, 1, sink)?;
        self.list(sink, 1)?;
        let mut others: Vec<String> = before.0.into_iter().map(|(key, _)| key).filter(|key| !key.is_empty()).collect();
        let mut out = Vec::new();
        loop {
            self.space()?;
            match self.need()? {
                b'}' => break,
                b',' => {}
                _ => return Err(self.error("expected `,` or `}` after the list of records, got something else")),
            }
            self.space()?;
            out.clear();
            if self.peek()? != Some(b'"') {
                return Err(self.error("expected a key in quotes, got something else"));
            }
            self.string(&mut out)?;
            others.push(serde_json::from_slice(&out).unwrap_or_default());
            self.space()?;
            if self.need()? != b':' {
                return Err(self.error("expected `:` after a key, got something else"));
            }
            self.space()?;
            self.skip = true;
            let skipped = self.value(&mut out);
            self.skip = false;
            skipped?;
        }
        for key in others {
            if keys::is_known(&key) || LISTS.iter().any(|l| keys::same(l, &key)) {
                return Err(self.error(&format!(
                    "`{key}` stands beside the list of records `{list}`, so that no record has it; write it into each record, or \
                     take it out"
                )));
            }
            sink.unused.key(&key);
        }
        Ok(())
    }

    /// Gives one record.
    fn give(&self, bytes: &[u8], line: usize, item: usize, sink: &mut Sink<'_, '_>) -> Result<()> {
        sink.give(parse(bytes, line).map(Entry::Keys), line, item)
    }
}

/// An object that begins in line `line`.
fn parse(bytes: &[u8], line: usize) -> Result<Fields> {
    let text = stream::utf8(bytes)?;
    let object: Object = serde_json::from_str(text).map_err(|e| {
        let (reason, line) = (e.to_string(), line + e.line().saturating_sub(1));
        let reason = reason.rfind(" at line ").map_or(&reason[..], |end| &reason[..end]);
        let quotes = if text.starts_with("{'") {
            "; texts and keys stand in `\"`, not in `'`: write the file with `json.dumps`"
        } else {
            ""
        };
        let message = format!(
            "expected one object a line or a list of objects, got an error: {reason} in line {line}, column {}{quotes}",
            e.column()
        );
        data_error("JSON", message).caused_by(e)
    })?;
    Fields::new(row(object)?.0)
}

/// The hub's viewer wraps each record: `{"row_idx": 0, "row": {..}, "truncated_cells": []}`.
fn row(mut object: Object) -> Result<Object> {
    let has = |key: &str| object.0.iter().any(|(k, _)| k == key);
    if !has("row_idx") || !has("row") {
        return Ok(object);
    }
    let cut =
        object.0.iter().find(|(k, v)| k == "truncated_cells" && v.as_array().is_some_and(|cells| !cells.is_empty()));
    if let Some((_, cells)) = cut {
        let message = format!("the hub's viewer cut these cells short: {cells}; download the data set's own files");
        return Err(data_error("truncated_cells", message));
    }
    match object.0.iter().position(|(k, v)| k == "row" && v.is_object()) {
        Some(i) => match object.0.swap_remove(i).1 {
            Value::Object(map) => Ok(Object(map.into_iter().collect())),
            _ => unreachable!("checked to be one"),
        },
        None => Ok(object),
    }
}
