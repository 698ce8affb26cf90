//! Eight floats at a time on `wide`, for the portable texts of the heavy ops.
//!
//! Tails are padded with zeros and run through the same instructions as full vectors, so that the value of
//! an element does not depend on where in a slice it stands.

use wide::f32x8;

/// Floats in a vector.
pub(crate) const LANES: usize = 8;

/// The first eight of `x`, zeros where `x` is shorter.
#[inline(always)]
pub(crate) fn load(x: &[f32]) -> f32x8 {
    match x.first_chunk::<LANES>() {
        Some(full) => f32x8::new(*full),
        None => {
            let mut padded = [0.0; LANES];
            padded[..x.len()].copy_from_slice(x);
            f32x8::new(padded)
        }
    }
}

/// Writes as many of the eight as fit in `y`.
#[inline(always)]
pub(crate) fn store(y: &mut [f32], value: f32x8) {
    match y.first_chunk_mut::<LANES>() {
        Some(full) => *full = value.to_array(),
        None => {
            let n = y.len();
            y.copy_from_slice(&value.to_array()[..n]);
        }
    }
}
