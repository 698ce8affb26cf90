//! What the NEON kernels share, and the instructions that have no stable intrinsic yet: each in a function of its own
//! that holds nothing else.
//!
//! All extensions of NEON belong to the one table named `neon`, as all of AVX-512 belong to `avx512`: nobody wants to
//! choose among extensions, and CI runs the tests on emulated processors with each of them. Kernels that differ in one such
//! instruction are written once, as a macro, because a generic function cannot have other target features for each use.

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

/// Lanes of the panels whose products come in squares: two tokens by two lanes in a vector.
pub(crate) const LANES: usize = 16;

/// The two tokens of such squares, lane by lane.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn tokens_of_squares(squares: &[float32x4_t; LANES / 2]) -> [[f32; LANES]; 2] {
    let mut tokens = [[0.0; LANES]; 2];
    for (i, squares) in squares.as_chunks::<2>().0.iter().enumerate() {
        let [a, b] = squares.map(|square| vreinterpretq_f64_f32(square));
        for (token, lanes) in tokens.iter_mut().zip([vtrn1q_f64(a, b), vtrn2q_f64(a, b)]) {
            let four = &mut token[4 * i..][..4];
            // SAFETY: the slice has 4 floats.
            unsafe { vst1q_f32(four.as_mut_ptr(), vreinterpretq_f32_f64(lanes)) };
        }
    }
    tokens
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

