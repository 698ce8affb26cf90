//! Peaks of what the compilation target guarantees.

use super::{NONE, Peak, Probes};
use std::hint::black_box;
use wide::f32x4;

pub(super) static PROBES: Probes = Probes {
    read: Some(read),
    f32: Some(Peak { run: f32, ops: 8 * 4 * 2 }),
    int8: Some(Peak { run: int8, ops: 2 * LEN as u64 }),
    ..NONE
};

/// Values of the integer product: both arrays stay in first-level cache.
const LEN: usize = 2048;

fn read(bytes: &[u8]) -> u64 {
    let (words, tail) = bytes.as_chunks::<8>();
    let sum = words.iter().fold(0, |sum, word| sum ^ u64::from_le_bytes(*word));
    tail.iter().fold(sum, |sum, byte| sum.rotate_left(8) ^ u64::from(*byte))
}

fn f32(rounds: usize) -> f32 {
    let (a, b) = black_box((f32x4::splat(1e-3), f32x4::splat(1e-3)));
    // Sums that start alike would be one value to the optimizer.
    let mut sums: [f32x4; 8] = std::array::from_fn(|i| f32x4::splat(i as f32));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = a.mul_add(b, *sum);
        }
    }
    sums.iter().map(|sum| sum.reduce_add()).sum()
}

/// A dot product of bytes as a compiler makes it for any target.
fn int8(rounds: usize) -> f32 {
    let (a, b) = ([3i8; LEN], [-5i8; LEN]);
    let mut total = 0i32;
    for _ in 0..rounds {
        let (a, b) = black_box((&a, &b));
        total = total.wrapping_add(a.iter().zip(b).map(|(a, b)| i32::from(*a) * i32::from(*b)).sum());
    }
    total as f32
}
