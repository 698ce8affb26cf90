//! Products element by element, and with one factor for each row or each column.
//!
//! Each is its own gradient by one of its inputs: `y = a b` has `da = b dy`, rows and columns likewise. The gradient by a
//! row's factor is [`dot_rows`] of `x` and `dy`, that by a column's factor [`sum_columns`].

use super::Cpu;
use super::elementwise::add_part;
use super::loops::{map, update};
use super::split::{chunks, parts};
use super::team::Team;

/// Elements of a task of [`dot_rows`].
const ELEMENTS: usize = 16 * 1024;
/// Columns of a task of [`sum_columns`], and rows that are summed before they join the total, so that a long sum in f32
/// stays exact.
const BLOCK: (usize, usize) = (128, 64);

/// `y = a b`.
pub(crate) fn multiply(team: &Team, a: &[f32], b: &[f32], y: &mut [f32]) {
    assert!(a.len() == y.len() && b.len() == y.len());
    parts(team, y, 1, |at, y| {
        let n = y.len();
        map([&a[at..][..n], &b[at..][..n]], y, |[a, b]| a * b);
    });
}

/// `y[t, :] = w[t] x[t, :]`.
pub(crate) fn scale_rows(team: &Team, w: &[f32], x: &[f32], y: &mut [f32]) {
    let width = width(w.len(), x, y);
    if width == 0 {
        return;
    }
    parts(team, y, width, |at, y| {
        let rows = w[at / width..].iter().zip(x[at..].chunks_exact(width));
        for ((w, x), y) in rows.zip(y.chunks_exact_mut(width)) {
            map([x], y, |[x]| w * x);
        }
    });
}

/// `y[t] = a[t, :] . b[t, :]`.
pub(crate) fn dot_rows(cpu: &Cpu, a: &[f32], b: &[f32], y: &mut [f32]) {
    let width = width(y.len(), a, b);
    if width == 0 {
        return y.fill(0.0);
    }
    let rows = (ELEMENTS / width).max(1);
    chunks(&cpu.team, y, rows, false, |i, y| {
        let [a, b] = [a, b].map(|x| x[i * rows * width..].chunks_exact(width));
        for ((a, b), y) in a.zip(b).zip(y) {
            *y = cpu.table.light().dot(a, b);
        }
    });
}

/// `y[t, :] = l x[t, :]`, element by element.
pub(crate) fn scale_columns(team: &Team, l: &[f32], x: &[f32], y: &mut [f32]) {
    let width = l.len();
    if width == 0 {
        return assert!(x.is_empty() && y.is_empty());
    }
    assert!(x.len() == y.len() && x.len().is_multiple_of(width));
    parts(team, y, width, |at, y| {
        for (x, y) in x[at..].chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            map([x, l], y, |[x, l]| x * l);
        }
    });
}

/// `y[c] += sum_t a[t, c] b[t, c]`, or without `b` the sum of `a` alone.
pub(crate) fn sum_columns(team: &Team, a: &[f32], b: Option<&[f32]>, y: &mut [f32]) {
    let width = y.len();
    if width == 0 {
        return assert!(a.is_empty());
    }
    assert!(a.len().is_multiple_of(width) && b.is_none_or(|b| b.len() == a.len()));
    let (columns, rows) = BLOCK;
    chunks(team, y, columns, a.len() < ELEMENTS, |i, y| {
        for first in (0..a.len() / width).step_by(rows) {
            let mut sums = [0.0; BLOCK.0];
            let sums = &mut sums[..y.len()];
            for t in first..(a.len() / width).min(first + rows) {
                let at = t * width + i * columns;
                let part = at..at + y.len();
                match b {
                    Some(b) => update(sums, [&a[part.clone()], &b[part]], |sum, [a, b]| sum + a * b),
                    None => add_part(&a[part], sums),
                }
            }
            add_part(sums, y);
        }
    });
}

/// Width of the rows of two arrays alike.
fn width(rows: usize, a: &[f32], b: &[f32]) -> usize {
    assert!(a.len() == b.len() && a.len().is_multiple_of(rows.max(1)) && (rows > 0 || a.is_empty()));
    a.len() / rows.max(1)
}
