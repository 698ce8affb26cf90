//! What the AVX2 kernels share.

use std::arch::x86_64::*;

/// The sums of four vectors, each `((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))` whatever the others hold.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn sum4(v: [__m256; 4]) -> __m128 {
    let pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps::<1>(pairs))
}

/// The sum of one vector, in the order of [`sum4`].
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn sum1(v: __m256) -> f32 {
    let zero = _mm256_setzero_ps();
    _mm_cvtss_f32(sum4([v, zero, zero, zero]))
}

/// See [`super::Table::prefetch`].
#[target_feature(enable = "avx2")]
pub(crate) fn prefetch(bytes: &[u8]) {
    for line in bytes.chunks(64) {
        _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
    }
}

/// Selects the first `n` lanes in masked loads and stores.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn first_lanes(n: usize) -> __m256i {
    _mm256_cmpgt_epi32(_mm256_set1_epi32(n.min(8) as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))
}
