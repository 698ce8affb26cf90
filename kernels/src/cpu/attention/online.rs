//! Softmax over keys that arrive in blocks (Milakov & Gimelshein 2018).

use super::super::elementwise::scale_part;
use super::super::softmax;
use super::super::table::Table;
use super::super::tile::{Coefficients, Rows};
use super::{KEYS, clip};
use std::ops::Range;

/// Query rows of one task with their running maximum and sum; their outputs stay with the caller.
pub(super) struct OnlineSoftmax<'a> {
    table: &'a Table,
    head_dim: usize,
    /// `[rows, D]`, times the scale.
    queries: Vec<f32>,
    /// Keys that each row sees.
    visible: Vec<Range<usize>>,
    max: Vec<f32>,
    sum: Vec<f64>,
    /// `[rows, KEYS]`.
    scores: Vec<f32>,
}

impl<'a> OnlineSoftmax<'a> {
    pub fn new(table: &'a Table, head_dim: usize, rows: usize) -> Self {
        Self {
            table,
            head_dim,
            queries: Vec::with_capacity(rows * head_dim),
            visible: Vec::with_capacity(rows),
            max: Vec::with_capacity(rows),
            sum: Vec::with_capacity(rows),
            scores: vec![0.0; rows * KEYS],
        }
    }

    /// Adds a query row; its output must be zeros.
    pub fn push(&mut self, q: &[f32], scale: f32, visible: Range<usize>) {
        assert_eq!(q.len(), self.head_dim);
        self.queries.extend(q.iter().map(|q| q * scale));
        self.visible.push(visible);
        self.max.push(f32::NEG_INFINITY);
        self.sum.push(0.0);
    }

    /// Keys that any row sees.
    pub fn span(&self) -> Range<usize> {
        let start = self.visible.iter().map(|range| range.start).min().unwrap_or(0);
        start..self.visible.iter().map(|range| range.end).max().unwrap_or(0)
    }

    /// Adds the keys and values `first..first + k.count()`, at most [`KEYS`], to the outputs.
    pub fn step(&mut self, k: Rows, v: Rows, first: usize, y: &mut [&mut [f32]]) {
        self.scores.fill(0.0);
        let mut scores: Vec<_> = self.scores.chunks_exact_mut(KEYS).collect();
        self.table.tile_dot(Rows::packed(&self.queries, self.head_dim), k, &mut scores, 0);
        for (i, row) in scores.into_iter().enumerate() {
            let seen = clip(&self.visible[i], first, k.count());
            row[..seen.start].fill(0.0);
            row[seen.end..].fill(0.0);
            let row = &mut row[seen];
            let max = self.max[i].max(softmax::max(row));
            // Nothing to add, and `-inf - -inf` would make it NaN. A NaN among the scores is carried on.
            if max == f32::NEG_INFINITY && row.iter().all(|s| *s == max) {
                row.fill(0.0);
                continue;
            }
            let shrink = (self.max[i] - max).exp();
            self.sum[i] = self.sum[i] * f64::from(shrink) + softmax::exp_sum(self.table, row, max);
            self.max[i] = max;
            if shrink != 1.0 {
                scale_part(shrink, y[i]);
            }
        }
        let p = Coefficients { data: &self.scores, row: KEYS, col: 1 };
        self.table.tile_axpy(p, v, y);
    }

    /// Divides the outputs by their sums.
    pub fn finish(&self, y: &mut [&mut [f32]]) {
        for (y, sum) in y.iter_mut().zip(&self.sum) {
            scale_part((1.0 / sum) as f32, y);
        }
    }

    /// Log-sum-exp of row `i`'s scores.
    pub fn lse(&self, i: usize) -> f32 {
        (f64::from(self.max[i]) + self.sum[i].ln()) as f32
    }
}
