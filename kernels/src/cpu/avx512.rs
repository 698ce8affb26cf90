//! What the AVX-512 kernels share.

use std::arch::x86_64::*;

/// Selects the first `n` of 16 lanes.
pub(crate) fn first_lanes(n: usize) -> __mmask16 {
    if n >= 16 { !0 } else { (1 << n) - 1 }
}

/// The lower half and the upper one.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn halves(v: __m512) -> [__m256; 2] {
    [_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)))]
}

/// The upper half added to the lower.
#[inline]
#[target_feature(enable = "avx512f,avx2")]
pub(crate) fn halve(v: __m512) -> __m256 {
    let [lower, upper] = halves(v);
    _mm256_add_ps(lower, upper)
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
    let (mut a, mut b, mut c, mut d) = (v, v, v, v);
    for i in 0..8 {
        let (x, y) = (v[2 * i], v[2 * i + 1]);
        (a[2 * i], a[2 * i + 1]) = (_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
    }
    for i in 0..8 {
        let (x, y) = (a[i / 2 * 4 + i % 2], a[i / 2 * 4 + 2 + i % 2]);
        (b[2 * i], b[2 * i + 1]) = (_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
    }
    // `b[4 g + r]` holds, in part `p`, column `4 p + r` of rows `4 g ..`. Then the parts themselves.
    for i in 0..8 {
        let (x, y) = (b[i / 4 * 8 + i % 4], b[i / 4 * 8 + 4 + i % 4]);
        (c[2 * i], c[2 * i + 1]) = (even_parts(x, y), odd_parts(x, y));
    }
    // `c[8 half + 2 r + odd]` holds parts `odd` and `odd + 2` of row groups `2 half` and `2 half + 1`.
    for i in 0..8 {
        let (part, r) = (i / 4, i % 4);
        let (x, y) = (c[2 * r + part], c[8 + 2 * r + part]);
        (d[4 * part + r], d[8 + 4 * part + r]) = (even_parts(x, y), odd_parts(x, y));
    }
    d
}

/// The 128-bit parts 0 and 2 of `x`, then of `y`.
#[inline]
#[target_feature(enable = "avx512f")]
fn even_parts(x: __m512i, y: __m512i) -> __m512i {
    _mm512_shuffle_i32x4::<0b10_00_10_00>(x, y)
}

/// Parts 1 and 3.
#[inline]
#[target_feature(enable = "avx512f")]
fn odd_parts(x: __m512i, y: __m512i) -> __m512i {
    _mm512_shuffle_i32x4::<0b11_01_11_01>(x, y)
}

/// The sums of sixteen vectors, in the order of the vectors; each is summed in the same order whatever the others hold.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn sums16(v: [__m512; 16]) -> __m512 {
    // Halves the vectors four times: with neighbours, then with pairs, within 128-bit parts; then parts with parts.
    let mut v = v;
    for i in 0..8 {
        let (a, b) = (v[2 * i], v[2 * i + 1]);
        v[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for i in 0..4 {
        let (a, b) = (_mm512_castps_pd(v[2 * i]), _mm512_castps_pd(v[2 * i + 1]));
        let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
        v[i] = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    }
    for i in 0..2 {
        v[i] = add_parts(v[2 * i], v[2 * i + 1]);
    }
    add_parts(v[0], v[1])
}

/// The sums of neighbouring 128-bit parts of `a`, then of `b`.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_parts(a: __m512, b: __m512) -> __m512 {
    let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
    _mm512_add_ps(even, _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b))
}
