//! Kernels for 16- and 32-bit float weights on NEON, whose base has the conversions between f16 and f32.

#![allow(unsafe_code, reason = "vector loads and stores")]

use super::super::neon::{load_part, prefetch, sum1, sum4};
use crate::FloatType;
use std::arch::aarch64::*;

// Types as numbers, for const generics take no enum.
const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// Rows at least this long are summed one at a time: several streams side by side read memory slower.
const LONG: usize = 256;

/// Bytes that the matrix-vector product reads ahead.
const AHEAD: usize = 1024;

/// See [`super::super::Table::dense_decode`].
#[target_feature(enable = "neon")]
pub(crate) fn decode(dtype: FloatType, bytes: &[u8], stride: usize, width: usize, out: &mut [f32]) {
    for (bytes, out) in bytes.chunks(stride * dtype.size()).zip(out.chunks_exact_mut(width)) {
        let rest = match dtype {
            FloatType::F32 => widen::<F32>(bytes, out),
            FloatType::F16 => widen::<F16>(bytes, out),
            FloatType::BF16 => widen::<BF16>(bytes, out),
        };
        if rest < width {
            super::portable::decode_row(dtype, &bytes[rest * dtype.size()..], &mut out[rest..]);
        }
    }
}

/// Widens all that fills vectors of four; returns how many elements that were.
#[inline]
#[target_feature(enable = "neon")]
fn widen<const TYPE: u8>(bytes: &[u8], out: &mut [f32]) -> usize {
    let (vectors, _) = out.as_chunks_mut::<4>();
    let done = 4 * vectors.len();
    for (bytes, out) in bytes[..done * size::<TYPE>()].chunks_exact(4 * size::<TYPE>()).zip(vectors) {
        // SAFETY: `bytes` holds 4 elements, `out` 4 floats.
        unsafe { vst1q_f32(out.as_mut_ptr(), load::<TYPE>(bytes.as_ptr())) };
    }
    done
}

/// See [`super::super::Table::dense_matvec`].
#[target_feature(enable = "neon")]
pub(crate) fn matvec(dtype: FloatType, bytes: &[u8], x: &[f32], y: &mut [f32]) {
    match dtype {
        FloatType::F32 => matvec_as::<F32>(bytes, x, y),
        FloatType::F16 => matvec_as::<F16>(bytes, x, y),
        FloatType::BF16 => matvec_as::<BF16>(bytes, x, y),
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn matvec_as<const TYPE: u8>(bytes: &[u8], x: &[f32], y: &mut [f32]) {
    let row = x.len() * size::<TYPE>();
    let fours = if x.len() < LONG { y.len() / 4 * 4 } else { 0 };
    let (four, one) = y.split_at_mut(fours);
    for (i, y) in four.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let sums = dot_rows::<TYPE, 4, 1>(&bytes[4 * i * row..][..4 * row], x);
        // SAFETY: `y` is an array of 4 floats.
        unsafe { vst1q_f32(y.as_mut_ptr(), sum4(sums.map(|[sum]| sum))) };
    }
    for (i, y) in one.iter_mut().enumerate() {
        let [[a, b, c, d]] = dot_rows::<TYPE, 1, 4>(&bytes[(fours + i) * row..][..row], x);
        *y = sum1(vaddq_f32(vaddq_f32(a, b), vaddq_f32(c, d)));
    }
}

/// `ROWS` products with `x`, each in `PARTS` sums of four lanes to hide the latency of the additions.
#[inline]
#[target_feature(enable = "neon")]
fn dot_rows<const TYPE: u8, const ROWS: usize, const PARTS: usize>(
    bytes: &[u8],
    x: &[f32],
) -> [[float32x4_t; PARTS]; ROWS] {
    let (size, n) = (size::<TYPE>(), x.len());
    assert_eq!(bytes.len(), ROWS * n * size);
    let mut sums = [[vdupq_n_f32(0.0); PARTS]; ROWS];
    let mut k = 0;
    while k + 4 * PARTS <= n {
        prefetch(bytes.as_ptr().wrapping_add(k * size + AHEAD));
        for part in 0..PARTS {
            let at = k + 4 * part;
            // SAFETY: `at + 4 <= n`, and `bytes` holds ROWS rows of n elements.
            let xv = unsafe { vld1q_f32(x.as_ptr().add(at)) };
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: as above.
                let w = unsafe { load::<TYPE>(bytes.as_ptr().add((r * n + at) * size)) };
                sums[part] = vfmaq_f32(sums[part], w, xv);
            }
        }
        k += 4 * PARTS;
    }
    for k in (k..n).step_by(4) {
        // What is left, four at a time, padded with zeros.
        let len = (n - k).min(4);
        let xv = load_part(&x[k..]);
        for (r, sums) in sums.iter_mut().enumerate() {
            let mut padded = [0; 16];
            padded[..len * size].copy_from_slice(&bytes[(r * n + k) * size..][..len * size]);
            // SAFETY: 16 bytes hold 4 elements of any type.
            sums[0] = vfmaq_f32(sums[0], unsafe { load::<TYPE>(padded.as_ptr()) }, xv);
        }
    }
    sums
}

const fn size<const TYPE: u8>() -> usize {
    if TYPE == F32 { 4 } else { 2 }
}

/// Four elements, widened.
///
/// # Safety
/// `at` points to four elements of any alignment.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load<const TYPE: u8>(at: *const u8) -> float32x4_t {
    // SAFETY: the caller's promise; loads of bytes need no alignment.
    unsafe {
        match TYPE {
            F32 => vreinterpretq_f32_u8(vld1q_u8(at)),
            F16 => vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at))),
            _ => vreinterpretq_f32_u32(vshll_n_u16::<16>(vreinterpret_u16_u8(vld1_u8(at)))),
        }
    }
}
