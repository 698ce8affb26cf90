//! Softmax over keys that arrive in blocks (Milakov & Gimelshein 2018).

use super::super::elementwise::scale_part;
use super::super::light::Light;
use super::super::loops::update;
use super::super::tile::Coefficients;
use super::{KEYS, clip};
use std::ops::Range;

/// Rows whose softmax is made at once.
const AT_ONCE: usize = 16;

/// Query rows of one task with their running maximum and sum; their outputs stay with the caller.
pub(super) struct OnlineSoftmax<'a> {
    light: &'a Light,
    softcap: Option<f32>,
    head_dim: usize,
    /// `[rows, D]`, times the scale.
    queries: Vec<f32>,
    rows: Vec<Row>,
    /// `[rows, KEYS]`.
    scores: Vec<f32>,
}

struct Row {
    /// Keys that it sees.
    visible: Range<usize>,
    so_far: SoFar,
}

/// What is known of a row beside its output, which still lacks the division by `sum`.
#[derive(Clone, Copy)]
pub(super) struct SoFar {
    pub max: f32,
    pub sum: f64,
}

impl SoFar {
    /// Before any key.
    pub const START: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };

    /// Before any key, for a head that may have a sink.
    pub fn begin(sinks: Option<&[f32]>, head: usize) -> Self {
        sinks.map_or(Self::START, |sinks| Self { max: sinks[head], sum: 1.0 })
    }

    /// Takes note of a block of scores after which the maximum is `max`, and of its `sum`; the output `y` shrinks to that
    /// maximum.
    fn add(&mut self, max: f32, sum: f32, y: &mut [f32]) {
        let shrink = match self.max {
            old if max == old => 1.0,
            f32::NEG_INFINITY => 0.0,
            old => (old - max).exp(),
        };
        // Nothing has been added yet where the maximum was that of no key.
        if shrink != 1.0 && self.max != f32::NEG_INFINITY {
            scale_part(shrink, y);
        }
        *self = Self { max, sum: self.sum * f64::from(shrink) + f64::from(sum) };
    }

    /// Log-sum-exp of the scores.
    pub fn lse(&self) -> f32 {
        (f64::from(self.max) + self.sum.ln()) as f32
    }
}

impl<'a> OnlineSoftmax<'a> {
    pub fn new(light: &'a Light, softcap: Option<f32>, head_dim: usize, rows: usize) -> Self {
        Self {
            light,
            softcap,
            head_dim,
            queries: Vec::with_capacity(rows * head_dim),
            rows: Vec::with_capacity(rows),
            scores: vec![0.0; rows * KEYS],
        }
    }

    /// Adds a query row, of which `so_far` is known; its output must be zeros.
    pub fn push(&mut self, q: &[f32], scale: f32, visible: Range<usize>, so_far: SoFar) {
        assert_eq!(q.len(), self.head_dim);
        self.queries.extend(q.iter().map(|q| q * scale));
        self.rows.push(Row { visible, so_far });
    }

    /// Keys that any row sees.
    pub fn span(&self) -> Range<usize> {
        let start = self.rows.iter().map(|row| row.visible.start).min().unwrap_or(0);
        start..self.rows.iter().map(|row| row.visible.end).max().unwrap_or(0)
    }

    /// Adds the keys and values `first..first + count` to the outputs `y`. `keys` and `values` are `axpy` with the turned
    /// keys, `columns` of them, and with the values; `factors` belong to keys and to values.
    pub fn step(
        &mut self,
        first: usize,
        count: usize,
        columns: usize,
        factors: Option<[&[f32]; 2]>,
        keys: impl FnOnce(Coefficients, &mut [&mut [f32]]),
        values: impl FnOnce(Coefficients, &mut [&mut [f32]]),
        y: &mut [&mut [f32]],
    ) {
        self.scores.fill(0.0);
        let queries = Coefficients { data: &self.queries, row: self.head_dim, col: 1 };
        with_rows(&mut self.scores, columns, |scores| keys(queries, scores));
        let scores = self.scores.as_chunks_mut().0.chunks_mut(AT_ONCE);
        for ((rows, scores), y) in self.rows.chunks_mut(AT_ONCE).zip(scores).zip(y.chunks_mut(AT_ONCE)) {
            let (mut max, mut sums) = ([0.0; AT_ONCE], [0.0; AT_ONCE]);
            let (max, sums) = (&mut max[..rows.len()], &mut sums[..rows.len()]);
            for ((row, scores), max) in rows.iter().zip(&mut *scores).zip(&mut *max) {
                let seen = clip(&row.visible, first, count);
                if let Some([keys, _]) = factors {
                    update(&mut scores[seen.clone()], [&keys[seen.clone()]], |s, [factor]| s * factor);
                }
                if let Some(cap) = self.softcap {
                    self.light.softcap(cap, &mut scores[seen.clone()]);
                }
                // Their exponentials are zeros, so that whole rows can be worked on.
                scores[..seen.start].fill(f32::NEG_INFINITY);
                scores[seen.end..].fill(f32::NEG_INFINITY);
                *max = row.so_far.max;
            }
            self.light.softmax_steps(scores, max, sums);
            for (i, (row, y)) in rows.iter_mut().zip(y).enumerate() {
                row.so_far.add(max[i], sums[i], y);
                if let Some([_, values]) = factors {
                    let seen = clip(&row.visible, first, count);
                    update(&mut scores[i][seen.clone()], [&values[seen]], |p, [factor]| p * factor);
                }
            }
        }
        values(Coefficients { data: &self.scores, row: KEYS, col: 1 }, y);
    }

    /// What is known of the rows.
    pub fn so_far(&self) -> impl Iterator<Item = SoFar> {
        self.rows.iter().map(|row| row.so_far)
    }

    /// Divides the outputs by their sums.
    pub fn finish(&self, y: &mut [&mut [f32]]) {
        for (y, so_far) in y.iter_mut().zip(self.so_far()) {
            scale_part((1.0 / so_far.sum) as f32, y);
        }
    }
}

/// Rows that a task of one token usually has at most.
const FEW: usize = 8;

/// Calls `work` with the first `columns` of each row of scores.
fn with_rows(scores: &mut [f32], columns: usize, work: impl FnOnce(&mut [&mut [f32]])) {
    let count = scores.len() / KEYS;
    let rows = scores.chunks_exact_mut(KEYS).map(|row| &mut row[..columns]);
    if count <= FEW {
        // Without an allocation: there is a call for every block of every layer.
        let mut few: [&mut [f32]; FEW] = Default::default();
        few.iter_mut().zip(rows).for_each(|(few, row)| *few = row);
        work(&mut few[..count]);
    } else {
        work(&mut rows.collect::<Vec<_>>());
    }
}
