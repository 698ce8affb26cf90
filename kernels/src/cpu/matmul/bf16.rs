//! Products of many tokens in bf16.
//!
//! A low-rank adapter adds `(x Aᵀ) Bᵀ` to `x Wᵀ`. The values of `h = x Aᵀ` stand beside those of `x` in the same rows, and
//! the columns of `B` behind those of `W` in the same panel. So one product computes both, `[x h] [W B]ᵀ`, and outputs are
//! written once. Backward by `x` is one product in the same way, `dx = [dy dh] [W A]`. `x Aᵀ` itself is computed in f32: it
//! has few outputs, for which rounding `x` would cost more than it saves.

use super::super::Cpu;
use super::super::bf16::{Bf16, Bf16Rows, Rounded, padded};
use super::super::buffer::Buffer;
use super::super::elementwise::scale;
use super::super::matrix::Band;
use super::super::split::{Patch, patches, run, with_halves};
use super::{SMALL, exact};
use crate::{Error, LowRank, Product};

/// Tasks of a product where its width allows: few enough that their slices of each token cost little, enough that
/// threads finish together.
pub(in super::super) const TASKS: usize = 16;
/// Terms of a sum in a panel of rows: whole rows where they are not too long, for that is how memory is read fastest.
/// With 32 lanes, 64 KiB.
const ROW_DEPTH: usize = 1024;
/// Terms of a sum in a panel of columns: with 32 lanes, 32 KiB.
const COL_DEPTH: usize = 512;
/// Further terms that go along in a panel, so that outputs are touched once: an adapter's, of ranks up to this.
const BESIDE: usize = 128;
/// Panels of columns that are decoded at a time at most, so that a row's piece is worth going there.
const COL_PANELS: usize = 4;

/// Halves of scratch that a thread keeps after products forward and by `X` with a weight `[O, K]` and `beside` terms of
/// adapters, at most.
pub(super) fn scratch(kernels: &Bf16, o: usize, k: usize, beside: usize) -> usize {
    let (lanes, group) = (kernels.lanes, kernels.group);
    let rows = cut([k, beside].into_iter(), ROW_DEPTH, group);
    let columns = cut([o, beside].into_iter(), COL_DEPTH, group);
    (lanes * (deepest(&rows) + longest(&rows))).max((panels(lanes, k) + 1) * lanes * deepest(&columns))
}

/// Panels of columns that are decoded at a time for `k` of them.
fn panels(lanes: usize, k: usize) -> usize {
    (1..=COL_PANELS).rev().find(|panels| k >= TASKS * panels * lanes).unwrap_or(1)
}

/// Terms of a sum that lie in one operand.
#[derive(Clone, Copy)]
struct Piece {
    operand: usize,
    /// First term and number of terms.
    at: usize,
    depth: usize,
    /// Where the activations have the first term.
    col: usize,
    /// Terms that it takes in a panel.
    padded: usize,
}

/// Cuts sums over several operands side by side, of so many terms each, into panels of about `most` terms.
fn cut(operands: impl Iterator<Item = usize>, most: usize, group: usize) -> Vec<Vec<Piece>> {
    let mut panels: Vec<Vec<Piece>> = Vec::new();
    let (mut col, mut filled) = (0, usize::MAX);
    for (operand, terms) in operands.enumerate() {
        for at in (0..terms).step_by(most) {
            let depth = most.min(terms - at);
            if filled.saturating_add(depth) > most + BESIDE {
                panels.push(Vec::new());
                filled = 0;
            }
            let panel = panels.last_mut().expect("pushed for the first piece");
            // What comes behind another begins where the activations' padding ends.
            if let Some(last) = panel.last_mut() {
                last.padded = padded(last.depth);
            }
            panel.push(Piece { operand, at, depth, col: col + at, padded: depth.next_multiple_of(group) });
            filled += padded(depth);
        }
        col += padded(terms);
    }
    panels
}

/// Terms of the deepest panel.
fn deepest(panels: &[Vec<Piece>]) -> usize {
    panels.iter().map(|panel| panel.iter().map(|piece| piece.padded).sum()).max().unwrap_or(0)
}

/// Terms of the longest piece.
fn longest(panels: &[Vec<Piece>]) -> usize {
    panels.iter().flatten().map(|piece| piece.depth).max().unwrap_or(0)
}

/// `y = x Wᵀ`, added to `y` if `accumulate`.
pub(super) fn forward(cpu: &Cpu, w: Band<'_>, x: &[f32], y: &mut [f32], accumulate: bool) {
    let (_, k) = w.shape();
    Rounded::with(x.len() / k, padded(k), |mut rounded| {
        rounded.set(cpu, 0, x, k);
        sum(cpu, &[w], &rounded, y, accumulate);
    });
}

