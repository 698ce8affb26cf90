//! Products of operands rounded to bf16 with sums in f32, for CPUs that have an instruction for it.
//!
//! The weight's rows are decoded to bf16 a panel at a time and arranged so that each lane is one output: `pack` for `X Wᵀ`
//! makes lanes of rows, for `dY W` lanes of columns. The panel stays in cache for all tokens. Weights of 4 and 16 bits go
//! to their panel without f32 in memory: a block's 16 values fill a register twice and are looked up 32 at a time.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;

use super::Cpu;
use super::nf4::Nf4;
use super::split::{run, with_rounded};
use crate::FloatType;

type DecodeDense = unsafe fn(FloatType, &[u8], usize, usize, &mut [u16]);
type Tile = unsafe fn(&[u16], Bf16Rows, &mut [&mut [f32]], usize, usize, bool);

/// Kernels of one instruction set.
pub(crate) struct Bf16 {
    /// Outputs of a panel.
    pub lanes: usize,
    /// Terms of the sum that lie together in a panel: its depth is padded to a multiple.
    pub group: usize,
    /// To the nearest, ties to even.
    pub round: unsafe fn(&[f32], &mut [u16]),
    /// [`super::Table::bf16_decode_nf4`], where there is a shorter way than by f32.
    pub decode_nf4: Option<unsafe fn(&Nf4, usize, &mut [u16])>,
    /// [`super::Table::bf16_decode_dense`], likewise.
    pub decode_dense: Option<DecodeDense>,
    /// Rows of the weight become lanes: at most `lanes` rows of any width.
    pub pack_rows: unsafe fn(Bf16Rows, &mut [u16]),
    /// Columns of the weight become lanes: any number of rows of at most `lanes`.
    pub pack_cols: unsafe fn(Bf16Rows, &mut [u16]),
    /// `c[t][col..col + n]` becomes `x[t, at..] . panel` over the panel's depth, or that is added to it.
    pub tile: Tile,
}

/// Activations in bf16: rows that have those of several operands `[T, K]` side by side, each padded with zeros.
pub(crate) struct Rounded<'a> {
    values: &'a mut [u16],
    stride: usize,
}

/// Depth that operands are padded to: the largest group of any kernels.
pub(super) const PAD: usize = 32;
/// Rows of a task.
const ROWS: usize = 16;

/// Columns that an operand takes.
pub(crate) fn padded(width: usize) -> usize {
    width.next_multiple_of(PAD)
}

impl Rounded<'_> {
    /// Lends `work` rows for so many tokens and columns in all; they hold anything at first.
    pub fn with<R>(tokens: usize, columns: usize, work: impl FnOnce(Rounded<'_>) -> R) -> R {
        with_rounded(tokens * columns, |values| work(Rounded { values, stride: columns }))
    }

    /// Rounds `x` of rows of `width` to the columns from `col` on.
    pub fn set(&mut self, cpu: &Cpu, col: usize, x: &[f32], width: usize) {
        let columns = col..col + padded(width);
        let rows = self.values.chunks_mut(self.stride * ROWS).zip(x.chunks(width * ROWS)).collect();
        run(&cpu.team, rows, x.len() < 16 * 1024, |(to, x)| {
            for (to, x) in to.chunks_mut(self.stride).zip(x.chunks_exact(width)) {
                let (to, pad) = to[columns.clone()].split_at_mut(width);
                cpu.table.bf16_round(x, to);
                pad.fill(0);
            }
        });
    }

    /// Rows.
    pub fn count(&self) -> usize {
        self.values.len() / self.stride
    }

    /// All rows, columns from `col` on.
    pub fn rows(&self, col: usize) -> Bf16Rows<'_> {
        Bf16Rows { values: &self.values[col..], stride: self.stride, count: self.count(), width: self.stride - col }
    }
}

/// `count` rows of `width`, `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Rows<'a> {
    pub values: &'a [u16],
    pub stride: usize,
    pub count: usize,
    pub width: usize,
}

impl<'a> Bf16Rows<'a> {
    /// Rows that follow one another.
    pub fn packed(values: &'a [u16], width: usize) -> Self {
        Self { values, stride: width, count: values.len() / width.max(1), width }
    }

    /// Row `i` from column `col` on, empty beyond the last row or column.
    #[inline(always)]
    pub fn part(&self, i: usize, col: usize) -> &'a [u16] {
        if i < self.count && col < self.width { &self.values[i * self.stride..][col..self.width] } else { &[] }
    }
}
