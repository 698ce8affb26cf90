//! Encoding f32 weights to packed NF4 codes and one f32 absmax a block.
//!
//! For a block x with m = max |x|: code = the number of midpoints between neighbouring codebook values that lie
//! strictly below x / m, so that a tie goes to the lower code. Element 2i is the high nibble of byte i.

use super::BLOCK;
use rayon::prelude::*;

/// The NF4 codebook: quantiles of a normal distribution with an exact zero (QLoRA, appendix E).
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The code of zero, which also pads an odd number of elements.
const ZERO: u8 = 7;

/// bitsandbytes' floor of absmax, which keeps the reciprocal of an all-zero block finite.
const SMALLEST_ABSMAX: f32 = 1e-38;

/// Exponent bits of infinity; every magnitude from here on is infinite or NaN.
const INFINITY_BITS: u32 = 0x7f80_0000;

/// Values that one rayon task encodes: large against its overhead, small against the cache.
const TASK: usize = 256 * BLOCK;

const MIDPOINTS: [f32; 15] = {
    let mut midpoints = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        midpoints[i] = (NF4[i] + NF4[i + 1]) / 2.0;
        i += 1;
    }
    midpoints
};

/// A weight that is NaN or infinite, which no scale can represent.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("expected finite weights, got `{value}` at element `{index}`")]
pub struct NotFinite {
    /// Position in the encoded slice.
    pub index: usize,
    /// NaN or an infinity.
    pub value: f32,
}

/// Encodes `values` on all threads: packed codes `[ceil(n / 2)]` and absmax `[ceil(n / 64)]`.
///
/// # Errors
/// A value is NaN or infinite; the first one is named.
pub fn encode(values: &[f32]) -> Result<(Vec<u8>, Vec<f32>), NotFinite> {
    let mut packed = vec![0; values.len().div_ceil(2)];
    let mut absmax = vec![0.0; values.len().div_ceil(BLOCK)];
    if values.len() <= TASK {
        // Not worth a thread.
        encode_blocks(values, &mut packed, &mut absmax)?;
        return Ok((packed, absmax));
    }
    let tasks = values.par_chunks(TASK).zip(packed.par_chunks_mut(TASK / 2)).zip(absmax.par_chunks_mut(TASK / BLOCK));
    let results: Vec<_> = tasks.map(|((values, packed), absmax)| encode_blocks(values, packed, absmax)).collect();
    for (task, result) in results.into_iter().enumerate() {
        result.map_err(|e| NotFinite { index: e.index + task * TASK, ..e })?;
    }
    Ok((packed, absmax))
}

/// Encodes consecutive blocks of a tensor on this thread. Every call but the tensor's last passes whole blocks, so
/// that pieces encoded apart are the bytes of the whole.
///
/// # Errors
/// A value is NaN or infinite; the first one is named, and the outputs are unspecified.
///
/// # Panics
/// `packed` is not `[ceil(n / 2)]` or `absmax` not `[ceil(n / 64)]`.
pub fn encode_blocks(values: &[f32], packed: &mut [u8], absmax: &mut [f32]) -> Result<(), NotFinite> {
    assert_eq!(packed.len(), values.len().div_ceil(2));
    assert_eq!(absmax.len(), values.len().div_ceil(BLOCK));
    let (blocks, tail) = values.as_chunks::<BLOCK>();
    let (packed, packed_tail) = packed.split_at_mut(blocks.len() * BLOCK / 2);
    let outputs = packed.as_chunks_mut::<{ BLOCK / 2 }>().0.iter_mut().zip(absmax.iter_mut());
    for (i, (block, (packed, absmax))) in blocks.iter().zip(outputs).enumerate() {
        *absmax = finite_absmax(block).ok_or_else(|| first_not_finite(block, i * BLOCK))?;
        // bitsandbytes multiplies by the rounded reciprocal here, and divides in a short block.
        let reciprocal = 1.0 / absmax.max(SMALLEST_ABSMAX);
        pack(&codes(&block.map(|x| x * reciprocal)), packed);
    }
    if let Some(last) = absmax.last_mut().filter(|_| !tail.is_empty()) {
        // Zeros change neither the absmax nor the codes before them, and their code is the padding.
        let mut block = [0.0; BLOCK];
        block[..tail.len()].copy_from_slice(tail);
        let absmax = finite_absmax(&block).ok_or_else(|| first_not_finite(tail, blocks.len() * BLOCK))?;
        *last = absmax.max(SMALLEST_ABSMAX);
        let codes = codes(&block.map(|x| x / *last));
        debug_assert!(codes[tail.len()..].iter().all(|&code| code == ZERO));
        let mut whole = [0; BLOCK / 2];
        pack(&codes, &mut whole);
        packed_tail.copy_from_slice(&whole[..packed_tail.len()]);
    }
    Ok(())
}

/// Largest magnitude, or `None` if a value is NaN or infinite. Magnitudes order like their bits, which turns the
/// search for a maximum and the search for NaN into one vector loop.
fn finite_absmax(block: &[f32; BLOCK]) -> Option<f32> {
    const LANES: usize = 16;
    let mut lanes = [0i32; LANES];
    for chunk in block.as_chunks::<LANES>().0 {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = (*lane).max((x.to_bits() & 0x7fff_ffff) as i32);
        }
    }
    let bits = lanes.into_iter().fold(0, i32::max) as u32;
    (bits < INFINITY_BITS).then(|| f32::from_bits(bits))
}

#[cold]
fn first_not_finite(block: &[f32], start: usize) -> NotFinite {
    let i = block.iter().position(|x| !x.is_finite()).unwrap_or(0);
    NotFinite { index: start + i, value: block[i] }
}

/// The code of each normalised value. Values beyond [-1, 1] by rounding need no clamp: the outer codes have no
/// midpoint beyond them.
fn codes(normalised: &[f32; BLOCK]) -> [u8; BLOCK] {
    const LANES: usize = 16; // what stays in registers while all midpoints pass by
    let mut codes = [0; BLOCK];
    for (codes, x) in codes.as_chunks_mut::<LANES>().0.iter_mut().zip(normalised.as_chunks::<LANES>().0) {
        let mut below = [0i32; LANES];
        for midpoint in MIDPOINTS {
            for (below, &x) in below.iter_mut().zip(x) {
                *below += i32::from(midpoint < x);
            }
        }
        *codes = below.map(|code| code as u8);
    }
    codes
}

fn pack(codes: &[u8; BLOCK], packed: &mut [u8; BLOCK / 2]) {
    for (byte, [high, low]) in packed.iter_mut().zip(codes.as_chunks().0) {
        *byte = high << 4 | low;
    }
}
