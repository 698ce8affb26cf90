//! 8-bit products with NEON: in the base set by widening multiplications, whose sums of two still fit 16 bits as no code
//! exceeds 127, and where the CPU has it by `sdot`, four codes a lane.
//!
//! `smmla` makes tiles alone: with one token there is nothing to put into the other row of its square.

#![allow(unsafe_code, reason = "vector loads and stores")]
#![allow(clippy::needless_range_loop, reason = "loops over registers read like the tile when they count")]

use super::super::neon::{by_fours, prefetch, sdot, sdot_lane, sum1};
use super::super::nf4::Nf4;
use super::super::shelf;
use super::columns::{Block, each_tile};
use super::portable::TINY;
use super::{BLOCK, Down, GROUP, Hidden, Int8, Panel, Place, Q8, Q8Mut, Q8Row, QUAD, Rows, TILE, Up, each_row};
use std::arch::aarch64::*;

pub(crate) use super::super::neon::LANES;

/// Codes in a vector.
pub(super) const VECTOR: usize = 16;
/// Bytes that the matrix-vector products read ahead.
const AHEAD: usize = 1024;

/// See [`super::super::Table::q8_quantize`].
#[target_feature(enable = "neon")]
pub(crate) fn quantize(x: &[f32], q: Q8Mut) {
    let parts = q.codes.iter_mut().zip(q.units).zip(q.starts);
    for (x, ((codes, unit), start)) in x.as_chunks::<BLOCK>().0.iter().zip(parts) {
        // SAFETY: `x` is an array of 64 floats; the load puts the even ones of eight first.
        let pairs: [float32x4x2_t; 8] = std::array::from_fn(|i| unsafe { vld2q_f32(x.as_ptr().add(8 * i)) });
        let most = pairs.map(|v| vmaxq_f32(vabsq_f32(v.0), vabsq_f32(v.1)));
        // A NaN is the maximum of all that it is compared with.
        let largest = vmaxvq_f32(most.into_iter().fold(vdupq_n_f32(0.0), |a, b| vmaxq_f32(a, b)));
        let broken = !largest.is_finite();
        *unit = if broken { f32::NAN } else { if largest < TINY { 0.0 } else { largest / 127.0 } };
        let inverse = if *unit > 0.0 { 127.0 / largest } else { 0.0 };
        let mut sum = vdupq_n_s32(0);
        for (odd, codes) in codes.as_chunks_mut::<{ BLOCK / 2 }>().0.iter_mut().enumerate() {
            let rounded = pairs.map(|v| {
                let n = vcvtnq_s32_f32(vmulq_n_f32(if odd == 0 { v.0 } else { v.1 }, inverse));
                vreinterpretq_s16_s32(if broken { vdupq_n_s32(0) } else { n })
            });
            for (n, codes) in rounded.as_chunks::<4>().0.iter().zip(codes.as_chunks_mut::<VECTOR>().0) {
                // Codes fit in a byte, so the lowest one of each integer is all of it.
                let halves = [vuzp1q_s16(n[0], n[1]), vuzp1q_s16(n[2], n[3])].map(|n| vreinterpretq_s8_s16(n));
                let bytes = vuzp1q_s8(halves[0], halves[1]);
                // SAFETY: `codes` is an array of 16 bytes.
                unsafe { vst1q_s8(codes.as_mut_ptr(), bytes) };
                sum = vpadalq_s16(sum, vpaddlq_s8(bytes));
            }
        }
        *start = -128 * vaddvq_s32(sum);
    }
}

/// The codebook.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn book(w: &Nf4) -> int8x16_t {
    // SAFETY: the codes are an array of 16 bytes.
    unsafe { vld1q_s8(w.codebook().codes.as_ptr()) }
}

/// The codes of 32 packed bytes: those of the high halves, then those of the low ones.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn look_up(book: int8x16_t, packed: &[u8; 32]) -> [int8x16_t; 4] {
    // SAFETY: `packed` is an array of 32 bytes.
    let bytes = [0, VECTOR].map(|at| unsafe { vld1q_u8(packed.as_ptr().add(at)) });
    let [a, b] = bytes.map(|bytes| vqtbl1q_s8(book, vshrq_n_u8::<4>(bytes)));
    let [c, d] = bytes.map(|bytes| vqtbl1q_s8(book, vandq_u8(bytes, vdupq_n_u8(15))));
    [a, b, c, d]
}

/// A block of activations, or of weights.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load<T>(codes: &[T; BLOCK]) -> [int8x16_t; 4] {
    const { assert!(size_of::<T>() == 1) };
    // SAFETY: `codes` is an array of 64 bytes.
    std::array::from_fn(|i| unsafe { vld1q_s8(codes.as_ptr().cast::<i8>().add(VECTOR * i)) })
}

