//! Products of many tokens in bf16.

use super::super::Cpu;
use super::super::bf16::Rounded;
use super::super::matrix::Band;
use super::super::split::{Patch, patches, run, with_halves, with_scratch};
use super::super::tile::Rows;
use super::SMALL;

/// Tasks of a product at most; each holds a slice a token, which is not free.
const TASKS: usize = 16;

/// How a weight is cut into panels.
struct Cut {
    /// Terms of a sum in a panel.
    depth: usize,
    /// Panels that are decoded at a time.
    panels: usize,
}

/// Whole rows where they are not too long, for that is how memory is read fastest: with 32 lanes, 64 KiB.
const ROWS: Cut = Cut { depth: 1024, panels: 1 };
/// Of columns several panels, so that a row's piece is worth going there: with 32 lanes, 128 columns.
const COLS: Cut = Cut { depth: 128, panels: 4 };

/// `y = x Wᵀ`, added to `y` if `accumulate`.
pub(super) fn forward(cpu: &Cpu, w: Band<'_>, x: &[f32], y: &mut [f32], accumulate: bool) {
    let (o, k) = w.shape();
    product(cpu, &ROWS, x, (k, o), y, accumulate, |col, at, lanes, depth, scratch, panel| {
        w.decode(cpu.table, col, at, depth, scratch);
        cpu.table.bf16_pack(Rows::new(scratch, depth, lanes, depth), true, panel);
    });
}

/// `dx = dy W`, added to `dx` if `accumulate`.
pub(super) fn vjp_x(cpu: &Cpu, w: Band<'_>, dy: &[f32], dx: &mut [f32], accumulate: bool) {
    let lanes = cpu.table.bf16().expect("the caller asked").lanes;
    product(cpu, &COLS, dy, w.shape(), dx, accumulate, |col, at, width, depth, scratch, panels| {
        w.decode(cpu.table, at, col, width, scratch);
        let size = panels.len() / width.div_ceil(lanes);
        for (first, panel) in (0..width).step_by(lanes).zip(panels.chunks_exact_mut(size)) {
            let rows = Rows::new(&scratch[first..], width, depth, lanes.min(width - first));
            cpu.table.bf16_pack(rows, false, panel);
        }
    });
}

/// `c[T, N] = a[T, K] P`, where `pack(n, k, width, depth, scratch, panels)` decodes that part of `P` into `scratch` and
/// arranges it in panels.
fn product(
    cpu: &Cpu,
    cut: &Cut,
    a: &[f32],
    (k, n): (usize, usize),
    c: &mut [f32],
    accumulate: bool,
    pack: impl Fn(usize, usize, usize, usize, &mut [f32], &mut [u16]) + Sync,
) {
    let kernels = cpu.table.bf16().expect("the caller asked");
    let (tokens, lanes, depth) = (a.len() / k, kernels.lanes, cut.depth.min(k));
    let group = cut.panels * lanes;
    let task = n.div_ceil(TASKS).next_multiple_of(group);
    Rounded::with(cpu, a, k, |a| {
        run(&cpu.team, patches(c, n, tokens, task), tokens * n * k < SMALL, |Patch { col, mut rows, .. }| {
            let cols = rows[0].len();
            if !accumulate {
                rows.iter_mut().for_each(|row| row.fill(0.0));
            }
            with_scratch(group * depth, |scratch| {
                with_halves(group * depth.next_multiple_of(kernels.group), |panels| {
                    for at in (0..k).step_by(depth) {
                        let depth = depth.min(k - at);
                        let size = lanes * depth.next_multiple_of(kernels.group);
                        for first in (0..cols).step_by(group) {
                            let width = group.min(cols - first);
                            let panels = &mut panels[..width.div_ceil(lanes) * size];
                            pack(col + first, at, width, depth, &mut scratch[..width * depth], panels);
                            for (i, panel) in panels.chunks_exact(size).enumerate() {
                                let at_col = first + i * lanes;
                                let width = lanes.min(cols - at_col);
                                cpu.table.bf16_tile(panel, a.rows(0, tokens, at), &mut rows, at_col, width);
                            }
                        }
                    }
                });
            });
        });
    });
}
