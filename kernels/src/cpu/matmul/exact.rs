//! Products in f32 with a weight that is expanded a panel at a time, into scratch that stays in cache.
//!
//! | | formula | form | task |
//! |---|---|---|---|
//! | forward | `Y[T, O] = X[T, K] Wᵀ` | `dot` | columns of `Y` |
//! | forward, thin `K` or many tokens | same | `axpy` on `Wᵀ` | columns of `Y` |
//! | forward, few outputs | same | `dot` | tokens |
//! | by `X` | `dX[T, K] = dY[T, O] W` | `axpy` | tokens by columns of `dX` |
//! | by `W` | `dW[O, K] += dYᵀ X` | `axpy` | patches of `dW` |
//! | by `W`, thin `K` | `dWᵀ[K, O] += Xᵀ dY` | `axpy` | columns of `dWᵀ` |

use super::super::elementwise::zero;
use super::super::matrix::Band;
use super::super::split::{Patch, patches, run, with_scratch};
use super::super::tile::{Coefficients, Rows};
use super::super::{Cpu, Table};
use super::SMALL;
use std::ops::Range;
use wide::f32x4;

/// Floats in a decoded panel: 256 KiB, half of a usual second-level cache.
const PANEL: usize = 64 * 1024;
/// Rows of a decoded panel at most, so that a task's share of the output is not too coarse.
const PANEL_ROWS: usize = 32;
/// Tasks of a forward product at most; a larger output gets larger tasks, as each holds a slice a token.
const TASKS: usize = 64;
/// Sums shorter than this (adapters of low rank) cost less as `axpy`, which has no horizontal additions.
pub(super) const THIN: usize = 64;
/// Outputs up to which a weight (an adapter's way down) is expanded whole by every task, of so many tokens.
const FEW: (usize, usize) = (16, 64);
/// Columns of a task of the product by a transposed panel, and rows of that panel: 128 KiB.
const TRANSPOSED: (usize, usize) = (128, 256);
/// Side of the squares in which a panel is transposed, so that reads and writes both stay in first-level cache.
const SQUARE: usize = 16;
/// Columns and tokens of a task of the product by `X`: one NF4 block, and enough tokens to pay its decoding.
const VJP_X: (usize, usize) = (64, 128);
/// Rows of `W` per panel there: 32 KiB with 64 columns.
const VJP_X_DEPTH: usize = 128;
/// Rows and columns of a task of the product by `W`.
const VJP_W: (usize, usize) = (48, 256);
/// Tokens at a time there: few enough that memory is read along their rows, and what was read once is still in
/// first-level cache for the next rows of the task.
const VJP_W_DEPTH: usize = 16;
/// Columns of `W` from which they fill the widest vectors well.
const VJP_W_THIN: usize = 16;

/// Floats of scratch that a thread keeps after [`forward`] and [`vjp_x`] of so many tokens with a weight `[O, K]`, at most.
pub(super) fn scratch(table: &Table, tokens: usize, o: usize, k: usize) -> usize {
    let forward = match narrow_scratch(o, k) {
        0 if is_transposed(table, tokens, k) => 2 * o.min(TRANSPOSED.0) * k.min(TRANSPOSED.1),
        0 => panel_rows(k) * k,
        narrow => narrow,
    };
    forward.max(VJP_X_DEPTH * k.min(VJP_X.0))
}

/// Rows of a panel of whole rows.
fn panel_rows(k: usize) -> usize {
    (PANEL / k.max(1) / 4 * 4).clamp(4, PANEL_ROWS)
}

/// Whether the product of so many tokens transposes its panels.
fn is_transposed(table: &Table, tokens: usize, k: usize) -> bool {
    k <= THIN || tokens >= table.transposes_from()
}

/// Those after a forward product that is [`is_narrow`], of which there are none else.
pub(super) fn narrow_scratch(o: usize, k: usize) -> usize {
    if o <= FEW.0 && k > THIN && o * k <= PANEL { o * k } else { 0 }
}

/// Those that the thread which calls [`vjp_w`] keeps after it.
pub(super) fn vjp_w_scratch(o: usize, k: usize) -> usize {
    if k < VJP_W_THIN && o > k { k * o } else { 0 }
}

