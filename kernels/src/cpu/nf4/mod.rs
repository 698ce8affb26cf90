//! Weights in bitsandbytes' 4-bit blocks, read in place.
//!
//! Element `i` of the flattened `[O, K]` matrix is `round(code[nibble(i)] * absmax[i / block])`: the product in
//! f32, rounded to the checkpoint's 16-bit type where it has one (Dettmers et al. 2023). Kernels make the 16
//! products of a block once and then only look up, which yields bitsandbytes' bits exactly and spares a
//! multiplication per weight.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod portable;
mod scale_map;

use crate::{Absmax, Error, FloatType, Nf4Source};
use bytes::Bytes;
use half::{bf16, f16};
use scale_map::ScaleMap;
use std::sync::Arc;

/// [`super::Table::nf4_matvec`] wants rows of a multiple of this: 16 packed bytes, which never cross a block.
pub(crate) const GRANULE: usize = 32;

/// A validated weight.
pub(crate) struct Nf4 {
    packed: Bytes,
    len: usize,
    block_log2: u32,
    code: [f32; 16],
    codebook: Option<Codebook>,
    #[cfg(target_arch = "x86_64")]
    narrow_codebook: Option<Codebook>,
    absmax: Absmax,
    /// Of double quantization, as [`Absmax::Double`] has it, too.
    scale_map: Option<Arc<ScaleMap>>,
    dtype: FloatType,
}

/// The codebook in integers: `code[i] ≈ codes[i] * unit`.
pub(crate) struct Codebook {
    pub codes: [i8; 16],
    pub unit: f32,
}

/// What the largest value of the codebook becomes before it is rounded to 8 bits.
const LEVELS: f64 = 127.0;
/// The same in 7 bits: of all that round to 63 or less, the one with the smallest error. Weighed by how often NF4's values
/// occur among normal weights, it is 0.95 % of the weights' norm (in 8 bits 0.59 %, that of NF4 itself 9.2 %).
#[cfg(target_arch = "x86_64")]
const NARROW_LEVELS: f64 = 63.32;

impl Codebook {
    /// `None` if the values are not finite or all zero.
    fn new(code: &[f32; 16], levels: f64) -> Option<Self> {
        let largest = code.iter().fold(0.0_f32, |m, c| m.max(c.abs()));
        if !code.iter().all(|c| c.is_finite()) || largest < f32::MIN_POSITIVE {
            return None;
        }
        let largest = f64::from(largest);
        let round = |c: f32| (f64::from(c) / largest * levels).round_ties_even() as i8;
        Some(Self { codes: code.map(round), unit: (largest / levels) as f32 })
    }
}

