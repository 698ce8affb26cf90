//! Matrices of few columns in 8 bits: the up-projections `B[O, r]` of adapters, for one token.
//!
//! `B[o, i] ≈ s[o] q[o, i]` and `h[i] ≈ u[i / 8] p[i]` with codes in -127..=127, so `y[o] += s[o] sum_g u[g] (sum_i p[i]
//! q[o, i])`, the inner sum over a group of 8 columns in exact integers. Rows lie in tiles of 32. A tile has four columns
//! of each row, then the next four, and the scales at its end: one stream to read, and a row for each lane, for sums
//! across a vector are what would take longest with rows so short.
//!
//! The error of `y[o]` is at most `s[o] / 2 sum_i |h[i]|` for `B`, with `s[o]` at most 1.008 / 127 of the row's largest
//! element, and 8 / 254 of the largest `|h|` of each group times the row's largest element for `h`.

use super::super::shelf::Shelf;
use super::QUAD;
use super::portable::unit;
use crate::Error;
use crate::quant::{nearest, nearest_f32};
use bytes::Bytes;
use half::bf16;
use std::sync::atomic::{AtomicU32, Ordering};

/// Rows of a tile.
pub(crate) const TILE: usize = 32;
/// Columns whose `h` share a unit.
pub(crate) const GROUP: usize = 8;

/// Four columns of a tile, row by row.
pub(super) type Quad = [u8; QUAD * TILE];
/// Scales of a tile, as bf16: with 16 columns, scales in f32 would be a fifth of what is read.
pub(super) type Scales = [[u8; 2]; TILE];

/// See the module's text.
pub(crate) struct Columns {
    /// Tile after tile, each on whole cache lines. Rows and columns past the end are zero.
    tiles: Bytes,
    /// Quads of a row.
    quads: usize,
}

impl Columns {
    /// Rounds `w` of rows of `cols`.
    pub fn new(shelf: &Shelf, w: &[f32], cols: usize) -> Result<Self, Error> {
        let quads = cols.div_ceil(QUAD);
        let rows = w.len().checked_div(cols).unwrap_or(0);
        let mut tiles = shelf.take(rows.div_ceil(TILE) * Self::tile_bytes(quads))?;
        for (o, row) in w.chunks_exact(cols.max(1)).enumerate() {
            let largest = row.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            let scale = if row.iter().all(|x| x.is_finite()) { round_up(largest / 127.0) } else { bf16::NAN };
            let inverse = if scale > bf16::ZERO { 1.0 / f64::from(scale) } else { 0.0 };
            let (codes, scales) = tiles[o / TILE * Self::tile_bytes(quads)..].split_at_mut(quads * size_of::<Quad>());
            for (i, x) in row.iter().enumerate() {
                let code = nearest(f64::from(*x) * inverse);
                codes[(i / QUAD * TILE + o % TILE) * QUAD + i % QUAD] = code.cast_unsigned();
            }
            scales[o % TILE * 2..][..2].copy_from_slice(&scale.to_le_bytes());
        }
        Ok(Self { tiles: tiles.freeze(), quads })
    }

    fn tile_bytes(quads: usize) -> usize {
        quads * size_of::<Quad>() + size_of::<Scales>()
    }

    /// What is read of the rows from `row` on, the first of a tile.
    fn rows(&self, row: usize, count: usize) -> &[u8] {
        let tile = Self::tile_bytes(self.quads);
        &self.tiles[row / TILE * tile..][..count.div_ceil(TILE) * tile]
    }
}

/// The next bf16 that is not smaller, so that codes stay in their range; `x` is not negative.
fn round_up(x: f32) -> bf16 {
    let near = bf16::from_f32(x);
    if near.to_f32() < x { bf16::from_bits(near.to_bits() + 1) } else { near }
}

/// A group of `h`, rounded, as bits: one thread fills it in, all read it.
#[derive(Default)]
#[repr(align(16))]
pub(crate) struct Hidden([AtomicU32; 4]);

