//! Products in 8 bits: activations rounded per block, weights as 8-bit codes, sums of a block in exact integers.
//!
//! With `x[k] ≈ u[b] p[k]` (`p` in -127..=127, `u[b] = max |x| / 127` over block `b` of 64) and `w[o, k] = a[o, b] c
//! q[o, k]` (`a` the block's scale, `q` the codebook in -127..=127, `c` its unit):
//! `y[o] = c sum_b a[o, b] u[b] (sum_k p[k] q[o, k])`. The relative error is some 0.6 % of a product's norm. Panels of
//! plain AVX2 have `q` in 7 bits (see `avx2`), which makes it 1.1 %.
//!
//! Within each block the even elements come first, for they are the high halves of NF4's bytes. A block with a NaN or
//! an infinity has a NaN as unit: what reads it becomes NaN, too.
//!
//! With one token a kernel walks along the rows of the weight (`matvec`), four rows at a time, because what begins and
//! ends a row takes as long as some of its blocks. With more, `pack` unfolds some rows into a panel whose lanes are rows,
//! and `tile` multiplies it by every token while it stays in cache: a block's scale then costs one multiplication for 16
//! integer products.
//!
//! Arrays that one piece of code writes and the next reads as whole vectors are aligned on the stack. Without that,
//! whether they cross cache lines depended on where the stack began, and some processes decoded a quarter slower.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avxvnni;
pub(crate) mod columns;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon_panel;
pub(crate) mod portable;
mod weight;

pub(crate) use columns::{Down, GROUP, Hidden, TILE, Up};
pub(crate) use weight::Int8;

use super::Cpu;
use super::nf4::Nf4;
use super::split::run;
use std::cell::Cell;

/// Activations that share a unit, and weights that share a scale.
pub(crate) const BLOCK: usize = 64;
/// Codes that a lane of an integer product sums up.
pub(crate) const QUAD: usize = 4;
/// Quads of a block.
#[cfg(target_arch = "x86_64")]
const QUADS: usize = BLOCK / QUAD;

/// Tokens from which unfolding the weight into a panel pays; with fewer, kernels walk along its rows.
pub(crate) const PANEL_TOKENS: usize = 4;

/// Activations `[T, K]` in 8 bits.
pub(crate) struct Q8 {
    blocks: usize,
    arrays: Arrays,
}

#[derive(Default)]
struct Arrays {
    /// From `aligned` on, so that a vector of codes never lies across two cache lines.
    codes: Vec<i8>,
    aligned: usize,
    /// `[T, K / 64]`.
    units: Vec<f32>,
    /// `-128` times the sum of each block's codes, `[T, K / 64]`: what products begin with whose weights are 128 too large.
    starts: Vec<i32>,
    /// `[T, ceil(K / 128)]`, or none: see [`super::Table::q8_pairs`].
    pairs: Vec<Pair>,
    /// The units of each token [`repeats`] times over, where kernels walk along rows.
    repeated: Vec<f32>,
}

/// Two neighbouring blocks of a token for kernels that look both up at once; zeros stand beside a last odd one.
#[derive(Clone)]
#[repr(align(64))]
pub(crate) struct Pair {
    /// The even elements of the first, then those of the second.
    pub even: [i8; BLOCK],
    pub odd: [i8; BLOCK],
    /// Theirs, each in the first of eight lanes.
    pub starts: [i32; 16],
}

impl Pair {
    const ZERO: Self = Self { even: [0; BLOCK], odd: [0; BLOCK], starts: [0; 16] };

    fn set(&mut self, codes: &[[i8; BLOCK]], starts: &[i32]) {
        *self = Self::ZERO;
        for (i, (codes, start)) in codes.iter().zip(starts).enumerate() {
            let (even, odd) = codes.split_at(BLOCK / 2);
            self.even[i * BLOCK / 2..][..BLOCK / 2].copy_from_slice(even);
            self.odd[i * BLOCK / 2..][..BLOCK / 2].copy_from_slice(odd);
            self.starts[i * 8] = *start;
        }
    }
}

thread_local! {
    /// The arrays of the last one that this thread dropped: asking the system for fresh pages each time costs more than
    /// the rounding itself.
    static STASH: Cell<Arrays> = Cell::default();
}

impl Drop for Q8 {
    fn drop(&mut self) {
        // A thread at its end may have lost its stash already.
        let _ = STASH.try_with(|stash| stash.set(std::mem::take(&mut self.arrays)));
    }
}

/// One token of them.
#[derive(Clone, Copy)]
pub(crate) struct Q8Row<'a> {
    pub codes: &'a [[i8; BLOCK]],
    pub units: &'a [f32],
    pub starts: &'a [i32],
    /// None where kernels do not ask for them.
    pub pairs: &'a [Pair],
    /// Units once for each of some rows, so that one loop makes their factors, with no regard to where rows end; none where
    /// a row alone is longer than that loop.
    repeated: &'a [f32],
}

