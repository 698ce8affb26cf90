//! Softmax of one row, in the parts that attention and cross-entropy put together:
//! `p = e^(x - m) / sum e^(x - m)` with `m = max x`, so that no exponential overflows.
//! Backward, with `D = sum_i p_i dp_i`: `dx = p (dp - D)`.

use super::lanes::{LANES, sum, update};
use super::table::Table;
use wide::f32x8;

/// Elements that are summed in f32 before they join the f64 total; keeps a vocabulary's sum exact to f32, and
/// the exponentials in first-level cache until they are summed.
const BLOCK: usize = 128 * LANES;

/// Largest element, `-inf` of an empty row. A NaN may be skipped: [`exp_sum`] carries it.
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut most = f32x8::splat(f32::NEG_INFINITY);
    let (vectors, rest) = x.as_chunks::<LANES>();
    for x in vectors {
        most = most.fast_max(f32x8::new(*x));
    }
    most.to_array().into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, f32::max)
}

/// `x = e^(x - shift)`; returns the sum.
pub(crate) fn exp_sum(table: &Table, x: &mut [f32], shift: f32) -> f64 {
    let mut total = 0.0;
    for x in x.chunks_mut(BLOCK) {
        table.exp(1.0, shift, x);
        total += f64::from(sum([&*x], |[x]| x));
    }
    total
}

/// `dp = factor * p (dp - d)`, the gradient by the scores.
pub(crate) fn vjp(p: &[f32], d: f32, factor: f32, dp: &mut [f32]) {
    let (d, factor) = (f32x8::splat(d), f32x8::splat(factor));
    update(dp, [p], |dp, [p]| factor * p * (dp - d));
}
