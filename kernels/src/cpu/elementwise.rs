//! Additions, factors and zeros.

use super::loops::{map, update};
use super::split::parts;
use super::team::Team;
use crate::mix;

/// `y = a + b`.
pub(crate) fn add(team: &Team, a: &[f32], b: &[f32], y: &mut [f32]) {
    assert!(a.len() == y.len() && b.len() == y.len());
    parts(team, y, 1, |at, y| {
        let n = y.len();
        map([&a[at..][..n], &b[at..][..n]], y, |[a, b]| a + b);
    });
}

/// `y += x`.
pub(crate) fn add_assign(team: &Team, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    parts(team, y, 1, |at, y| {
        let n = y.len();
        add_part(&x[at..][..n], y);
    });
}

/// `y += x` on this thread.
pub(crate) fn add_part(x: &[f32], y: &mut [f32]) {
    update(y, [x], |y, [x]| y + x);
}

/// `y[t, :] += bias`.
pub(crate) fn add_bias(team: &Team, bias: &[f32], y: &mut [f32]) {
    let width = bias.len();
    if width == 0 {
        return assert!(y.is_empty());
    }
    assert!(y.len().is_multiple_of(width));
    parts(team, y, width, |_, y| y.chunks_exact_mut(width).for_each(|y| add_part(bias, y)));
}

/// `x *= factor`.
pub(crate) fn scale(team: &Team, factor: f32, x: &mut [f32]) {
    parts(team, x, 1, |_, x| scale_part(factor, x));
}

/// `x *= factor` on this thread.
pub(crate) fn scale_part(factor: f32, x: &mut [f32]) {
    update(x, [], |x, []| x * factor);
}

/// Inverted dropout (Srivastava et al. 2014): element `i` falls if the upper 32 of its random bits lie below `p`.
/// Linear in `x` with a mask that only `key` decides, so it is its own gradient.
pub(crate) fn dropout(team: &Team, p: f32, key: u64, first: u64, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    let (bar, keep) = ((f64::from(p) * 2f64.powi(32)) as u64, 1.0 / (1.0 - p));
    parts(team, y, 1, |at, y| {
        for (i, y) in y.iter_mut().enumerate() {
            *y = if mix(key, first + (at + i) as u64) >> 32 < bar { 0.0 } else { x[at + i] * keep };
        }
    });
}

/// `y = x`.
pub(crate) fn copy(team: &Team, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    parts(team, y, 1, |at, y| y.copy_from_slice(&x[at..][..y.len()]));
}

/// Zeros.
pub(crate) fn zero(team: &Team, x: &mut [f32]) {
    parts(team, x, 1, |_, x| x.fill(0.0));
}
