//! Thin matrices in 8 bits: the down-projections `A[r, K]` and up-projections `B[O, r]` of adapters, for one token.
//!
//! Rows lie in tiles: of `A` eight rows, with eight columns of each side by side, and of `B` 32 rows, with four columns of
//! each. A tile has some columns of each row, then as many again, and the scales at its end: one stream to
//! read, and a row for each lane or two, for sums across a vector are what would take longest with rows so short or so few.
//!
//! `B[o, i] ≈ s[o] q[o, i]` and `h[i] ≈ u[i / 8] p[i]` with codes in -127..=127, so `y[o] += s[o] sum_g u[g] (sum_i p[i]
//! q[o, i])`, the inner sum over a group of 8 columns in exact integers; `A` the same with the activations' blocks of 64,
//! whose order its columns have.
//!
//! The error of `y[o]` is at most `s[o] / 2 sum_i |h[i]|` for `B`, with `s[o]` at most 1.008 / 127 of the row's largest
//! element, and 8 / 254 of the largest `|h|` of each group times the row's largest element for `h`.

use super::super::buffer::LINE;
use super::super::shelf::Shelf;
use super::portable::unit;
use super::{BLOCK, Q8Row, QUAD};
use crate::Error;
use crate::quant::{nearest, nearest_f32};
use bytes::Bytes;
use half::bf16;
use std::sync::atomic::{AtomicU32, Ordering};

/// Rows of a tile of an up-projection.
pub(crate) const TILE: usize = 32;
/// Rows of a tile of a down-projection, whose sums then share a unit.
pub(crate) const GROUP: usize = 8;

/// Columns that lie together in a down-projection.
const OCTET: usize = 8;
/// Octets of a block.
const OCTETS: usize = BLOCK / OCTET;

/// `W` columns of a tile, row by row.
pub(super) type Part<const N: usize, const W: usize> = [[u8; W]; N];
/// Those of an up-projection.
pub(super) type Quad = Part<TILE, QUAD>;
/// Those of a down-projection: a cache line.
pub(super) type Octet = Part<GROUP, OCTET>;
/// Scales of a tile, as bf16: with 16 columns, scales in f32 would be a fifth of what is read.
pub(super) type Scales<const N: usize> = [[u8; 2]; N];

/// See the module's text; `N` rows make a tile, with `W` columns side by side.
pub(crate) struct Thin<const N: usize, const W: usize> {
    /// Tile after tile, each on whole cache lines. Rows and columns past the end are zero.
    tiles: Bytes,
    /// Parts of a tile.
    parts: usize,
}

/// A down-projection.
pub(crate) type Down = Thin<GROUP, OCTET>;
/// An up-projection.
pub(crate) type Up = Thin<TILE, QUAD>;

impl<const N: usize, const W: usize> Thin<N, W> {
    /// Rounds `w` of rows of `cols`.
    pub fn new(shelf: &Shelf, w: &[f32], cols: usize) -> Result<Self, Error> {
        let parts = cols.div_ceil(W);
        let rows = w.len().checked_div(cols).unwrap_or(0);
        let mut tiles = shelf.take(rows.div_ceil(N) * Self::tile_bytes(parts))?;
        for (o, row) in w.chunks_exact(cols.max(1)).enumerate() {
            let largest = row.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            let scale = if row.iter().all(|x| x.is_finite()) { round_up(largest / 127.0) } else { bf16::NAN };
            let inverse = if scale > bf16::ZERO { 1.0 / f64::from(scale) } else { 0.0 };
            let (codes, scales) =
                tiles[o / N * Self::tile_bytes(parts)..].split_at_mut(parts * size_of::<Part<N, W>>());
            for (i, x) in row.iter().enumerate() {
                let code = nearest(f64::from(*x) * inverse);
                codes[(i / W * N + o % N) * W + i % W] = code.cast_unsigned();
            }
            scales[o % N * 2..][..2].copy_from_slice(&scale.to_le_bytes());
        }
        Ok(Self { tiles: tiles.freeze(), parts })
    }

    fn tile_bytes(parts: usize) -> usize {
        (parts * size_of::<Part<N, W>>() + size_of::<Scales<N>>()).next_multiple_of(LINE)
    }

    /// Tiles from number `first` on, each as its parts and scales.
    #[inline(always)]
    fn tiles(&self, first: usize) -> impl Iterator<Item = (&[Part<N, W>], &Scales<N>)> {
        let tile = Self::tile_bytes(self.parts);
        self.tiles[first * tile..].chunks_exact(tile).map(|bytes| {
            let (parts, scales) = bytes.split_at(self.parts * size_of::<Part<N, W>>());
            let parts = parts.as_chunks::<W>().0.as_chunks().0;
            (parts, scales.as_chunks().0.first_chunk().expect("a tile ends with them"))
        })
    }
}

