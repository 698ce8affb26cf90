//! What the AVX-512 kernels share.

use std::arch::x86_64::*;

/// The upper half added to the lower.
#[inline]
#[target_feature(enable = "avx512f,avx2")]
pub(crate) fn halve(v: __m512) -> __m256 {
    let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)));
    _mm256_add_ps(_mm512_castps512_ps256(v), upper)
}
