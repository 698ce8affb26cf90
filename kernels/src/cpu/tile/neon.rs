//! Matrix tiles for NEON: 4 x 4 sums of four in `dot`, 4 x 16 elements in `axpy`, half of the 32 registers, which is as
//! many sums as the fastest cores need to hide the latency of their four multipliers.
//!
//! The order in which an element is summed does not depend on the tile that computes it, so edges of the output
//! hold the bits that they would hold in the middle.

#![allow(unsafe_code, reason = "vector loads and stores")]
#![allow(clippy::needless_range_loop, reason = "loops over registers read like the tile when they count")]

use super::super::neon::{by_fours, load_part, sum4};
use super::{AXPY_DEPTH, Coefficients, DOT_DEPTH, DOT_ROWS, Rows};
use std::arch::aarch64::*;
use std::ops::Range;

/// See [`super::super::Table::tile_dot`].
#[target_feature(enable = "neon")]
pub(crate) fn dot(x: Rows, w: Rows, c: &mut [&mut [f32]], at: usize) {
    for k in (0..x.width()).step_by(DOT_DEPTH) {
        let k = k..x.width().min(k + DOT_DEPTH);
        for first in (0..x.count()).step_by(DOT_ROWS) {
            let end = x.count().min(first + DOT_ROWS);
            for j in (0..w.count()).step_by(4) {
                by_fours(&mut c[first..end], |i, c| match c.len() {
                    4 => dot_tile::<4>(x, first + i, w, j, k.clone(), c, at),
                    2 => dot_tile::<2>(x, first + i, w, j, k.clone(), c, at),
                    _ => dot_tile::<1>(x, first + i, w, j, k.clone(), c, at),
                });
            }
        }
    }
}

/// `I` rows of `x` from `i` on by four rows of `w` from `j` on, the last one several times where there are fewer.
#[inline]
#[target_feature(enable = "neon")]
fn dot_tile<const I: usize>(x: Rows, i: usize, w: Rows, j: usize, k: Range<usize>, c: &mut [&mut [f32]], at: usize) {
    let xs: [&[f32]; I] = std::array::from_fn(|a| &x.row(i + a)[k.clone()]);
    let ws: [&[f32]; 4] = std::array::from_fn(|b| &w.row((j + b).min(w.count() - 1))[k.clone()]);
    let mut sums = [[vdupq_n_f32(0.0); 4]; I];
    let whole = k.len() / 4 * 4;
    for k in (0..whole).step_by(4) {
        // SAFETY: every row slice above has at least `whole` elements.
        let load = |row: &[f32]| unsafe { vld1q_f32(row.as_ptr().add(k)) };
        let (xv, wv) = (xs.map(load), ws.map(load));
        for a in 0..I {
            for b in 0..4 {
                sums[a][b] = vfmaq_f32(sums[a][b], xv[a], wv[b]);
            }
        }
    }
    if whole < k.len() {
        let wv = ws.map(|row| load_part(&row[whole..]));
        for a in 0..I {
            let xv = load_part(&xs[a][whole..]);
            for b in 0..4 {
                sums[a][b] = vfmaq_f32(sums[a][b], xv, wv[b]);
            }
        }
    }
    for (c, sums) in c.iter_mut().zip(sums) {
        let (c, sums) = (&mut c[at + j..][..4.min(w.count() - j)], sum4(sums));
        let mut four = [0.0; 4];
        // SAFETY: both stores are to arrays of 4 floats.
        unsafe {
            if let Some(c) = c.first_chunk_mut::<4>() {
                vst1q_f32(c.as_mut_ptr(), vaddq_f32(vld1q_f32(c.as_ptr()), sums));
                continue;
            }
            vst1q_f32(four.as_mut_ptr(), sums);
        }
        c.iter_mut().zip(four).for_each(|(c, sum)| *c += sum);
    }
}

/// See [`super::super::Table::tile_axpy`].
#[target_feature(enable = "neon")]
pub(crate) fn axpy(coef: Coefficients, p: Rows, c: &mut [&mut [f32]]) {
    let width = p.width();
    for j in (0..p.count()).step_by(AXPY_DEPTH) {
        let js = j..p.count().min(j + AXPY_DEPTH);
        let mut n = 0;
        while n < width {
            match width - n {
                16.. => {
                    axpy_strip::<4>(coef, p, js.clone(), n, c);
                    n += 16;
                }
                4.. => {
                    axpy_strip::<1>(coef, p, js.clone(), n, c);
                    n += 4;
                }
                _ => {
                    axpy_column(coef, p, js.clone(), n, c);
                    n += 1;
                }
            }
        }
    }
}

