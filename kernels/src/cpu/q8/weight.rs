//! Weights that are stored as signed bytes with a scale for each row.

use super::BLOCK;
use crate::Error;
use bytes::Bytes;

/// Bytes of a matrix that may stay in the caches from one token to the next.
#[cfg(target_arch = "x86_64")]
const CACHED: usize = 1 << 20;

/// See [`crate::MatrixData::Int8`].
pub(crate) struct Int8 {
    codes: Bytes,
    scales: Bytes,
    cols: usize,
}

impl Int8 {
    /// Checks the parts against the shape.
    pub fn new(rows: usize, cols: usize, codes: Bytes, scales: Bytes) -> Result<Self, Error> {
        let expect = |what, unit, got: usize, expected: usize| {
            if got == expected { Ok(()) } else { Err(Error::Matrix { rows, cols, what, unit, got, expected }) }
        };
        expect("row", "elements", cols, cols.next_multiple_of(BLOCK).max(BLOCK))?;
        expect("codes", "bytes", codes.len(), rows.saturating_mul(cols))?;
        expect("scales", "bytes", scales.len(), rows.saturating_mul(4))?;
        Ok(Self { codes, scales, cols })
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.scales.len()
    }

    /// Blocks of row `row`.
    #[inline(always)]
    pub fn row(&self, row: usize) -> &[[u8; BLOCK]] {
        self.codes[row * self.cols..][..self.cols].as_chunks().0
    }

    /// Codes of some rows.
    pub fn rows(&self, row: usize, count: usize) -> &[u8] {
        &self.codes[row * self.cols..][..count * self.cols]
    }

    /// How far to read ahead past the caches: `far` in a matrix that is too large to find itself there when the next token
    /// comes; not at all in a small one, as of an adapter, which has been asked for before and should stay.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub fn ahead(&self, far: usize) -> usize {
        if self.codes.len() > CACHED { far } else { 0 }
    }

    /// Scale of row `row`.
    #[inline(always)]
    pub fn scale(&self, row: usize) -> f32 {
        f32::from_le_bytes(self.scales.as_chunks().0[row])
    }

    /// Elements `col..col + out.len()` of row `row`.
    pub fn decode(&self, row: usize, col: usize, out: &mut [f32]) {
        let (blocks, scale) = (self.row(row), self.scale(row));
        for (i, out) in (col..).zip(out) {
            let code = blocks[i / BLOCK][i % 2 * (BLOCK / 2) + i % BLOCK / 2];
            *out = f32::from(code.cast_signed()) * scale;
        }
    }
}