/// Vector `part` of a block of activations.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_part(row: Q8Row, block: usize, part: usize) -> int8x16_t {
    let codes = &row.codes[block].as_chunks::<VECTOR>().0[part];
    // SAFETY: `codes` is an array of 16 bytes.
    unsafe { vld1q_s8(codes.as_ptr()) }
}

/// The blocks of a panel with their scales.
#[inline(always)]
pub(super) fn blocks<'a>(
    panel: &'a Panel,
    at: &Place,
) -> impl Iterator<Item = (&'a [u8; BLOCK * LANES], &'a [f32; LANES])> {
    panel.codes.as_chunks().0.iter().zip(panel.scales.as_chunks().0).take(at.blocks)
}

/// `sum + scale dot`.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn add_scaled(sum: float32x4_t, dot: int32x4_t, scale: float32x4_t) -> float32x4_t {
    vfmaq_f32(sum, vcvtq_f32_s32(dot), scale)
}

/// Four bf16.
#[inline]
#[target_feature(enable = "neon")]
fn widen(scales: &[[u8; 2]; 4]) -> float32x4_t {
    // SAFETY: `scales` is four times two bytes.
    vreinterpretq_f32_u32(vshll_n_u16::<16>(unsafe { vld1_u16(scales.as_ptr().cast()) }))
}

