//! Tiles of the cache for AVX2: 6 x 16 elements in twelve of sixteen registers.

#![allow(unsafe_code, reason = "vector loads and stores")]
#![allow(clippy::needless_range_loop, reason = "loops over registers read like the tile when they count")]

use super::super::avx2::{KEEP, first_lanes, prefetch_line};
use super::super::cache::Tile;
use super::super::tile::Coefficients;
use super::{F16, F32, I8, size};
use crate::CacheType;
use std::arch::x86_64::*;

/// Lanes of a vector.
const LANES: usize = 8;

/// See [`super::super::Table::tile_axpy_narrow`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn axpy(coef: Coefficients, p: Tile, c: &mut [&mut [f32]]) {
    match p.dtype {
        CacheType::F32 => strips::<F32>(coef, p, c),
        CacheType::F16 => strips::<F16>(coef, p, c),
        CacheType::I8 => strips::<I8>(coef, p, c),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn strips<const TYPE: u8>(coef: Coefficients, p: Tile, c: &mut [&mut [f32]]) {
    let mut n = 0;
    while n < p.width {
        n += match (p.width - n, c.len()) {
            // So few rows leave registers for wider strips, which load the coefficients less often.
            (32.., 1) => tile::<TYPE, 1, 4>(coef, p, n, 0, c),
            (32.., 2) => tile::<TYPE, 2, 4>(coef, p, n, 0, c),
            (16.., _) => strip::<TYPE, 2>(coef, p, n, c),
            (8.., _) => strip::<TYPE, 1>(coef, p, n, c),
            _ => rest::<TYPE>(coef, p, n, c),
        };
    }
}

/// All rows of `c`, `8 N` columns from `n` on; returns their number.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn strip<const TYPE: u8, const N: usize>(coef: Coefficients, p: Tile, n: usize, c: &mut [&mut [f32]]) -> usize {
    let mut i = 0;
    while i < c.len() {
        // Eight rows are better taken as four and four than as six and two.
        let left = c.len() - i;
        let high = left.div_ceil(left.div_ceil(6));
        match high {
            6 => tile::<TYPE, 6, N>(coef, p, n, i, c),
            5 => tile::<TYPE, 5, N>(coef, p, n, i, c),
            4 => tile::<TYPE, 4, N>(coef, p, n, i, c),
            3 => tile::<TYPE, 3, N>(coef, p, n, i, c),
            2 => tile::<TYPE, 2, N>(coef, p, n, i, c),
            _ => tile::<TYPE, 1, N>(coef, p, n, i, c),
        };
        i += high;
    }
    LANES * N
}

/// `I` rows of `c` from `i` on, `8 N` columns from `n` on; returns the number of columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn tile<const TYPE: u8, const I: usize, const N: usize>(
    coef: Coefficients,
    p: Tile,
    n: usize,
    i: usize,
    c: &mut [&mut [f32]],
) -> usize {
    let size = size::<TYPE>();
    // What the pointers rely on, besides the checks of the entry: the columns of each row.
    assert!(n + LANES * N <= p.width);
    let mut sums = [[_mm256_setzero_ps(); N]; I];
    // SAFETY: the entry checked that `p` and `coef` have `p.count` rows and columns and that rows of `c` are as long as
    // those of `p`, in which the columns lie by the assertion.
    unsafe {
        for a in 0..I {
            for b in 0..N {
                sums[a][b] = _mm256_loadu_ps(c[i + a].as_ptr().add(n + LANES * b));
            }
        }
        let coefs = coef.data.as_ptr().wrapping_add(i * coef.row);
        let mut row = p.bytes.as_ptr().wrapping_add(n * size);
        let asks = p.asks(i, n);
        for j in 0..p.count {
            if asks {
                p.ask(row, LANES * N * size, prefetch_line::<KEEP>);
            }
            let mut pv = [_mm256_setzero_ps(); N];
            for b in 0..N {
                pv[b] = load::<TYPE>(row.add(LANES * b * size));
            }
            for a in 0..I {
                let factor = _mm256_broadcast_ss(&*coefs.add(a * coef.row + j * coef.col));
                for b in 0..N {
                    sums[a][b] = _mm256_fmadd_ps(factor, pv[b], sums[a][b]);
                }
            }
            row = row.wrapping_add(p.stride * size);
        }
        for a in 0..I {
            for b in 0..N {
                _mm256_storeu_ps(c[i + a].as_mut_ptr().add(n + LANES * b), sums[a][b]);
            }
        }
    }
    LANES * N
}

/// The last columns, fewer than eight; rare enough for one row at a time.
#[target_feature(enable = "avx2,fma,f16c")]
fn rest<const TYPE: u8>(coef: Coefficients, p: Tile, n: usize, c: &mut [&mut [f32]]) -> usize {
    let (size, count) = (size::<TYPE>(), p.width - n);
    for (i, c) in c.iter_mut().enumerate() {
        let c = &mut c[n..p.width];
        let mask = first_lanes(count);
        // SAFETY: the mask keeps loads and stores inside `c`; 32 bytes hold 8 elements of any type.
        unsafe {
            let mut sum = _mm256_maskload_ps(c.as_ptr(), mask);
            for j in 0..p.count {
                let mut padded = [0; 32];
                padded[..count * size].copy_from_slice(&p.bytes[(j * p.stride + n) * size..][..count * size]);
                sum = _mm256_fmadd_ps(
                    _mm256_set1_ps(coef.data[i * coef.row + j * coef.col]),
                    load::<TYPE>(padded.as_ptr()),
                    sum,
                );
            }
            _mm256_maskstore_ps(c.as_mut_ptr(), mask, sum);
        }
    }
    count
}

/// Eight elements, widened.
///
/// # Safety
/// `at` points to eight elements of any alignment.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load<const TYPE: u8>(at: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        match TYPE {
            F32 => _mm256_loadu_ps(at.cast()),
            F16 => _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
            _ => _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast()))),
        }
    }
}
