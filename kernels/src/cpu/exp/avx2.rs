//! The exponential for AVX2 with FMA.

#![allow(unsafe_code, reason = "vector loads and stores")]

use super::super::avx2::first_lanes;
use super::{LN_2, POLYNOMIAL, RANGE};
use std::arch::x86_64::*;

/// See [`super::super::Table::exp`].
#[target_feature(enable = "avx2,fma")]
pub(crate) fn exp(factor: f32, shift: f32, x: &mut [f32]) {
    let (factor, shift) = (_mm256_set1_ps(factor), _mm256_set1_ps(shift));
    let (vectors, rest) = x.as_chunks_mut::<8>();
    for x in vectors {
        // SAFETY: `x` is an array of 8 floats.
        unsafe {
            let y = exp8(_mm256_fmsub_ps(_mm256_loadu_ps(x.as_ptr()), factor, shift));
            _mm256_storeu_ps(x.as_mut_ptr(), y);
        }
    }
    if !rest.is_empty() {
        let mask = first_lanes(rest.len());
        // SAFETY: the mask keeps load and store inside `rest`.
        unsafe {
            let y = exp8(_mm256_fmsub_ps(_mm256_maskload_ps(rest.as_ptr(), mask), factor, shift));
            _mm256_maskstore_ps(rest.as_mut_ptr(), mask, y);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn exp8(x: __m256) -> __m256 {
    // `x` comes second, where a NaN passes; it then stays in `r` and so in the polynomial.
    let bounded = _mm256_max_ps(_mm256_set1_ps(RANGE.0), _mm256_min_ps(_mm256_set1_ps(RANGE.1), x));
    let n = _mm256_cvtps_epi32(_mm256_mul_ps(bounded, _mm256_set1_ps(std::f32::consts::LOG2_E)));
    let steps = _mm256_cvtepi32_ps(n);
    let r = _mm256_fnmadd_ps(steps, _mm256_set1_ps(LN_2.0), bounded);
    let r = _mm256_fnmadd_ps(steps, _mm256_set1_ps(LN_2.1), r);
    let mut p = _mm256_set1_ps(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*c));
    }
    let y = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0));
    let half = _mm256_srai_epi32::<1>(n);
    let y = _mm256_mul_ps(y, power_of_two(half));
    _mm256_mul_ps(y, power_of_two(_mm256_sub_epi32(n, half)))
}

/// `2^n` for `n` in the range of normal numbers.
#[inline]
#[target_feature(enable = "avx2")]
fn power_of_two(n: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))))
}
