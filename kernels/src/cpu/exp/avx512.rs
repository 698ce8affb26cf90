//! The exponential for AVX-512, which can multiply by a power of two in one instruction, with gradual underflow.

#![allow(unsafe_code, reason = "vector loads and stores")]

use super::{LN_2, POLYNOMIAL, RANGE};
use std::arch::x86_64::*;

/// See [`super::super::Table::exp`].
#[target_feature(enable = "avx512f,avx2,fma")]
pub(crate) fn exp(factor: f32, shift: f32, x: &mut [f32]) {
    let (factor, shift) = (_mm512_set1_ps(factor), _mm512_set1_ps(shift));
    let (vectors, rest) = x.as_chunks_mut::<16>();
    for x in vectors {
        // SAFETY: `x` is an array of 16 floats.
        unsafe {
            let y = exp16(_mm512_fmsub_ps(_mm512_loadu_ps(x.as_ptr()), factor, shift));
            _mm512_storeu_ps(x.as_mut_ptr(), y);
        }
    }
    let mask = (1 << rest.len()) - 1;
    // SAFETY: the mask keeps load and store inside `rest`.
    unsafe {
        let y = exp16(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(mask, rest.as_ptr()), factor, shift));
        _mm512_mask_storeu_ps(rest.as_mut_ptr(), mask, y);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn exp16(x: __m512) -> __m512 {
    // `x` comes second, where a NaN passes; it then stays in `r` and so in the polynomial.
    let bounded = _mm512_max_ps(_mm512_set1_ps(RANGE.0), _mm512_min_ps(_mm512_set1_ps(RANGE.1), x));
    let n = _mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(_mm512_mul_ps(
        bounded,
        _mm512_set1_ps(std::f32::consts::LOG2_E),
    ));
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN_2.0), bounded);
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN_2.1), r);
    let mut p = _mm512_set1_ps(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
    }
    let y = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0));
    _mm512_scalef_ps(y, n)
}
