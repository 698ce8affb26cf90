//! Rows of activations at rest in 16 bits.
//!
//! A row is its unit `u`, a power of two, then pairs of f16 with `x = u h`. The unit brings the row's largest element to
//! `[2^14, 2^15)`, so that nothing overflows however large a few elements are, and elements down to `2^-28` of the largest
//! keep all 11 bits of an f16's mantissa; a bf16 has 8. A NaN or an infinity is carried.
//!
//! Training keeps layer inputs so until backward; the forward pass itself goes on in f32.

use super::loops::reduce;
use super::split::run;
use super::team::Team;
use crate::narrow_width;
use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

/// Rows of a task.
const ROWS: usize = 16;
/// Elements that are scaled at a time.
const CHUNK: usize = 64;

/// See [`crate::Call::Narrow`].
pub(crate) fn pack(team: &Team, width: usize, x: &[f32], y: &mut [f32]) {
    each(team, width, y, x.len(), |at, y| pack_row(&x[at * width..][..width], y));
}

fn pack_row(x: &[f32], y: &mut [f32]) {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let unit = unit(reduce([x], 0.0, |most, [x]| larger(most, x.abs()), larger));
    let inverse = 1.0 / unit;
    y[0] = unit;
    let halves: &mut [u16] = bytemuck::cast_slice_mut(&mut y[1..]);
    let mut scaled = [0.0; CHUNK];
    for (x, to) in x.chunks(CHUNK).zip(halves.chunks_mut(CHUNK)) {
        scaled.iter_mut().zip(x).for_each(|(s, x)| *s = x * inverse);
        to[..x.len()].reinterpret_cast_mut::<f16>().convert_from_f32_slice(&scaled[..x.len()]);
    }
}

/// The power of two that brings `largest` to `[2^14, 2^15)`, as far as it and its inverse are normal numbers.
fn unit(largest: f32) -> f32 {
    let exponent = (largest.to_bits() >> 23) as i32 - 127 - 14;
    f32::from_bits(((exponent.clamp(-126, 112) + 127) as u32) << 23)
}

/// See [`crate::Call::Widen`].
pub(crate) fn unpack(team: &Team, width: usize, x: &[f32], y: &mut [f32]) {
    let packed = narrow_width(width);
    assert!(width > 0 && y.len().is_multiple_of(width) && x.len() == y.len() / width * packed);
    let tasks = x.chunks(ROWS * packed).zip(y.chunks_mut(ROWS * width)).collect();
    run(team, tasks, false, |(x, y)| {
        for (x, y) in x.chunks_exact(packed).zip(y.chunks_exact_mut(width)) {
            let (unit, halves) = (x[0], bytemuck::cast_slice::<f32, u16>(&x[1..]));
            halves[..width].reinterpret_cast::<f16>().convert_to_f32_slice(y);
            y.iter_mut().for_each(|y| *y *= unit);
        }
    });
}

/// Calls `work` with the number and the place of each packed row.
fn each(team: &Team, width: usize, y: &mut [f32], len: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    let packed = narrow_width(width);
    assert!(width > 0 && len.is_multiple_of(width) && y.len() == len / width * packed);
    run(team, y.chunks_mut(ROWS * packed).enumerate().collect(), false, |(i, y)| {
        y.chunks_exact_mut(packed).enumerate().for_each(|(j, y)| work(i * ROWS + j, y));
    });
}
