//! Root mean square norm (Zhang & Sennrich 2019).
//!
//! `y = r x w` with `r = 1 / sqrt(mean(x²) + eps)`, over rows of `C`. Forward keeps nothing: backward computes
//! `r` again, which is cheaper than to store it.

use super::Cpu;
use super::loops::{map, sum, update};
use super::split::parts;

/// `y[T, C]` from `x[T, C]` and `w[C]`.
pub(crate) fn forward(cpu: &Cpu, w: &[f32], eps: f32, x: &[f32], y: &mut [f32]) {
    let width = width(w, x, y);
    if width == 0 {
        return;
    }
    parts(&cpu.team, y, width, |at, y| cpu.table.light().rms_norm(w, eps, &x[at..][..y.len()], y));
}

/// `dx += r (dy w) - x r³ mean(dy w x)`.
pub(crate) fn vjp_x(cpu: &Cpu, w: &[f32], eps: f32, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    let width = width(w, x, dx);
    assert_eq!(dy.len(), dx.len());
    if width == 0 {
        return;
    }
    parts(&cpu.team, dx, width, |at, dx| {
        let n = dx.len();
        cpu.table.light().rms_norm_vjp(w, eps, &x[at..][..n], &dy[at..][..n], dx);
    });
}

/// [`forward`] on one thread.
#[inline(always)]
pub(super) fn rows(w: &[f32], eps: f32, x: &[f32], y: &mut [f32]) {
    for (x, y) in x.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
        let r = inverse_rms(x, eps);
        map([x, w], y, |[x, w]| x * r * w);
    }
}

/// [`vjp_x`] on one thread.
#[inline(always)]
pub(super) fn vjp_rows(w: &[f32], eps: f32, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    let rows = x.chunks_exact(w.len()).zip(dy.chunks_exact(w.len()));
    for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(w.len())) {
        let r = inverse_rms(x, eps);
        let mean = sum([dy, w, x], |[dy, w, x]| dy * w * x) / w.len() as f32;
        let back = r * r * r * mean;
        update(dx, [dy, w, x], |dx, [dy, w, x]| dx + (dy * w * r - x * back));
    }
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum([x], |[x]| x * x) / x.len() as f32 + eps).sqrt()
}

fn width(w: &[f32], x: &[f32], y: &[f32]) -> usize {
    assert!(x.len() == y.len() && (x.is_empty() || x.len().is_multiple_of(w.len())));
    w.len()
}
