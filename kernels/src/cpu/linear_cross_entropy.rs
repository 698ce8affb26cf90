//! Cross-entropy of a linear head, blockwise over the vocabulary (Wijmans et al. 2024).
//!
//! For rows `x[N, C]` and the head `W[V, C]`, a band of `W` at a time: `l = x Wᵀ`, then as in blockwise attention
//! `m' = max(m, max l)`, `O = e^(m - m') O + e^(l - m') W`, `Z = e^(m - m') Z + sum e^(l - m')`. In the end
//! `loss = m + log Z - l[target]` (natural log) and `dx = weight (O / Z - W[target])`. Nothing is kept for backward,
//! for the gradient is there at once. Bands and their order depend on shapes alone. Both products of a band find it in
//! cache.
//!
//! `W[target]` is taken off at the end, rounded as the products rounded it: a row that predicts its target with certainty
//! has a gradient of exactly zero. So are the rows of a target that is a distribution, see [`Targets`]: then `loss` and
//! factors on `O / Z` and on each of the target's `W` are those of [`soft_targets::row`].

use super::buffer::Buffer;
use super::elementwise::{scale_part, zero};
use super::light::Light;
use super::loops::update;
use super::matmul::{forward_band, scratch, takes_bf16, vjp_x_band};
use super::matrix::Matrix;
use super::soft_targets;
use super::split::{run as run_tasks, with_scratch};
use super::table::Table;
use super::{Cost, Cpu};
use crate::{Arithmetic, Error, Targets};
use half::bf16;

/// Rows of `W` in a band: sums long enough to pay for reading and writing `O`, logits few enough for a cache.
const BAND: usize = 512;
/// Rows of a task between the products.
const ROWS: usize = 16;

/// What is known of a row when some bands are done.
#[derive(Clone, Copy)]
struct Row {
    /// `m`.
    max: f32,
    /// `Z`.
    sum: f64,
}

/// What [`run`] takes for so many rows and tokens of targets with a head `[V, C]`: a band's logits in f32, the larger operand
/// of the two products in bf16, and the products' scratch.
pub(crate) fn cost(
    table: &Table,
    arithmetic: Arithmetic,
    (rows, ids): (usize, usize),
    (vocab, width): (usize, usize),
) -> Cost {
    let band = BAND.min(vocab);
    let row = size_of::<f32>() * band + size_of::<u16>() * band.max(width) + size_of::<Row>();
    let passing = rows * row + ids * size_of::<f32>();
    Cost { passing, ..scratch(table, arithmetic, rows, (band, width), 0) }
}

/// See [`crate::Call::LinearCrossEntropy`].
pub(crate) fn run(
    cpu: &Cpu,
    arithmetic: Arithmetic,
    w: &Matrix,
    targets: Targets<'_>,
    weights: &[f32],
    x: &[f32],
    losses: &mut [f32],
    mut dx: Option<&mut [f32]>,
) -> Result<(), Error> {
    let ((vocab, width), n) = (w.shape(), weights.len());
    assert!(x.len() == n * width && losses.len() == n && dx.as_ref().is_none_or(|dx| dx.len() == x.len()));
    targets.check(n, vocab);
    if n == 0 {
        return Ok(());
    }
    let bf16 = arithmetic == Arithmetic::Bf16 && takes_bf16(cpu, n, width);
    let mut logits = Buffer::zeros(n * BAND.min(vocab))?;
    let mut rows = vec![Row { max: f32::NEG_INFINITY, sum: 0.0 }; n];
    // Of each target `l`, from the band that holds it on.
    let mut picked = vec![f32::NAN; targets.ids.len()];
    if let Some(dx) = dx.as_deref_mut() {
        zero(&cpu.team, dx);
    }
    for first in (0..vocab).step_by(BAND) {
        let count = BAND.min(vocab - first);
        let (band, logits) = (w.band(first, count), &mut logits[..n * count]);
        forward_band(cpu, bf16, band, x, logits);
        join(cpu, first, targets.ids, logits, &mut rows, &mut picked, dx.as_deref_mut());
        if let Some(dx) = dx.as_deref_mut() {
            vjp_x_band(cpu, bf16, band, logits, dx);
        }
    }
    // The factors of the gradient on `O / Z` take the place of the sums' reciprocals, those on `W` that of the logits.
    let width = targets.width(n);
    let mut factors = Vec::with_capacity(n);
    for (i, ((row, loss), picked)) in rows.iter().zip(losses).zip(picked.chunks_exact_mut(width)).enumerate() {
        let (found, common) = match targets.shares.get(i * width..(i + 1) * width).filter(|shares| !shares.is_empty()) {
            Some(shares) => soft_targets::row(shares, picked, row.max, row.sum),
            None => {
                let loss = row.sum.ln() + f64::from(row.max) - f64::from(picked[0]);
                picked[0] = -1.0;
                (loss, 1.0)
            }
        };
        *loss = found as f32;
        factors.push((common / row.sum) as f32);
    }
    if let Some(dx) = dx {
        finish(cpu, bf16, w, targets.ids, weights, &factors, &picked, dx);
    }
    Ok(())
}

