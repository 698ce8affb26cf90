//! Products of many tokens in bf16.

use super::super::Cpu;
use super::super::bf16::Rounded;
use super::super::matrix::Matrix;
use super::super::split::{Patch, patches, run, with_halves, with_scratch};
use super::super::tile::Rows;
use super::SMALL;

/// Terms of a sum in one panel: with 32 lanes, 16 KiB.
const DEPTH: usize = 256;
/// Tasks of a product at most; each holds a slice a token, which is not free.
const TASKS: usize = 16;

/// `y += x Wᵀ`.
pub(super) fn forward(cpu: &Cpu, w: &Matrix, x: &[f32], y: &mut [f32]) {
    let (o, k) = w.shape();
    product(cpu, x, (k, o), y, |cpu, col, at, lanes, depth, scratch, panel| {
        let decoded = &mut scratch[..lanes * depth];
        w.decode(cpu.table, col, at, depth, decoded);
        cpu.table.bf16_pack(Rows::packed(decoded, depth), true, panel);
    });
}

/// `dx += dy W`.
pub(super) fn vjp_x(cpu: &Cpu, w: &Matrix, dy: &[f32], dx: &mut [f32]) {
    product(cpu, dy, w.shape(), dx, |cpu, col, at, lanes, depth, scratch, panel| {
        let decoded = &mut scratch[..lanes * depth];
        w.decode(cpu.table, at, col, lanes, decoded);
        cpu.table.bf16_pack(Rows::packed(decoded, lanes), false, panel);
    });
}

/// `c[T, N] += a[T, K] P`, where `pack(cpu, n, k, lanes, depth, scratch, panel)` arranges that part of `P`.
fn product(
    cpu: &Cpu,
    a: &[f32],
    (k, n): (usize, usize),
    c: &mut [f32],
    pack: impl Fn(&Cpu, usize, usize, usize, usize, &mut [f32], &mut [u16]) + Sync,
) {
    let tokens = a.len() / k;
    let a = Rounded::new(cpu, a, k);
    let kernels = cpu.table.bf16().expect("the caller asked");
    let (lanes, depth) = (kernels.lanes, DEPTH.min(k));
    let task = n.div_ceil(TASKS).next_multiple_of(2 * lanes);
    run(&cpu.team, patches(c, n, tokens, task), tokens * n * k < SMALL, |Patch { col, mut rows, .. }| {
        let cols = rows[0].len();
        with_scratch(lanes * depth, |scratch| {
            with_halves(lanes * depth.next_multiple_of(kernels.group), |panel| {
                for at in (0..k).step_by(depth) {
                    let depth = depth.min(k - at);
                    for first in (0..cols).step_by(lanes) {
                        let lanes_now = lanes.min(cols - first);
                        let panel = &mut panel[..lanes * depth.next_multiple_of(kernels.group)];
                        pack(cpu, col + first, at, lanes_now, depth, scratch, panel);
                        cpu.table.bf16_tile(panel, a.rows(0, tokens, at), &mut rows, first, lanes_now);
                    }
                }
            });
        });
    });
}
