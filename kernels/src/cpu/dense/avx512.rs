//! Widening of 16-bit floats with AVX-512, sixteen at a time; 32-bit ones need none and go the way of AVX2.

#![allow(unsafe_code, reason = "vector loads and stores")]

use crate::FloatType;
use std::arch::x86_64::*;

/// See [`super::super::Table::dense_decode`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub(crate) fn decode(dtype: FloatType, bytes: &[u8], stride: usize, width: usize, out: &mut [f32]) {
    match dtype {
        FloatType::F32 => super::avx2::decode(dtype, bytes, stride, width, out),
        FloatType::F16 => rows::<true>(bytes, stride, width, out),
        FloatType::BF16 => rows::<false>(bytes, stride, width, out),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn rows<const F16: bool>(bytes: &[u8], stride: usize, width: usize, out: &mut [f32]) {
    for (bytes, out) in bytes.chunks(2 * stride).zip(out.chunks_exact_mut(width)) {
        let (vectors, rest) = out.as_chunks_mut::<16>();
        let (whole, tail) = bytes[..2 * width].as_chunks::<32>();
        for (bytes, out) in whole.iter().zip(vectors) {
            // Not masked: what a masked store has written is slow to read again, and the next step reads it.
            // SAFETY: the arrays hold 16 elements each.
            unsafe {
                let halves = _mm256_loadu_si256(bytes.as_ptr().cast());
                _mm512_storeu_ps(out.as_mut_ptr(), widen::<F16>(halves));
            }
        }
        let mask = (1 << rest.len()) - 1;
        // SAFETY: the mask keeps both within what is left, as many elements of either.
        unsafe {
            let halves = _mm256_maskz_loadu_epi16(mask, tail.as_ptr().cast());
            _mm512_mask_storeu_ps(rest.as_mut_ptr(), mask, widen::<F16>(halves));
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn widen<const F16: bool>(halves: __m256i) -> __m512 {
    if F16 {
        _mm512_cvtph_ps(halves)
    } else {
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
    }
}
