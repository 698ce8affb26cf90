//! Memory for the 8-bit copies of adapters, one behind the other in the order of their first use, which is the order in
//! which every token reads them.
//!
//! So what a token will need soon lies a known distance ahead of what it reads now, whichever layer that belongs to. Each
//! copy by itself is too short to be read ahead, and to wait for the first bytes of some hundreds of them costs several
//! percent of a small model's decoding.
//!
//! A copy is made when an adapter's factor first multiplies a single token in 8 bits. It is dropped when the factor's
//! values change. Training makes no copies.

use super::buffer::{LINE, lines};
use crate::Error;
use bytes::BytesMut;
use std::sync::{Mutex, PoisonError};

/// How far ahead to ask for what is read next. Between two reads lie ten times as many bytes of the base, so it takes
/// little; with four times as much, lines are gone from the caches again when they are needed.
pub(crate) const AHEAD: usize = 16 * 1024;

/// Bytes that are asked of the system at once. Miri takes minutes to write a megabyte of zeros.
const CHUNK: usize = if cfg!(miri) { 1 << 12 } else { 1 << 20 };

/// See the module's text. A chunk lives as long as anything on it, the last one as long as the shelf.
#[derive(Default)]
pub(crate) struct Shelf(Mutex<BytesMut>);

impl Shelf {
    /// The next zeros, whole cache lines of them.
    pub fn take(&self, size: usize) -> Result<BytesMut, Error> {
        let lines_size = size.next_multiple_of(LINE);
        let mut rest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if rest.len() < lines_size {
            *rest = lines(lines_size.max(CHUNK))?;
        }
        let mut taken = rest.split_to(lines_size);
        taken.truncate(size);
        Ok(taken)
    }
}
