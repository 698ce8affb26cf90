//! Weights that are stored as signed bytes with a scale for each row.

use super::BLOCK;
use crate::Error;
use bytes::Bytes;

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