/// Defines `fn name(sum, a, b) -> sum`, one instruction that adds products to its first operand.
macro_rules! multiply_add {
    ($(#[$doc:meta])* $name:ident $(<$lane:ident>)?, $feature:literal, $text:literal, $sum:ty, $factor:ty) => {
        $(#[$doc])*
        #[inline]
        #[target_feature(enable = $feature)]
        pub(crate) fn $name$(<const $lane: usize>)?(mut sum: $sum, a: $factor, b: $factor) -> $sum {
            // SAFETY: the instruction works on registers and status flags alone; the caller has the feature.
            unsafe {
                asm!($text, inout(vreg) sum, in(vreg) a, in(vreg) b, $(lane = const $lane,)?
                     options(pure, nomem, nostack));
            }
            sum
        }
    };
}

multiply_add!(
    /// `sum[i] += a[4 i..][..4] . b[4 i..][..4]`.
    sdot, "neon,dotprod", "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", int32x4_t, int8x16_t
);
multiply_add!(
    /// `sum[i] += a[4 i..][..4] . b[4 LANE..][..4]`.
    sdot_lane<LANE>, "neon,dotprod", "sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{lane}]", int32x4_t, int8x16_t
);
multiply_add!(
    /// `sum[2 i + j] += a[8 i..][..8] . b[8 j..][..8]`.
    smmla, "neon,i8mm", "smmla {0:v}.4s, {1:v}.16b, {2:v}.16b", int32x4_t, int8x16_t
);
multiply_add!(
    /// `sum[2 i + j] += a[4 i..][..4] . b[4 j..][..4]` in bf16.
    bfmmla, "neon,bf16", "bfmmla {0:v}.4s, {1:v}.8h, {2:v}.8h", float32x4_t, uint16x8_t
);

/// To the nearest bf16, ties to even.
#[inline]
#[target_feature(enable = "neon,bf16")]
pub(crate) fn bfcvtn(x: float32x4_t) -> uint16x4_t {
    let bf16: uint16x4_t;
    // SAFETY: the instruction works on registers and status flags alone; the caller has the feature.
    unsafe {
        asm!("bfcvtn {0:v}.4h, {1:v}.4s", lateout(vreg) bf16, in(vreg) x, options(pure, nomem, nostack));
    }
    bf16
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use std::arch::is_aarch64_feature_detected;
    use std::io::Write as _;

    fn skipped(feature: &str) {
        // Not `eprintln!`, which the test harness swallows when a test passes.
        let _ = writeln!(std::io::stderr(), "SKIPPED: this CPU lacks `{feature}`");
    }

    /// Bytes of all sizes and signs, the most negative among them.
    fn bytes(seed: i32) -> [i8; 16] {
        std::array::from_fn(|i| ((i as i32 * 89 + seed * 57) % 256 - 128) as i8)
    }

    fn dot(a: &[i8], b: &[i8]) -> i32 {
        a.iter().zip(b).map(|(a, b)| i32::from(*a) * i32::from(*b)).sum()
    }

    #[target_feature(enable = "neon")]
    fn load(x: &[i8; 16]) -> int8x16_t {
        // SAFETY: `x` is an array of 16 bytes.
        unsafe { vld1q_s8(x.as_ptr()) }
    }

    #[target_feature(enable = "neon")]
    fn check(name: &str, got: int32x4_t, want: impl Fn(usize) -> i32) {
        let mut lanes = [0; 4];
        // SAFETY: `lanes` is an array of 4 integers.
        unsafe { vst1q_s32(lanes.as_mut_ptr(), got) };
        assert_eq!(lanes, std::array::from_fn(want), "{name}");
    }

    #[target_feature(enable = "neon,dotprod")]
    fn sdot_is_four_products_a_lane() {
        for seed in 0..50 {
            let (a, b) = (bytes(seed), bytes(3 * seed + 1));
            let (start, va, vb) = (vdupq_n_s32(1000 - seed), load(&a), load(&b));
            let quad = |i: usize, x: [i8; 16]| -> [i8; 4] { x.as_chunks().0[i] };
            check("sdot", sdot(start, va, vb), |i| 1000 - seed + dot(&quad(i, a), &quad(i, b)));
            let by_lane = |lane: usize| move |i: usize| 1000 - seed + dot(&quad(i, a), &quad(lane, b));
            check("sdot_lane 0", sdot_lane::<0>(start, va, vb), by_lane(0));
            check("sdot_lane 1", sdot_lane::<1>(start, va, vb), by_lane(1));
            check("sdot_lane 2", sdot_lane::<2>(start, va, vb), by_lane(2));
            check("sdot_lane 3", sdot_lane::<3>(start, va, vb), by_lane(3));
        }
    }

    #[target_feature(enable = "neon,i8mm")]
    fn smmla_is_a_square_of_products() {
        for seed in 0..50 {
            let (a, b) = (bytes(seed), bytes(3 * seed + 1));
            let got = smmla(vdupq_n_s32(seed - 7), load(&a), load(&b));
            check("smmla", got, |i| seed - 7 + dot(&a[i / 2 * 8..][..8], &b[i % 2 * 8..][..8]));
        }
    }

    #[target_feature(enable = "neon,bf16")]
    fn bfmmla_is_a_square_of_products() {
        for seed in 0..50_u16 {
            // Small whole numbers, whose sums are exact in any order.
            let numbers = |seed: u16| -> [bf16; 8] {
                std::array::from_fn(|i| bf16::from_f32(f32::from((i as u16 * 29 + seed * 13) % 61) - 30.0))
            };
            let (a, b) = (numbers(seed), numbers(3 * seed + 1));
            let mut got = [0.0; 4];
            // SAFETY: all four are arrays of the vectors' sizes; `bf16` is two bytes of plain data.
            unsafe {
                let (va, vb) = (vld1q_u16(a.as_ptr().cast()), vld1q_u16(b.as_ptr().cast()));
                vst1q_f32(got.as_mut_ptr(), bfmmla(vdupq_n_f32(0.5), va, vb));
            }
            let want = |i: usize| {
                let terms = a[i / 2 * 4..][..4].iter().zip(&b[i % 2 * 4..][..4]);
                0.5 + terms.map(|(a, b)| a.to_f32() * b.to_f32()).sum::<f32>()
            };
            assert_eq!(got, std::array::from_fn(want));
        }
    }

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
            if is_aarch64_feature_detected!("bf16") {
                let mut narrow = [0; 4];
                // SAFETY: the CPU has the feature; `narrow` is an array of 4.
                unsafe { vst1_u16(narrow.as_mut_ptr(), bfcvtn(vld1q_f32(x.as_ptr()))) };
                check_rounding("bfcvtn", x, &narrow);
            } else {
                skipped("bf16");
            }
        }
    }

    #[test]
    fn instructions_do_what_their_names_say() {
        if is_aarch64_feature_detected!("dotprod") {
            // SAFETY: the CPU has the feature.
            unsafe { sdot_is_four_products_a_lane() };
        } else {
            skipped("dotprod");
        }
        if is_aarch64_feature_detected!("i8mm") {
            // SAFETY: the CPU has the feature.
            unsafe { smmla_is_a_square_of_products() };
        } else {
            skipped("i8mm");
        }
        if is_aarch64_feature_detected!("bf16") {
            // SAFETY: the CPU has the feature.
            unsafe { bfmmla_is_a_square_of_products() };
        } else {
            skipped("bf16");
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
