//! Tiles of the cache for NEON, whose base has the conversion from f16: 4 x 16 elements in half of 32 registers.

#![allow(unsafe_code, reason = "vector loads and stores")]
#![allow(clippy::needless_range_loop, reason = "loops over registers read like the tile when they count")]

use super::super::cache::Tile;
use super::super::neon::prefetch;
use super::super::tile::Coefficients;
use super::{F16, F32, I8, size};
use crate::CacheType;
use std::arch::aarch64::*;

/// Columns of a strip.
const COLUMNS: usize = 16;

/// See [`super::super::Table::tile_axpy_narrow`].
#[target_feature(enable = "neon")]
pub(crate) fn axpy(coef: Coefficients, p: Tile, c: &mut [&mut [f32]]) {
    match p.dtype {
        CacheType::F32 => strips::<F32>(coef, p, c),
        CacheType::F16 => strips::<F16>(coef, p, c),
        CacheType::I8 => strips::<I8>(coef, p, c),
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn strips<const TYPE: u8>(coef: Coefficients, p: Tile, c: &mut [&mut [f32]]) {
    let whole = p.width / COLUMNS * COLUMNS;
    for n in (0..whole).step_by(COLUMNS) {
        let mut i = 0;
        while i < c.len() {
            // Five rows are better taken as three and two than as four and one.
            let left = c.len() - i;
            let high = left.div_ceil(left.div_ceil(4));
            match high {
                4 => strip::<TYPE, 4>(coef, p, n, i, c),
                3 => strip::<TYPE, 3>(coef, p, n, i, c),
                2 => strip::<TYPE, 2>(coef, p, n, i, c),
                _ => strip::<TYPE, 1>(coef, p, n, i, c),
            }
            i += high;
        }
    }
    if whole < p.width {
        rest::<TYPE>(coef, p, whole, c);
    }
}

/// `I` rows of `c` from `i` on, [`COLUMNS`] columns from `n` on.
#[inline]
#[target_feature(enable = "neon")]
fn strip<const TYPE: u8, const I: usize>(coef: Coefficients, p: Tile, n: usize, i: usize, c: &mut [&mut [f32]]) {
    let size = size::<TYPE>();
    // What the pointers rely on, besides the checks of the entry: the columns of each row.
    assert!(n + COLUMNS <= p.width);
    let mut sums = [[vdupq_n_f32(0.0); 4]; I];
    // SAFETY: the entry checked that `p` and `coef` have `p.count` rows and columns and that rows of `c` are as long as
    // those of `p`, in which the columns lie by the assertion.
    unsafe {
        for a in 0..I {
            for b in 0..4 {
                sums[a][b] = vld1q_f32(c[i + a].as_ptr().add(n + 4 * b));
            }
        }
        let coefs = coef.data.as_ptr().wrapping_add(i * coef.row);
        let mut row = p.bytes.as_ptr().wrapping_add(n * size);
        let asks = p.asks(i, n);
        for j in 0..p.count {
            if asks {
                p.ask(row, COLUMNS * size, prefetch);
            }
            let pv = load::<TYPE>(row);
            for a in 0..I {
                let factor = *coefs.add(a * coef.row + j * coef.col);
                for b in 0..4 {
                    sums[a][b] = vfmaq_n_f32(sums[a][b], pv[b], factor);
                }
            }
            row = row.wrapping_add(p.stride * size);
        }
        for a in 0..I {
            for b in 0..4 {
                vst1q_f32(c[i + a].as_mut_ptr().add(n + 4 * b), sums[a][b]);
            }
        }
    }
}

/// The last columns, fewer than [`COLUMNS`], in padded rows; rare enough for one row of `c` at a time.
#[target_feature(enable = "neon")]
fn rest<const TYPE: u8>(coef: Coefficients, p: Tile, n: usize, c: &mut [&mut [f32]]) {
    let (size, columns) = (size::<TYPE>(), p.width - n);
    for (i, c) in c.iter_mut().enumerate() {
        let mut sums = [0.0; COLUMNS];
        sums[..columns].copy_from_slice(&c[n..]);
        for j in 0..p.count {
            let mut padded = [0; 4 * COLUMNS];
            padded[..columns * size].copy_from_slice(&p.bytes[(j * p.stride + n) * size..][..columns * size]);
            // SAFETY: as many bytes as 16 elements of any type have.
            let pv = unsafe { load::<TYPE>(padded.as_ptr()) };
            let factor = coef.data[i * coef.row + j * coef.col];
            for (sums, pv) in sums.as_chunks_mut::<4>().0.iter_mut().zip(pv) {
                // SAFETY: `sums` is an array of 4 floats.
                unsafe { vst1q_f32(sums.as_mut_ptr(), vfmaq_n_f32(vld1q_f32(sums.as_ptr()), pv, factor)) };
            }
        }
        c[n..].copy_from_slice(&sums[..columns]);
    }
}

/// Sixteen elements, widened.
///
/// # Safety
/// `at` points to sixteen elements of any alignment.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load<const TYPE: u8>(at: *const u8) -> [float32x4_t; 4] {
    let mut wide = [vdupq_n_f32(0.0); 4];
    // SAFETY: the caller's promise; loads of bytes need no alignment.
    unsafe {
        match TYPE {
            F32 => {
                for b in 0..4 {
                    wide[b] = vreinterpretq_f32_u8(vld1q_u8(at.add(16 * b)));
                }
            }
            F16 => {
                for b in 0..4 {
                    wide[b] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at.add(8 * b))));
                }
            }
            _ => {
                let codes = vreinterpretq_s8_u8(vld1q_u8(at));
                let (low, high) = (vmovl_s8(vget_low_s8(codes)), vmovl_high_s8(codes));
                wide[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
                wide[1] = vcvtq_f32_s32(vmovl_high_s16(low));
                wide[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
                wide[3] = vcvtq_f32_s32(vmovl_high_s16(high));
            }
        }
    }
    wide
}
