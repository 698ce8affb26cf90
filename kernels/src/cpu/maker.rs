//! What depends on a processor's maker, not on a feature that can be asked for.
//!
//! There are three such choices: how far ahead of its use a weight is asked for, by which kind of prefetch, and whether
//! AVX-512 multiplies in bf16. Every other choice follows from features.

use std::arch::x86_64::__cpuid;
use std::sync::LazyLock;

const AMD: &[u8; 12] = b"AuthenticAMD";
const INTEL: &[u8; 12] = b"GenuineIntel";

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
        if maker() == *AMD && family < 26 { AHEAD_ZEN4 } else { AHEAD }
    });
    *FAR
}

/// Whether [`super::avx2::KEEP`] is the faster hint. On Intel's processors a line that is not to be kept comes past the
/// second-level cache and unseen by its prefetcher, at a fifth of the rate; on AMD's it leaves the caches to others.
pub(crate) fn keeps() -> bool {
    static KEEPS: LazyLock<bool> = LazyLock::new(|| maker() == *INTEL);
    *KEEPS
}

/// Whether AVX-512's products in bf16 are slower than those in f32: on Intel's processors, where AMX is meant to be used
/// instead but a hypervisor may hide it, they have half of the rate, on AMD's twice.
///
/// By name and not by measurement: a training that goes on later must come to the same numbers.
pub(crate) fn slow_bf16() -> bool {
    maker() == *INTEL
}

/// The maker's name.
fn maker() -> [u8; 12] {
    let leaf = __cpuid(0);
    let mut name = [0; 12];
    name.copy_from_slice([leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).as_flattened());
    name
}
