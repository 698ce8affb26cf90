//! Cross-entropy of a linear head, blockwise over the vocabulary (Wijmans et al. 2024).
//!
//! For rows `x[N, C]` and the head `W[V, C]`, a band of `W` at a time: `l = x Wᵀ`, then as in blockwise attention
//! `m' = max(m, max l)`, `O = e^(m - m') O + e^(l - m') W`, `Z = e^(m - m') Z + sum e^(l - m')`. In the end
//! `loss = m + log Z - l[target]` (natural log) and `dx = weight (O / Z - W[target])`. Nothing is kept for backward,
//! for the gradient is there at once. Bands and their order depend on shapes alone. Both products of a band find it in
//! cache.
//!
//! `W[target]` is taken off at the end, rounded as the products rounded it: a row that predicts its target with certainty
//! has a gradient of exactly zero.

use super::buffer::Buffer;
use super::elementwise::{scale_part, zero};
use super::light::Light;
use super::loops::update;
use super::matmul::{forward_band, scratch, takes_bf16, vjp_x_band};
use super::matrix::Matrix;
use super::split::{run as run_tasks, with_scratch};
use super::table::Table;
use super::{Cost, Cpu};
use crate::{Arithmetic, Error};
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
    /// `l[target]`, from the band that holds it on.
    picked: f32,
}

/// What [`run`] takes for so many rows with a head `[V, C]`: a band's logits in f32, the larger operand of the two products
/// in bf16, and the products' scratch.
pub(crate) fn cost(table: &Table, arithmetic: Arithmetic, rows: usize, (vocab, width): (usize, usize)) -> Cost {
    let band = BAND.min(vocab);
    let passing = rows * (size_of::<f32>() * band + size_of::<u16>() * band.max(width) + size_of::<Row>());
    Cost { passing, ..scratch(table, arithmetic, rows, (band, width), 0) }
}

/// See [`crate::Call::LinearCrossEntropy`].
pub(crate) fn run(
    cpu: &Cpu,
    arithmetic: Arithmetic,
    w: &Matrix,
    targets: &[u32],
    weights: &[f32],
    x: &[f32],
    losses: &mut [f32],
    mut dx: Option<&mut [f32]>,
) -> Result<(), Error> {
    let ((vocab, width), n) = (w.shape(), targets.len());
    assert!(
        x.len() == n * width
            && losses.len() == n
            && weights.len() == n
            && dx.as_ref().is_none_or(|dx| dx.len() == x.len())
    );
    assert!(targets.iter().all(|target| (*target as usize) < vocab), "target beyond the head's `{vocab}` rows");
    if n == 0 {
        return Ok(());
    }
    let bf16 = arithmetic == Arithmetic::Bf16 && takes_bf16(cpu, n, width);
    let mut logits = Buffer::zeros(n * BAND.min(vocab))?;
    let mut rows = vec![Row { max: f32::NEG_INFINITY, sum: 0.0, picked: f32::NAN }; n];
    if let Some(dx) = dx.as_deref_mut() {
        zero(&cpu.team, dx);
    }
    for first in (0..vocab).step_by(BAND) {
        let count = BAND.min(vocab - first);
        let (band, logits) = (w.band(first, count), &mut logits[..n * count]);
        forward_band(cpu, bf16, band, x, logits);
        join(cpu, first, targets, logits, &mut rows, dx.as_deref_mut());
        if let Some(dx) = dx.as_deref_mut() {
            vjp_x_band(cpu, bf16, band, logits, dx);
        }
    }
    for (row, loss) in rows.iter().zip(losses) {
        *loss = (row.sum.ln() + f64::from(row.max) - f64::from(row.picked)) as f32;
    }
    if let Some(dx) = dx {
        finish(cpu, bf16, w, targets, weights, &rows, dx);
    }
    Ok(())
}

/// Joins the logits of the band that begins at row `first` of `W` to what is known of each row. They become `e^(l - m)`,
/// and `dx`, which holds `O`, is scaled to the new maximum.
fn join(cpu: &Cpu, first: usize, targets: &[u32], logits: &mut [f32], rows: &mut [Row], dx: Option<&mut [f32]>) {
    let (count, light) = (logits.len() / rows.len(), cpu.table.light());
    let width = dx.as_ref().map_or(0, |dx| dx.len() / rows.len());
    // Without a gradient each task gets an empty share of it.
    let mut dx = dx.unwrap_or_default();
    let mut tasks = Vec::new();
    let blocks = targets.chunks(ROWS).zip(logits.chunks_mut(ROWS * count)).zip(rows.chunks_mut(ROWS));
    for ((targets, logits), rows) in blocks {
        let (now, later) = std::mem::take(&mut dx).split_at_mut(rows.len() * width);
        dx = later;
        tasks.push((targets, logits, rows, now));
    }
    run_tasks(&cpu.team, tasks, false, |(targets, logits, rows, dx)| {
        let mut outputs = dx.chunks_exact_mut(width.max(1));
        for ((target, l), row) in targets.iter().zip(logits.chunks_exact_mut(count)).zip(rows) {
            if let Some(l) = (*target as usize).checked_sub(first).and_then(|at| l.get(at)) {
                row.picked = *l;
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

/// From `O` to the gradient.
fn finish(cpu: &Cpu, bf16: bool, w: &Matrix, targets: &[u32], weights: &[f32], rows: &[Row], dx: &mut [f32]) {
    let width = dx.len() / rows.len();
    if width == 0 {
        return;
    }
    let wanted = targets.chunks(ROWS).zip(weights.chunks(ROWS));
    let blocks = dx.chunks_mut(ROWS * width).zip(rows.chunks(ROWS)).zip(wanted).collect();
    run_tasks(&cpu.team, blocks, false, |((dx, rows), (targets, weights))| {
        with_scratch(width, |picked| {
            for ((dx, row), (target, weight)) in dx.chunks_exact_mut(width).zip(rows).zip(targets.iter().zip(weights)) {
                w.decode(cpu.table, *target as usize, 0, width, picked);
                if bf16 {
                    // As the products have it, or of a sure target, where both terms are nearly the same, its rounding
                    // would remain.
                    picked.iter_mut().for_each(|w| *w = bf16::from_f32(*w).to_f32());
                }
                let share = (1.0 / row.sum) as f32;
                update(dx, [picked], |o, [w]| weight * (o * share - w));
            }
        });
    });
}
