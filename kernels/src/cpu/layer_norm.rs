//! Layer norm (Ba et al. 2016).
//!
//! `y = n w + b` with `n = r (x - mean(x))` and `r = 1 / sqrt(mean((x - mean(x))²) + eps)`, over rows of `C`. Forward keeps
//! nothing: backward computes `n` again.

use super::Cpu;
use super::loops::{map, sum, update};
use super::split::{parts, with_scratch};

/// `y[T, C]` from `x[T, C]`, `w[C]` and `b[C]`; without `b` nothing is added.
pub(crate) fn forward(cpu: &Cpu, w: &[f32], b: Option<&[f32]>, eps: f32, x: &[f32], y: &mut [f32]) {
    let Some(b) = b else {
        return with_scratch(w.len(), |zeros| {
            zeros.fill(0.0);
            forward(cpu, w, Some(zeros), eps, x, y);
        });
    };
    assert!(w.len() == b.len() && x.len() == y.len() && (x.is_empty() || x.len().is_multiple_of(w.len())));
    parts(&cpu.team, y, w.len(), |at, y| cpu.table.light().layer_norm([w, b], eps, &x[at..][..y.len()], y));
}

/// `dx += r (g - mean(g) - n mean(g n))` with `g = dy w`.
pub(crate) fn vjp_x(cpu: &Cpu, w: &[f32], eps: f32, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    assert!(x.len() == dx.len() && dy.len() == dx.len() && (x.is_empty() || x.len().is_multiple_of(w.len())));
    parts(&cpu.team, dx, w.len(), |at, dx| {
        let n = dx.len();
        cpu.table.light().layer_norm_vjp(w, eps, &x[at..][..n], &dy[at..][..n], dx);
    });
}

/// [`forward`] on one thread.
#[inline(always)]
pub(super) fn rows([w, b]: [&[f32]; 2], eps: f32, x: &[f32], y: &mut [f32]) {
    for (x, y) in x.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
        let (mean, r) = moments(x, eps);
        map([x, w, b], y, |[x, w, b]| (x - mean) * r * w + b);
    }
}

/// [`vjp_x`] on one thread.
#[inline(always)]
pub(super) fn vjp_rows(w: &[f32], eps: f32, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    let rows = x.chunks_exact(w.len()).zip(dy.chunks_exact(w.len()));
    for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(w.len())) {
        let (mean, r) = moments(x, eps);
        let count = w.len() as f32;
        let straight = sum([dy, w], |[dy, w]| dy * w) / count;
        let along = sum([dy, w, x], |[dy, w, x]| dy * w * (x - mean)) / count;
        let back = r * r * along;
        update(dx, [dy, w, x], |dx, [dy, w, x]| dx + r * (dy * w - straight - (x - mean) * back));
    }
}

/// The mean of `x`, and one over the root of its variance.
#[inline(always)]
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let count = x.len() as f32;
    let mean = sum([x], |[x]| x) / count;
    let variance = sum([x], |[x]| (x - mean) * (x - mean)) / count;
    (mean, 1.0 / (variance + eps).sqrt())
}
