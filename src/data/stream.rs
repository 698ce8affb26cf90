//! Files as UTF-8, whatever they are packed and written in.

use super::zstd::Zstd;
use super::{data_error, foreign, place};
use crate::error::{Error, ErrorCode, Result};
use flate2::read::MultiGzDecoder;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

/// Bytes that tell what a file is.
const HEAD: usize = 4096;
/// The byte order mark of UTF-8.
pub(super) const BOM: &[u8] = b"\xef\xbb\xbf";

pub(super) type Reader = Box<dyn Read>;

/// A file's text, and how it begins.
pub(super) struct Source {
    pub reader: Reader,
    head: Vec<u8>,
}

impl Source {
    /// Whether an object or a list comes first.
    pub fn starts_json(&mut self) -> bool {
        let first = self.head.trim_ascii_start();
        // A list of something that is no value is no list: a note may begin with a link, `[text](..)`.
        match first.first() {
            Some(b'{') => true,
            Some(b'[') => matches!(first[1..].trim_ascii_start().first(), Some(b'{' | b'[' | b']')),
            _ => false,
        }
    }
}

/// Opens `path`, unpacks gzip and zstd, and makes UTF-8 of UTF-16.
pub(super) fn open(path: &Path) -> Result<Source> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let (mut head, mut reader) = peek(path, Box::new(BufReader::with_capacity(1 << 16, file)))?;
    if head.starts_with(b"\x1f\x8b") {
        (head, reader) = peek(path, Box::new(MultiGzDecoder::new(reader)))?;
    } else if head.starts_with(b"\x28\xb5\x2f\xfd") {
        (head, reader) = peek(path, Box::new(Zstd::new(reader)))?;
    }
    if head.is_empty() {
        let message = "the file is empty; expected JSON, a table or a text";
        return Err(Error::new(ErrorCode::Data, place(path, 0, 0), message));
    }
    let utf16 = |big: bool, bom: usize, mut reader: Reader| {
        reader.read_exact(&mut [0; 2][..bom])?;
        Ok(Box::new(Utf16 { inner: reader, big, raw: Vec::new(), text: Vec::new(), at: 0 }) as Reader)
    };
    let decoded = match head[..] {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] | [1..=255, 0, 0, 0, ..] | [0, 0, 0, 1..=255, ..] => {
            return Err(foreign::encoding(path, "UTF-32"));
        }
        [0xff, 0xfe, ..] => Some(utf16(false, 2, reader)),
        [0xfe, 0xff, ..] => Some(utf16(true, 2, reader)),
        [1..=255, 0, 1..=255, 0, ..] => Some(utf16(false, 0, reader)),
        [0, 1..=255, 0, 1..=255, ..] => Some(utf16(true, 0, reader)),
        _ => {
            foreign::refuse(path, &head)?;
            if head.starts_with(BOM) {
                reader.read_exact(&mut [0; 3]).map_err(|e| read_error(path, e))?;
                head.drain(..BOM.len());
            }
            return Ok(Source { reader, head });
        }
    };
    let (head, reader) = peek(path, decoded.transpose().map_err(|e| read_error(path, e))?.expect("decoded"))?;
    foreign::refuse(path, &head)?;
    Ok(Source { reader, head })
}

/// The first bytes, and all of them still to be read.
fn peek(path: &Path, mut reader: Reader) -> Result<(Vec<u8>, Reader)> {
    let mut head = Vec::new();
    (&mut reader).take(HEAD as u64).read_to_end(&mut head).map_err(|e| read_error(path, e))?;
    Ok((head.clone(), Box::new(io::Cursor::new(head).chain(reader))))
}

/// An error of reading: the system's, or of what the file is packed or written in.
pub(super) fn read_error(path: &Path, e: io::Error) -> Error {
    use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    if !matches!(e.kind(), InvalidData | InvalidInput | UnexpectedEof) {
        return Error::io("read", path, e);
    }
    let message = format!("the file is broken or cut off ({e}); fetch or write it again");
    Error::new(ErrorCode::Data, place(path, 0, 0), message).caused_by(e)
}

/// Bytes as text.
pub(super) fn utf8(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).map_err(|e| {
        let after = e.valid_up_to();
        let message = format!(
            "expected UTF-8, got byte `0x{:02x}` after {after} bytes, as files in Windows-1252 or Latin-1 have it; convert \
             the file: `iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW`",
            bytes[after]
        );
        data_error("text", message).caused_by(e)
    })
}

/// UTF-16 as UTF-8.
struct Utf16 {
    inner: Reader,
    big: bool,
    /// Bytes that are no whole character yet.
    raw: Vec<u8>,
    text: Vec<u8>,
    at: usize,
}

impl Read for Utf16 {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.at == self.text.len() {
            let mut bytes = [0; 8192];
            let n = self.inner.read(&mut bytes)?;
            if n == 0 && self.raw.is_empty() {
                return Ok(0);
            }
            if n == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "UTF-16 ends within a character"));
            }
            self.raw.extend_from_slice(&bytes[..n]);
            self.decode()?;
        }
        let n = buf.len().min(self.text.len() - self.at);
        buf[..n].copy_from_slice(&self.text[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

impl Utf16 {
    /// Decodes all but a last half of a character.
    fn decode(&mut self) -> io::Result<()> {
        let unit = |pair: &[u8]| {
            if self.big { u16::from_be_bytes([pair[0], pair[1]]) } else { u16::from_le_bytes([pair[0], pair[1]]) }
        };
        let mut units: Vec<u16> = self.raw.chunks_exact(2).map(unit).collect();
        if units.last().is_some_and(|last| (0xd800..0xdc00).contains(last)) {
            units.pop();
        }
        self.raw.drain(..2 * units.len());
        (self.at, self.text) = (0, Vec::with_capacity(3 * units.len()));
        for c in char::decode_utf16(units) {
            let c = c.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("UTF-16: {e}")))?;
            self.text.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
        }
        Ok(())
    }
}
