//! Root mean square norm (Zhang & Sennrich 2019).
//!
//! `y = r x w` with `r = 1 / sqrt(mean(x²) + eps)`, over rows of `C`; factors `w` may be stored less one, or absent, or be
//! those of several such rows one after the other. Forward keeps nothing: backward computes `r` again, which is cheaper
//! than to store it.

use super::Cpu;
use super::loops::{map, sum, update};
use super::split::{parts, with_scratch};

/// What rows of `width` are multiplied by.
#[derive(Clone, Copy)]
pub(crate) struct Factors<'a> {
    pub width: usize,
    /// None: by one.
    pub w: Option<&'a [f32]>,
    /// By one more than `w`.
    pub plus_one: bool,
}

impl Factors<'_> {
    /// Lends the factors themselves. To make them takes a row's time.
    fn with(self, work: impl FnOnce(&[f32])) {
        match self.w {
            Some(w) if !self.plus_one => work(w),
            w => with_scratch(w.map_or(self.width, <[f32]>::len), |factors| {
                match w {
                    Some(w) => map([w], factors, |[w]| 1.0 + w),
                    None => factors.fill(1.0),
                }
                work(factors);
            }),
        }
    }

    /// Asserts that all are whole rows; whether there are any.
    fn fit(self, x: &[f32], y: &[f32]) -> bool {
        let period = self.w.map_or(self.width, <[f32]>::len);
        assert!(period > 0 && period.is_multiple_of(self.width));
        assert!(x.len() == y.len() && x.len().is_multiple_of(period));
        !x.is_empty()
    }
}

/// `y[T, C]` from `x[T, C]` and `w[C]`.
pub(crate) fn forward(cpu: &Cpu, factors: Factors<'_>, eps: f32, x: &[f32], y: &mut [f32]) {
    if factors.fit(x, y) {
        factors.with(|w| {
            parts(&cpu.team, y, w.len(), |at, y| {
                cpu.table.light().rms_norm(w, factors.width, eps, &x[at..][..y.len()], y)
            });
        });
    }
}

/// `dx += r (dy w) - x r³ mean(dy w x)`.
pub(crate) fn vjp_x(cpu: &Cpu, factors: Factors<'_>, eps: f32, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    assert_eq!(dy.len(), dx.len());
    if factors.fit(x, dx) {
        factors.with(|w| {
            parts(&cpu.team, dx, w.len(), |at, dx| {
                let n = dx.len();
                cpu.table.light().rms_norm_vjp(w, factors.width, eps, &x[at..][..n], &dy[at..][..n], dx);
            });
        });
    }
}

/// [`forward`] on one thread.
#[inline(always)]
pub(super) fn rows(w: &[f32], width: usize, eps: f32, x: &[f32], y: &mut [f32]) {
    let factors = w.chunks_exact(width).cycle();
    for ((x, y), w) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(factors) {
        let r = inverse_rms(x, eps);
        map([x, w], y, |[x, w]| x * r * w);
    }
}

/// [`vjp_x`] on one thread.
#[inline(always)]
pub(super) fn vjp_rows(w: &[f32], width: usize, eps: f32, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    let rows = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(w.chunks_exact(width).cycle());
    for (((x, dy), w), dx) in rows.zip(dx.chunks_exact_mut(width)) {
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
