//! NF4 kernels for NEON. A table look-up takes 16 bytes by 16 indices, so the values of a block are kept as planes, one
//! for each byte of an f32, and weights are put together from the planes: for bf16 two, else four.

#![allow(unsafe_code, reason = "vector loads and stores")]

use super::super::neon::{prefetch, round_bf16, sum1};
use super::{EvenOdd, GRANULE, Nf4, Piece};
use crate::FloatType;
use std::arch::aarch64::*;

/// Bytes that the matrix-vector product reads ahead.
const AHEAD: usize = 1024;

/// See [`super::super::Table::nf4_decode`].
#[target_feature(enable = "neon")]
pub(crate) fn decode(w: &Nf4, start: usize, out: &mut [f32]) {
    match w.dtype {
        FloatType::BF16 => decode_planes::<2>(w, start, out),
        FloatType::F16 | FloatType::F32 => decode_planes::<4>(w, start, out),
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn decode_planes<const PLANES: usize>(w: &Nf4, start: usize, out: &mut [f32]) {
    for Piece { absmax, at, len } in w.pieces(start, out.len()) {
        let out = &mut out[at - start..][..len];
        // Half a byte in front and what is left of a granule behind go through the portable text.
        let lead = (at % 2).min(len);
        let whole = (len - lead) / GRANULE * GRANULE;
        let planes = planes::<PLANES>(w, absmax);
        let packed = w.packed[(at + lead) / 2..][..whole / 2].as_chunks::<16>().0;
        let (granules, _) = out[lead..].as_chunks_mut::<GRANULE>();
        for (packed, out) in packed.iter().zip(granules) {
            let [high, low] = nibbles(packed);
            let halves = [vzip1q_u8(high, low), vzip2q_u8(high, low)];
            for (index, out) in halves.into_iter().zip(out.as_chunks_mut::<16>().0) {
                for (values, out) in look_up(planes, index).into_iter().zip(out.as_chunks_mut::<4>().0) {
                    // SAFETY: `out` is an array of 4 floats.
                    unsafe { vst1q_f32(out.as_mut_ptr(), values) };
                }
            }
        }
        super::portable::decode(w, at, &mut out[..lead]);
        super::portable::decode(w, at + lead + whole, &mut out[lead + whole..]);
    }
}

/// See [`super::super::Table::nf4_matvec`].
#[target_feature(enable = "neon")]
pub(crate) fn matvec(w: &Nf4, cols: usize, row: usize, x: &EvenOdd, y: &mut [f32]) {
    for (i, y) in y.iter_mut().enumerate() {
        let start = (row + i) * cols;
        *y = match w.dtype {
            FloatType::BF16 => dot_planes::<2>(w, start, x),
            FloatType::F16 | FloatType::F32 => dot_planes::<4>(w, start, x),
        };
    }
}

/// The product of `x` with as many weights from `start` on.
#[inline]
#[target_feature(enable = "neon")]
fn dot_planes<const PLANES: usize>(w: &Nf4, start: usize, x: &EvenOdd) -> f32 {
    let mut sums = [vdupq_n_f32(0.0); 4];
    for Piece { absmax, at, len } in w.pieces(start, x.len()) {
        let planes = planes::<PLANES>(w, absmax);
        let packed = w.packed[at / 2..][..len / 2].as_chunks::<16>().0;
        prefetch(packed.as_ptr().wrapping_byte_add(AHEAD));
        for (packed, x) in packed.iter().zip(x.0[at - start..].as_chunks::<GRANULE>().0) {
            // High nibbles are even elements, low ones odd: the first and the second four of each eight.
            for (half, index) in nibbles(packed).into_iter().enumerate() {
                for (i, (sum, values)) in sums.iter_mut().zip(look_up(planes, index)).enumerate() {
                    let x = &x[8 * i + 4 * half..][..4];
                    // SAFETY: the slice has 4 floats.
                    *sum = vfmaq_f32(*sum, values, unsafe { vld1q_f32(x.as_ptr()) });
                }
            }
        }
    }
    sum1(vaddq_f32(vaddq_f32(sums[0], sums[1]), vaddq_f32(sums[2], sums[3])))
}

/// The high and the low halves of 16 bytes.
#[inline]
#[target_feature(enable = "neon")]
fn nibbles(packed: &[u8; 16]) -> [uint8x16_t; 2] {
    // SAFETY: `packed` is an array of 16 bytes.
    let bytes = unsafe { vld1q_u8(packed.as_ptr()) };
    [vshrq_n_u8::<4>(bytes), vandq_u8(bytes, vdupq_n_u8(15))]
}

/// The 16 values of a block (code times absmax in f32, rounded to the checkpoint's type), the last `PLANES` bytes of
/// each in a plane of its own.
#[inline]
#[target_feature(enable = "neon")]
fn planes<const PLANES: usize>(w: &Nf4, absmax: f32) -> [uint8x16_t; PLANES] {
    let values: [uint8x16_t; 4] = std::array::from_fn(|i| {
        let code = &w.code[4 * i..][..4];
        // SAFETY: the slice has 4 floats.
        let exact = vmulq_n_f32(unsafe { vld1q_f32(code.as_ptr()) }, absmax);
        vreinterpretq_u8_f32(match w.dtype {
            FloatType::F32 => exact,
            FloatType::F16 => vcvt_f32_f16(vcvt_f16_f32(exact)),
            FloatType::BF16 => round_bf16(exact),
        })
    });
    let [a, b, c, d] = values;
    // Bytes 0 and 2 of each value, bytes 1 and 3; then each of them alone.
    let (even, odd) = ([vuzp1q_u8(a, b), vuzp1q_u8(c, d)], [vuzp2q_u8(a, b), vuzp2q_u8(c, d)]);
    let all = [
        vuzp1q_u8(even[0], even[1]),
        vuzp1q_u8(odd[0], odd[1]),
        vuzp2q_u8(even[0], even[1]),
        vuzp2q_u8(odd[0], odd[1]),
    ];
    std::array::from_fn(|i| all[4 - PLANES + i])
}

/// The values of 16 indices, in their order.
#[inline]
#[target_feature(enable = "neon")]
fn look_up<const PLANES: usize>(planes: [uint8x16_t; PLANES], index: uint8x16_t) -> [float32x4_t; 4] {
    let mut bytes = [vdupq_n_u8(0); 4];
    for (bytes, plane) in bytes[4 - PLANES..].iter_mut().zip(planes) {
        *bytes = vqtbl1q_u8(plane, index);
    }
    let zip = |a, b| [vzip1q_u8(a, b), vzip2q_u8(a, b)].map(|pairs| vreinterpretq_u16_u8(pairs));
    let ([low0, low1], [high0, high1]) = (zip(bytes[0], bytes[1]), zip(bytes[2], bytes[3]));
    [vzip1q_u16(low0, high0), vzip2q_u16(low0, high0), vzip1q_u16(low1, high1), vzip2q_u16(low1, high1)]
        .map(|value| vreinterpretq_f32_u16(value))
}
