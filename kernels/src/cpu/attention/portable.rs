//! Tiles of the cache on any CPU.

use super::super::cache::{Tile, size};
use super::super::lanes::{LANES, load, store};
use super::super::tile::Coefficients;
use crate::CacheType;
use wide::f32x8;

/// Columns that are widened at a time.
const COLUMNS: usize = 2 * LANES;

/// See [`super::super::Table::tile_axpy_narrow`].
pub(crate) fn axpy(coef: Coefficients, p: Tile, c: &mut [&mut [f32]]) {
    for n in (0..p.width).step_by(COLUMNS) {
        let mut i = 0;
        while i < c.len() {
            if c.len() - i >= 2 {
                strip::<2>(coef, p, n, i, c);
                i += 2;
            } else {
                strip::<1>(coef, p, n, i, c);
                i += 1;
            }
        }
    }
}

/// `I` rows by [`COLUMNS`] columns, fewer at the right edge.
#[inline(always)]
fn strip<const I: usize>(coef: Coefficients, p: Tile, n: usize, i: usize, c: &mut [&mut [f32]]) {
    let (end, size) = (p.width.min(n + COLUMNS), size(p.dtype));
    let mid = end.min(n + LANES);
    let mut sums: [[f32x8; 2]; I] = std::array::from_fn(|a| [load(&c[i + a][n..mid]), load(&c[i + a][mid..end])]);
    let rows = p.bytes.chunks_exact(p.width * size).take(p.count);
    for (j, row) in rows.enumerate() {
        let mut wide = [0.0; COLUMNS];
        widen(p.dtype, &row[n * size..end * size], &mut wide);
        let pv = [load(&wide[..LANES]), load(&wide[LANES..])];
        for (a, sums) in sums.iter_mut().enumerate() {
            let factor = f32x8::splat(coef.data[(i + a) * coef.row + j * coef.col]);
            *sums = [factor.mul_add(pv[0], sums[0]), factor.mul_add(pv[1], sums[1])];
        }
    }
    for (c, sums) in c[i..].iter_mut().zip(sums) {
        store(&mut c[n..mid], sums[0]);
        store(&mut c[mid..end], sums[1]);
    }
}

#[inline(always)]
fn widen(dtype: CacheType, bytes: &[u8], out: &mut [f32; COLUMNS]) {
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
        for bits in 0..=u16::MAX {
            let (got, want) = (super::half(bits), half::f16::from_bits(bits).to_f32());
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:#x}: {got} {want}");
        }
    }
}