/// See [`crate::Call::MatmulGroup`]. `x` is rounded once for all; what an adapter's way down makes of it lies beside it,
/// so that the way up is but more terms of the same sums.
pub(super) fn group(cpu: &Cpu, x: &[f32], products: &mut [Product<'_, Cpu>]) -> Result<(), Error> {
    let Some(first) = products.first() else { return Ok(()) };
    let (_, k) = first.w.shape();
    let tokens = x.len() / k;
    let beside = |p: &Product<'_, Cpu>| p.low_rank.iter().map(|l| padded(l.a.shape().0)).sum::<usize>();
    let columns = padded(k) + products.iter().map(beside).max().unwrap_or(0);
    Rounded::with(tokens, columns, |mut rounded| {
        rounded.set(cpu, 0, x, k);
        for Product { w, low_rank, y } in products {
            let (mut weights, mut col) = (vec![w.whole()], padded(k));
            for LowRank { a, b, scale: factor, .. } in low_rank.iter().filter(|l| l.a.shape().0 > 0) {
                let (rank, _) = a.shape();
                let mut h = Buffer::zeros(tokens * rank)?;
                if exact::is_narrow(a.whole()) {
                    exact::forward(cpu, a.whole(), x, &mut h, false);
                } else {
                    sum(cpu, &[a.whole()], &rounded, &mut h, false);
                }
                scale(&cpu.team, *factor, &mut h);
                rounded.set(cpu, col, &h, rank);
                weights.push(b.whole());
                col += padded(rank);
            }
            sum(cpu, &weights, &rounded, y, false);
        }
        Ok(())
    })
}

/// The sum of `x Wᵀ` over `weights`, whose operands `x` has side by side, added to `y` if `accumulate`.
fn sum(cpu: &Cpu, weights: &[Band<'_>], x: &Rounded, y: &mut [f32], accumulate: bool) {
    let kernels = cpu.table.bf16().expect("the caller asked");
    let (lanes, (o, _), tokens) = (kernels.lanes, weights[0].shape(), x.count());
    let panels = cut(weights.iter().map(|w| w.shape().1), ROW_DEPTH, kernels.group);
    let depth = deepest(&panels);
    let (panel_len, decoded_len) = (lanes * depth, lanes * longest(&panels));
    let task = (o / TASKS / lanes).max(1) * lanes;
    run(&cpu.team, patches(y, o, tokens, task), tokens * o * depth < SMALL, |Patch { col, mut rows, .. }| {
        let cols = rows[0].len();
        with_halves(panel_len + decoded_len, |scratch| {
            let (panel, decoded) = scratch.split_at_mut(panel_len);
            for first in (0..cols).step_by(lanes) {
                let width = lanes.min(cols - first);
                for (i, pieces) in panels.iter().enumerate() {
                    let mut filled = 0;
                    for Piece { operand, at, depth, padded, .. } in pieces.iter().copied() {
                        let decoded = &mut decoded[..width * depth];
                        weights[operand].decode_bf16(cpu.table, col + first, at, depth, decoded);
                        let to = &mut panel[filled..][..lanes * padded];
                        cpu.table.bf16_pack(Bf16Rows::packed(decoded, depth), true, to);
                        filled += to.len();
                    }
                    let (panel, add) = (&panel[..filled], accumulate || i > 0);
                    cpu.table.bf16_tile(panel, x.rows(pieces[0].col), &mut rows, first, width, add);
                }
            }
        });
    });
}

/// `dx = ` the sum of `dy W` over `terms`, of which there are some, added to `dx` if `accumulate`.
pub(super) fn vjp_x(cpu: &Cpu, terms: &[(Band<'_>, &[f32])], dx: &mut [f32], accumulate: bool) {
    let Some((w, dy)) = terms.first() else { return };
    let columns = terms.iter().map(|(w, _)| padded(w.shape().0)).sum();
    Rounded::with(dy.len() / w.shape().0, columns, |mut rounded| {
        let mut col = 0;
        for (w, dy) in terms {
            let (o, _) = w.shape();
            rounded.set(cpu, col, dy, o);
            col += padded(o);
        }
        sum_vjp_x(cpu, terms, &rounded, dx, accumulate);
    });
}

/// [`vjp_x`] with all `dy` side by side.
fn sum_vjp_x(cpu: &Cpu, terms: &[(Band<'_>, &[f32])], dy: &Rounded, dx: &mut [f32], accumulate: bool) {
    let kernels = cpu.table.bf16().expect("the caller asked");
    let (lanes, (_, k), tokens) = (kernels.lanes, terms[0].0.shape(), dy.count());
    let chunks = cut(terms.iter().map(|(w, _)| w.shape().0), COL_DEPTH, kernels.group);
    let (group, depth) = (panels(lanes, k) * lanes, deepest(&chunks));
    let task = (k / TASKS / group).max(1) * group;
    run(&cpu.team, patches(dx, k, tokens, task), tokens * k * depth < SMALL, |Patch { col, mut rows, .. }| {
        let cols = rows[0].len();
        with_halves((group + lanes) * depth, |scratch| {
            let (panel, decoded) = scratch.split_at_mut(lanes * depth);
            for (i, pieces) in chunks.iter().enumerate() {
                let add = accumulate || i > 0;
                for first in (0..cols).step_by(group) {
                    let width = group.min(cols - first);
                    let mut start = 0;
                    for Piece { operand, at, depth, .. } in pieces.iter().copied() {
                        let to = &mut decoded[start..][..width * depth];
                        terms[operand].0.decode_bf16(cpu.table, at, col + first, width, to);
                        start += to.len();
                    }
                    for lane in (0..width).step_by(lanes) {
                        let n = lanes.min(width - lane);
                        let (mut start, mut filled) = (0, 0);
                        for Piece { depth, padded, .. } in pieces.iter().copied() {
                            let values = &decoded[start + lane..][..width * depth - lane];
                            let part = Bf16Rows { values, stride: width, count: depth, width: n };
                            let to = &mut panel[filled..][..lanes * padded];
                            cpu.table.bf16_pack(part, false, to);
                            (start, filled) = (start + width * depth, filled + to.len());
                        }
                        let panel = &panel[..filled];
                        cpu.table.bf16_tile(panel, dy.rows(pieces[0].col), &mut rows, first + lane, n, add);
                    }
                }
            }
        });
    });
}
