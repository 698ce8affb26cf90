//! Products of many tokens in bf16.

use super::super::Cpu;
use super::super::bf16::{Bf16, Bf16Rows, Rounded};
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
/// Panels of columns that are decoded at a time at most, so that a row's piece is worth going there.
const COL_PANELS: usize = 4;

/// Halves of scratch that a thread keeps after [`forward`] and [`vjp_x`] with a weight `[O, K]`, at most.
pub(super) fn scratch(kernels: &Bf16, o: usize, k: usize) -> usize {
    let (lanes, group) = (kernels.lanes, kernels.group);
    let columns = (panels(lanes, k) + 1) * lanes * COL_DEPTH.min(o).next_multiple_of(group);
    columns.max(2 * lanes * ROW_DEPTH.min(k).next_multiple_of(group))
}

/// Panels of columns that are decoded at a time for `k` of them.
fn panels(lanes: usize, k: usize) -> usize {
    (1..=COL_PANELS).rev().find(|panels| k >= TASKS * panels * lanes).unwrap_or(1)
}

/// A term of a sum of products by `w`.
struct Term<'a> {
    w: Band<'a>,
    x: &'a Rounded<'a>,
}

/// `y = x Wᵀ`, added to `y` if `accumulate`.
pub(super) fn forward(cpu: &Cpu, w: Band<'_>, x: &[f32], y: &mut [f32], accumulate: bool) {
    Rounded::with(cpu, x, w.shape().1, |x| sum(cpu, &[Term { w, x: &x }], y, accumulate));
}

/// See [`crate::Backend::matmul_group`]. `x` is rounded once for all, and the up-projection of an adapter is one more
/// term of the sum in a panel's lanes, which finds them in first-level cache.
pub(super) fn group(cpu: &Cpu, wide: &[f32], products: &mut [Product<'_, Cpu>]) -> Result<(), Error> {
    let Some(first) = products.first() else { return Ok(()) };
    Rounded::with(cpu, wide, first.w.shape().1, |x| {
        for Product { w, low_rank, y } in products {
            let mut parts = Vec::with_capacity(low_rank.len());
            for LowRank { a, b, scale: factor } in low_rank.iter().filter(|l| l.a.shape().0 > 0) {
                let mut h = Buffer::zeros(x.count() * a.shape().0)?;
                if exact::is_narrow(a.whole()) {
                    exact::forward(cpu, a.whole(), wide, &mut h, false);
                } else {
                    sum(cpu, &[Term { w: a.whole(), x: &x }], &mut h, false);
                }
                scale(&cpu.team, *factor, &mut h);
                parts.push((b.whole(), Rounded::new(cpu, &h, a.shape().0)));
            }
            let mut terms = vec![Term { w: w.whole(), x: &x }];
            terms.extend(parts.iter().map(|(w, x)| Term { w: *w, x }));
            sum(cpu, &terms, y, false);
        }
        Ok(())
    })
}

/// The sum of products of the same shape, added to `y` if `accumulate`.
fn sum(cpu: &Cpu, terms: &[Term<'_>], y: &mut [f32], accumulate: bool) {
    let kernels = cpu.table.bf16().expect("the caller asked");
    let lanes = kernels.lanes;
    let (o, tokens) = (terms[0].w.shape().0, terms[0].x.count());
    let depth = terms.iter().map(|t| t.w.shape().1.min(ROW_DEPTH)).max().unwrap_or(0);
    let task = (o / TASKS / lanes).max(1) * lanes;
    let small = tokens * o * depth < SMALL;
    run(&cpu.team, patches(y, o, tokens, task), small, |Patch { col, mut rows, .. }| {
        let cols = rows[0].len();
        with_halves(2 * lanes * depth.next_multiple_of(kernels.group), |scratch| {
            for first in (0..cols).step_by(lanes) {
                let width = lanes.min(cols - first);
                let mut add = accumulate;
                for Term { w, x } in terms {
                    let (_, k) = w.shape();
                    for at in (0..k).step_by(ROW_DEPTH) {
                        let depth = ROW_DEPTH.min(k - at);
                        let (panel, decoded) = scratch.split_at_mut(lanes * depth.next_multiple_of(kernels.group));
                        let decoded = &mut decoded[..width * depth];
                        w.decode_bf16(cpu.table, col + first, at, depth, decoded);
                        cpu.table.bf16_pack(Bf16Rows::packed(decoded, depth), true, panel);
                        cpu.table.bf16_tile(panel, x.rows(at), &mut rows, first, width, add);
                        add = true;
                    }
                }
            }
        });
    });
}

/// `dx = ` the sum of `dy W` over `terms`, of which there are some, added to `dx` if `accumulate`.
pub(super) fn vjp_x(cpu: &Cpu, terms: &[(Band<'_>, &[f32])], dx: &mut [f32], accumulate: bool) {
    let Some(((w, dy), more)) = terms.split_first() else { return };
    let more: Vec<_> = more.iter().map(|(w, dy)| (*w, Rounded::new(cpu, dy, w.shape().0))).collect();
    Rounded::with(cpu, dy, w.shape().0, |dy| {
        let mut terms = vec![Term { w: *w, x: &dy }];
        terms.extend(more.iter().map(|(w, x)| Term { w: *w, x }));
        sum_vjp_x(cpu, &terms, dx, accumulate);
    });
}

/// The sum of `x W`, added to `dx` if `accumulate`.
fn sum_vjp_x(cpu: &Cpu, terms: &[Term<'_>], dx: &mut [f32], accumulate: bool) {
    let kernels = cpu.table.bf16().expect("the caller asked");
    let (lanes, (_, k)) = (kernels.lanes, terms[0].w.shape());
    let (group, tokens) = (panels(lanes, k) * lanes, terms[0].x.count());
    let task = (k / TASKS / group).max(1) * group;
    let panel_len = |depth: usize| lanes * depth.next_multiple_of(kernels.group);
    let depth = terms.iter().map(|t| t.w.shape().0.min(COL_DEPTH)).max().unwrap_or(0);
    let small = tokens * k * terms.iter().map(|t| t.w.shape().0).sum::<usize>() < SMALL;
    run(&cpu.team, patches(dx, k, tokens, task), small, |Patch { col, mut rows, .. }| {
        let cols = rows[0].len();
        with_halves(group * depth + panel_len(depth), |scratch| {
            let mut add = accumulate;
            for Term { w, x } in terms {
                let (o, _) = w.shape();
                for at in (0..o).step_by(COL_DEPTH) {
                    let depth = COL_DEPTH.min(o - at);
                    let (panel, decoded) = scratch.split_at_mut(panel_len(depth));
                    for first in (0..cols).step_by(group) {
                        let width = group.min(cols - first);
                        let decoded = &mut decoded[..width * depth];
                        w.decode_bf16(cpu.table, at, col + first, width, decoded);
                        for lane in (0..width).step_by(lanes) {
                            let n = lanes.min(width - lane);
                            let part = Bf16Rows { values: &decoded[lane..], stride: width, count: depth, width: n };
                            cpu.table.bf16_pack(part, false, panel);
                            cpu.table.bf16_tile(panel, x.rows(at), &mut rows, first + lane, n, add);
                        }
                    }
                    add = true;
                }
            }
        });
    });
}
