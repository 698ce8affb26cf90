//! Weights in bitsandbytes' 4-bit blocks, read in place.
//!
//! Element `i` of the flattened `[O, K]` matrix is `round(code[nibble(i)] * absmax[i / block])`: the product in
//! f32, rounded to the checkpoint's 16-bit type where it has one (Dettmers et al. 2023). Kernels make the 16
//! products of a block once and then only look up, which yields bitsandbytes' bits exactly and spares a
//! multiplication per weight.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
pub(crate) mod portable;

use crate::{Absmax, Error, FloatType, Nf4Source};
use bytes::Bytes;
use half::{bf16, f16};

/// [`super::Table::nf4_matvec`] wants rows of a multiple of this: 8 packed bytes, which never cross a block.
pub(crate) const GRANULE: usize = 16;

/// A validated weight.
pub(crate) struct Nf4 {
    packed: Bytes,
    len: usize,
    block_log2: u32,
    code: [f32; 16],
    absmax: Absmax,
    dtype: FloatType,
}

impl Nf4 {
    /// Checks every part against the shape, so that kernels may index without asking again.
    pub fn new(rows: usize, cols: usize, len: usize, source: Nf4Source) -> Result<Self, Error> {
        let expect = |what, unit, got: usize, expected: usize| {
            if got == expected { Ok(()) } else { Err(Error::Matrix { rows, cols, what, unit, got, expected }) }
        };
        let Nf4Source { packed, block, code, absmax, dtype } = source;
        let valid = block.is_power_of_two() && (32..=4096).contains(&block);
        expect("block", "elements", block, if valid { block } else { 64 })?;
        expect("packed", "bytes", packed.len(), len.div_ceil(2))?;
        let blocks = len.div_ceil(block);
        match &absmax {
            Absmax::Plain(scales) => expect("absmax", "bytes", scales.len(), blocks.saturating_mul(4))?,
            Absmax::Double { codes, nested, nested_block, .. } => {
                expect("absmax", "bytes", codes.len(), blocks)?;
                expect("nested block", "blocks", *nested_block, (*nested_block).max(1))?;
                expect("nested_absmax", "elements", nested.len(), blocks.div_ceil(*nested_block))?;
            }
        }
        Ok(Self { packed, len, block_log2: block.trailing_zeros(), code, absmax, dtype })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Scale of one block; with double quantization two roundings, as bitsandbytes has them.
    #[inline(always)]
    pub fn absmax(&self, block: usize) -> f32 {
        match &self.absmax {
            Absmax::Plain(bytes) => {
                let at = 4 * block;
                f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            }
            Absmax::Double { codes, map, nested, nested_block, offset } => {
                // A shift for the size that all files have; a division costs as much as 16 weights.
                let outer = if *nested_block == 256 { block >> 8 } else { block / *nested_block };
                map[usize::from(codes[block])] * nested[outer] + *offset
            }
        }
    }

    /// The parts that block borders cut `start..start + len` into.
    #[inline(always)]
    fn pieces(&self, start: usize, len: usize) -> impl Iterator<Item = Piece> + '_ {
        let (mut at, end) = (start, start + len);
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let block = at >> self.block_log2;
                let stop = end.min((block + 1) << self.block_log2);
                let piece = Piece { absmax: self.absmax(block), at, len: stop - at };
                at = stop;
                piece
            })
        })
    }

    /// The 16 values that a block with this scale can hold.
    fn values(&self, absmax: f32) -> [f32; 16] {
        self.code.map(|code| match self.dtype {
            FloatType::F32 => code * absmax,
            FloatType::F16 => f16::from_f32(code * absmax).to_f32(),
            FloatType::BF16 => bf16::from_f32(code * absmax).to_f32(),
        })
    }

    /// The four bits of element `i`.
    #[inline(always)]
    fn nibble(&self, i: usize) -> usize {
        usize::from(self.packed[i / 2] >> (4 * (1 - i % 2)) & 15)
    }
}

/// Consecutive elements of one block.
struct Piece {
    absmax: f32,
    /// First element, counted over the flattened matrix.
    at: usize,
    len: usize,
}

/// Activations of one token with even and odd elements apart: a packed byte holds one of each, so weights
/// need no reordering before the product.
pub(crate) struct EvenOdd {
    even: Vec<f32>,
    odd: Vec<f32>,
}

impl EvenOdd {
    /// Splits `x` of even length.
    pub fn new(x: &[f32]) -> Self {
        let (pairs, rest) = x.as_chunks::<2>();
        assert!(rest.is_empty());
        Self { even: pairs.iter().map(|p| p[0]).collect(), odd: pairs.iter().map(|p| p[1]).collect() }
    }

    /// Elements of both halves.
    pub fn len(&self) -> usize {
        2 * self.even.len()
    }
}
