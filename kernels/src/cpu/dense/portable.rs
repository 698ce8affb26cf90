//! Kernels for 16- and 32-bit float weights on any CPU.

use super::super::lanes::{LANES, load};
use crate::FloatType;
use half::{bf16, f16};
use wide::f32x8;

/// See [`super::super::Table::dense_decode`].
pub(crate) fn decode(dtype: FloatType, bytes: &[u8], stride: usize, width: usize, out: &mut [f32]) {
    for (bytes, out) in bytes.chunks(stride * dtype.size()).zip(out.chunks_exact_mut(width)) {
        decode_row(dtype, bytes, out);
    }
}

/// As many elements as `out` holds.
pub(super) fn decode_row(dtype: FloatType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        FloatType::F32 => {
            for (y, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *y = f32::from_le_bytes(*b);
            }
        }
        FloatType::F16 => {
            for (y, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *y = f16::from_le_bytes(*b).to_f32();
            }
        }
        FloatType::BF16 => {
            for (y, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *y = bf16::from_le_bytes(*b).to_f32();
            }
        }
    }
}

/// See [`super::super::Table::dense_matvec`].
pub(crate) fn matvec(dtype: FloatType, bytes: &[u8], x: &[f32], y: &mut [f32]) {
    /// Elements widened at a time, into an array that stays in registers or first-level cache.
    const STEP: usize = 4 * LANES;
    for (i, y) in y.iter_mut().enumerate() {
        let row = &bytes[i * x.len() * dtype.size()..][..x.len() * dtype.size()];
        let mut sums = [f32x8::ZERO; STEP / LANES];
        for (x, row) in x.chunks(STEP).zip(row.chunks(STEP * dtype.size())) {
            let mut w = [0.0; STEP];
            decode_row(dtype, row, &mut w[..x.len()]);
            for (j, sum) in sums.iter_mut().enumerate().take(x.len().div_ceil(LANES)) {
                *sum = load(&w[j * LANES..]).mul_add(load(&x[j * LANES..]), *sum);
            }
        }
        *y = ((sums[0] + sums[1]) + (sums[2] + sums[3])).reduce_add();
    }
}
