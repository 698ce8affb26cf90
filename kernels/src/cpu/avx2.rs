//! What the AVX2 kernels share.

use super::shelf;
use std::arch::x86_64::*;

/// Hints for what a token reads once: not to be kept in larger caches, or to be kept.
pub(crate) const ONCE: i32 = _MM_HINT_NTA;
pub(crate) const KEEP: i32 = _MM_HINT_T0;

/// Calls a function of a hint with the one that is faster here, and with how far to read ahead as last argument.
macro_rules! with_hint {
    ($function:ident($($arg:expr),*)) => {
        if $crate::cpu::maker::keeps() {
            $function::<{ $crate::cpu::avx2::KEEP }>($($arg),*, $crate::cpu::maker::ahead())
        } else {
            $function::<{ $crate::cpu::avx2::ONCE }>($($arg),*, $crate::cpu::maker::ahead())
        }
    };
}
pub(crate) use with_hint;

/// Asks for the cache line that comes [`shelf::AHEAD`] after the one at `at`.
#[inline(always)]
pub(crate) fn read_shelf(at: *const u8) {
    prefetch_line::<KEEP>(at.wrapping_add(shelf::AHEAD));
}

/// Asks for the cache line at `at`, wherever that is: a prefetch is no access.
#[inline(always)]
pub(crate) fn prefetch_line<const HINT: i32>(at: *const u8) {
    // SAFETY: every x86-64 processor has the instruction, and it reads nothing.
    #[allow(unsafe_code, reason = "an instruction that needs no feature")]
    unsafe {
        _mm_prefetch::<HINT>(at.cast());
    }
}

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

/// Selects the first `n` lanes in masked loads and stores.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn first_lanes(n: usize) -> __m256i {
    _mm256_cmpgt_epi32(_mm256_set1_epi32(n.min(8) as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))
}
