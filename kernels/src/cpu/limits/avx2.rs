//! Peaks of 256-bit x86-64.

#![allow(unsafe_code, reason = "vector loads, and empty assembly that hides a value from the optimizer")]

use super::super::avx2::{KEEP, ONCE, prefetch_line};
use super::super::maker::AHEAD;
use super::{NONE, Peak, Probes};
use std::arch::asm;
use std::arch::x86_64::*;

pub(super) static AVX2: Probes = Probes {
    read: Some(read::<ONCE>),
    f32: Some(Peak { run: f32, ops: 12 * 8 * 2 }),
    int8: Some(Peak { run: int8, ops: 8 * 32 * 2 }),
    ..NONE
};

/// The faster way to read depends on the maker.
pub(super) static AVX2_KEEP: Probes = Probes { read: Some(read::<KEEP>), ..NONE };

/// 256-bit dot products without AVX-512, as client processors have them.
pub(super) static AVX_VNNI: Probes = Probes { int8: Some(Peak { run: vnni, ops: 12 * 32 * 2 }), ..NONE };

/// The same value, of which the optimizer knows nothing: without it, products of constants would be computed once.
macro_rules! hide {
    ($x:ident) => {
        // SAFETY: no instruction at all; the register keeps its value.
        unsafe { asm!("/* {0} */", inout(ymm_reg) $x, options(nomem, nostack, preserves_flags)) }
    };
}

#[target_feature(enable = "avx2")]
fn read<const HINT: i32>(bytes: &[u8]) -> u64 {
    let (lines, tail) = bytes.as_chunks::<128>();
    let mut sums = [_mm256_setzero_si256(); 4];
    for line in lines {
        prefetch_line::<HINT>(line.as_ptr().wrapping_add(AHEAD));
        prefetch_line::<HINT>(line[64..].as_ptr().wrapping_add(AHEAD));
        for (sum, part) in sums.iter_mut().zip(line.as_chunks::<32>().0) {
            // SAFETY: `part` is an array of 32 bytes.
            *sum = _mm256_xor_si256(*sum, unsafe { _mm256_loadu_si256(part.as_ptr().cast()) });
        }
    }
    let sum = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
    let words = [_mm256_extract_epi64::<0>(sum), _mm256_extract_epi64::<1>(sum), _mm256_extract_epi64::<2>(sum)];
    let sum = words.iter().fold(_mm256_extract_epi64::<3>(sum), |sum, word| sum ^ word);
    tail.iter().fold(sum.cast_unsigned(), |sum, byte| sum.rotate_left(8) ^ u64::from(*byte))
}

#[target_feature(enable = "avx2,fma")]
fn f32(rounds: usize) -> f32 {
    let (mut a, b) = (_mm256_set1_ps(1e-3), _mm256_set1_ps(1e-3));
    hide!(a);
    let mut sums = [b; 12];
    // Sums that start alike are one value to the optimizer.
    for (i, sum) in sums.iter_mut().enumerate() {
        *sum = _mm256_set1_ps(i as f32);
    }
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(a, b, *sum);
        }
    }
    sums.iter().fold(0.0, |total, sum| total + _mm256_cvtss_f32(*sum))
}

/// Three instructions for 32 products: to 16 bits in pairs, to 32 bits in pairs, and the sum.
#[target_feature(enable = "avx2")]
fn int8(rounds: usize) -> f32 {
    let (mut w, x, ones) = (_mm256_set1_epi8(3), _mm256_set1_epi8(-5), _mm256_set1_epi16(1));
    let mut sums = [_mm256_setzero_si256(); 8];
    for _ in 0..rounds {
        for sum in &mut sums {
            hide!(w);
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
        }
    }
    sums.iter().fold(0.0, |total, sum| total + _mm256_extract_epi32::<0>(*sum) as f32)
}

#[target_feature(enable = "avx2,avxvnni")]
fn vnni(rounds: usize) -> f32 {
    let (mut w, x) = (_mm256_set1_epi8(3), _mm256_set1_epi8(-5));
    let mut sums = [_mm256_setzero_si256(); 12];
    for _ in 0..rounds {
        hide!(w);
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, w, x);
        }
    }
    sums.iter().fold(0.0, |total, sum| total + _mm256_extract_epi32::<0>(*sum) as f32)
}
