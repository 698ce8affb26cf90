//! Tiles of the cache on any CPU.

use super::super::cache::{Tile, size};
use super::super::lanes::{LANES, load, store};
use super::super::tile::Coefficients;
use crate::CacheType;
use std::ops::Range;
use wide::f32x8;

/// Columns and rows that are widened at a time, on the stack.
const PART: (usize, usize) = (2 * LANES, 64);
/// Rows of a register tile, as in `tile::portable`.
const ROWS: usize = if cfg!(target_arch = "aarch64") { 4 } else { 2 };

/// See [`super::super::Table::tile_axpy_narrow`].
pub(crate) fn axpy(coef: Coefficients, p: Tile, c: &mut [&mut [f32]]) {
    let size = size(p.dtype);
    let mut part = [[0.0; PART.0]; PART.1];
    for j in (0..p.count).step_by(PART.1) {
        let part = &mut part[..PART.1.min(p.count - j)];
        for n in (0..p.width).step_by(PART.0) {
            let columns = n..p.width.min(n + PART.0);
            for (i, wide) in part.iter_mut().enumerate() {
                widen(p.dtype, &p.bytes[(j + i) * p.stride * size..][columns.start * size..columns.end * size], wide);
            }
            let mut i = 0;
            while i < c.len() {
                if c.len() - i >= ROWS {
                    rows::<ROWS>(coef, j, part, columns.clone(), i, c);
                    i += ROWS;
                } else {
                    rows::<1>(coef, j, part, columns.clone(), i, c);
                    i += 1;
                }
            }
        }
    }
}

/// Adds multiples of widened rows, of which the first is row `j`, to `I` rows of `c` from `i` on.
#[inline(always)]
fn rows<const I: usize>(
    coef: Coefficients,
    j: usize,
    part: &[[f32; PART.0]],
    Range { start, end }: Range<usize>,
    i: usize,
    c: &mut [&mut [f32]],
) {
    let mid = end.min(start + LANES);
    let mut sums: [[f32x8; 2]; I] = std::array::from_fn(|a| [load(&c[i + a][start..mid]), load(&c[i + a][mid..end])]);
    for (j, row) in (j..).zip(part) {
        let pv = [load(&row[..LANES]), load(&row[LANES..])];
        for (a, sums) in sums.iter_mut().enumerate() {
            let factor = f32x8::splat(coef.data[(i + a) * coef.row + j * coef.col]);
            *sums = [factor.mul_add(pv[0], sums[0]), factor.mul_add(pv[1], sums[1])];
        }
    }
    for (c, sums) in c[i..].iter_mut().zip(sums) {
        store(&mut c[start..mid], sums[0]);
        store(&mut c[mid..end], sums[1]);
    }
}

#[inline(always)]
fn widen(dtype: CacheType, bytes: &[u8], out: &mut [f32; PART.0]) {
    match dtype {
        CacheType::F32 => out.iter_mut().zip(bytes.as_chunks().0).for_each(|(y, b)| *y = f32::from_le_bytes(*b)),
        CacheType::F16 => out.iter_mut().zip(bytes.as_chunks().0).for_each(|(y, b)| *y = half(u16::from_le_bytes(*b))),
        CacheType::I8 => out.iter_mut().zip(bytes).for_each(|(y, b)| *y = f32::from(b.cast_signed())),
    }
}

/// The f16 with these bits, without branches, so that a loop becomes vectors: its exponent counts from another number,
/// which a multiplication puts right for subnormal numbers, too; the largest exponent means infinity or NaN.
#[inline(always)]
fn half(bits: u16) -> f32 {
    let bits = u32::from(bits);
    // 2^(127 - 15).
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    let special = if magnitude >= 65536.0 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_f16_widens_to_itself() {
        // Every power of two is among those that Miri has the time for.
        for bits in (0..=u16::MAX).step_by(if cfg!(miri) { 256 } else { 1 }) {
            let (got, want) = (super::half(bits), half::f16::from_bits(bits).to_f32());
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:#x}: {got} {want}");
        }
    }
}