/// What [`Hidden`] holds.
#[derive(Clone, Copy)]
pub(super) struct Group {
    /// Of two quads.
    pub codes: [i32; GROUP / QUAD],
    /// What products begin with whose weights are 128 too large.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "others multiply signed codes"))]
    pub start: i32,
    pub unit: f32,
}

impl Hidden {
    /// Rounds at most [`GROUP`] elements. A NaN or an infinity makes the unit NaN.
    pub fn set(&self, h: &[f32]) {
        let mut group = [0.0; GROUP];
        group[..h.len()].copy_from_slice(h);
        let (unit, inverse) = unit(&group);
        let codes = group.map(|x| if unit.is_nan() { 0 } else { nearest_f32(x * inverse).cast_unsigned() });
        let start = -128 * codes.iter().map(|code| i32::from(code.cast_signed())).sum::<i32>();
        let quads = codes.as_chunks().0.iter().map(|quad| u32::from_le_bytes(*quad));
        let words = quads.chain([start.cast_unsigned(), unit.to_bits()]);
        self.0.iter().zip(words).for_each(|(to, word)| to.store(word, Ordering::Relaxed));
    }

    #[inline(always)]
    pub(super) fn get(&self) -> Group {
        let [a, b, start, unit] = [0, 1, 2, 3].map(|i| self.0[i].load(Ordering::Relaxed));
        Group { codes: [a.cast_signed(), b.cast_signed()], start: start.cast_signed(), unit: f32::from_bits(unit) }
    }
}

/// Calls `tile(quads, scales, y)` for the tiles of the rows from `row` on, the first of a tile. Each group of `h` belongs to
/// two of the quads, the last perhaps to one.
#[inline(always)]
pub(super) fn each_tile(
    w: &Columns,
    row: usize,
    h: &[Hidden],
    y: &mut [f32],
    mut tile: impl FnMut(&[Quad], &Scales, &mut [f32; TILE]),
) {
    assert!(row.is_multiple_of(TILE) && h.len() == w.quads.div_ceil(GROUP / QUAD));
    let tiles = w.rows(row, y.len()).chunks_exact(Columns::tile_bytes(w.quads));
    let mut padded = [0.0; TILE];
    for (bytes, part) in tiles.zip(y.chunks_mut(TILE)) {
        let (quads, scales) = bytes.split_at(w.quads * size_of::<Quad>());
        let n = part.len();
        let whole = match part.as_chunks_mut().0 {
            [whole] => whole,
            _ => {
                padded[..n].copy_from_slice(part);
                &mut padded
            }
        };
        tile(quads.as_chunks().0, scales.as_chunks().0.first_chunk().expect("a tile ends with them"), whole);
        if n < TILE {
            part.copy_from_slice(&padded[..n]);
        }
    }
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
        let columns = Columns::new(&Shelf::default(), &w, cols).unwrap();
        let h = [1.0_f32, -2.0, 0.5];
        let rounded = [Hidden::default()];
        rounded[0].set(&h);
        for table in Table::available() {
            let mut y = vec![1.0; rows];
            table.q8_add_columns(&columns, 0, &rounded, &mut y);
            let mut from = vec![1.0; rows - TILE];
            table.q8_add_columns(&columns, TILE, &rounded, &mut from);
            assert_eq!(bits(&from), bits(&y[TILE..]), "{}", table.isa().name());
            for (o, y) in y.iter().enumerate() {
                let row = &w[o * cols..][..cols];
                let exact: f64 = row.iter().zip(h).map(|(w, h)| f64::from(*w) * f64::from(h)).sum();
                let largest = row.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
                // Of the row's elements, and of those of `h`.
                let off = f64::from(largest) / 254.0 * (1.008 * 3.5 + 3.0 * 2.0) * 1.01;
                match o {
                    3 | 4 => assert!(y.is_nan(), "{} row {o}: {y}", table.isa().name()),
                    _ => assert!(
                        (f64::from(*y) - 1.0 - exact).abs() <= off + 1e-6,
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
