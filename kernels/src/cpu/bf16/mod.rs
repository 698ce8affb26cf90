//! Products of operands rounded to bf16 with sums in f32, for CPUs that have an instruction for it.
//!
//! The weight's rows are decoded to bf16 a panel at a time and arranged so that each lane is one output: `pack` for `X Wᵀ`
//! makes lanes of rows, for `dY W` lanes of columns. The panel stays in cache for all tokens.

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
use std::borrow::Cow;

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

/// Activations `[T, K]` in bf16, rows padded with zeros.
pub(crate) struct Rounded<'a> {
    values: Cow<'a, [u16]>,
    stride: usize,
}

/// Depth that rows are padded to: the largest group of any kernels.
pub(super) const PAD: usize = 32;
/// Rows of a task.
const ROWS: usize = 16;

impl Rounded<'_> {
    /// Lends the rows of `x`, rounded, to `work`.
    pub fn with<R>(cpu: &Cpu, x: &[f32], width: usize, work: impl FnOnce(Rounded<'_>) -> R) -> R {
        let stride = width.next_multiple_of(PAD);
        with_rounded(x.len() / width * stride, |values| {
            fill(cpu, x, width, values);
            work(Rounded { values: Cow::Borrowed(values), stride })
        })
    }

    /// The rows of `x` in memory of their own: for few values, or more than one such operand.
    pub fn new(cpu: &Cpu, x: &[f32], width: usize) -> Rounded<'static> {
        let stride = width.next_multiple_of(PAD);
        let mut values = vec![0; x.len() / width * stride];
        fill(cpu, x, width, &mut values);
        Rounded { values: Cow::Owned(values), stride }
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

/// Rounds rows of `width` into padded ones.
fn fill(cpu: &Cpu, x: &[f32], width: usize, values: &mut [u16]) {
    let stride = width.next_multiple_of(PAD);
    let rows = values.chunks_mut(stride * ROWS).zip(x.chunks(width * ROWS)).collect();
    run(&cpu.team, rows, x.len() < 16 * 1024, |(to, x)| {
        for (to, x) in to.chunks_mut(stride).zip(x.chunks_exact(width)) {
            cpu.table.bf16_round(x, &mut to[..width]);
            to[width..].fill(0);
        }
    });
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
