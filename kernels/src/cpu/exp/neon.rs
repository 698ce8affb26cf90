//! The exponential for NEON.

#![allow(unsafe_code, reason = "vector loads and stores")]

use super::super::neon::load_part;
use super::{LN_2, POLYNOMIAL, RANGE};
use std::arch::aarch64::*;

/// See [`super::super::Table::exp`].
#[target_feature(enable = "neon")]
pub(crate) fn exp(factor: f32, shift: f32, x: &mut [f32]) {
    let (factor, shift) = (vdupq_n_f32(factor), vdupq_n_f32(-shift));
    // Two vectors at a time, for the steps of one wait for each other.
    let (pairs, rest) = x.as_chunks_mut::<8>();
    for x in pairs {
        let (low, high) = x.split_at_mut(4);
        let y = [&*low, &*high].map(|x| exp4(vfmaq_f32(shift, load_part(x), factor)));
        // SAFETY: both halves have 4 floats.
        unsafe {
            vst1q_f32(low.as_mut_ptr(), y[0]);
            vst1q_f32(high.as_mut_ptr(), y[1]);
        }
    }
    for x in rest.chunks_mut(4) {
        let mut y = [0.0; 4];
        // SAFETY: `y` is an array of 4 floats.
        unsafe { vst1q_f32(y.as_mut_ptr(), exp4(vfmaq_f32(shift, load_part(x), factor))) };
        x.copy_from_slice(&y[..x.len()]);
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn exp4(x: float32x4_t) -> float32x4_t {
    // Minimum and maximum of a NaN are NaN; it stays in `r` and so in the polynomial.
    let bounded = vmaxq_f32(vdupq_n_f32(RANGE.0), vminq_f32(vdupq_n_f32(RANGE.1), x));
    let n = vcvtnq_s32_f32(vmulq_n_f32(bounded, std::f32::consts::LOG2_E));
    let steps = vcvtq_f32_s32(n);
    let r = vfmsq_f32(bounded, steps, vdupq_n_f32(LN_2.0));
    let r = vfmsq_f32(r, steps, vdupq_n_f32(LN_2.1));
    let mut p = vdupq_n_f32(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = vfmaq_f32(vdupq_n_f32(*c), p, r);
    }
    let y = vaddq_f32(vfmaq_f32(r, p, vmulq_f32(r, r)), vdupq_n_f32(1.0));
    let half = vshrq_n_s32::<1>(n);
    vmulq_f32(vmulq_f32(y, power_of_two(half)), power_of_two(vsubq_s32(n, half)))
}

/// `2^n` for `n` in the range of normal numbers.
#[inline]
#[target_feature(enable = "neon")]
fn power_of_two(n: int32x4_t) -> float32x4_t {
    vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127))))
}
