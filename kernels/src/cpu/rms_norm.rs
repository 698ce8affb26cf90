//! Root mean square norm (Zhang & Sennrich 2019).
//!
//! `y = r x w` with `r = 1 / sqrt(mean(x²) + eps)`, over rows of `C`. Forward keeps nothing: backward computes
//! `r` again, which is cheaper than to store it.

use super::lanes::{map, sum, update};
use super::split::parts;
use super::team::Team;
use wide::f32x8;

/// `y[T, C]` from `x[T, C]` and `w[C]`.
pub(crate) fn forward(team: &Team, w: &[f32], eps: f32, x: &[f32], y: &mut [f32]) {
    let width = width(w, x, y);
    if width == 0 {
        return;
    }
    parts(team, y, width, |at, y| {
        for (x, y) in x[at..].chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let r = f32x8::splat(inverse_rms(x, eps));
            map([x, w], y, |[x, w]| x * r * w);
        }
    });
}

/// `dx += r (dy w) - x r³ mean(dy w x)`.
pub(crate) fn vjp_x(team: &Team, w: &[f32], eps: f32, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    let width = width(w, x, dx);
    assert_eq!(dy.len(), dx.len());
    if width == 0 {
        return;
    }
    parts(team, dx, width, |at, dx| {
        let rows = x[at..].chunks_exact(width).zip(dy[at..].chunks_exact(width));
        for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(width)) {
            let r = inverse_rms(x, eps);
            let mean = sum([dy, w, x], |[dy, w, x]| dy * w * x) / width as f32;
            let (r, back) = (f32x8::splat(r), f32x8::splat(r * r * r * mean));
            update(dx, [dy, w, x], |dx, [dy, w, x]| dx + (dy * w * r - x * back));
        }
    });
}

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum([x], |[x]| x * x) / x.len() as f32 + eps).sqrt()
}

fn width(w: &[f32], x: &[f32], y: &[f32]) -> usize {
    assert!(x.len() == y.len() && (x.is_empty() || x.len().is_multiple_of(w.len())));
    w.len()
}