/// Defines the kernels that differ in how products are summed alone. A function may use the instructions of its own
/// `$features` only, which is why they are written out once for each and not generic.
macro_rules! kernels {
    ($features:literal) => {
        /// See [`crate::cpu::Table::q8_nf4_matvec`].
        #[target_feature(enable = $features)]
        pub(crate) fn nf4_matvec(w: &Nf4, row: usize, x: Q8Row, y: &mut [f32]) {
            let (book, unit) = (book(w), w.codebook().unit);
            let scales = |group: usize, out: &mut [f32]| w.scales64(group, out);
            each_row(w, row, x, y, scales, |mut rows, y| {
                for y in y {
                    let Rows { packed, factors, x, .. } = rows.take(1);
                    let mut sum = vdupq_n_f32(0.0);
                    for ((packed, codes), factor) in packed.iter().zip(x.codes).zip(factors) {
                        prefetch(packed.as_ptr().wrapping_add(AHEAD));
                        sum = add_scaled(sum, dot64(look_up(book, packed), load(codes)), vdupq_n_f32(*factor));
                    }
                    *y = sum1(sum) * unit;
                }
            });
        }

        /// See [`crate::cpu::Table::q8_int8_matvec`].
        #[target_feature(enable = $features)]
        pub(crate) fn int8_matvec(w: &Int8, row: usize, x: Q8Row, y: &mut [f32]) {
            for (i, y) in y.iter_mut().enumerate() {
                let mut sum = vdupq_n_f32(0.0);
                for ((w, codes), unit) in w.row(row + i).iter().zip(x.codes).zip(x.units) {
                    prefetch(w.as_ptr().wrapping_add(AHEAD));
                    sum = add_scaled(sum, dot64(load(w), load(codes)), vdupq_n_f32(*unit));
                }
                *y = sum1(sum) * w.scale(row + i);
            }
        }

        /// See [`crate::cpu::Table::q8_down`].
        #[target_feature(enable = $features)]
        pub(crate) fn down(w: &Down, tile: usize, x: Q8Row, y: &mut [f32; GROUP]) {
            let (blocks, scales) = w.blocks(tile, x);
            // A row's octet is in two lanes.
            let mut sums = [vdupq_n_f32(0.0); GROUP / 2];
            for Block { octets, codes, unit, .. } in blocks {
                let mut dots = [zero(); GROUP / 2];
                for (w, x) in octets.iter().zip(codes) {
                    prefetch(w.as_ptr().wrapping_byte_add(shelf::AHEAD));
                    let x = vreinterpretq_s8_s64(vdupq_n_s64(i64::from_le_bytes(x.map(i8::cast_unsigned))));
                    for (dot, w) in dots.iter_mut().zip(w.as_flattened().as_chunks::<VECTOR>().0) {
                        // SAFETY: `w` is an array of 16 bytes.
                        *dot = add_quad(*dot, unsafe { vld1q_s8(w.as_ptr().cast()) }, x);
                    }
                }
                for (sum, dot) in sums.iter_mut().zip(dots) {
                    *sum = add_scaled(*sum, total(dot), vdupq_n_f32(unit));
                }
            }
            let parts = y.as_chunks_mut::<4>().0.iter_mut().zip(scales.as_chunks::<4>().0).zip(sums.as_chunks::<2>().0);
            for ((y, scales), sums) in parts {
                // SAFETY: `y` is an array of 4 floats.
                unsafe { vst1q_f32(y.as_mut_ptr(), vmulq_f32(vpaddq_f32(sums[0], sums[1]), widen(scales))) };
            }
        }

        /// See [`crate::cpu::Table::q8_add_columns`].
        #[target_feature(enable = $features)]
        pub(crate) fn add_columns(w: &Up, row: usize, h: &[Hidden], y: &mut [f32]) {
            each_tile(w, row, h, y, |quads, scales, y| {
                let mut sums = [vdupq_n_f32(0.0); TILE / 4];
                prefetch(scales.as_ptr().wrapping_byte_add(shelf::AHEAD));
                for (quads, h) in quads.chunks(GROUP / QUAD).zip(h) {
                    let (mut dots, h) = ([zero(); TILE / 4], h.get());
                    for (quad, codes) in quads.iter().zip(h.codes) {
                        prefetch(quad.as_ptr().wrapping_byte_add(shelf::AHEAD));
                        prefetch(quad.as_ptr().wrapping_byte_add(shelf::AHEAD + QUAD * TILE / 2));
                        let codes = vreinterpretq_s8_s32(vdupq_n_s32(codes));
                        for (dot, w) in dots.iter_mut().zip(quad.as_flattened().as_chunks::<VECTOR>().0) {
                            // SAFETY: `w` is an array of 16 bytes.
                            *dot = add_quad(*dot, unsafe { vld1q_s8(w.as_ptr().cast()) }, codes);
                        }
                    }
                    for (sum, dot) in sums.iter_mut().zip(dots) {
                        *sum = add_scaled(*sum, total(dot), vdupq_n_f32(h.unit));
                    }
                }
                for ((y, scales), sum) in y.as_chunks_mut::<4>().0.iter_mut().zip(scales.as_chunks::<4>().0).zip(sums) {
                    // SAFETY: `y` is an array of 4 floats.
                    unsafe { vst1q_f32(y.as_mut_ptr(), vfmaq_f32(vld1q_f32(y.as_ptr()), sum, widen(scales))) };
                }
            });
        }

        /// Products of 64 codes in four sums, by way of two chains.
        #[inline]
        #[target_feature(enable = $features)]
        fn dot64(w: [int8x16_t; 4], x: [int8x16_t; 4]) -> int32x4_t {
            let zero = vdupq_n_s32(0);
            vaddq_s32(dot(dot(zero, w[0], x[0]), w[1], x[1]), dot(dot(zero, w[2], x[2]), w[3], x[3]))
        }

        /// See [`crate::cpu::Table::q8_tile`].
        #[target_feature(enable = $features)]
        pub(crate) fn tile(panel: Panel, x: &Q8, at: Place, c: &mut [&mut [f32]], col: usize) {
            by_fours(c, |t, c| match c.len() {
                4 => {
                    for (i, c) in c.as_chunks_mut::<TOKENS>().0.iter_mut().enumerate() {
                        tokens::<TOKENS>(&panel, x, t + i * TOKENS, at, c, col);
                    }
                }
                2 => tokens::<2>(&panel, x, t, at, c, col),
                _ => tokens::<1>(&panel, x, t, at, c, col),
            });
        }

        /// `M` tokens from `t` on with all rows of the panel.
        #[inline]
        #[target_feature(enable = $features)]
        fn tokens<const M: usize>(panel: &Panel, x: &Q8, t: usize, at: Place, c: &mut [&mut [f32]], col: usize) {
            let rows: [Q8Row; M] = std::array::from_fn(|m| x.row(t + m));
            // In memory, for they are touched once a block: the registers belong to the integer sums.
            let mut sums = [[vdupq_n_f32(0.0); LANES / 4]; M];
            for (b, (w, scales)) in blocks(panel, &at).enumerate() {
                for first in (0..LANES / 4).step_by(VECTORS) {
                    let mut dots = [[zero(); VECTORS]; M];
                    for (part, w) in w.as_chunks::<{ VECTOR * LANES }>().0.iter().enumerate() {
                        let mut x = [vdupq_n_s8(0); M];
                        for m in 0..M {
                            x[m] = load_part(rows[m], at.block + b, part);
                        }
                        add_quads::<M, 0, 1>(&mut dots, &w[VECTOR * first..], x);
                        add_quads::<M, 2, 3>(&mut dots, &w[VECTOR * (first + LANES / 2)..], x);
                    }
                    for m in 0..M {
                        let unit = rows[m].units[at.block + b];
                        for (j, dot) in (first..).zip(dots[m]) {
                            // SAFETY: `scales` has four times as many floats.
                            let scale = unsafe { vld1q_f32(scales.as_ptr().add(4 * j)) };
                            sums[m][j] = add_scaled(sums[m][j], total(dot), vmulq_n_f32(scale, unit));
                        }
                    }
                }
            }
            for (c, sums) in c.iter_mut().zip(sums) {
                let mut lanes = [0.0; LANES];
                for (four, sum) in lanes.as_chunks_mut::<4>().0.iter_mut().zip(sums) {
                    // SAFETY: `four` is an array of 4 floats.
                    unsafe { vst1q_f32(four.as_mut_ptr(), sum) };
                }
                c[col..][..at.rows].iter_mut().zip(lanes).for_each(|(c, sum)| *c += sum);
            }
        }

        /// Adds the products of two quads of the panel, whose lanes begin at `w`, with quads `A` and `B` of `x`.
        #[inline]
        #[target_feature(enable = $features)]
        fn add_quads<const M: usize, const A: usize, const B: usize>(
            dots: &mut [[Sum; VECTORS]; M],
            w: &[u8],
            x: [int8x16_t; M],
        ) {
            let mut quads = [[vdupq_n_s8(0); 2]; VECTORS];
            for (j, [a, b]) in quads.iter_mut().enumerate() {
                let (first, second) = (&w[VECTOR * j..][..VECTOR], &w[VECTOR * (j + LANES / 4)..][..VECTOR]);
                // SAFETY: the slices have 16 bytes.
                (*a, *b) = unsafe { (vld1q_s8(first.as_ptr().cast()), vld1q_s8(second.as_ptr().cast())) };
            }
            for (dots, x) in dots.iter_mut().zip(x) {
                for (dot, w) in dots.iter_mut().zip(quads) {
                    *dot = add_lanes::<A, B>(*dot, w, x);
                }
            }
        }
    };
}

