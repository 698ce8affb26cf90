//! Peaks of 64-bit ARM: what every such CPU has, and its dot and matrix products.

#![allow(unsafe_code, reason = "vector loads, and instructions that have no stable intrinsic")]

use super::{NONE, Peak, Probes};
use std::arch::aarch64::*;
use std::arch::asm;

pub(super) static NEON: Probes = Probes {
    read: Some(read),
    f32: Some(Peak { run: f32, ops: SUMS as u64 * 4 * 2 }),
    int8: Some(Peak { run: int8, ops: 8 * 16 * 2 }),
    ..NONE
};

pub(super) static DOTPROD: Probes = Probes { int8: Some(Peak { run: dot_i8, ops: SUMS as u64 * 16 * 2 }), ..NONE };

pub(super) static I8MM: Probes = Probes { int8: Some(Peak { run: matrix_i8, ops: SUMS as u64 * 32 * 2 }), ..NONE };

pub(super) static BF16_DOT: Probes = Probes { bf16: Some(Peak { run: dot_bf16, ops: SUMS as u64 * 8 * 2 }), ..NONE };

pub(super) static BF16_MATRIX: Probes =
    Probes { bf16: Some(Peak { run: matrix_bf16, ops: SUMS as u64 * 16 * 2 }), ..NONE };

/// Four units of four cycles' latency; with more, compilers begin to keep some in memory.
const SUMS: usize = 16;

/// The same value, of which the optimizer knows nothing.
macro_rules! hide {
    ($x:ident) => {
        // SAFETY: no instruction at all; the register keeps its value.
        unsafe { asm!("/* {0:v} */", inout(vreg) $x, options(nomem, nostack, preserves_flags)) }
    };
}

#[target_feature(enable = "neon")]
fn read(bytes: &[u8]) -> u64 {
    let (lines, tail) = bytes.as_chunks::<64>();
    let mut sums = [vdupq_n_u64(0); 4];
    for line in lines {
        for (sum, part) in sums.iter_mut().zip(line.as_chunks::<16>().0) {
            // SAFETY: `part` is an array of 16 bytes.
            *sum = veorq_u64(*sum, unsafe { vreinterpretq_u64_u8(vld1q_u8(part.as_ptr())) });
        }
    }
    let sum = veorq_u64(veorq_u64(sums[0], sums[1]), veorq_u64(sums[2], sums[3]));
    let sum = vgetq_lane_u64::<0>(sum) ^ vgetq_lane_u64::<1>(sum);
    tail.iter().fold(sum, |sum, byte| sum.rotate_left(8) ^ u64::from(*byte))
}

#[target_feature(enable = "neon")]
fn f32(rounds: usize) -> f32 {
    let (mut a, b) = (vdupq_n_f32(1e-3), vdupq_n_f32(1e-3));
    hide!(a);
    let mut sums = [b; SUMS];
    // Sums that start alike are one value to the optimizer.
    for (i, sum) in sums.iter_mut().enumerate() {
        *sum = vdupq_n_f32(i as f32);
    }
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = vfmaq_f32(*sum, a, b);
        }
    }
    sums.iter().fold(0.0, |total, sum| total + vgetq_lane_f32::<0>(*sum))
}

/// Without dot products: 16-bit products of both halves, summed in pairs to 32 bits.
#[target_feature(enable = "neon")]
fn int8(rounds: usize) -> f32 {
    let (mut w, x) = (vdupq_n_s8(3), vdupq_n_s8(-5));
    let mut sums = [vdupq_n_s32(0); 8];
    for _ in 0..rounds {
        for sum in &mut sums {
            hide!(w);
            let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
            *sum = vpadalq_s16(*sum, vmlal_high_s8(low, w, x));
        }
    }
    sums.iter().fold(0.0, |total, sum| total + vgetq_lane_s32::<0>(*sum) as f32)
}

/// A loop of one instruction `sum, x, y` on registers.
macro_rules! instruction {
    ($name:ident, $feature:literal, $text:literal, $zero:expr, $x:expr, $y:expr, $lane:expr) => {
        #[target_feature(enable = $feature)]
        fn $name(rounds: usize) -> f32 {
            let (x, y) = ($x, $y);
            let mut sums = [$zero; SUMS];
            for _ in 0..rounds {
                for sum in &mut sums {
                    // SAFETY: arithmetic on three registers; the caller's table checked that the CPU has it.
                    unsafe {
                        asm!($text, inout(vreg) *sum, in(vreg) x, in(vreg) y, options(pure, nomem, nostack, preserves_flags));
                    }
                }
            }
            sums.iter().fold(0.0, |total, sum| total + $lane(*sum) as f32)
        }
    };
}

instruction!(
    dot_i8,
    "neon,dotprod",
    "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
    vdupq_n_s32(0),
    vdupq_n_s8(3),
    vdupq_n_s8(-5),
    vgetq_lane_s32::<0>
);
instruction!(
    matrix_i8,
    "neon,i8mm",
    "smmla {0:v}.4s, {1:v}.16b, {2:v}.16b",
    vdupq_n_s32(0),
    vdupq_n_s8(3),
    vdupq_n_s8(-5),
    vgetq_lane_s32::<0>
);
// 0x3c00 is 2^-7 in bf16: no sum grows beyond f32.
instruction!(
    dot_bf16,
    "neon,bf16",
    "bfdot {0:v}.4s, {1:v}.8h, {2:v}.8h",
    vdupq_n_f32(0.0),
    vdupq_n_u16(0x3c00),
    vdupq_n_u16(0x3c00),
    vgetq_lane_f32::<0>
);
instruction!(
    matrix_bf16,
    "neon,bf16",
    "bfmmla {0:v}.4s, {1:v}.8h, {2:v}.8h",
    vdupq_n_f32(0.0),
    vdupq_n_u16(0x3c00),
    vdupq_n_u16(0x3c00),
    vgetq_lane_f32::<0>
);
