//! NF4 kernels for AVX2: two 8-entry permutes and a blend look up eight weights.

#![allow(unsafe_code, reason = "vector loads and stores")]

use super::super::avx2::sum1;
use super::{EvenOdd, GRANULE, Nf4, Piece};
use crate::FloatType;
use std::arch::x86_64::*;

/// Bytes that the matrix-vector product reads ahead; worth 15 % where weights come from memory.
const AHEAD: usize = 1024;

/// See [`super::super::Table::nf4_decode`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn decode(w: &Nf4, start: usize, out: &mut [f32]) {
    for Piece { absmax, at, len } in w.pieces(start, out.len()) {
        let out = &mut out[at - start..][..len];
        // Half a byte in front and what is left of a granule behind go through the portable text.
        let lead = (at % 2).min(len);
        let whole = (len - lead) / GRANULE * GRANULE;
        let values = products(w, absmax);
        let packed = &w.packed[(at + lead) / 2..][..whole / 2];
        for (packed, out) in packed.as_chunks::<8>().0.iter().zip(out[lead..].as_chunks_mut::<GRANULE>().0) {
            let packed = _mm_cvtsi64_si128(i64::from_le_bytes(*packed));
            let low = _mm_set1_epi8(15);
            let ordered =
                _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16::<4>(packed), low), _mm_and_si128(packed, low));
            let first = _mm256_cvtepu8_epi32(ordered);
            let second = _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(ordered));
            let first = look_up(values, first, _mm256_slli_epi32::<28>(first));
            let second = look_up(values, second, _mm256_slli_epi32::<28>(second));
            // SAFETY: `out` is an array of 16 floats.
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr(), first);
                _mm256_storeu_ps(out.as_mut_ptr().add(8), second);
            }
        }
        if lead > 0 {
            super::portable::decode(w, at, &mut out[..lead]);
        }
        if lead + whole < len {
            super::portable::decode(w, at + lead + whole, &mut out[lead + whole..]);
        }
    }
}

/// See [`super::super::Table::nf4_matvec`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn matvec(w: &Nf4, cols: usize, row: usize, x: &EvenOdd, y: &mut [f32]) {
    for (i, y) in y.iter_mut().enumerate() {
        let start = (row + i) * cols;
        let (mut even_sum, mut odd_sum) = (_mm256_setzero_ps(), _mm256_setzero_ps());
        for Piece { absmax, at, len } in w.pieces(start, cols) {
            let values = products(w, absmax);
            let k = (at - start) / 2;
            let packed = &w.packed[at / 2..][..len / 2];
            // A prefetch is no access: it may point past the end.
            _mm_prefetch::<_MM_HINT_T0>(packed.as_ptr().wrapping_add(AHEAD).cast());
            let x = x.even[k..][..len / 2].as_chunks::<8>().0.iter().zip(x.odd[k..][..len / 2].as_chunks::<8>().0);
            for (packed, (even, odd)) in packed.as_chunks::<8>().0.iter().zip(x) {
                let bytes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(*packed)));
                // A permute reads the low 3 bits of an index, a blend the sign: nothing needs masking.
                let high = look_up(values, _mm256_srli_epi32::<4>(bytes), _mm256_slli_epi32::<24>(bytes));
                let low = look_up(values, bytes, _mm256_slli_epi32::<28>(bytes));
                // SAFETY: `even` and `odd` are arrays of 8 floats.
                let (even, odd) = unsafe { (_mm256_loadu_ps(even.as_ptr()), _mm256_loadu_ps(odd.as_ptr())) };
                even_sum = _mm256_fmadd_ps(high, even, even_sum);
                odd_sum = _mm256_fmadd_ps(low, odd, odd_sum);
            }
        }
        *y = sum1(_mm256_add_ps(even_sum, odd_sum));
    }
}

/// The 16 values of a block: code times absmax in f32, rounded to the checkpoint's type.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn products(w: &Nf4, absmax: f32) -> [__m256; 2] {
    let scale = _mm256_set1_ps(absmax);
    // SAFETY: `code` is an array of 16 floats.
    let code = unsafe { [_mm256_loadu_ps(w.code.as_ptr()), _mm256_loadu_ps(w.code.as_ptr().add(8))] };
    let exact = [_mm256_mul_ps(code[0], scale), _mm256_mul_ps(code[1], scale)];
    match w.dtype {
        FloatType::F32 => exact,
        FloatType::F16 => [round_f16(exact[0]), round_f16(exact[1])],
        FloatType::BF16 => [round_bf16(exact[0]), round_bf16(exact[1])],
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn round_f16(x: __m256) -> __m256 {
    _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x))
}

/// To the nearest, ties to even, by adding half of the last place that stays; a NaN is kept from the carry.
#[inline]
#[target_feature(enable = "avx2")]
fn round_bf16(x: __m256) -> __m256 {
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let carried = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    let rounded = _mm256_and_si256(carried, _mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
    _mm256_blendv_ps(_mm256_castsi256_ps(rounded), x, _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x))
}

/// Entries `index & 7` of the lower table, of the upper one where `upper` has its sign bit set.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up(table: [__m256; 2], index: __m256i, upper: __m256i) -> __m256 {
    let (low, high) = (_mm256_permutevar8x32_ps(table[0], index), _mm256_permutevar8x32_ps(table[1], index));
    _mm256_blendv_ps(low, high, _mm256_castsi256_ps(upper))
}