/// With the multiplications that every aarch64 has.
pub(crate) mod base {
    use super::*;

    /// Tokens and vectors of a panel taken at once: 8 registers of sums, for as many hold products on their way there.
    const TOKENS: usize = 2;
    const VECTORS: usize = 2;
    /// Pairs of products of four lanes, in two registers.
    type Sum = [int32x4_t; 2];

    kernels!("neon");

    /// Products of 16 codes in four sums.
    #[inline]
    #[target_feature(enable = "neon")]
    fn dot(sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
        vpadalq_s16(sum, vmlal_high_s8(low, w, x))
    }

    /// Products of four lanes with what `x` has in them.
    #[inline]
    #[target_feature(enable = "neon")]
    fn add_quad(sum: Sum, w: int8x16_t, x: int8x16_t) -> Sum {
        let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
        [vpadalq_s16(sum[0], low), vpadalq_s16(sum[1], vmull_high_s8(w, x))]
    }

    /// Products of two quads of four lanes with quads `A` and `B` of `x`.
    #[inline]
    #[target_feature(enable = "neon")]
    fn add_lanes<const A: usize, const B: usize>(sum: Sum, w: [int8x16_t; 2], x: int8x16_t) -> Sum {
        let (a, b) = (repeat::<A>(x), repeat::<B>(x));
        let low = vmlal_s8(vmull_s8(vget_low_s8(w[0]), a), vget_low_s8(w[1]), b);
        let high = vmlal_s8(vmull_s8(vget_high_s8(w[0]), a), vget_high_s8(w[1]), b);
        [vpadalq_s16(sum[0], low), vpadalq_s16(sum[1], high)]
    }

    /// Quad `LANE` twice.
    #[inline]
    #[target_feature(enable = "neon")]
    fn repeat<const LANE: usize>(x: int8x16_t) -> int8x8_t {
        let x = vreinterpretq_s32_s8(x);
        vreinterpret_s8_s32(match LANE {
            0 => vdup_laneq_s32::<0>(x),
            1 => vdup_laneq_s32::<1>(x),
            2 => vdup_laneq_s32::<2>(x),
            _ => vdup_laneq_s32::<3>(x),
        })
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn zero() -> Sum {
        [vdupq_n_s32(0); 2]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn total(sum: Sum) -> int32x4_t {
        vpaddq_s32(sum[0], sum[1])
    }
}

/// With `sdot`.
pub(crate) mod dotprod {
    use super::*;

    /// Tokens and vectors of a panel taken at once: 16 registers of sums.
    const TOKENS: usize = 4;
    const VECTORS: usize = 4;
    /// Of four lanes.
    type Sum = int32x4_t;

    kernels!("neon,dotprod");

    use super::{sdot as dot, sdot as add_quad};

    /// Products of two quads of four lanes with quads `A` and `B` of `x`.
    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    fn add_lanes<const A: usize, const B: usize>(sum: Sum, w: [int8x16_t; 2], x: int8x16_t) -> Sum {
        sdot_lane::<B>(sdot_lane::<A>(sum, w[0], x), w[1], x)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn zero() -> Sum {
        vdupq_n_s32(0)
    }

    fn total(sum: Sum) -> int32x4_t {
        sum
    }
}
