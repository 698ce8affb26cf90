//! What the AVX-512 kernels share.

use std::arch::x86_64::*;

/// The upper half added to the lower.
#[inline]
#[target_feature(enable = "avx512f,avx2")]
pub(crate) fn halve(v: __m512) -> __m256 {
    let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)));
    _mm256_add_ps(_mm512_castps512_ps256(v), upper)
}

/// The sum of one vector, in an order that does not depend on what else is computed.
#[inline]
#[target_feature(enable = "avx512f,avx2")]
pub(crate) fn sum16(v: __m512) -> f32 {
    super::avx2::sum1(halve(v))
}

/// Lane `j` of vector `i` goes to lane `i` of vector `j`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn transpose16(v: [__m512i; 16]) -> [__m512i; 16] {
    // Within 128-bit parts: first pairs of 32 bits, then pairs of 64.
    let a: [__m512i; 16] = std::array::from_fn(|i| {
        let (x, y) = (v[i / 2 * 2], v[i / 2 * 2 + 1]);
        if i % 2 == 0 { _mm512_unpacklo_epi32(x, y) } else { _mm512_unpackhi_epi32(x, y) }
    });
    let b: [__m512i; 16] = std::array::from_fn(|i| {
        let (x, y) = (a[i / 4 * 4 + i % 4 / 2], a[i / 4 * 4 + 2 + i % 4 / 2]);
        if i % 2 == 0 { _mm512_unpacklo_epi64(x, y) } else { _mm512_unpackhi_epi64(x, y) }
    });
    // `b[4 g + r]` holds, in part `p`, column `4 p + r` of rows `4 g ..`. Then the parts themselves.
    let c: [__m512i; 16] = std::array::from_fn(|i| {
        let (half, r, odd) = (i / 8, i % 8 / 2, i % 2);
        let (x, y) = (b[8 * half + r], b[8 * half + 4 + r]);
        if odd == 0 { _mm512_shuffle_i32x4::<0b10_00_10_00>(x, y) } else { _mm512_shuffle_i32x4::<0b11_01_11_01>(x, y) }
    });
    // `c[8 half + 2 r + odd]` holds parts `odd` and `odd + 2` of row groups `2 half` and `2 half + 1`.
    std::array::from_fn(|i| {
        let (part, r) = (i / 4, i % 4);
        let (x, y) = (c[2 * r + part % 2], c[8 + 2 * r + part % 2]);
        if part < 2 { _mm512_shuffle_i32x4::<0b10_00_10_00>(x, y) } else { _mm512_shuffle_i32x4::<0b11_01_11_01>(x, y) }
    })
}
