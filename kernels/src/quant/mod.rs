//! The 4-bit codec: NF4 blocks and double quantization, byte for byte as bitsandbytes 0.50 makes them.
//!
//! A weight is cut into blocks of 64 elements over its flattened rows. A block keeps its largest magnitude (absmax)
//! and one of 16 codes an element (QLoRA, Dettmers et al. 2023, <https://arxiv.org/abs/2305.14314>). Double
//! quantization then stores the absmax themselves in 8 bits: 4.127 bits a weight in all.
//!
//! The CPU inference of bitsandbytes rounds block scales to bf16 in memory, so its logits are up to 0.04 away (of a tiny
//! model) from those of the weights that it dequantizes to. The dequantized weights are the definition here; its training
//! uses them, too.
//!
//! Encoding lives here once. Decoding here is the plain definition, for files and tests; the fast ones are in `cpu/`.

mod decode;
mod dynamic;
mod int8;
mod nf4;

pub use dynamic::{DoubleQuantized, double_quantize, dynamic_map, unsigned_dynamic_map};
pub use int8::encode_int8;
pub(crate) use int8::{ROUND, nearest, nearest_f32};
pub use nf4::{NF4, NotFinite, encode, encode_blocks};

/// Weights per absmax.
pub const BLOCK: usize = 64;

/// Absmax per nested absmax.
pub const NESTED_BLOCK: usize = 256;

/// Relative root-mean-square error of `decoded` against `original`: 0 for equal slices, about 0.09 for normally
/// distributed weights in NF4.
///
/// # Panics
/// The slices differ in length.
#[must_use]
pub fn relative_rms_error(original: &[f32], decoded: &[f32]) -> f64 {
    assert_eq!(original.len(), decoded.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let signal: f64 = original.iter().map(|&x| square(x)).sum();
    let error: f64 = original.iter().zip(decoded).map(|(&x, &y)| square(x - y)).sum();
    if signal == 0.0 { error.sqrt() } else { (error / signal).sqrt() }
}
