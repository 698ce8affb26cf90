//! What the AVX2 kernels share.

use super::shelf;
use std::arch::x86_64::*;
use std::sync::LazyLock;

/// Bytes that the matrix-vector products read ahead: what memory delivers in some 300 ns. With a quarter of it, a core
/// reads at three quarters of the rate; but see [`ahead`].
pub(crate) const AHEAD: usize = 12 * 1024;

/// The same for AMD's processors before Zen 5. On Zen 4, decoding is a twentieth slower with four times as much and a
/// quarter slower with none.
const AHEAD_ZEN4: usize = 2 * 1024;

/// How far to read ahead here.
pub(crate) fn ahead() -> usize {
    static FAR: LazyLock<usize> = LazyLock::new(|| {
        // Family numbers from 15 on are continued in a field of their own; that of Zen 5 is 26.
        let signature = __cpuid(1).eax;
        let family = (signature >> 8 & 15) + (signature >> 20 & 255);
        if vendor() == *b"AuthenticAMD" && family < 26 { AHEAD_ZEN4 } else { AHEAD }
    });
    *FAR
}

/// The maker's name.
fn vendor() -> [u8; 12] {
    let leaf = __cpuid(0);
    let mut name = [0; 12];
    name.copy_from_slice([leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).as_flattened());
    name
}

/// Hints for what a token reads once: not to be kept in larger caches, or to be kept.
pub(crate) const ONCE: i32 = _MM_HINT_NTA;
pub(crate) const KEEP: i32 = _MM_HINT_T0;

/// Whether [`KEEP`] is the faster hint. On Intel's processors a line that is not to be kept comes past the second-level
/// cache and unseen by its prefetcher, at a fifth of the rate; on AMD's it leaves the caches to others.
pub(crate) fn keeps() -> bool {
    static KEEPS: LazyLock<bool> = LazyLock::new(|| vendor() == *b"GenuineIntel");
    *KEEPS
}

/// Calls a function of a hint with the one that is faster here, and with how far to read ahead as last argument.
macro_rules! with_hint {
    ($function:ident($($arg:expr),*)) => {
        if $crate::cpu::avx2::keeps() {
            $function::<{ $crate::cpu::avx2::KEEP }>($($arg),*, $crate::cpu::avx2::ahead())
        } else {
            $function::<{ $crate::cpu::avx2::ONCE }>($($arg),*, $crate::cpu::avx2::ahead())
        }
    };
}
pub(crate) use with_hint;

/// The same with what a matrix in 8 bits wants.
macro_rules! with_ahead {
    ($function:ident($w:expr, $($arg:expr),*)) => {
        if $w.is_shelved() {
            $function::<{ $crate::cpu::avx2::KEEP }>($w, $($arg),*, $crate::cpu::shelf::AHEAD)
        } else {
            $crate::cpu::avx2::with_hint!($function($w, $($arg),*))
        }
    };
}
pub(crate) use with_ahead;

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
