//! Softmax of one row, in the parts that attention and cross-entropy put together:
//! `p = e^(x - m) / sum e^(x - m)` with `m = max x`, so that no exponential overflows.
//! Backward, with `D = sum_i p_i dp_i`: `dx = p (dp - D)`.

pub(super) use super::loops::largest;

use super::cache::BLOCK as KEYS;
use super::exp::exp;
use super::lanes::LANES;
use super::loops::{sum, update};
use super::map::tanh;
use wide::f32x8;

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

/// A block of the softmax of several rows, whose maxima so far are `max`: finds the new ones, makes the scores
/// `e^(x - max)` and gives their sums. Pass by pass, so that one row's vectors are worked on while another's lanes are
/// joined, which is a long chain of few instructions.
#[inline(always)]
pub(super) fn steps<const FMA: bool>(x: &mut [[f32; KEYS]], max: &mut [f32], sums: &mut [f32]) {
    assert!(x.len() == max.len() && x.len() == sums.len());
    for (x, max) in x.iter().zip(&mut *max) {
        // `max` of floats passes over a NaN.
        *max = fold(x, f32x8::fast_max, |a, b| if b > a { b } else { a }).max(*max);
    }
    for (x, max) in x.iter_mut().zip(&*max) {
        // `-inf - -inf` would be NaN where there is nothing to add; a NaN among the scores is carried on in any case.
        let shift = if *max == f32::NEG_INFINITY { 0.0 } else { *max };
        update(x, [], |x, []| exp::<FMA>(x - shift));
    }
    for (x, sum) in x.iter().zip(sums) {
        *sum = fold(x, |a, b| a + b, |a, b| a + b);
    }
}

/// The row's elements joined, in vectors spelled out: of lengths known to it the compiler makes poor ones.
#[inline(always)]
fn fold(x: &[f32; KEYS], vectors: impl Fn(f32x8, f32x8) -> f32x8, floats: impl Fn(f32, f32) -> f32) -> f32 {
    let x = x.as_chunks::<LANES>().0;
    let mut lanes: [f32x8; KEYS / LANES] = [f32x8::ZERO; KEYS / LANES];
    for (lanes, x) in lanes.iter_mut().zip(x) {
        *lanes = f32x8::new(*x);
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    let joined = vectors(vectors(vectors(a, b), vectors(c, d)), vectors(vectors(e, f), vectors(g, h))).to_array();
    let [a, b, c, d, e, f, g, h] = joined;
    floats(floats(floats(a, e), floats(b, f)), floats(floats(c, g), floats(d, h)))
}

/// From scores before their scale and gradients by probabilities to probabilities `e^(scale s - lse)` and gradients by
/// scores; `along` is `D`.
#[inline(always)]
pub(super) fn vjp<const FMA: bool>(scale: f32, lse: f32, along: f32, s: &mut [f32; KEYS], dp: &mut [f32; KEYS]) {
    update(s, [], |s, []| exp::<FMA>(s * scale - lse));
    update(dp, [s], |dp, [p]| scale * p * (dp - along));
}

/// The same where the scaled scores were put through `cap tanh(s / cap)`.
#[inline(always)]
pub(super) fn vjp_capped<const FMA: bool>(
    [scale, cap]: [f32; 2],
    lse: f32,
    along: f32,
    s: &mut [f32; KEYS],
    dp: &mut [f32; KEYS],
) {
    for (s, dp) in s.iter_mut().zip(dp) {
        let t = tanh::<FMA>(*s * scale / cap);
        *s = exp::<FMA>(cap * t - lse);
        *dp = scale * (1.0 - t * t) * *s * (*dp - along);
    }
}

/// `D` of a row: `p . dp` or, in attention, `y . dy`, which is the same.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum([a, b], |[a, b]| a * b)
}
