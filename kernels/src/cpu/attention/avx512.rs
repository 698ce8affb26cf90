//! Tiles of the cache for AVX-512: 6 x 64 elements in 24 of 32 registers.

#![allow(unsafe_code, reason = "vector loads and stores")]
#![allow(clippy::needless_range_loop, reason = "loops over registers read like the tile when they count")]

use super::super::avx2::{KEEP, prefetch_line};
use super::super::cache::Tile;
use super::super::tile::Coefficients;
use super::{F16, F32, I8, size};
use crate::CacheType;
use std::arch::x86_64::*;

/// Lanes of a vector.
const LANES: usize = 16;

/// See [`super::super::Table::tile_axpy_narrow`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub(crate) fn axpy(coef: Coefficients, p: Tile, c: &mut [&mut [f32]]) {
    match p.dtype {
        CacheType::F32 => strips::<F32>(coef, p, c),
        CacheType::F16 => strips::<F16>(coef, p, c),
        CacheType::I8 => strips::<I8>(coef, p, c),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn strips<const TYPE: u8>(coef: Coefficients, p: Tile, c: &mut [&mut [f32]]) {
    let mut n = 0;
    while n < p.width {
        n += match p.width - n {
            64.. => strip::<TYPE, 4>(coef, p, n, !0, c),
            16.. => strip::<TYPE, 1>(coef, p, n, !0, c),
            rest => strip::<TYPE, 1>(coef, p, n, (1 << rest) - 1, c),
        };
    }
}

/// All rows of `c`, `16 N` columns from `n` on, or as many as `mask` has, which must be full unless `N` is 1. Returns
/// the number of columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn strip<const TYPE: u8, const N: usize>(
    coef: Coefficients,
    p: Tile,
    n: usize,
    mask: __mmask16,
    c: &mut [&mut [f32]],
) -> usize {
    let mut i = 0;
    while i < c.len() {
        // Eight rows are better taken as four and four than as six and two.
        let left = c.len() - i;
        let high = left.div_ceil(left.div_ceil(6));
        match high {
            6 => tile::<TYPE, 6, N>(coef, p, n, mask, i, c),
            5 => tile::<TYPE, 5, N>(coef, p, n, mask, i, c),
            4 => tile::<TYPE, 4, N>(coef, p, n, mask, i, c),
            3 => tile::<TYPE, 3, N>(coef, p, n, mask, i, c),
            2 => tile::<TYPE, 2, N>(coef, p, n, mask, i, c),
            _ => tile::<TYPE, 1, N>(coef, p, n, mask, i, c),
        }
        i += high;
    }
    (N - 1) * LANES + mask.count_ones() as usize
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn tile<const TYPE: u8, const I: usize, const N: usize>(
    coef: Coefficients,
    p: Tile,
    n: usize,
    mask: __mmask16,
    i: usize,
    c: &mut [&mut [f32]],
) {
    let size = size::<TYPE>();
    // What the pointers rely on, besides the checks of the entry: the columns of each row.
    assert!(n + LANES * (N - 1) + mask.count_ones() as usize <= p.width);
    let mut sums = [[_mm512_setzero_ps(); N]; I];
    // SAFETY: the entry checked that `p` and `coef` have `p.count` rows and columns and that rows of `c` are as long as
    // those of `p`, in which the columns lie by the assertion; `mask` keeps those away that a single vector lacks.
    unsafe {
        for a in 0..I {
            for b in 0..N {
                sums[a][b] = _mm512_maskz_loadu_ps(mask, c[i + a].as_ptr().add(n + LANES * b));
            }
        }
        let coefs = coef.data.as_ptr().wrapping_add(i * coef.row);
        let mut row = p.bytes.as_ptr().wrapping_add(n * size);
        let asks = p.asks(i, n);
        for j in 0..p.count {
            if asks {
                p.ask(row, LANES * N * size, prefetch_line::<KEEP>);
            }
            let mut pv = [_mm512_setzero_ps(); N];
            for b in 0..N {
                pv[b] = load::<TYPE>(mask, row.add(LANES * b * size));
            }
            for a in 0..I {
                let factor = _mm512_set1_ps(*coefs.add(a * coef.row + j * coef.col));
                for b in 0..N {
                    sums[a][b] = _mm512_fmadd_ps(factor, pv[b], sums[a][b]);
                }
            }
            row = row.wrapping_add(p.stride * size);
        }
        for a in 0..I {
            for b in 0..N {
                _mm512_mask_storeu_ps(c[i + a].as_mut_ptr().add(n + LANES * b), mask, sums[a][b]);
            }
        }
    }
}

/// Sixteen elements or those that `mask` selects, widened.
///
/// # Safety
/// `at` points to the selected elements, of any alignment.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn load<const TYPE: u8>(mask: __mmask16, at: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        match TYPE {
            F32 => _mm512_maskz_loadu_ps(mask, at.cast()),
            F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at.cast())),
            _ => _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, at.cast()))),
        }
    }
}
