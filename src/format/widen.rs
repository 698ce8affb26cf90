//! 16- and 32-bit floats of files to f32.

use half::{bf16, f16};
use pocketlora_kernels::FloatType;

/// Widens the little-endian elements in `bytes`, which may be unaligned, into `out`.
///
/// # Panics
/// The two hold different numbers of elements.
pub(crate) fn widen(float: FloatType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * float.size(), "bytes for `{}` elements of {float:?}", out.len());
    match float {
        FloatType::F32 => fill(bytes, out, f32::from_le_bytes),
        FloatType::F16 => fill(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        FloatType::BF16 => fill(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
    }
}

fn fill<const N: usize>(bytes: &[u8], out: &mut [f32], one: impl Fn([u8; N]) -> f32) {
    for (out, &bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = one(bytes);
    }
}
