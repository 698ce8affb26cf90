//! Kernels for 16- and 32-bit float weights on AVX2 with F16C.

#![allow(unsafe_code, reason = "vector loads and stores")]

use super::super::avx2::{sum1, sum4};
use crate::FloatType;
use std::arch::x86_64::*;

// Types as numbers, for const generics take no enum.
const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// Rows at least this long are summed one at a time: two streams side by side read memory slower.
const LONG: usize = 256;

/// Bytes that the matrix-vector product reads ahead.
const AHEAD: usize = 2048;

/// See [`super::super::Table::dense_decode`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn decode(dtype: FloatType, bytes: &[u8], stride: usize, width: usize, out: &mut [f32]) {
    match dtype {
        FloatType::F32 => decode_as::<F32>(dtype, bytes, stride, width, out),
        FloatType::F16 => decode_as::<F16>(dtype, bytes, stride, width, out),
        FloatType::BF16 => decode_as::<BF16>(dtype, bytes, stride, width, out),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn decode_as<const TYPE: u8>(dtype: FloatType, bytes: &[u8], stride: usize, width: usize, out: &mut [f32]) {
    let size = size::<TYPE>();
    for (bytes, out) in bytes.chunks(stride * size).zip(out.chunks_exact_mut(width)) {
        let (vectors, rest) = out.as_chunks_mut::<8>();
        for (bytes, out) in bytes.chunks_exact(8 * size).zip(vectors) {
            // SAFETY: `bytes` holds 8 elements, `out` 8 floats.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), load::<TYPE>(bytes.as_ptr())) };
        }
        if !rest.is_empty() {
            super::portable::decode_row(dtype, &bytes[(width - rest.len()) * size..], rest);
        }
    }
}

/// See [`super::super::Table::dense_matvec`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn matvec(dtype: FloatType, bytes: &[u8], x: &[f32], y: &mut [f32]) {
    match dtype {
        FloatType::F32 => matvec_as::<F32>(bytes, x, y),
        FloatType::F16 => matvec_as::<F16>(bytes, x, y),
        FloatType::BF16 => matvec_as::<BF16>(bytes, x, y),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn matvec_as<const TYPE: u8>(bytes: &[u8], x: &[f32], y: &mut [f32]) {
    let row = x.len() * size::<TYPE>();
    let mut done = 0;
    if x.len() < LONG {
        for (i, y) in y.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let sums = dot_rows::<TYPE, 4, 1>(&bytes[4 * i * row..][..4 * row], x);
            let sums = sum4([sums[0][0], sums[1][0], sums[2][0], sums[3][0]]);
            // SAFETY: `y` is an array of 4 floats.
            unsafe { _mm_storeu_ps(y.as_mut_ptr(), sums) };
            done += 4;
        }
    }
    for (i, y) in y.iter_mut().enumerate().skip(done) {
        let [s] = dot_rows::<TYPE, 1, 4>(&bytes[i * row..][..row], x);
        *y = sum1(_mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3])));
    }
}

/// `ROWS` products with `x`, each in `PARTS` sums of 8 lanes to hide the latency of the additions.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_rows<const TYPE: u8, const ROWS: usize, const PARTS: usize>(bytes: &[u8], x: &[f32]) -> [[__m256; PARTS]; ROWS] {
    let (size, n) = (size::<TYPE>(), x.len());
    assert_eq!(bytes.len(), ROWS * n * size);
    let mut sums = [[_mm256_setzero_ps(); PARTS]; ROWS];
    let mut k = 0;
    while k + 8 * PARTS <= n {
        // A prefetch is no access: it may point past the end.
        _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(k * size + AHEAD).cast());
        for part in 0..PARTS {
            let at = k + 8 * part;
            // SAFETY: `at + 8 <= n`, and `bytes` holds ROWS rows of n elements.
            let xv = unsafe { _mm256_loadu_ps(x.as_ptr().add(at)) };
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: as above.
                let w = unsafe { load::<TYPE>(bytes.as_ptr().add((r * n + at) * size)) };
                sums[part] = _mm256_fmadd_ps(w, xv, sums[part]);
            }
        }
        k += 8 * PARTS;
    }
    while k < n {
        // What is left, eight at a time, padded with zeros.
        let len = (n - k).min(8);
        let mut xs = [0.0; 8];
        xs[..len].copy_from_slice(&x[k..k + len]);
        // SAFETY: `xs` is an array of 8 floats.
        let xv = unsafe { _mm256_loadu_ps(xs.as_ptr()) };
        for (r, sums) in sums.iter_mut().enumerate() {
            let mut padded = [0; 32];
            padded[..len * size].copy_from_slice(&bytes[(r * n + k) * size..][..len * size]);
            // SAFETY: 32 bytes hold 8 elements of any type.
            let w = unsafe { load::<TYPE>(padded.as_ptr()) };
            sums[0] = _mm256_fmadd_ps(w, xv, sums[0]);
        }
        k += 8;
    }
    sums
}

const fn size<const TYPE: u8>() -> usize {
    if TYPE == F32 { 4 } else { 2 }
}

/// Eight elements, widened.
///
/// # Safety
/// `at` points to eight elements of any alignment.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load<const TYPE: u8>(at: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        match TYPE {
            F32 => _mm256_loadu_ps(at.cast()),
            F16 => _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
            _ => {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }
    }
}
