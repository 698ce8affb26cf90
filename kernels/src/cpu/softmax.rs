//! Softmax of one row, in the parts that attention and cross-entropy put together:
//! `p = e^(x - m) / sum e^(x - m)` with `m = max x`, so that no exponential overflows.
//! Backward, with `D = sum_i p_i dp_i`: `dx = p (dp - D)`.

pub(super) use super::loops::largest;

use super::exp::exp;
use super::loops::{sum, update};

/// Elements that are summed in f32 before they join the f64 total; keeps a vocabulary's sum exact to f32, and
/// the exponentials in first-level cache until they are summed.
const BLOCK: usize = 1024;

/// `x = e^(x - shift)`; returns the sum.
#[inline(always)]
pub(super) fn exp_sum<const FMA: bool>(x: &mut [f32], shift: f32) -> f64 {
    let mut total = 0.0;
    for x in x.chunks_mut(BLOCK) {
        update(x, [], |x, []| exp::<FMA>(x - shift));
        total += f64::from(sum([x], |[x]| x));
    }
    total
}

/// A block of a softmax whose maximum so far is `max`: finds the new maximum `m`, makes the scores `e^(x - m)` and
/// returns `(m, their sum)`.
#[inline(always)]
pub(super) fn step<const FMA: bool>(x: &mut [f32], max: f32) -> (f32, f32) {
    let max = largest(x).max(max);
    // `-inf - -inf` would be NaN where there is nothing to add; a NaN among the scores is carried on in any case.
    let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
    update(x, [], |x, []| exp::<FMA>(x - shift));
    (max, sum([x], |[x]| x))
}

/// From scores before their scale and gradients by probabilities to probabilities `e^(scale s - lse)` and gradients by
/// scores; `along` is `D`.
#[inline(always)]
pub(super) fn vjp<const FMA: bool>(scale: f32, lse: f32, along: f32, s: &mut [f32], dp: &mut [f32]) {
    update(s, [], |s, []| exp::<FMA>(s * scale - lse));
    update(dp, [s], |dp, [p]| scale * p * (dp - along));
}
