//! Products of operands rounded to bf16 with sums in f32, for CPUs that have an instruction for it.
//!
//! The weight's rows are decoded to f32 a panel at a time, rounded, and arranged so that each lane is one output: `pack`
//! for `X Wᵀ` makes lanes of rows, for `dY W` lanes of columns. The panel stays in cache for all tokens.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;

use super::Cpu;
use super::split::{run, with_rounded};
use super::tile::Rows;

type Tile = unsafe fn(&[u16], Bf16Rows, &mut [&mut [f32]], usize, usize);

/// Kernels of one instruction set.
pub(crate) struct Bf16 {
    /// Outputs of a panel.
    pub lanes: usize,
    /// Terms of the sum that lie together in a panel: its depth is padded to a multiple.
    pub group: usize,
    /// To the nearest, ties to even.
    pub round: unsafe fn(&[f32], &mut [u16]),
    /// Rows of the weight become lanes: at most `lanes` rows of any width.
    pub pack_rows: unsafe fn(Rows, &mut [u16]),
    /// Columns of the weight become lanes: any number of rows of at most `lanes`.
    pub pack_cols: unsafe fn(Rows, &mut [u16]),
    /// `c[t][col..col + n] += x[t, at..] . panel` over the panel's depth.
    pub tile: Tile,
}

/// Activations `[T, K]` in bf16, rows padded with zeros.
pub(crate) struct Rounded<'a> {
    values: &'a [u16],
    stride: usize,
}

/// Depth that rows are padded to.
pub(super) const PAD: usize = 8;
/// Rows of a task.
const ROWS: usize = 16;

impl Rounded<'_> {
    /// Lends the rows of `x`, rounded, to `work`.
    pub fn with<R>(cpu: &Cpu, x: &[f32], width: usize, work: impl FnOnce(Rounded<'_>) -> R) -> R {
        let stride = width.next_multiple_of(PAD);
        with_rounded(x.len() / width * stride, |values| {
            let rows = values.chunks_mut(stride * ROWS).zip(x.chunks(width * ROWS)).collect();
            run(&cpu.team, rows, x.len() < 16 * 1024, |(to, x)| {
                for (to, x) in to.chunks_mut(stride).zip(x.chunks_exact(width)) {
                    cpu.table.bf16_round(x, &mut to[..width]);
                    to[width..].fill(0);
                }
            });
            work(Rounded { values, stride })
        })
    }

    /// Rows `first..first + count`, columns from `col` on.
    pub fn rows(&self, first: usize, count: usize, col: usize) -> Bf16Rows<'_> {
        Bf16Rows { values: &self.values[first * self.stride + col..], stride: self.stride, count }
    }
}

/// `count` rows, `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Rows<'a> {
    pub values: &'a [u16],
    pub stride: usize,
    pub count: usize,
}