/// All rows of `c`, `4 N` columns from `n` on.
#[inline]
#[target_feature(enable = "neon")]
fn axpy_strip<const N: usize>(coef: Coefficients, p: Rows, js: Range<usize>, n: usize, c: &mut [&mut [f32]]) {
    by_fours(c, |i, c| match c.len() {
        4 => axpy_tile::<4, N>(coef, p, js.clone(), n, i, c),
        2 => axpy_tile::<2, N>(coef, p, js.clone(), n, i, c),
        _ => axpy_tile::<1, N>(coef, p, js.clone(), n, i, c),
    });
}

/// `I` rows of coefficients from `i` on.
#[inline]
#[target_feature(enable = "neon")]
fn axpy_tile<const I: usize, const N: usize>(
    coef: Coefficients,
    p: Rows,
    js: Range<usize>,
    n: usize,
    i: usize,
    c: &mut [&mut [f32]],
) {
    // Slices check what the pointers rely on: 4 N columns from `n` on in every row, and the last coefficient.
    let (count, stride) = (js.len(), p.stride);
    let mut row = p.data[js.start * stride + n..][..(count - 1) * stride + 4 * N].as_ptr();
    let factors: [*const f32; I] = std::array::from_fn(|a| {
        coef.data[(i + a) * coef.row + js.start * coef.col..][..=(count - 1) * coef.col].as_ptr()
    });
    let mut c = c.iter_mut().map(|c| &mut c[n..][..4 * N]);
    let c: [&mut [f32]; I] = std::array::from_fn(|_| c.next().expect("the caller counted the rows"));
    // SAFETY: all pointers stay within the slices above.
    unsafe {
        let mut sums: [[float32x4_t; N]; I] =
            std::array::from_fn(|a| std::array::from_fn(|b| vld1q_f32(c[a].as_ptr().add(4 * b))));
        let whole = count / 4 * 4;
        for j in (0..whole).step_by(4) {
            let four = factors.map(|at| load_four(at.add(j * coef.col), coef.col));
            add_row::<0, I, N>(&mut sums, four, row);
            add_row::<1, I, N>(&mut sums, four, row.wrapping_add(stride));
            add_row::<2, I, N>(&mut sums, four, row.wrapping_add(2 * stride));
            add_row::<3, I, N>(&mut sums, four, row.wrapping_add(3 * stride));
            row = row.wrapping_add(4 * stride);
        }
        for j in whole..count {
            add_row::<0, I, N>(&mut sums, factors.map(|at| vld1q_dup_f32(at.add(j * coef.col))), row);
            row = row.wrapping_add(stride);
        }
        for (c, sums) in c.into_iter().zip(sums) {
            for b in 0..N {
                vst1q_f32(c.as_mut_ptr().add(4 * b), sums[b]);
            }
        }
    }
}

/// Adds a row of `p`, times lane `LANE` of each vector of factors.
///
/// # Safety
/// `row` points to `4 N` floats.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn add_row<const LANE: i32, const I: usize, const N: usize>(
    sums: &mut [[float32x4_t; N]; I],
    factors: [float32x4_t; I],
    row: *const f32,
) {
    for b in 0..N {
        // SAFETY: the caller's promise.
        let pv = unsafe { vld1q_f32(row.add(4 * b)) };
        for a in 0..I {
            sums[a][b] = vfmaq_laneq_f32::<LANE>(sums[a][b], pv, factors[a]);
        }
    }
}

/// Four floats that are `step` apart.
///
/// # Safety
/// `at` points to `3 step + 1` floats.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_four(at: *const f32, step: usize) -> float32x4_t {
    // SAFETY: the caller's promise.
    unsafe {
        if step == 1 {
            return vld1q_f32(at);
        }
        let four = vld1q_lane_f32::<1>(at.add(step), vld1q_dup_f32(at));
        vld1q_lane_f32::<3>(at.add(3 * step), vld1q_lane_f32::<2>(at.add(2 * step), four))
    }
}

/// One of the last columns, fewer than four; rare enough to go without vectors.
#[target_feature(enable = "neon")]
fn axpy_column(coef: Coefficients, p: Rows, js: Range<usize>, n: usize, c: &mut [&mut [f32]]) {
    for (i, c) in c.iter_mut().enumerate() {
        c[n] = js.clone().fold(c[n], |sum, j| coef.at(i, j).mul_add(p.row(j)[n], sum));
    }
}
