//! Matrix tiles for AVX-512: 4 x 4 sums of sixteen in `dot` (with more the compiler spills), 6 x 64 elements in `axpy`.
//!
//! As with AVX2, the order in which an element is summed does not depend on the tile that computes it.

#![allow(unsafe_code, reason = "vector loads and stores")]
#![allow(clippy::needless_range_loop, reason = "loops over registers read like the tile when they count")]

use super::super::avx2::{sum1, sum4};
use super::super::avx512::{first_lanes, halve};
use super::{AXPY_DEPTH, Coefficients, DOT_DEPTH, Rows};
use std::arch::x86_64::*;
use std::ops::Range;

/// Lanes of a vector.
const LANES: usize = 16;

/// See [`super::super::Table::tile_dot`].
#[target_feature(enable = "avx512f,avx2,fma")]
pub(crate) fn dot(x: Rows, w: Rows, c: &mut [&mut [f32]], at: usize) {
    for k in (0..x.width()).step_by(DOT_DEPTH) {
        let k = k..x.width().min(k + DOT_DEPTH);
        let mut i = 0;
        while i < x.count() {
            let high = (x.count() - i).min(4);
            match high {
                4 => dot_strip::<4>(x, i, w, k.clone(), c, at),
                3 => dot_strip::<3>(x, i, w, k.clone(), c, at),
                2 => dot_strip::<2>(x, i, w, k.clone(), c, at),
                _ => dot_strip::<1>(x, i, w, k.clone(), c, at),
            }
            i += high;
        }
    }
}

/// `I` rows of `x`, which stay in first-level cache, with all of `w`.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma")]
fn dot_strip<const I: usize>(x: Rows, i: usize, w: Rows, k: Range<usize>, c: &mut [&mut [f32]], at: usize) {
    let fours = w.count() / 4 * 4;
    for j in (0..fours).step_by(4) {
        dot_tile::<I, 4>(x, i, w, j, k.clone(), c, at);
    }
    for j in fours..w.count() {
        dot_tile::<I, 1>(x, i, w, j, k.clone(), c, at);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx2,fma")]
fn dot_tile<const I: usize, const J: usize>(
    x: Rows,
    i: usize,
    w: Rows,
    j: usize,
    k: Range<usize>,
    c: &mut [&mut [f32]],
    at: usize,
) {
    let len = k.len();
    let xs: [*const f32; I] = std::array::from_fn(|a| x.row(i + a)[k.clone()].as_ptr());
    let ws: [*const f32; J] = std::array::from_fn(|b| w.row(j + b)[k.clone()].as_ptr());
    let mut sums = [[_mm512_setzero_ps(); J]; I];
    let mut k = 0;
    while k + LANES <= len {
        // SAFETY: every row slice above has `len` elements.
        unsafe {
            let mut xv = [_mm512_setzero_ps(); I];
            for a in 0..I {
                xv[a] = _mm512_loadu_ps(xs[a].add(k));
            }
            for b in 0..J {
                let wv = _mm512_loadu_ps(ws[b].add(k));
                for a in 0..I {
                    sums[a][b] = _mm512_fmadd_ps(xv[a], wv, sums[a][b]);
                }
            }
        }
        k += LANES;
    }
    if k < len {
        let mask = first_lanes(len - k);
        // SAFETY: the mask keeps the loads inside the `len` elements of their rows.
        unsafe {
            for b in 0..J {
                let wv = _mm512_maskz_loadu_ps(mask, ws[b].add(k));
                for a in 0..I {
                    sums[a][b] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, xs[a].add(k)), wv, sums[a][b]);
                }
            }
        }
    }
    for (c, sums) in c[i..].iter_mut().zip(sums) {
        let c = &mut c[at + j..][..J];
        let mut halves = [_mm256_setzero_ps(); J];
        for b in 0..J {
            halves[b] = halve(sums[b]);
        }
        if let (Ok(c), Ok(sums)) = (<&mut [f32; 4]>::try_from(&mut *c), <[__m256; 4]>::try_from(halves.as_slice())) {
            // SAFETY: `c` is an array of 4 floats.
            unsafe { _mm_storeu_ps(c.as_mut_ptr(), _mm_add_ps(_mm_loadu_ps(c.as_ptr()), sum4(sums))) };
        } else {
            for (c, sum) in c.iter_mut().zip(halves) {
                *c += sum1(sum);
            }
        }
    }
}

