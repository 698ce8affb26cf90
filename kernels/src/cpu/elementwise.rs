//! Additions, factors and zeros.

use super::lanes::{map, update};
use super::split::parts;
use wide::f32x8;

/// `y = a + b`.
pub(crate) fn add(a: &[f32], b: &[f32], y: &mut [f32]) {
    assert!(a.len() == y.len() && b.len() == y.len());
    parts(y, 1, |at, y| {
        let n = y.len();
        map([&a[at..][..n], &b[at..][..n]], y, |[a, b]| a + b);
    });
}

/// `y += x`.
pub(crate) fn add_assign(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    parts(y, 1, |at, y| {
        let n = y.len();
        add_part(&x[at..][..n], y);
    });
}

/// `y += x` on this thread.
pub(crate) fn add_part(x: &[f32], y: &mut [f32]) {
    update(y, [x], |y, [x]| y + x);
}

/// `y[t, :] += bias`.
pub(crate) fn add_bias(bias: &[f32], y: &mut [f32]) {
    let width = bias.len();
    if width == 0 {
        return assert!(y.is_empty());
    }
    assert!(y.len().is_multiple_of(width));
    parts(y, width, |_, y| y.chunks_exact_mut(width).for_each(|y| add_part(bias, y)));
}

/// `x *= factor`.
pub(crate) fn scale(factor: f32, x: &mut [f32]) {
    parts(x, 1, |_, x| scale_part(factor, x));
}

/// `x *= factor` on this thread.
pub(crate) fn scale_part(factor: f32, x: &mut [f32]) {
    update(x, [], |x, []| x * f32x8::splat(factor));
}

/// Zeros.
pub(crate) fn zero(x: &mut [f32]) {
    parts(x, 1, |_, x| x.fill(0.0));
}
