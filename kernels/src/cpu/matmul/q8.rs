//! Products of several tokens in 8 bits.

use super::super::Cpu;
use super::super::matrix::{Elements, Matrix};
use super::super::q8::{BLOCK, PANEL_TOKENS, Panel, Place, Q8};
use super::super::split::{Patch, patches, run, with_bytes, with_scratch};
use super::SMALL;

/// Blocks of a panel: with 32 rows, 32 KiB.
const DEPTH: usize = 16;
/// Tasks of a product at most; each holds a slice a token, which is not free.
const TASKS: usize = 16;

/// Whether a weight can be multiplied in 8 bits.
pub(super) fn fits(w: &Matrix) -> bool {
    match w.elements() {
        Elements::Nf4(nf4) => nf4.has_q8(w.shape().1),
        Elements::Int8(_) => true,
        Elements::Dense(..) => false,
    }
}

/// `y = x Wᵀ` for a weight that [`fits`], added to `y` if `accumulate`.
pub(super) fn forward(cpu: &Cpu, w: &Matrix, x: &Q8, y: &mut [f32], accumulate: bool) {
    let (o, k) = w.shape();
    let (tokens, lanes) = (x.tokens(), cpu.table.q8_lanes());
    let task = o.div_ceil(TASKS).next_multiple_of(lanes);
    run(&cpu.team, patches(y, o, tokens, task), tokens * o * k < SMALL, |Patch { col, mut rows, .. }| {
        if !accumulate {
            rows.iter_mut().for_each(|row| row.fill(0.0));
        }
        if tokens < PANEL_TOKENS {
            for (t, y) in rows.iter_mut().enumerate() {
                matvec(cpu, w, x, t, col, y);
            }
        } else {
            tiles(cpu, w, x, col, &mut rows);
        }
    });
}

/// `y += W x[t]` for the rows of `w` from `row` on.
fn matvec(cpu: &Cpu, w: &Matrix, x: &Q8, t: usize, row: usize, y: &mut [f32]) {
    with_scratch(y.len(), |sums| {
        match w.elements() {
            Elements::Nf4(w) => cpu.table.q8_nf4_matvec(w, row, x.row(t), sums),
            Elements::Int8(w) => cpu.table.q8_int8_matvec(w, row, x.row(t), sums),
            Elements::Dense(..) => unreachable!("`fits` lets no floats in"),
        }
        super::super::elementwise::add_part(sums, y);
    });
}

/// `c[t] += W x[t]` for all tokens and the rows of `w` from `row` on.
fn tiles(cpu: &Cpu, w: &Matrix, x: &Q8, row: usize, c: &mut [&mut [f32]]) {
    let (lanes, blocks, cols) = (cpu.table.q8_lanes(), x.blocks(), c[0].len());
    let depth = DEPTH.min(blocks);
    with_bytes(lanes * depth * BLOCK, |codes| {
        with_scratch(lanes * depth, |scales| {
            for col in (0..cols).step_by(lanes) {
                for block in (0..blocks).step_by(depth) {
                    let (rows, blocks_now) = (lanes.min(cols - col), depth.min(blocks - block));
                    let at = Place { row: row + col, rows, block, blocks: blocks_now };
                    let mut panel = Panel { codes: &mut *codes, scales: &mut *scales };
                    match w.elements() {
                        Elements::Nf4(w) => {
                            cpu.table.q8_pack_nf4(w, blocks, at, panel.lend());
                            cpu.table.q8_tile(panel.lend(), x, at, c, col);
                        }
                        Elements::Int8(w) => {
                            cpu.table.q8_pack_int8(w, at, panel.lend());
                            cpu.table.q8_tile_int8(panel.lend(), x, at, c, col);
                        }
                        Elements::Dense(..) => unreachable!("`fits` lets no floats in"),
                    }
                }
            }
        });
    });
}
