//! Products of a single token, as in decoding: the kernels walk along the weight's rows as the file has them, for
//! reading them is all that takes time.

use super::super::Cpu;
use super::super::elementwise::add_part;
use super::super::matrix::{Elements, Matrix};
use super::super::nf4::{EvenOdd, GRANULE};
use super::super::q8::Q8;
use super::super::split::{chunks, with_scratch};
use super::super::tile::Rows;
use crate::Arithmetic;
use std::sync::OnceLock;

/// Weights of a task, a microsecond or two of work: coarse enough for one claim each, fine enough to share the rest.
pub(super) const TASK: usize = 32 * 1024;

/// Activations of one token in the forms that kernels want, each made when the first asks for it.
pub(super) struct OneToken<'a> {
    x: &'a [f32],
    arithmetic: Arithmetic,
    even_odd: OnceLock<EvenOdd>,
    q8: OnceLock<Q8>,
}

impl<'a> OneToken<'a> {
    pub fn new(_cpu: &Cpu, arithmetic: Arithmetic, x: &'a [f32]) -> Self {
        Self { x, arithmetic, even_odd: OnceLock::new(), q8: OnceLock::new() }
    }

    /// `y = W x`, added to `y` if `accumulate`.
    pub fn product(&self, cpu: &Cpu, w: &Matrix, y: &mut [f32], accumulate: bool) {
        let (_, k) = w.shape();
        let small = y.len() * k < 2 * TASK;
        let rows = rows_per_task(k);
        chunks(&cpu.team, y, rows, small, |i, y| {
            if accumulate {
                with_scratch(y.len(), |sums| {
                    self.rows(cpu, w, i * rows, sums);
                    add_part(sums, y);
                });
            } else {
                self.rows(cpu, w, i * rows, y);
            }
        });
    }

    /// `y[i] = w[row + i] . x`.
    pub fn rows(&self, cpu: &Cpu, w: &Matrix, row: usize, y: &mut [f32]) {
        let (x, k, table) = (self.x, self.x.len(), cpu.table);
        let q8 = || self.q8.get_or_init(|| Q8::new(cpu, x, k)).row(0);
        match w.elements() {
            Elements::Nf4(w) if self.arithmetic == Arithmetic::Int8 && w.has_q8(k) => {
                table.q8_nf4_matvec(w, row, q8(), y);
            }
            // Stored in 8 bits, it has no other kernel that is worth having.
            Elements::Int8(w) => table.q8_int8_matvec(w, row, q8(), y),
            Elements::Nf4(w) if k.is_multiple_of(GRANULE) => {
                table.nf4_matvec(w, k, row, self.even_odd.get_or_init(|| EvenOdd::new(x)), y);
            }
            Elements::Dense(dtype, bytes) => {
                let size = k * dtype.size();
                table.dense_matvec(dtype, &bytes[row * size..][..y.len() * size], x, y);
            }
            Elements::Nf4(_) => with_scratch(k, |decoded| {
                for (i, y) in y.iter_mut().enumerate() {
                    w.decode(table, row + i, 0, k, decoded);
                    *y = 0.0;
                    table.tile_dot(Rows::packed(x, k), Rows::packed(decoded, k), &mut [std::slice::from_mut(y)], 0);
                }
            }),
        }
    }
}

/// Rows of `k` weights in a task: groups of four, as some kernels sum short rows four at a time.
pub(super) fn rows_per_task(k: usize) -> usize {
    (TASK / k.max(1)).next_multiple_of(4).max(4)
}
