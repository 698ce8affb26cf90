//! A bounded cursor: the only code that turns positions of a GGUF file into bytes.

use crate::error::{Error, Result};
use bytes::Bytes;
use std::fmt::Display;
use std::path::Path;

/// Reads little-endian values off a map, front to back. Nothing is read past the end, and no length that the file
/// claims is trusted before the bytes behind it are known to exist.
pub(super) struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a Bytes,
    pos: usize,
}

impl<'a> Cursor<'a> {
    /// A cursor at the start of `bytes`; `path` is only for messages.
    pub(super) fn new(path: &'a Path, bytes: &'a Bytes) -> Self {
        Self { path, bytes, pos: 0 }
    }

    /// Bytes read so far.
    pub(super) fn pos(&self) -> usize {
        self.pos
    }

    /// A shared handle on the bytes from `start` to here.
    pub(super) fn since(&self, start: usize) -> Bytes {
        self.bytes.slice(start..self.pos)
    }

    /// An error at `item` of this file.
    pub(super) fn fail(&self, item: &dyn Display, expected: impl Display, got: impl Display) -> Error {
        Error::format(self.path, item, expected, got)
    }

    /// The next `count` elements of `size` bytes each.
    pub(super) fn take(&mut self, count: u64, size: usize, item: &dyn Display) -> Result<&'a [u8]> {
        let left = self.bytes.len() - self.pos;
        let wanted = usize::try_from(count).ok().and_then(|n| n.checked_mul(size)).filter(|&n| n <= left);
        let Some(wanted) = wanted else {
            return Err(self.fail(item, format_args!("{count} x {size} bytes at offset {}", self.pos), left));
        };
        let taken = &self.bytes[self.pos..self.pos + wanted];
        self.pos += wanted;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, item: &dyn Display) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(1, N, item)?);
        Ok(out)
    }

    /// The next 32-bit unsigned integer.
    pub(super) fn u32(&mut self, item: &dyn Display) -> Result<u32> {
        self.array(item).map(u32::from_le_bytes)
    }

    /// The next 64-bit unsigned integer.
    pub(super) fn u64(&mut self, item: &dyn Display) -> Result<u64> {
        self.array(item).map(u64::from_le_bytes)
    }

    /// The next string: a 64-bit length and that many bytes of UTF-8.
    pub(super) fn string(&mut self, item: &dyn Display) -> Result<&'a str> {
        let len = self.u64(item)?;
        let start = self.pos;
        let bytes = self.take(len, 1, item)?;
        std::str::from_utf8(bytes)
            .map_err(|e| self.fail(item, "UTF-8", format_args!("other bytes at offset {}", start + e.valid_up_to())))
    }
}