/// A block of eight rows, and the activations that it is multiplied by.
pub(super) struct Block<'a> {
    pub octets: &'a [Octet; OCTETS],
    pub codes: &'a [[i8; OCTET]; OCTETS],
    /// See [`Q8Row::starts`].
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "others multiply signed codes"))]
    pub start: i32,
    pub unit: f32,
}

impl Down {
    /// The blocks of tile number `tile` with those of `x`, and the scales of its rows.
    #[inline(always)]
    pub(super) fn blocks<'a>(
        &'a self,
        tile: usize,
        x: Q8Row<'a>,
    ) -> (impl Iterator<Item = Block<'a>>, &'a Scales<GROUP>) {
        let (octets, scales) = self.tiles(tile).next().expect("as many tiles as eights of rows");
        let weights = octets.as_chunks().0;
        assert!(weights.len() == x.units.len());
        let parts = weights.iter().zip(x.codes).zip(x.starts.iter().zip(x.units));
        let block = |((octets, codes), (start, unit)): ((_, &'a [i8; BLOCK]), (&i32, &f32))| {
            let codes = codes.as_chunks().0.first_chunk().expect("a block is as many octets");
            Block { octets, codes, start: *start, unit: *unit }
        };
        (parts.map(block), scales)
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
    w: &Up,
    row: usize,
    h: &[Hidden],
    y: &mut [f32],
    mut tile: impl FnMut(&[Quad], &Scales<TILE>, &mut [f32; TILE]),
) {
    assert!(row.is_multiple_of(TILE) && h.len() == w.parts.div_ceil(GROUP / QUAD));
    let mut padded = [0.0; TILE];
    for ((quads, scales), part) in w.tiles(row / TILE).zip(y.chunks_mut(TILE)) {
        let n = part.len();
        let whole = match part.as_chunks_mut().0 {
            [whole] => whole,
            _ => {
                padded[..n].copy_from_slice(part);
                &mut padded
            }
        };
        tile(quads, scales, whole);
        if n < TILE {
            part.copy_from_slice(&padded[..n]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Q8;
    use super::*;
    use crate::WorkType;
    use crate::cpu::{Cpu, Matrix, Table};

    #[test]
    fn rows_keep_to_their_step_and_broken_ones_are_none() {
        let (rows, cols) = (70, 3);
        let mut w: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 + 5) % 41) as f32 * 1e-3 - 0.02).collect();
        w[3 * cols] = f32::INFINITY;
        w[4 * cols + 2] = f32::NAN;
        w[5 * cols..6 * cols].fill(0.0);
        w[6 * cols..7 * cols].fill(1e-44);
        let columns = Up::new(&Shelf::default(), &w, cols).unwrap();
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

    #[test]
    fn sums_of_eight_rows_keep_to_their_steps_and_broken_ones_are_none() {
        let (rows, cols) = (11, 192);
        let mut w: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 + 5) % 41) as f32 / 512.0 - 0.039_062_5).collect();
        w[3 * cols + 70] = f32::INFINITY;
        w[9 * cols] = f32::NAN;
        w[5 * cols..6 * cols].fill(0.0);
        let x: Vec<f32> = (0..cols).map(|i| ((i * 29 + 3) % 53) as f32 * 0.1 - 2.0).collect();
        let mut broken = x.clone();
        broken[100] = f32::NEG_INFINITY;
        for table in Table::available() {
            let (cpu, isa) = (Cpu::with_table(1, table), table.isa().name());
            let mut matrix = Matrix::zeros(rows, cols, WorkType::F16).unwrap();
            matrix.set(&w);
            let down = matrix.down(&cpu).unwrap().unwrap();
            let mut y = [0.0; 2 * GROUP];
            let sums = |x: &[f32], y: &mut [f32; 2 * GROUP]| {
                let x = Q8::new(&cpu, x, cols);
                y.as_chunks_mut().0.iter_mut().enumerate().for_each(|(i, y)| table.q8_down(down, i, x.row(0), y));
            };
            sums(&x, &mut y);
            for (o, row) in w.chunks(cols).enumerate() {
                let exact: f64 = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                let sum = |x: &[f32]| x.iter().map(|x| f64::from(x.abs())).sum::<f64>();
                let largest = |x: &[f32]| f64::from(x.iter().fold(0.0_f32, |m, x| m.max(x.abs())));
                let off = (1.008 * largest(row) * sum(&x) + largest(&x) * sum(row)) / 254.0 * 1.01;
                match o {
                    3 | 9 => assert!(y[o].is_nan(), "{isa} row {o}: {}", y[o]),
                    _ => assert!((f64::from(y[o]) - exact).abs() <= off, "{isa} row {o}: {} for {exact}", y[o]),
                }
            }
            assert_eq!(y[rows..], [0.0; 2 * GROUP][rows..], "{isa}: rows past the end");
            sums(&broken, &mut y);
            assert!(y[..rows].iter().all(|y| y.is_nan()), "{isa}: {y:?}");
        }
    }

    fn bits(y: &[f32]) -> Vec<u32> {
        y.iter().map(|y| y.to_bits()).collect()
    }
}