/// `y = x Wᵀ` for any number of tokens, added to `y` if `accumulate`.
pub(super) fn forward(cpu: &Cpu, w: Band<'_>, x: &[f32], y: &mut [f32], accumulate: bool) {
    let (o, k) = w.shape();
    if !accumulate {
        zero(&cpu.team, y);
    }
    if x.is_empty() || y.is_empty() {
        return;
    }
    let tokens = x.len() / k;
    let small = tokens * o * k < SMALL;
    if is_narrow(w) {
        narrow(cpu, w, x, y, small);
    } else if is_transposed(cpu.table, tokens, k) {
        transposed(cpu, w, x, y, small);
    } else {
        panels(cpu, w, x, y, small);
    }
}

/// Whether `x Wᵀ` has few outputs of long sums, for which rounding `x` to bf16 would cost more than it saves.
pub(super) fn is_narrow(w: Band<'_>) -> bool {
    let (o, k) = w.shape();
    narrow_scratch(o, k) > 0
}

/// `y += x Wᵀ` with few outputs.
fn narrow(cpu: &Cpu, w: Band<'_>, x: &[f32], y: &mut [f32], small: bool) {
    let (o, k) = w.shape();
    run(&cpu.team, patches(y, o, FEW.1, o), small, |Patch { row, mut rows, .. }| {
        with_scratch(o * k, |decoded| {
            w.decode(cpu.table, 0, 0, k, decoded);
            cpu.table.tile_dot(Rows::new(&x[row * k..], k, rows.len(), k), Rows::packed(decoded, k), &mut rows, 0);
        });
    });
}

/// `y += x Wᵀ` by panels of whole rows.
fn panels(cpu: &Cpu, w: Band<'_>, x: &[f32], y: &mut [f32], small: bool) {
    let (o, k) = w.shape();
    let panel = panel_rows(k);
    let task = panel * o.div_ceil(TASKS * panel);
    let x = Rows::packed(x, k);
    run(&cpu.team, patches(y, o, x.count(), task), small, |Patch { col, mut rows, .. }| {
        let cols = rows[0].len();
        with_scratch(panel * k, |scratch| {
            for at in (0..cols).step_by(panel) {
                let decoded = &mut scratch[..panel.min(cols - at) * k];
                w.decode(cpu.table, col + at, 0, k, decoded);
                cpu.table.tile_dot(x, Rows::packed(decoded, k), &mut rows, at);
            }
        });
    });
}

/// `y += x Wᵀ` by panels of `W` that are transposed first, which turns the product into `axpy`.
fn transposed(cpu: &Cpu, w: Band<'_>, x: &[f32], y: &mut [f32], small: bool) {
    let (o, k) = w.shape();
    let tokens = x.len() / k;
    run(&cpu.team, patches(y, o, tokens, TRANSPOSED.0), small, |Patch { col, mut rows, .. }| {
        let cols = rows[0].len();
        let depth = TRANSPOSED.1.min(k);
        with_scratch(2 * cols * depth, |scratch| {
            for at in (0..k).step_by(depth) {
                let depth = depth.min(k - at);
                let (decoded, panel) = scratch[..2 * cols * depth].split_at_mut(cols * depth);
                w.decode(cpu.table, col, at, depth, decoded);
                transpose(decoded, depth, panel);
                let coef = Coefficients { data: &x[at..], row: k, col: 1 };
                cpu.table.tile_axpy(coef, Rows::packed(panel, cols), &mut rows);
            }
        });
    });
}

/// Writes the transpose of `from`, whose rows are `width` long, to `to`.
fn transpose(from: &[f32], width: usize, to: &mut [f32]) {
    let height = from.len() / width;
    for top in (0..height).step_by(SQUARE) {
        let rows = top..height.min(top + SQUARE);
        for left in (0..width).step_by(SQUARE) {
            transpose_part(from, width, rows.clone(), left..width.min(left + SQUARE), to);
        }
    }
}

