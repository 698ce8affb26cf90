//! The exponential on `wide`.

use super::super::lanes::update;
use super::{LN_2, POLYNOMIAL, RANGE};
use wide::{bytemuck, f32x8, i32x8};

/// See [`super::super::Table::exp`].
pub(crate) fn exp(factor: f32, shift: f32, x: &mut [f32]) {
    let (factor, shift) = (f32x8::splat(factor), f32x8::splat(shift));
    update(x, [], |x, []| exp8(x * factor - shift));
}

#[inline(always)]
fn exp8(x: f32x8) -> f32x8 {
    let bounded = f32x8::splat(RANGE.0).fast_max(f32x8::splat(RANGE.1).fast_min(x));
    let n = (bounded * f32x8::splat(std::f32::consts::LOG2_E)).fast_round_int();
    let steps = f32x8::from_i32x8(n);
    let r = steps.mul_neg_add(f32x8::splat(LN_2.0), bounded);
    let r = steps.mul_neg_add(f32x8::splat(LN_2.1), r);
    let mut p = f32x8::splat(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = p.mul_add(r, f32x8::splat(*c));
    }
    let y = p.mul_add(r * r, r) + f32x8::ONE;
    let half: i32x8 = n >> 1;
    let y = y * power_of_two(half) * power_of_two(n - half);
    x.is_nan().select(x, y)
}

/// `2^n` for `n` in the range of normal numbers.
#[inline(always)]
fn power_of_two(n: i32x8) -> f32x8 {
    bytemuck::cast((n + i32x8::splat(127)) << 23)
}
