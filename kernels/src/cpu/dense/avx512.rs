//! 16-bit floats with AVX-512, sixteen at a time; 32-bit ones go the way of AVX2.

#![allow(unsafe_code, reason = "vector loads and stores")]

use super::super::avx2::{KEEP, prefetch_line};
use super::super::avx512::{first_lanes, sum16, sums16};
use super::super::bf16::avx512::round2;
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
        let mask = first_lanes(rest.len());
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

/// See [`super::super::Table::bf16_decode_dense`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(crate) fn decode_bf16(dtype: FloatType, bytes: &[u8], stride: usize, width: usize, out: &mut [u16]) {
    let size = dtype.size();
    // Pieces of rows are too far apart for the processor to guess the next.
    let ahead = if stride == width { AHEAD } else { ROWS_AHEAD * stride * size };
    for (bytes, out) in bytes.chunks(stride * size).zip(out.chunks_exact_mut(width)) {
        for (bytes, out) in bytes[..width * size].chunks(32 * size).zip(out.chunks_mut(32)) {
            let n = out.len();
            prefetch_line::<KEEP>(bytes.as_ptr().wrapping_add(ahead));
            let (low, high) = (first_lanes(n), first_lanes(n.saturating_sub(16)));
            let both = u32::from(low) | u32::from(high) << 16;
            let at = bytes.as_ptr();
            // SAFETY: the masks keep all within the `n` elements of both slices.
            unsafe {
                let rounded = match dtype {
                    FloatType::BF16 => _mm512_maskz_loadu_epi16(both, at.cast()),
                    FloatType::F16 => round2(
                        _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(low, at.cast())),
                        _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(high, at.wrapping_add(32).cast())),
                    ),
                    FloatType::F32 => round2(
                        _mm512_maskz_loadu_ps(low, at.cast()),
                        _mm512_maskz_loadu_ps(high, at.wrapping_add(64).cast()),
                    ),
                };
                // What a masked store has written is slow to read again.
                if n == 32 {
                    _mm512_storeu_si512(out.as_mut_ptr().cast(), rounded);
                } else {
                    _mm512_mask_storeu_epi16(out.as_mut_ptr().cast(), both, rounded);
                }
            }
        }
    }
}

/// Rows up to this long are summed sixteen at a time, as those of an adapter's up-projection.
const SHORT: usize = 32;
/// Bytes of whole rows, and pieces of rows, that are read ahead.
const AHEAD: usize = 3072;
const ROWS_AHEAD: usize = 8;

/// See [`super::super::Table::dense_matvec`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub(crate) fn matvec(dtype: FloatType, bytes: &[u8], x: &[f32], y: &mut [f32]) {
    match dtype {
        FloatType::F32 => super::avx2::matvec(dtype, bytes, x, y),
        FloatType::F16 if x.len() <= SHORT => short_rows::<true>(bytes, x, y),
        FloatType::BF16 if x.len() <= SHORT => short_rows::<false>(bytes, x, y),
        FloatType::F16 => long_rows::<true>(bytes, x, y),
        FloatType::BF16 => long_rows::<false>(bytes, x, y),
    }
}

/// Sixteen rows give a vector each, and those are summed crosswise: one by one the sums would take longest.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
fn short_rows<const F16: bool>(bytes: &[u8], x: &[f32], y: &mut [f32]) {
    let k = x.len();
    let masks = [first_lanes(k), first_lanes(k.saturating_sub(16))];
    // SAFETY: the masks keep the loads inside `x`.
    let xs = unsafe {
        let high = x.as_ptr().wrapping_add(16);
        [_mm512_maskz_loadu_ps(masks[0], x.as_ptr()), _mm512_maskz_loadu_ps(masks[1], high)]
    };
    for (bytes, y) in bytes.chunks(32 * k.max(1)).zip(y.chunks_mut(16)) {
        let mut sums = [_mm512_setzero_ps(); 16];
        for (row, sum) in bytes.chunks_exact(2 * k.max(1)).zip(&mut sums) {
            // SAFETY: the masks keep the loads inside the row.
            unsafe {
                let low = _mm256_maskz_loadu_epi16(masks[0], row.as_ptr().cast());
                *sum = _mm512_mul_ps(widen::<F16>(low), xs[0]);
                if k > 16 {
                    let high = _mm256_maskz_loadu_epi16(masks[1], row.as_ptr().wrapping_add(32).cast());
                    *sum = _mm512_fmadd_ps(widen::<F16>(high), xs[1], *sum);
                }
            }
        }
        let sums = sums16(sums);
        // SAFETY: an array of 16 floats takes a whole vector; the mask keeps the other store inside `y`.
        unsafe {
            match y.as_mut_array::<16>() {
                Some(y) => _mm512_storeu_ps(y.as_mut_ptr(), sums),
                None => _mm512_mask_storeu_ps(y.as_mut_ptr(), first_lanes(y.len()), sums),
            }
        }
    }
}

/// One row after the other, in four sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
fn long_rows<const F16: bool>(bytes: &[u8], x: &[f32], y: &mut [f32]) {
    let (groups, rest) = x.as_chunks::<64>();
    for (row, y) in bytes.chunks_exact(2 * x.len()).zip(y) {
        let (row_groups, row_rest) = row.as_chunks::<128>();
        let mut sums = [_mm512_setzero_ps(); 4];
        for (w, x) in row_groups.iter().zip(groups) {
            for line in 0..2 {
                // A prefetch is no access: it may point past the end.
                _mm_prefetch::<_MM_HINT_T0>(w.as_ptr().wrapping_add(64 * line + AHEAD).cast());
            }
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `w` and `x` hold 64 elements.
                unsafe {
                    let w = _mm256_loadu_si256(w.as_ptr().add(32 * i).cast());
                    *sum = _mm512_fmadd_ps(widen::<F16>(w), _mm512_loadu_ps(x.as_ptr().add(16 * i)), *sum);
                }
            }
        }
        for ((w, x), sum) in row_rest.chunks(32).zip(rest.chunks(16)).zip(&mut sums) {
            let mask = first_lanes(x.len());
            // SAFETY: the mask keeps the loads inside their chunks of as many elements.
            unsafe {
                let w = _mm256_maskz_loadu_epi16(mask, w.as_ptr().cast());
                *sum = _mm512_fmadd_ps(widen::<F16>(w), _mm512_maskz_loadu_ps(mask, x.as_ptr()), *sum);
            }
        }
        *y = sum16(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
    }
}