impl Nf4 {
    /// Checks every part against the shape, so that kernels may index without asking again.
    pub fn new(rows: usize, cols: usize, len: usize, source: Nf4Source) -> Result<Self, Error> {
        let expect = |what, unit, got: usize, expected: usize| {
            if got == expected { Ok(()) } else { Err(Error::Matrix { rows, cols, what, unit, got, expected }) }
        };
        let Nf4Source { packed, block, code, mut absmax, dtype } = source;
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
        let scale_map = match &mut absmax {
            Absmax::Plain(_) => None,
            Absmax::Double { map, .. } => {
                let shared = ScaleMap::of(map);
                *map = shared.values.clone();
                Some(shared)
            }
        };
        let codebook = |levels| Codebook::new(&code, levels).filter(|_| block >= super::q8::BLOCK);
        Ok(Self {
            codebook: codebook(LEVELS),
            #[cfg(target_arch = "x86_64")]
            narrow_codebook: codebook(NARROW_LEVELS),
            packed,
            len,
            block_log2: block.trailing_zeros(),
            code,
            absmax,
            scale_map,
            dtype,
        })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes of codes, scales and the tables that decode them.
    pub fn bytes(&self) -> usize {
        let scales = match &self.absmax {
            Absmax::Plain(scales) => scales.len(),
            Absmax::Double { codes, map, nested, .. } => codes.len() + size_of_val(&map[..]) + size_of_val(&nested[..]),
        };
        self.packed.len() + scales + size_of_val(&self.code)
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

    /// Scales of consecutive blocks from `first` on, as [`Nf4::absmax`] has them; the way to read them is chosen once.
    #[inline(always)]
    fn scales(&self, first: usize, out: &mut [f32]) {
        // A loop, not `for_each`, which would be a call without the caller's instructions.
        self.scales_by(first, out, |map, codes, nested, offset, out| {
            // Two passes: looking up, then arithmetic on whole vectors.
            for (out, code) in out.iter_mut().zip(codes) {
                *out = map.values[usize::from(*code)];
            }
            for out in out {
                *out = *out * nested + offset;
            }
        });
    }

    /// The same, where `double(codes, nested, offset, out)` decodes codes that share their nested scale.
    #[inline(always)]
    fn scales_by(&self, first: usize, out: &mut [f32], double: impl Fn(&ScaleMap, &[u8], f32, f32, &mut [f32])) {
        match (&self.absmax, &self.scale_map) {
            (Absmax::Double { codes, nested, nested_block: 256, offset, .. }, Some(map)) => {
                let (mut at, mut out) = (first, out);
                while !out.is_empty() {
                    let n = out.len().min(256 - at % 256);
                    let (now, later) = out.split_at_mut(n);
                    double(map, &codes[at..at + n], nested[at >> 8], *offset, now);
                    (at, out) = (at + n, later);
                }
            }
            _ => out.iter_mut().enumerate().for_each(|(i, out)| *out = self.absmax(first + i)),
        }
    }

    /// Whether rows of `cols` can be multiplied in 8 bits: 64 elements share a scale.
    pub fn has_q8(&self, cols: usize) -> bool {
        self.codebook.is_some() && cols.is_multiple_of(super::q8::BLOCK)
    }

    /// The codebook in 8 bits; asserts [`Nf4::has_q8`].
    #[inline(always)]
    pub fn codebook(&self) -> &Codebook {
        self.codebook.as_ref().expect("only weights that have one come here")
    }

    /// The codebook in 7 bits, for products that would overflow with 8; asserts [`Nf4::has_q8`].
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub fn narrow_codebook(&self) -> &Codebook {
        self.narrow_codebook.as_ref().expect("only weights that have one come here")
    }

    /// The packed bytes from group number `first` of 64 elements on.
    #[inline(always)]
    pub fn packed64(&self, first: usize) -> &[[u8; 32]] {
        &self.packed.as_chunks().0[first..]
    }

    /// Scale of group number `group` of 64 elements.
    #[inline(always)]
    pub fn scale64(&self, group: usize) -> f32 {
        self.absmax(group >> (self.block_log2 - 6))
    }

    /// Scales of consecutive groups of 64 from `first` on.
    #[inline(always)]
    pub fn scales64(&self, first: usize, out: &mut [f32]) {
        if self.block_log2 == 6 {
            return self.scales(first, out);
        }
        out.iter_mut().enumerate().for_each(|(i, out)| *out = self.scale64(first + i));
    }

    /// The parts that block borders cut `start..start + len` into.
    #[inline(always)]
    fn pieces(&self, start: usize, len: usize) -> Pieces<'_> {
        Pieces { w: self, at: start, end: start + len }
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

/// A type of its own, for a closure in `iter::from_fn` would not be inlined into the AVX2 kernels: a call and the
/// saving of all registers for every 64 weights.
struct Pieces<'a> {
    w: &'a Nf4,
    at: usize,
    end: usize,
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    #[inline(always)]
    fn next(&mut self) -> Option<Piece> {
        if self.at >= self.end {
            return None;
        }
        let (at, block) = (self.at, self.at >> self.w.block_log2);
        self.at = self.end.min((block + 1) << self.w.block_log2);
        Some(Piece { absmax: self.w.absmax(block), at, len: self.at - at })
    }
}

/// Activations of one token in the order in which four packed bytes yield weights: of every eight elements the
/// four even ones (high nibbles), then the four odd ones. So weights need no reordering before the product.
pub(crate) struct EvenOdd(Vec<f32>);

impl EvenOdd {
    /// Reorders `x`, whose length is a multiple of eight.
    pub fn new(x: &[f32]) -> Self {
        let (groups, rest) = x.as_chunks::<8>();
        assert!(rest.is_empty());
        Self(groups.iter().flat_map(|g| [g[0], g[2], g[4], g[6], g[1], g[3], g[5], g[7]]).collect())
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}