/// Joins the logits of the band that begins at row `first` of `W` to what is known of each row. They become `e^(l - m)`,
/// and `dx`, which holds `O`, is scaled to the new maximum.
fn join(
    cpu: &Cpu,
    first: usize,
    targets: &[u32],
    logits: &mut [f32],
    rows: &mut [Row],
    picked: &mut [f32],
    dx: Option<&mut [f32]>,
) {
    let (count, light) = (logits.len() / rows.len(), cpu.table.light());
    let width = dx.as_ref().map_or(0, |dx| dx.len() / rows.len());
    let each = targets.len() / rows.len();
    // Without a gradient each task gets an empty share of it.
    let mut dx = dx.unwrap_or_default();
    let mut tasks = Vec::new();
    let wanted = targets.chunks(ROWS * each).zip(picked.chunks_mut(ROWS * each));
    let blocks = wanted.zip(logits.chunks_mut(ROWS * count)).zip(rows.chunks_mut(ROWS));
    for (((targets, picked), logits), rows) in blocks {
        let (now, later) = std::mem::take(&mut dx).split_at_mut(rows.len() * width);
        dx = later;
        tasks.push((targets, picked, logits, rows, now));
    }
    run_tasks(&cpu.team, tasks, false, |(targets, picked, logits, rows, dx)| {
        let mut outputs = dx.chunks_exact_mut(width.max(1));
        let wanted = targets.chunks_exact(each).zip(picked.chunks_exact_mut(each));
        for (((targets, picked), l), row) in wanted.zip(logits.chunks_exact_mut(count)).zip(rows) {
            for (target, picked) in targets.iter().zip(picked) {
                if let Some(l) = (*target as usize).checked_sub(first).and_then(|at| l.get(at)) {
                    *picked = *l;
                }
            }
            let factor = row.join(light, l);
            if let Some(output) = outputs.next().filter(|_| factor != 1.0) {
                scale_part(factor, output);
            }
        }
    });
}

impl Row {
    /// Joins further logits, which become `e^(l - m)`; returns the factor `e^(m_before - m)` of what was added up before.
    fn join(&mut self, light: &Light, l: &mut [f32]) -> f32 {
        let max = light.largest(l).max(self.max);
        // `-inf - -inf` would be NaN where there is nothing to add; a NaN among the logits is carried on in any case.
        let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let factor = if max == self.max { 1.0 } else { (self.max - shift).exp() };
        self.sum = self.sum * f64::from(factor) + light.exp_sum(l, shift);
        self.max = max;
        factor
    }
}

/// From `O` to the gradient `weight (factor O + sum_k own_k W[target_k])`.
fn finish(
    cpu: &Cpu,
    bf16: bool,
    w: &Matrix,
    targets: &[u32],
    weights: &[f32],
    factors: &[f32],
    own: &[f32],
    dx: &mut [f32],
) {
    let (width, each) = (dx.len() / weights.len(), targets.len() / weights.len());
    if width == 0 {
        return;
    }
    let wanted = targets.chunks(ROWS * each).zip(own.chunks(ROWS * each));
    let rows = weights.chunks(ROWS).zip(factors.chunks(ROWS));
    let blocks = dx.chunks_mut(ROWS * width).zip(rows).zip(wanted).collect();
    run_tasks(&cpu.team, blocks, false, |((dx, (weights, factors)), (targets, own))| {
        with_scratch(width, |picked| {
            let wanted = targets.chunks_exact(each).zip(own.chunks_exact(each));
            let rows = dx.chunks_exact_mut(width).zip(weights.iter().zip(factors));
            for ((dx, (weight, factor)), (targets, own)) in rows.zip(wanted) {
                for (i, (target, own)) in targets.iter().zip(own).enumerate() {
                    w.decode(cpu.table, *target as usize, 0, width, picked);
                    if bf16 {
                        // As the products have it, or of a sure target, where both terms are nearly the same, its rounding
                        // would remain.
                        picked.iter_mut().for_each(|w| *w = bf16::from_f32(*w).to_f32());
                    }
                    let before = if i == 0 { *factor } else { 1.0 };
                    let after = if i + 1 == each { *weight } else { 1.0 };
                    update(dx, [picked], |o, [w]| after * (o * before + own * w));
                }
            }
        });
    });
}