impl Q8Row<'_> {
    /// `count` blocks from the even number `first` on.
    #[inline(always)]
    fn part(self, first: usize, count: usize) -> Self {
        Self {
            codes: &self.codes[first..][..count],
            units: &self.units[first..][..count],
            starts: &self.starts[first..][..count],
            pairs: self.pairs.get(first / 2..).unwrap_or_default(),
            repeated: &[],
        }
    }
}

/// What quantizing one token fills in.
pub(crate) struct Q8Mut<'a> {
    pub codes: &'a mut [[i8; BLOCK]],
    pub units: &'a mut [f32],
    pub starts: &'a mut [i32],
}

impl Q8 {
    /// Rounds the rows of `x`, whose width is a multiple of 64.
    pub fn new(cpu: &Cpu, x: &[f32], width: usize) -> Self {
        assert!(width > 0 && width.is_multiple_of(BLOCK) && x.len().is_multiple_of(width));
        let blocks = width / BLOCK;
        let mut arrays = STASH.take();
        arrays.codes.resize(x.len() + BLOCK, 0);
        arrays.aligned = arrays.codes.as_ptr().align_offset(BLOCK).min(BLOCK);
        arrays.units.resize(x.len() / BLOCK, 0.0);
        arrays.starts.resize(x.len() / BLOCK, 0);
        let codes = arrays.codes[arrays.aligned..][..x.len()].as_chunks_mut().0;
        let rows = codes.chunks_mut(blocks).zip(arrays.units.chunks_mut(blocks));
        let rows = rows.zip(arrays.starts.chunks_mut(blocks)).zip(x.chunks(width)).collect();
        run(&cpu.team, rows, x.len() < 16 * 1024, |(((codes, units), starts), x)| {
            cpu.table.q8_quantize(x, Q8Mut { codes, units, starts });
        });
        let mut q8 = Self { blocks, arrays };
        q8.arrays.pairs.clear();
        q8.arrays.repeated.clear();
        if q8.tokens() < PANEL_TOKENS {
            q8.repeat_units();
            if cpu.table.q8_pairs() {
                q8.pair_up();
            }
        }
        q8
    }

    fn repeat_units(&mut self) {
        let Arrays { units, repeated, .. } = &mut self.arrays;
        for units in units.chunks(self.blocks) {
            (0..repeats(self.blocks)).for_each(|_| repeated.extend_from_slice(units));
        }
    }

    fn pair_up(&mut self) {
        let mut pairs = std::mem::take(&mut self.arrays.pairs);
        pairs.resize(self.tokens() * self.blocks.div_ceil(2), Pair::ZERO);
        for (t, pairs) in pairs.chunks_mut(self.blocks.div_ceil(2)).enumerate() {
            let row = self.row(t);
            let blocks = row.codes.chunks(2).zip(row.starts.chunks(2));
            pairs.iter_mut().zip(blocks).for_each(|(pair, (codes, starts))| pair.set(codes, starts));
        }
        self.arrays.pairs = pairs;
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.arrays.units.len() / self.blocks
    }

    /// Blocks of a token.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Token `t`.
    #[inline(always)]
    pub fn row(&self, t: usize) -> Q8Row<'_> {
        let range = t * self.blocks..(t + 1) * self.blocks;
        Q8Row {
            codes: &self.arrays.codes[self.arrays.aligned..].as_chunks().0[range.clone()],
            units: &self.arrays.units[range.clone()],
            starts: &self.arrays.starts[range],
            pairs: self.arrays.pairs.chunks(self.blocks.div_ceil(2)).nth(t).unwrap_or_default(),
            repeated: self.arrays.repeated.chunks(self.blocks * repeats(self.blocks).max(1)).nth(t).unwrap_or_default(),
        }
    }
}

/// Scales that are decoded at a time: several short rows' or a part of a long one's.
const BATCH: usize = 256;
/// Rows whose scales are multiplied with the units of the activations in one loop.
const REPEATS: usize = 16;

/// Rows of so many blocks whose scales are decoded at a time: groups of four, and whole vectors of scales; none where not
/// even one fits in.
fn batch(blocks: usize) -> usize {
    match BATCH / blocks {
        n @ REPEATS.. => n / REPEATS * REPEATS,
        n @ 4.. => n / 4 * 4,
        n => n,
    }
}

/// How often [`Q8Row::repeated`] repeats.
fn repeats(blocks: usize) -> usize {
    batch(blocks).min(REPEATS)
}

/// Floats on the stack that vectors write. Where the stack begins is left to chance, and stores across two cache lines made
/// whole processes a quarter slower.
#[repr(align(64))]
struct Aligned<const N: usize>([f32; N]);

/// Consecutive rows of a weight, or a part of one, with the activations that they are multiplied by.
#[derive(Clone, Copy)]
struct Rows<'a> {
    packed: &'a [[u8; BLOCK / 2]],
    /// For each group of 64 weights its scale times the unit of the activations.
    factors: &'a [f32],
    x: Q8Row<'a>,
    /// Number of the first block of `x` in its token.
    block: usize,
}