/// See [`super::super::Table::tile_axpy`].
#[target_feature(enable = "avx512f,avx2,fma")]
pub(crate) fn axpy(coef: Coefficients, p: Rows, c: &mut [&mut [f32]]) {
    let width = p.width();
    for j in (0..p.count()).step_by(AXPY_DEPTH) {
        let js = j..p.count().min(j + AXPY_DEPTH);
        let mut n = 0;
        while n < width {
            n += match width - n {
                64.. => axpy_strip::<4>(coef, p, js.clone(), n, !0, c),
                32.. => axpy_strip::<2>(coef, p, js.clone(), n, !0, c),
                16.. => axpy_strip::<1>(coef, p, js.clone(), n, !0, c),
                rest => axpy_strip::<1>(coef, p, js.clone(), n, first_lanes(rest), c),
            };
        }
    }
}

/// All rows of `c`, `16 N` columns from `n` on, or as many as `mask` has, which must be full unless `N` is 1. Returns
/// the number of columns.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma")]
fn axpy_strip<const N: usize>(
    coef: Coefficients,
    p: Rows,
    js: Range<usize>,
    n: usize,
    mask: __mmask16,
    c: &mut [&mut [f32]],
) -> usize {
    let cols = (N - 1) * LANES + mask.count_ones() as usize;
    let mut i = 0;
    while i < c.len() {
        let high = (c.len() - i).min(6);
        match high {
            6 => axpy_tile::<6, N>(coef, p, js.clone(), n..n + cols, mask, i, c),
            5 => axpy_tile::<5, N>(coef, p, js.clone(), n..n + cols, mask, i, c),
            4 => axpy_tile::<4, N>(coef, p, js.clone(), n..n + cols, mask, i, c),
            3 => axpy_tile::<3, N>(coef, p, js.clone(), n..n + cols, mask, i, c),
            2 => axpy_tile::<2, N>(coef, p, js.clone(), n..n + cols, mask, i, c),
            _ => axpy_tile::<1, N>(coef, p, js.clone(), n..n + cols, mask, i, c),
        }
        i += high;
    }
    cols
}

#[inline]
#[target_feature(enable = "avx512f,avx2,fma")]
fn axpy_tile<const I: usize, const N: usize>(
    coef: Coefficients,
    p: Rows,
    js: Range<usize>,
    ns: Range<usize>,
    mask: __mmask16,
    i: usize,
    c: &mut [&mut [f32]],
) {
    // Slices check what the pointers rely on: the columns `ns` of every row, and the last coefficient.
    let rows = Rows { data: &p.data[js.start * p.stride + ns.start..], width: ns.len(), count: js.len(), ..p };
    let (first, last) = (js.start * coef.col, (js.end - 1) * coef.col);
    assert!(ns.end <= p.width && (i + I - 1) * coef.row + last < coef.data.len());
    let c: [&mut [f32]; I] = {
        let mut rows = c[i..].iter_mut();
        std::array::from_fn(|_| &mut rows.next().expect("the caller counted the rows")[ns.clone()])
    };
    let mut sums = [[_mm512_setzero_ps(); N]; I];
    let coef_rows: [*const f32; I] = std::array::from_fn(|a| coef.data[(i + a) * coef.row + first..].as_ptr());
    // SAFETY: the asserts above, and `Rows::new` for the rows of `p`; `mask` is full but for a single last vector,
    // whose absent columns it keeps from being touched.
    unsafe {
        for a in 0..I {
            for b in 0..N {
                sums[a][b] = _mm512_maskz_loadu_ps(mask, c[a].as_ptr().add(LANES * b));
            }
        }
        let mut row = rows.data.as_ptr();
        for j in 0..rows.count {
            let pv: [__m512; N] = std::array::from_fn(|b| _mm512_maskz_loadu_ps(mask, row.add(LANES * b)));
            for a in 0..I {
                let factor = _mm512_set1_ps(*coef_rows[a].add(j * coef.col));
                for b in 0..N {
                    sums[a][b] = _mm512_fmadd_ps(factor, pv[b], sums[a][b]);
                }
            }
            row = row.wrapping_add(rows.stride);
        }
        for (c, sums) in c.into_iter().zip(sums) {
            for b in 0..N {
                _mm512_mask_storeu_ps(c.as_mut_ptr().add(LANES * b), mask, sums[b]);
            }
        }
    }
}
