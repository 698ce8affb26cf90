//! NF4 kernels for AVX2. A byte shuffle looks up 32 bytes in a table of 16, so the values of a block are kept as
//! planes, one for each byte of an f32, and weights are put together from the planes: for bf16 two, else four.

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
    match w.dtype {
        FloatType::BF16 => decode_planes::<2>(w, start, out),
        FloatType::F16 | FloatType::F32 => decode_planes::<4>(w, start, out),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn decode_planes<const PLANES: usize>(w: &Nf4, start: usize, out: &mut [f32]) {
    // Each byte twice, for its two nibbles; those of elements 0-3 of every eight in the lower lane, 4-7 in the
    // upper one, where `look_up` wants them.
    let twice = _mm256_setr_epi8(
        0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13, 2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15,
    );
    let (even, odd) = (_mm256_set1_epi16(0x000f), _mm256_set1_epi16(0x0f00));
    for Piece { absmax, at, len } in w.pieces(start, out.len()) {
        let out = &mut out[at - start..][..len];
        // Half a byte in front and what is left of a granule behind go through the portable text.
        let lead = (at % 2).min(len);
        let whole = (len - lead) / GRANULE * GRANULE;
        let planes = planes::<PLANES>(w, absmax);
        let packed = &w.packed[(at + lead) / 2..][..whole / 2];
        for (packed, out) in packed.as_chunks::<16>().0.iter().zip(out[lead..].as_chunks_mut::<GRANULE>().0) {
            let bytes = _mm256_shuffle_epi8(load_twice(packed), twice);
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), even);
            let values = look_up(planes, _mm256_or_si256(high, _mm256_and_si256(bytes, odd)));
            for (values, out) in values.into_iter().zip(out.as_chunks_mut::<8>().0) {
                // SAFETY: `out` is an array of 8 floats.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr(), values) };
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
    match w.dtype {
        FloatType::BF16 => matvec_planes::<2>(w, cols, row, x, y),
        FloatType::F16 | FloatType::F32 => matvec_planes::<4>(w, cols, row, x, y),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn matvec_planes<const PLANES: usize>(w: &Nf4, cols: usize, row: usize, x: &EvenOdd, y: &mut [f32]) {
    // High nibbles in the lower lane, low ones in the upper, as `EvenOdd` has the activations.
    let shifts = _mm256_setr_epi32(4, 4, 4, 4, 0, 0, 0, 0);
    let nibble = _mm256_set1_epi8(15);
    for (i, y) in y.iter_mut().enumerate() {
        let start = (row + i) * cols;
        let mut sums = [_mm256_setzero_ps(); 4];
        for Piece { absmax, at, len } in w.pieces(start, cols) {
            let planes = planes::<PLANES>(w, absmax);
            let packed = &w.packed[at / 2..][..len / 2];
            // A prefetch is no access: it may point past the end.
            _mm_prefetch::<_MM_HINT_T0>(packed.as_ptr().wrapping_add(AHEAD).cast());
            let x = &x.0[at - start..][..len];
            for (packed, x) in packed.as_chunks::<16>().0.iter().zip(x.as_chunks::<GRANULE>().0) {
                let index = _mm256_and_si256(_mm256_srlv_epi32(load_twice(packed), shifts), nibble);
                let values = look_up(planes, index);
                for ((sum, values), x) in sums.iter_mut().zip(values).zip(x.as_chunks::<8>().0) {
                    // SAFETY: `x` is an array of 8 floats.
                    *sum = _mm256_fmadd_ps(values, unsafe { _mm256_loadu_ps(x.as_ptr()) }, *sum);
                }
            }
        }
        *y = sum1(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
    }
}

/// The same 16 bytes in both lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn load_twice(bytes: &[u8; 16]) -> __m256i {
    // SAFETY: `bytes` is an array of 16 bytes.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

/// The 16 values of a block (code times absmax in f32, rounded to the checkpoint's type), the last `PLANES` bytes
/// of each in a plane of its own that both lanes hold.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn planes<const PLANES: usize>(w: &Nf4, absmax: f32) -> [__m256i; PLANES] {
    let scale = _mm256_set1_ps(absmax);
    // Entries 0-3 and 8-11, then 4-7 and 12-15: the order that leaves each plane in two quarters below.
    let code = w.code.as_ptr();
    // SAFETY: `code` is an array of 16 floats.
    let code = unsafe { [_mm256_loadu2_m128(code.add(8), code), _mm256_loadu2_m128(code.add(12), code.add(4))] };
    // Bytes 0 of four values, then bytes 1, 2 and 3.
    let split = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    let mut bytes = [_mm256_setzero_si256(); 2];
    for (bytes, code) in bytes.iter_mut().zip(code) {
        let exact = _mm256_mul_ps(code, scale);
        let rounded = match w.dtype {
            FloatType::F32 => exact,
            FloatType::F16 => round_f16(exact),
            FloatType::BF16 => round_bf16(exact),
        };
        *bytes = _mm256_shuffle_epi8(_mm256_castps_si256(rounded), split);
    }
    let low = _mm256_unpacklo_epi32(bytes[0], bytes[1]);
    let high = _mm256_unpackhi_epi32(bytes[0], bytes[1]);
    let all = [
        _mm256_permute4x64_epi64::<0x88>(low),
        _mm256_permute4x64_epi64::<0xdd>(low),
        _mm256_permute4x64_epi64::<0x88>(high),
        _mm256_permute4x64_epi64::<0xdd>(high),
    ];
    let mut planes = [_mm256_setzero_si256(); PLANES];
    planes.copy_from_slice(&all[4 - PLANES..]);
    planes
}

/// 32 values. Vector `i` has those of indices `4 i..4 i + 4` of either lane, the lower lane's first.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up<const PLANES: usize>(planes: [__m256i; PLANES], index: __m256i) -> [__m256; 4] {
    let zero = _mm256_setzero_si256();
    let mut bytes = [zero; 4];
    for (bytes, plane) in bytes[4 - PLANES..].iter_mut().zip(planes) {
        *bytes = _mm256_shuffle_epi8(plane, index);
    }
    let (low0, low1) = (_mm256_unpacklo_epi8(bytes[0], bytes[1]), _mm256_unpackhi_epi8(bytes[0], bytes[1]));
    let (high0, high1) = (_mm256_unpacklo_epi8(bytes[2], bytes[3]), _mm256_unpackhi_epi8(bytes[2], bytes[3]));
    [
        _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0)),
        _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0)),
        _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1)),
        _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1)),
    ]
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