impl Rows<'_> {
    /// Takes the first `count` rows off.
    #[inline(always)]
    fn take(&mut self, count: usize) -> Self {
        let (packed, factors);
        (packed, self.packed) = self.packed.split_at(count * self.x.units.len());
        (factors, self.factors) = self.factors.split_at(packed.len());
        Self { packed, factors, ..*self }
    }
}

/// `y[i] = W[row + i] x`. `scales(group, out)` writes the scales of consecutive groups of 64 weights; `rows` multiplies
/// as many rows as its output has elements.
#[inline(always)]
fn each_row(
    w: &Nf4,
    row: usize,
    x: Q8Row,
    y: &mut [f32],
    scales: impl Fn(usize, &mut [f32]),
    mut rows: impl FnMut(Rows, &mut [f32]),
) {
    if y.is_empty() {
        return;
    }
    let Aligned(factors) = &mut Aligned([0.0; BATCH]);
    let blocks = x.units.len();
    if blocks > BATCH {
        for (i, y) in y.iter_mut().enumerate() {
            *y = 0.0;
            for block in (0..blocks).step_by(BATCH) {
                let x = x.part(block, BATCH.min(blocks - block));
                let (factors, group) = (&mut factors[..x.units.len()], (row + i) * blocks + block);
                scales(group, factors);
                multiply(factors, x.units);
                let mut sum = [0.0];
                rows(Rows { packed: &w.packed64(group)[..factors.len()], factors, x, block }, &mut sum);
                *y += sum[0];
            }
        }
        return;
    }
    let batch = batch(blocks);
    let repeated = &x.repeated[..repeats(blocks).min(y.len()) * blocks];
    for (i, y) in y.chunks_mut(batch).enumerate() {
        let group = (row + i * batch) * blocks;
        let factors = &mut factors[..y.len() * blocks];
        scales(group, factors);
        for factors in factors.chunks_mut(repeated.len()) {
            multiply(factors, repeated);
        }
        rows(Rows { packed: &w.packed64(group)[..factors.len()], factors, x, block: 0 }, y);
    }
}

#[inline(always)]
fn multiply(factors: &mut [f32], units: &[f32]) {
    for (factor, unit) in factors.iter_mut().zip(units) {
        *factor *= unit;
    }
}

/// Some rows of a weight, unfolded: `codes` holds, for each block and quad, four codes of each lane; `scales`, for each
/// block, one of each lane. How codes are signed is up to the instruction set.
pub(crate) struct Panel<'a> {
    pub codes: &'a mut [u8],
    pub scales: &'a mut [f32],
}

impl Panel<'_> {
    /// The same panel, lent for one call.
    pub fn lend(&mut self) -> Panel<'_> {
        Panel { codes: &mut *self.codes, scales: &mut *self.scales }
    }
}

/// Where a panel lies in its weight.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub row: usize,
    /// Rows, at most the instruction set's lanes; further lanes are zeros.
    pub rows: usize,
    /// First block of each row, and how many.
    pub block: usize,
    pub blocks: usize,
}

/// Fills in the scales of a panel of `N` lanes, those of lanes without a row as zeros.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn fill_scales<const N: usize>(at: Place, scales: &mut [f32], get: impl Fn(usize, usize) -> f32) {
    for (b, scales) in scales.as_chunks_mut::<N>().0.iter_mut().take(at.blocks).enumerate() {
        for (lane, scale) in scales.iter_mut().enumerate() {
            *scale = if lane < at.rows { get(lane, b) } else { 0.0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cpu, Table};
    use super::Q8;

    #[test]
    fn activations_are_rounded_alike_everywhere() {
        let mut x: Vec<f32> = (0..320).map(|i| ((i * 37 + 11) % 101) as f32 - 50.5).collect();
        x[64..128].fill(0.0);
        x[130] = f32::NAN;
        x[200] = f32::NEG_INFINITY;
        x[256..].iter_mut().for_each(|x| *x *= 1e-42);
        for table in Table::available() {
            let isa = table.isa().name();
            let q = Q8::new(&Cpu::with_table(1, table), &x, 320);
            let row = q.row(0);
            assert_eq!(row.units[..2], [50.5 / 127.0, 0.0], "{isa}");
            assert!(row.units[2].is_nan() && row.units[3].is_nan() && row.units[4] == 0.0, "{isa}");
            for (i, x) in x[..64].iter().enumerate() {
                let code = row.codes[0][i % 2 * 32 + i / 2];
                assert_eq!(f32::from(code), (x * (127.0 / 50.5)).round_ties_even(), "{isa} element {i}");
            }
            for (codes, starts) in row.codes.iter().zip(row.starts) {
                assert_eq!(*starts, -128 * codes.iter().map(|c| i32::from(*c)).sum::<i32>(), "{isa}");
            }
        }
    }
}
