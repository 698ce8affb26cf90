//! Eight floats at a time on `wide`: how light ops walk slices.
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

/// `y[i] = f(xs[0][i], xs[1][i], ..)`.
#[inline(always)]
pub(crate) fn map<const N: usize>(xs: [&[f32]; N], y: &mut [f32], f: impl Fn([f32x8; N]) -> f32x8) {
    update(y, xs, |_, xs| f(xs));
}

/// `y[i] = f(y[i], xs[0][i], xs[1][i], ..)`.
#[inline(always)]
pub(crate) fn update<const N: usize>(y: &mut [f32], xs: [&[f32]; N], f: impl Fn(f32x8, [f32x8; N]) -> f32x8) {
    assert!(xs.iter().all(|x| x.len() == y.len()));
    let whole = y.len() / LANES * LANES;
    let (vectors, rest) = y.as_chunks_mut::<LANES>();
    let chunks = xs.map(|x| x.as_chunks::<LANES>().0);
    for (i, y) in vectors.iter_mut().enumerate() {
        *y = f(f32x8::new(*y), chunks.map(|x| f32x8::new(x[i]))).to_array();
    }
    if !rest.is_empty() {
        let value = f(load(rest), xs.map(|x| load(&x[whole..])));
        store(rest, value);
    }
}

/// `sum_i f(xs[0][i], xs[1][i], ..)`, in an order that depends on the length alone; `f` of zeros must be zero.
#[inline(always)]
pub(crate) fn sum<const N: usize>(xs: [&[f32]; N], f: impl Fn([f32x8; N]) -> f32x8) -> f32 {
    let n = xs[0].len();
    assert!(xs.iter().all(|x| x.len() == n));
    let chunks = xs.map(|x| x.as_chunks::<LANES>().0);
    let mut total = f32x8::ZERO;
    for i in 0..n / LANES {
        total += f(chunks.map(|x| f32x8::new(x[i])));
    }
    if !n.is_multiple_of(LANES) {
        total += f(xs.map(|x| load(&x[n / LANES * LANES..])));
    }
    total.reduce_add()
}
