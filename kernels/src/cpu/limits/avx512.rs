//! Peaks of AVX-512 and two of its extensions.

#![allow(unsafe_code, reason = "vector loads, and empty assembly that hides a value from the optimizer")]

use super::super::avx2::{KEEP, ONCE, prefetch_line};
use super::super::maker::AHEAD;
use super::{NONE, Peak, Probes};
use std::arch::asm;
use std::arch::x86_64::*;

pub(super) static AVX512: Probes =
    Probes { read: Some(read::<ONCE>), f32: Some(Peak { run: f32, ops: SUMS as u64 * 16 * 2 }), ..NONE };

pub(super) static AVX512_KEEP: Probes = Probes { read: Some(read::<KEEP>), ..NONE };

pub(super) static VNNI: Probes = Probes { int8: Some(Peak { run: int8, ops: SUMS as u64 * 64 * 2 }), ..NONE };

pub(super) static BF16: Probes = Probes { bf16: Some(Peak { run: bf16, ops: SUMS as u64 * 32 * 2 }), ..NONE };

/// Two units of up to eight cycles' latency; with more, compilers begin to keep some in memory.
const SUMS: usize = 16;

/// The same value, of which the optimizer knows nothing.
macro_rules! hide {
    ($x:ident) => {
        // SAFETY: no instruction at all; the register keeps its value.
        unsafe { asm!("/* {0} */", inout(zmm_reg) $x, options(nomem, nostack, preserves_flags)) }
    };
}

#[target_feature(enable = "avx512f")]
fn read<const HINT: i32>(bytes: &[u8]) -> u64 {
    let (lines, tail) = bytes.as_chunks::<128>();
    let mut sums = [_mm512_setzero_si512(); 2];
    for line in lines {
        prefetch_line::<HINT>(line.as_ptr().wrapping_add(AHEAD));
        prefetch_line::<HINT>(line[64..].as_ptr().wrapping_add(AHEAD));
        for (sum, part) in sums.iter_mut().zip(line.as_chunks::<64>().0) {
            // SAFETY: `part` is an array of 64 bytes.
            *sum = _mm512_xor_si512(*sum, unsafe { _mm512_loadu_si512(part.as_ptr().cast()) });
        }
    }
    let mut words = [0u64; 8];
    // SAFETY: `words` has the 64 bytes of a register.
    unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), _mm512_xor_si512(sums[0], sums[1])) };
    let sum = words.iter().fold(0, |sum, word| sum ^ word);
    tail.iter().fold(sum, |sum, byte| sum.rotate_left(8) ^ u64::from(*byte))
}

#[target_feature(enable = "avx512f")]
fn f32(rounds: usize) -> f32 {
    let (mut a, b) = (_mm512_set1_ps(1e-3), _mm512_set1_ps(1e-3));
    hide!(a);
    let mut sums = [b; SUMS];
    // Sums that start alike are one value to the optimizer.
    for (i, sum) in sums.iter_mut().enumerate() {
        *sum = _mm512_set1_ps(i as f32);
    }
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(a, b, *sum);
        }
    }
    sums.iter().fold(0.0, |total, sum| total + _mm512_cvtss_f32(*sum))
}

#[target_feature(enable = "avx512f,avx512vnni")]
fn int8(rounds: usize) -> f32 {
    let (mut w, x) = (_mm512_set1_epi8(3), _mm512_set1_epi8(-5));
    let mut sums = [_mm512_setzero_si512(); SUMS];
    for _ in 0..rounds {
        hide!(w);
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, w, x);
        }
    }
    sums.iter().fold(0.0, |total, sum| total + _mm512_cvtsi512_si32(*sum) as f32)
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16(rounds: usize) -> f32 {
    let (a, b) = (_mm512_set1_ps(0.999), _mm512_set1_ps(1e-3));
    let (x, y) = (_mm512_cvtne2ps_pbh(a, b), _mm512_cvtne2ps_pbh(b, b));
    let mut sums = [_mm512_setzero_ps(); SUMS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, x, y);
        }
    }
    sums.iter().fold(0.0, |total, sum| total + _mm512_cvtss_f32(*sum))
}
