//! Products of a single token, as in decoding: the kernels walk along the weight's rows as the file has them, for
//! reading them is all that takes time.

use super::super::Cpu;
use super::super::elementwise::add_part;
use super::super::matrix::{Elements, Matrix};
use super::super::nf4::{EvenOdd, GRANULE, Nf4};
use super::super::q8::{Int8, Q8, Q8Row, TILE};
use super::super::split::{chunks, with_scratch};
use super::super::tile::Rows;
use crate::{Arithmetic, FloatType};

/// Weights of a task, a microsecond or two of work: coarse enough for one claim each, fine enough to share the rest.
pub(super) const TASK: usize = 32 * 1024;

/// Tasks below which they are cut smaller.
const FEW: usize = 32;

/// Activations of one token in the forms that kernels want. They are made before threads come to the work: to wait for
/// the first of them to make one would be a system call, which cost a sixth of decoding on two threads.
pub(super) struct OneToken<'a> {
    x: &'a [f32],
    arithmetic: Arithmetic,
    even_odd: Option<EvenOdd>,
    q8: Option<Q8>,
}

impl<'a> OneToken<'a> {
    /// For products with `weights` and no others.
    pub fn new<'w>(
        cpu: &Cpu,
        arithmetic: Arithmetic,
        x: &'a [f32],
        weights: impl IntoIterator<Item = &'w Matrix>,
    ) -> Self {
        let mut token = Self { x, arithmetic, even_odd: None, q8: None };
        for w in weights {
            match token.way(w) {
                Way::Q8Nf4(_) | Way::Q8Int8(_) if token.q8.is_none() => token.q8 = Some(Q8::new(cpu, x, x.len())),
                Way::EvenOdd(_) if token.even_odd.is_none() => token.even_odd = Some(EvenOdd::new(x)),
                _ => {}
            }
        }
        token
    }

    fn way<'w>(&self, w: &'w Matrix) -> Way<'w> {
        let k = self.x.len();
        match w.elements() {
            Elements::Nf4(w) if self.arithmetic == Arithmetic::Int8 && w.has_q8(k) => Way::Q8Nf4(w),
            // Stored in 8 bits, it has no other kernel that is worth having.
            Elements::Int8(w) => Way::Q8Int8(w),
            Elements::Nf4(w) if k.is_multiple_of(GRANULE) => Way::EvenOdd(w),
            Elements::Nf4(w) => Way::Decoded(w),
            Elements::Dense(dtype, bytes) => Way::Dense(dtype, bytes),
        }
    }

    /// The activations.
    pub fn x(&self) -> &[f32] {
        self.x
    }

    /// The activations in 8 bits, if a weight multiplies those.
    pub fn q8(&self) -> Option<Q8Row<'_>> {
        self.q8.as_ref().map(|q8| q8.row(0))
    }

    /// `y = W x`, added to `y` if `accumulate`.
    pub fn product(&self, cpu: &Cpu, w: &Matrix, y: &mut [f32], accumulate: bool) {
        let (_, k) = w.shape();
        let small = y.len() * k < 2 * TASK;
        let rows = rows_per_task(k, y.len());
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
        let q8 = || self.q8().expect("made for all weights in `new`");
        match self.way(w) {
            Way::Q8Nf4(w) => table.q8_nf4_matvec(w, row, q8(), y),
            Way::Q8Int8(w) => table.q8_int8_matvec(w, row, q8(), y),
            Way::EvenOdd(w) => {
                table.nf4_matvec(w, k, row, self.even_odd.as_ref().expect("made for all weights in `new`"), y);
            }
            Way::Dense(dtype, bytes) => {
                let size = k * dtype.size();
                table.dense_matvec(dtype, &bytes[row * size..][..y.len() * size], x, y);
            }
            Way::Decoded(w) => with_scratch(k, |decoded| {
                for (i, y) in y.iter_mut().enumerate() {
                    table.nf4_decode(w, (row + i) * k, decoded);
                    *y = 0.0;
                    table.tile_dot(Rows::packed(x, k), Rows::packed(decoded, k), &mut [std::slice::from_mut(y)], 0);
                }
            }),
        }
    }
}

/// The kernel for a weight.
enum Way<'a> {
    Q8Nf4(&'a Nf4),
    Q8Int8(&'a Int8),
    EvenOdd(&'a Nf4),
    Dense(FloatType, &'a [u8]),
    /// NF4 whose rows no kernel fits.
    Decoded(&'a Nf4),
}

/// Rows of `k` weights in a task of products with `total` rows: whole tiles of up-projections, and groups of four, as some
/// kernels sum short rows. Small tiles where there are few, for with two threads the odd one of 9 is idle time.
pub(super) fn rows_per_task(k: usize, total: usize) -> usize {
    let rows = (TASK / k.max(1)).next_multiple_of(TILE).max(TILE);
    if total < FEW * rows { TILE } else { rows }
}
