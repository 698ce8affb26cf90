//! What the NEON kernels share.

#![allow(unsafe_code, reason = "instructions without stable intrinsics, vector loads")]

use std::arch::aarch64::*;
use std::arch::asm;

/// The sums of four vectors, each `(0 + 1) + (2 + 3)` whatever the others hold.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn sum4(v: [float32x4_t; 4]) -> float32x4_t {
    vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3]))
}

/// The sum of one vector, in the order of [`sum4`].
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn sum1(v: float32x4_t) -> f32 {
    vgetq_lane_f32::<0>(sum4([v; 4]))
}

/// The first four of `x`, zeros where it is shorter.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn load_part(x: &[f32]) -> float32x4_t {
    let mut padded = [0.0; 4];
    let four = x.first_chunk().unwrap_or_else(|| {
        padded[..x.len()].copy_from_slice(x);
        &padded
    });
    // SAFETY: `four` is an array of 4 floats.
    unsafe { vld1q_f32(four.as_ptr()) }
}

/// To the nearest bf16, ties to even, by adding half of the last place that stays; a NaN is kept from the carry.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn round_bf16(x: float32x4_t) -> float32x4_t {
    let bits = vreinterpretq_u32_f32(x);
    let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
    let carried = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    let rounded = vandq_u32(carried, vdupq_n_u32(0xffff_0000));
    vbslq_f32(vceqq_f32(x, x), vreinterpretq_f32_u32(rounded), x)
}

/// Calls `work` with four, two or one of `rows` at a time and the number of the first.
#[inline(always)]
pub(crate) fn by_fours<T>(mut rows: &mut [T], mut work: impl FnMut(usize, &mut [T])) {
    let mut first = 0;
    while !rows.is_empty() {
        let count = [4, 2].into_iter().find(|n| *n <= rows.len()).unwrap_or(1);
        let (now, later) = rows.split_at_mut(count);
        work(first, now);
        (first, rows) = (first + count, later);
    }
}

/// Asks for the cache line at `at`. A prefetch is no access: it may point anywhere.
#[inline(always)]
pub(crate) fn prefetch<T>(at: *const T) {
    // SAFETY: `prfm` changes neither registers nor memory and never faults.
    unsafe { asm!("prfm pldl1keep, [{}]", in(reg) at, options(readonly, nostack, preserves_flags)) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    /// Numbers at and beside ties, subnormal, infinite and none.
    const EDGES: [f32; 12] = [
        0.0,
        -1.0,
        f32::from_bits(0x3f80_8000),
        f32::from_bits(0x3f81_8000),
        f32::from_bits(0x3f80_8001),
        f32::from_bits(0xbf80_7fff),
        f32::MAX,
        f32::INFINITY,
        f32::NEG_INFINITY,
        1e-40,
        f32::NAN,
        -f32::NAN,
    ];

    fn check_rounding(name: &str, x: &[f32], got: &[u16; 4]) {
        for (x, got) in x.iter().zip(got) {
            let (want, got) = (bf16::from_f32(*x), bf16::from_bits(*got));
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && x.is_nan()), "{name}({x}) = {got}, not {want}");
        }
    }

    #[test]
    fn bf16_is_rounded_to_the_nearest() {
        for x in EDGES.as_chunks::<4>().0 {
            let mut wide = [0.0_f32; 4];
            // SAFETY: NEON is part of every aarch64; both are arrays of 4 floats.
            unsafe { vst1q_f32(wide.as_mut_ptr(), round_bf16(vld1q_f32(x.as_ptr()))) };
            assert!(wide.iter().all(|x| x.is_nan() || x.to_bits() & 0xffff == 0));
            check_rounding("round_bf16", x, &wide.map(|x| (x.to_bits() >> 16) as u16));
        }
    }

    #[test]
    fn sums_have_one_order() {
        // SAFETY: NEON is part of every aarch64.
        unsafe {
            let v = vld1q_f32([1e8, 1.0, -1e8, 1.0].as_ptr());
            let want = (1e8_f32 + 1.0) + (-1e8 + 1.0);
            assert_eq!(sum1(v), want);
            let all = sum4([vdupq_n_f32(1.0), v, vdupq_n_f32(f32::NAN), load_part(&[1.0, 2.0])]);
            let mut sums = [0.0; 4];
            vst1q_f32(sums.as_mut_ptr(), all);
            assert!(sums[0] == 4.0 && sums[1] == want && sums[2].is_nan() && sums[3] == 3.0, "{sums:?}");
        }
    }
}
