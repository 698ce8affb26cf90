//! Numbers in f64 in a buffer of f32: sums over many values, which the host reads once a step.

use bytemuck::{cast_slice, pod_read_unaligned};

/// The f64 numbers that [`crate::Call::Sum`] and [`crate::Call::SumSquares`] keep in a buffer: two values each, which are
/// the halves of its bits. As f32 they mean nothing.
#[must_use]
pub fn doubles(values: &[f32]) -> Vec<f64> {
    assert!(values.len().is_multiple_of(2));
    values.chunks_exact(2).map(|halves| pod_read_unaligned(cast_slice(halves))).collect()
}

/// Adds `sum` to number `at` of `y`.
pub(crate) fn add_double(sum: f64, at: usize, y: &mut [f32]) {
    let place: &mut [u8] = bytemuck::cast_slice_mut(&mut y[2 * at..][..2]);
    let total: f64 = pod_read_unaligned(place);
    place.copy_from_slice(&(total + sum).to_ne_bytes());
}
