//! Matrix tiles for AVX2: 3 x 4 sums of eight in `dot`, 6 x 16 elements in `axpy`, twelve of sixteen registers.
//!
//! The order in which an element is summed does not depend on the tile that computes it, so edges of the output
//! hold the bits that they would hold in the middle.

#![allow(unsafe_code, reason = "vector loads and stores")]
#![allow(clippy::needless_range_loop, reason = "loops over registers read like the tile when they count")]

use super::super::avx2::{first_lanes, sum1, sum4};
use super::{AXPY_DEPTH, Coefficients, DOT_DEPTH, DOT_ROWS, Rows};
use std::arch::x86_64::*;
use std::ops::Range;

/// See [`super::super::Table::tile_dot`].
#[target_feature(enable = "avx2,fma")]
pub(crate) fn dot(x: Rows, w: Rows, c: &mut [&mut [f32]], at: usize) {
    for k in (0..x.width()).step_by(DOT_DEPTH) {
        let k = k..x.width().min(k + DOT_DEPTH);
        for i0 in (0..x.count()).step_by(DOT_ROWS) {
            let end = x.count().min(i0 + DOT_ROWS);
            let mut j = 0;
            while j < w.count() {
                let wide = w.count() - j >= 4;
                let mut i = i0;
                while i < end {
                    let high = (end - i).min(3);
                    match (high, wide) {
                        (3, true) => dot_tile::<3, 4>(x, i, w, j, k.clone(), c, at),
                        (2, true) => dot_tile::<2, 4>(x, i, w, j, k.clone(), c, at),
                        (_, true) => dot_tile::<1, 4>(x, i, w, j, k.clone(), c, at),
                        (3, false) => dot_tile::<3, 1>(x, i, w, j, k.clone(), c, at),
                        (2, false) => dot_tile::<2, 1>(x, i, w, j, k.clone(), c, at),
                        (_, false) => dot_tile::<1, 1>(x, i, w, j, k.clone(), c, at),
                    }
                    i += high;
                }
                j += if wide { 4 } else { 1 };
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
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
    let mut sums = [[_mm256_setzero_ps(); J]; I];
    let mut k = 0;
    while k + 8 <= len {
        // SAFETY: every row slice above has `len` elements.
        unsafe {
            let mut xv = [_mm256_setzero_ps(); I];
            for a in 0..I {
                xv[a] = _mm256_loadu_ps(xs[a].add(k));
            }
            for b in 0..J {
                let wv = _mm256_loadu_ps(ws[b].add(k));
                for a in 0..I {
                    sums[a][b] = _mm256_fmadd_ps(xv[a], wv, sums[a][b]);
                }
            }
        }
        k += 8;
    }
    if k < len {
        let mask = first_lanes(len - k);
        for b in 0..J {
            // SAFETY: the mask keeps both loads inside the `len` elements of their rows.
            unsafe {
                let wv = _mm256_maskload_ps(ws[b].add(k), mask);
                for a in 0..I {
                    sums[a][b] = _mm256_fmadd_ps(_mm256_maskload_ps(xs[a].add(k), mask), wv, sums[a][b]);
                }
            }
        }
    }
    for (c, sums) in c[i..].iter_mut().zip(sums) {
        let c = &mut c[at + j..][..J];
        if let (Ok(c), Ok(sums)) = (<&mut [f32; 4]>::try_from(&mut *c), <[__m256; 4]>::try_from(sums.as_slice())) {
            // SAFETY: `c` is an array of 4 floats.
            unsafe { _mm_storeu_ps(c.as_mut_ptr(), _mm_add_ps(_mm_loadu_ps(c.as_ptr()), sum4(sums))) };
        } else {
            for (c, sum) in c.iter_mut().zip(sums) {
                *c += sum1(sum);
            }
        }
    }
}

/// See [`super::super::Table::tile_axpy`].
#[target_feature(enable = "avx2,fma")]
pub(crate) fn axpy(coef: Coefficients, p: Rows, c: &mut [&mut [f32]]) {
    let width = p.width();
    for j in (0..p.count()).step_by(AXPY_DEPTH) {
        let js = j..p.count().min(j + AXPY_DEPTH);
        let mut n = 0;
        while n < width {
            let taken = match width - n {
                16.. => {
                    axpy_strip::<2>(coef, p, js.clone(), n, c);
                    16
                }
                8.. => {
                    axpy_strip::<1>(coef, p, js.clone(), n, c);
                    8
                }
                rest => {
                    axpy_rest(coef, p, js.clone(), n, c);
                    rest
                }
            };
            n += taken;
        }
    }
}

/// All rows of `c`, `8 N` columns from `n` on.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn axpy_strip<const N: usize>(coef: Coefficients, p: Rows, js: Range<usize>, n: usize, c: &mut [&mut [f32]]) {
    let mut i = 0;
    while i < c.len() {
        let high = (c.len() - i).min(6);
        match high {
            6 => axpy_tile::<6, N>(coef, p, js.clone(), n, i, c),
            5 => axpy_tile::<5, N>(coef, p, js.clone(), n, i, c),
            4 => axpy_tile::<4, N>(coef, p, js.clone(), n, i, c),
            3 => axpy_tile::<3, N>(coef, p, js.clone(), n, i, c),
            2 => axpy_tile::<2, N>(coef, p, js.clone(), n, i, c),
            _ => axpy_tile::<1, N>(coef, p, js.clone(), n, i, c),
        }
        i += high;
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn axpy_tile<const I: usize, const N: usize>(
    coef: Coefficients,
    p: Rows,
    js: Range<usize>,
    n: usize,
    i: usize,
    c: &mut [&mut [f32]],
) {
    // Slices check what the pointers rely on: 8 N columns from `n` on in every row, and the last coefficient.
    let rows = Rows { data: &p.data[js.start * p.stride + n..], width: 8 * N, count: js.len(), ..p };
    let (first, last) = (js.start * coef.col, (js.end - 1) * coef.col);
    assert!(n + 8 * N <= p.width && (i + I - 1) * coef.row + last < coef.data.len());
    let c: [&mut [f32]; I] = {
        let mut rows = c[i..].iter_mut();
        std::array::from_fn(|_| &mut rows.next().expect("the caller counted the rows")[n..][..8 * N])
    };
    let mut sums = [[_mm256_setzero_ps(); N]; I];
    let coef_rows: [*const f32; I] = std::array::from_fn(|a| coef.data[(i + a) * coef.row + first..].as_ptr());
    // SAFETY: the asserts above, and `Rows::new` for the rows of `p`.
    unsafe {
        for a in 0..I {
            for b in 0..N {
                sums[a][b] = _mm256_loadu_ps(c[a].as_ptr().add(8 * b));
            }
        }
        let mut row = rows.data.as_ptr();
        for j in 0..rows.count {
            let mut pv = [_mm256_setzero_ps(); N];
            for b in 0..N {
                pv[b] = _mm256_loadu_ps(row.add(8 * b));
            }
            for a in 0..I {
                let factor = _mm256_broadcast_ss(&*coef_rows[a].add(j * coef.col));
                for b in 0..N {
                    sums[a][b] = _mm256_fmadd_ps(factor, pv[b], sums[a][b]);
                }
            }
            row = row.wrapping_add(rows.stride);
        }
        for (c, sums) in c.into_iter().zip(sums) {
            for b in 0..N {
                _mm256_storeu_ps(c.as_mut_ptr().add(8 * b), sums[b]);
            }
        }
    }
}

/// The last columns, fewer than eight; rare enough for one row at a time.
#[target_feature(enable = "avx2,fma")]
fn axpy_rest(coef: Coefficients, p: Rows, js: Range<usize>, n: usize, c: &mut [&mut [f32]]) {
    for (i, c) in c.iter_mut().enumerate() {
        let c = &mut c[n..p.width];
        let mask = first_lanes(c.len());
        // SAFETY: the mask keeps loads and stores inside the rows' ends, which are slices of equal length.
        unsafe {
            let mut sum = _mm256_maskload_ps(c.as_ptr(), mask);
            for j in js.clone() {
                let row = _mm256_maskload_ps(p.row(j)[n..].as_ptr(), mask);
                sum = _mm256_fmadd_ps(_mm256_set1_ps(coef.at(i, j)), row, sum);
            }
            _mm256_maskstore_ps(c.as_mut_ptr(), mask, sum);
        }
    }
}
