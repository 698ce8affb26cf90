//! Matrices of few columns in 8 bits: the up-projections `B[O, r]` of adapters, for one token.
//!
//! `B[o, i] ≈ s[o] q[o, i]` with `q` in -127..=127. Rows lie in tiles of 32, a tile column by column, so that `y += B h`
//! is a sum of `r` vectors: no sums across a vector, which is what would take longest with rows so short. `h` stays f32.
//! The error of `y[o]` is at most `s[o] / 2 sum_i |h[i]|`, with `s[o]` at most 1.008 / 127 of the row's largest element.

use super::super::buffer::reserve;
use super::super::loops::multiply_add;
use crate::Error;
use half::bf16;
use std::sync::atomic::{AtomicU32, Ordering};

/// Rows of a tile.
pub(crate) const TILE: usize = 32;

/// See the module's text.
pub(crate) struct Columns {
    /// `[O / 32, r, 32]`, rows past the end zero.
    codes: Vec<u8>,
    /// `[O / 32, 32]`, as bf16: with 16 columns, a scale in f32 would be a fifth of what is read.
    scales: Vec<u8>,
    cols: usize,
}

impl Columns {
    /// Rounds `w` of rows of `cols`.
    pub fn new(w: &[f32], cols: usize) -> Result<Self, Error> {
        let rows = w.len().checked_div(cols).unwrap_or(0).next_multiple_of(TILE);
        let (mut codes, mut scales) = (reserve(rows * cols)?, reserve(rows * 2)?);
        codes.resize(rows * cols, 0_u8);
        scales.resize(rows * 2, 0_u8);
        for (o, row) in w.chunks_exact(cols.max(1)).enumerate() {
            let largest = row.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            let scale = if row.iter().all(|x| x.is_finite()) { round_up(largest / 127.0) } else { bf16::NAN };
            scales[2 * o..][..2].copy_from_slice(&scale.to_le_bytes());
            let inverse = if scale > bf16::ZERO { 1.0 / f64::from(scale) } else { 0.0 };
            let tile = &mut codes[o / TILE * TILE * cols..][..TILE * cols];
            for (i, x) in row.iter().enumerate() {
                tile[i * TILE + o % TILE] = ((f64::from(*x) * inverse).round_ties_even() as i8).cast_unsigned();
            }
        }
        Ok(Self { codes, scales, cols })
    }

    /// Codes of the rows from `row` on, the first of a tile.
    pub fn rows(&self, row: usize, count: usize) -> &[u8] {
        &self.codes[row * self.cols..][..count.next_multiple_of(TILE) * self.cols]
    }
}

/// The next bf16 that is not smaller, so that codes stay in their range; `x` is not negative.
fn round_up(x: f32) -> bf16 {
    let near = bf16::from_f32(x);
    if near.to_f32() < x { bf16::from_bits(near.to_bits() + 1) } else { near }
}

/// `y += B h` for the rows from `row` on, the first of a tile. `h` holds the bits of `r` floats.
#[inline(always)]
pub(crate) fn add<const FMA: bool>(w: &Columns, row: usize, h: &[AtomicU32], y: &mut [f32]) {
    assert!(row.is_multiple_of(TILE) && h.len() == w.cols);
    let scales = w.scales.as_chunks::<2>().0.as_chunks::<TILE>().0;
    let tiles = w.codes.as_chunks::<TILE>().0;
    let (full, rest) = y.as_chunks_mut::<TILE>();
    let first = row / TILE;
    for (i, y) in (first..).zip(&mut *full) {
        let sums = tile::<FMA>(&tiles[i * h.len()..][..h.len()], &scales[i], h);
        for (y, sum) in y.iter_mut().zip(sums) {
            *y += sum;
        }
    }
    if !rest.is_empty() {
        let i = first + full.len();
        let sums = tile::<FMA>(&tiles[i * h.len()..][..h.len()], &scales[i], h);
        for (y, sum) in rest.iter_mut().zip(sums) {
            *y += sum;
        }
    }
}

/// `B h` for the rows of a tile.
#[inline(always)]
fn tile<const FMA: bool>(codes: &[[u8; TILE]], scales: &[[u8; 2]; TILE], h: &[AtomicU32]) -> [f32; TILE] {
    let mut sums = [0.0; TILE];
    for (codes, h) in codes.iter().zip(h) {
        let h = f32::from_bits(h.load(Ordering::Relaxed));
        for i in 0..TILE {
            sums[i] = multiply_add::<FMA>(f32::from(codes[i].cast_signed()), h, sums[i]);
        }
    }
    for i in 0..TILE {
        sums[i] *= f32::from_bits(u32::from(u16::from_le_bytes(scales[i])) << 16);
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Table;

    #[test]
    fn rows_keep_to_their_step_and_broken_ones_are_none() {
        let (rows, cols) = (70, 3);
        let mut w: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 + 5) % 41) as f32 * 1e-3 - 0.02).collect();
        w[3 * cols] = f32::INFINITY;
        w[4 * cols + 2] = f32::NAN;
        w[5 * cols..6 * cols].fill(0.0);
        w[6 * cols..7 * cols].fill(1e-44);
        let columns = Columns::new(&w, cols).unwrap();
        let h = [1.0_f32, -2.0, 0.5];
        let h_bits = h.map(|h| AtomicU32::new(h.to_bits()));
        for table in Table::available() {
            let mut y = vec![1.0; rows];
            table.light().add_columns(&columns, 0, &h_bits, &mut y);
            let mut from = vec![1.0; rows - TILE];
            table.light().add_columns(&columns, TILE, &h_bits, &mut from);
            assert_eq!(bits(&from), bits(&y[TILE..]), "{}", table.isa().name());
            for (o, y) in y.iter().enumerate() {
                let row = &w[o * cols..][..cols];
                let exact: f64 = row.iter().zip(h).map(|(w, h)| f64::from(*w) * f64::from(h)).sum();
                let largest = row.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
                let step = f64::from(largest) / 127.0 * 1.008;
                match o {
                    3 | 4 => assert!(y.is_nan(), "{} row {o}: {y}", table.isa().name()),
                    _ => assert!(
                        (f64::from(*y) - 1.0 - exact).abs() <= step / 2.0 * 3.5 + 1e-6,
                        "{} row {o}: {y} for {exact}",
                        table.isa().name()
                    ),
                }
            }
        }
    }

    fn bits(y: &[f32]) -> Vec<u32> {
        y.iter().map(|y| y.to_bits()).collect()
    }
}