/// The part of [`transpose`] in these rows and columns, four by four where there are as many.
fn transpose_part(from: &[f32], width: usize, rows: Range<usize>, columns: Range<usize>, to: &mut [f32]) {
    let height = from.len() / width;
    let four = |i: usize, j: usize| f32x4::new(from[i * width + j..].as_chunks().0[0]);
    let (bottom, right) = (rows.start + rows.len() / 4 * 4, columns.start + columns.len() / 4 * 4);
    for i in (rows.start..bottom).step_by(4) {
        for j in (columns.start..right).step_by(4) {
            let turned = f32x4::transpose([four(i, j), four(i + 1, j), four(i + 2, j), four(i + 3, j)]);
            for (k, turned) in turned.into_iter().enumerate() {
                to[(j + k) * height + i..].as_chunks_mut().0[0] = turned.to_array();
            }
        }
    }
    for i in rows {
        for j in if i < bottom { right } else { columns.start }..columns.end {
            to[j * height + i] = from[i * width + j];
        }
    }
}

/// `dx = ` the sum of `dy W` over `terms`, added to `dx` if `accumulate`.
pub(super) fn vjp_x(cpu: &Cpu, terms: &[(Band<'_>, &[f32])], dx: &mut [f32], accumulate: bool) {
    if !accumulate {
        zero(&cpu.team, dx);
    }
    let Some((first, _)) = terms.first() else { return };
    if dx.is_empty() {
        return;
    }
    let (_, k) = first.shape();
    let rows: usize = terms.iter().map(|(w, _)| w.shape().0).sum();
    let small = dx.len() * rows < SMALL;
    run(&cpu.team, patches(dx, k, VJP_X.1, VJP_X.0), small, |Patch { row, col, mut rows }| {
        let cols = rows[0].len();
        with_scratch(VJP_X_DEPTH * cols, |scratch| {
            for (w, dy) in terms {
                let (o, _) = w.shape();
                for at in (0..o).step_by(VJP_X_DEPTH) {
                    let decoded = &mut scratch[..VJP_X_DEPTH.min(o - at) * cols];
                    w.decode(cpu.table, at, col, cols, decoded);
                    let coef = Coefficients { data: &dy[row * o + at..], row: o, col: 1 };
                    cpu.table.tile_axpy(coef, Rows::packed(decoded, cols), &mut rows);
                }
            }
        });
    });
}

/// `dw[O, K] += dy[T, O]ᵀ x[T, K]`.
pub(super) fn vjp_w(cpu: &Cpu, tokens: usize, dy: &[f32], x: &[f32], dw: &mut [f32]) {
    if tokens == 0 {
        return;
    }
    let (o, k) = (dy.len() / tokens, x.len() / tokens);
    assert!(dy.len() == tokens * o && x.len() == tokens * k && dw.len() == o * k);
    if dw.is_empty() {
        return;
    }
    let small = tokens * o * k < SMALL;
    if k < VJP_W_THIN && o > k {
        // Vectors run along the wider of the two.
        return with_scratch(k * o, |turned| {
            turned.fill(0.0);
            run(&cpu.team, patches(turned, o, k, VJP_W.1), small, |Patch { col, mut rows, .. }| {
                outer(cpu.table, tokens, (x, k), (&dy[col..], o), &mut rows);
            });
            for (j, turned) in turned.chunks_exact(o).enumerate() {
                dw[j..].iter_mut().step_by(k).zip(turned).for_each(|(dw, part)| *dw += part);
            }
        });
    }
    run(&cpu.team, patches(dw, k, VJP_W.0, VJP_W.1), small, |Patch { row, col, mut rows }| {
        outer(cpu.table, tokens, (&dy[row..], o), (&x[col..], k), &mut rows);
    });
}

/// Adds to `c` the sum over tokens of `aᵀ b`, each given with the distance of its rows.
fn outer(table: &Table, tokens: usize, (a, a_row): (&[f32], usize), (b, b_row): (&[f32], usize), c: &mut [&mut [f32]]) {
    let width = c[0].len();
    for t in (0..tokens).step_by(VJP_W_DEPTH) {
        let b = Rows::new(&b[t * b_row..], b_row, VJP_W_DEPTH.min(tokens - t), width);
        table.tile_axpy(Coefficients { data: &a[t * a_row..], row: 1, col: a_row }, b, c);
    }
}
