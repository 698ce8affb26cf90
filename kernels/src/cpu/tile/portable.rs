//! Matrix tiles on `wide`.

use super::super::lanes::{LANES, load, store};
use super::{AXPY_DEPTH, Coefficients, DOT_DEPTH, DOT_ROWS, Rows};
use std::ops::Range;
use wide::f32x8;

/// Rows and columns of a register tile: 16 registers of SSE2 hold 2 x 2 sums of two registers each with their
/// operands, NEON's 32 hold 4 x 2.
const TILE: (usize, usize) = if cfg!(target_arch = "aarch64") { (4, 2) } else { (2, 2) };

/// See [`super::super::Table::tile_dot`].
pub(crate) fn dot(x: Rows, w: Rows, c: &mut [&mut [f32]], at: usize) {
    for k in (0..x.width()).step_by(DOT_DEPTH) {
        let k = k..x.width().min(k + DOT_DEPTH);
        for i0 in (0..x.count()).step_by(DOT_ROWS) {
            let end = x.count().min(i0 + DOT_ROWS);
            let mut j = 0;
            while j < w.count() {
                let wide = w.count() - j >= TILE.1;
                let mut i = i0;
                while i < end {
                    let high = end - i >= TILE.0;
                    match (high, wide) {
                        (true, true) => dot_tile::<{ TILE.0 }, { TILE.1 }>(x, i, w, j, k.clone(), c, at),
                        (true, false) => dot_tile::<{ TILE.0 }, 1>(x, i, w, j, k.clone(), c, at),
                        (false, true) => dot_tile::<1, { TILE.1 }>(x, i, w, j, k.clone(), c, at),
                        (false, false) => dot_tile::<1, 1>(x, i, w, j, k.clone(), c, at),
                    }
                    i += if high { TILE.0 } else { 1 };
                }
                j += if wide { TILE.1 } else { 1 };
            }
        }
    }
}

#[inline(always)]
fn dot_tile<const I: usize, const J: usize>(
    x: Rows,
    i: usize,
    w: Rows,
    j: usize,
    k: Range<usize>,
    c: &mut [&mut [f32]],
    at: usize,
) {
    let xs: [&[f32]; I] = std::array::from_fn(|a| &x.row(i + a)[k.clone()]);
    let ws: [&[f32]; J] = std::array::from_fn(|b| &w.row(j + b)[k.clone()]);
    let mut sums = [[f32x8::ZERO; J]; I];
    for k in (0..k.len()).step_by(LANES) {
        let wv = ws.map(|w| load(&w[k..]));
        for (sums, x) in sums.iter_mut().zip(xs) {
            let xv = load(&x[k..]);
            for (sum, wv) in sums.iter_mut().zip(wv) {
                *sum = xv.mul_add(wv, *sum);
            }
        }
    }
    for (c, sums) in c[i..].iter_mut().zip(sums) {
        for (c, sum) in c[at + j..].iter_mut().zip(sums) {
            *c += sum.reduce_add();
        }
    }
}

/// See [`super::super::Table::tile_axpy`].
pub(crate) fn axpy(coef: Coefficients, p: Rows, c: &mut [&mut [f32]]) {
    for j in (0..p.count()).step_by(AXPY_DEPTH) {
        let js = j..p.count().min(j + AXPY_DEPTH);
        for n in (0..p.width()).step_by(2 * LANES) {
            let mut i = 0;
            while i < c.len() {
                if c.len() - i >= TILE.0 {
                    axpy_tile::<{ TILE.0 }>(coef, p, js.clone(), n, i, c);
                    i += TILE.0;
                } else {
                    axpy_tile::<1>(coef, p, js.clone(), n, i, c);
                    i += 1;
                }
            }
        }
    }
}

/// `I` rows by 16 columns, fewer at the right edge.
#[inline(always)]
fn axpy_tile<const I: usize>(coef: Coefficients, p: Rows, js: Range<usize>, n: usize, i: usize, c: &mut [&mut [f32]]) {
    let end = p.width().min(n + 2 * LANES);
    let mid = end.min(n + LANES);
    let mut sums: [[f32x8; 2]; I] = std::array::from_fn(|a| [load(&c[i + a][n..mid]), load(&c[i + a][mid..end])]);
    for j in js {
        let row = p.row(j);
        let pv = [load(&row[n..mid]), load(&row[mid..end])];
        for (a, sums) in sums.iter_mut().enumerate() {
            let factor = f32x8::splat(coef.at(i + a, j));
            *sums = [factor.mul_add(pv[0], sums[0]), factor.mul_add(pv[1], sums[1])];
        }
    }
    for (c, sums) in c[i..].iter_mut().zip(sums) {
        store(&mut c[n..mid], sums[0]);
        store(&mut c[mid..end], sums[1]);
    }
}
