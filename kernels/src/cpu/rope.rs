//! Rotary position embedding (Su et al. 2021), in the half-split order of Hugging Face checkpoints.
//!
//! For each token, head and `i < D / 2`, with `c = cos[t, i]` and `s = sin[t, i]`:
//! `y[i] = x[i] c - x[i + D/2] s`, `y[i + D/2] = x[i + D/2] c + x[i] s`. The inverse (`s` negated) is the
//! transpose of the rotation and so its gradient.

use super::Cpu;
use super::loops::map;
use super::split::parts;

/// `y[T, heads * D]` from `x` of the same shape and `cos`, `sin` `[T, D / 2]`.
pub(crate) fn forward(
    cpu: &Cpu,
    heads: usize,
    head_dim: usize,
    cos: &[f32],
    sin: &[f32],
    x: &[f32],
    inverse: bool,
    y: &mut [f32],
) {
    assert!(head_dim.is_multiple_of(2));
    let width = heads * head_dim;
    assert!(x.len() == y.len() && cos.len() == sin.len() && cos.len() * 2 * heads == x.len());
    if width == 0 {
        return;
    }
    assert!(x.len().is_multiple_of(width));
    let sign = if inverse { -1.0 } else { 1.0 };
    parts(&cpu.team, y, width, |at, y| {
        let rows = x[at..].chunks_exact(width).zip(y.chunks_exact_mut(width));
        let [cos, sin] = [cos, sin].map(|angles| angles[at / heads / 2..].chunks_exact(head_dim / 2));
        for ((x, y), (cos, sin)) in rows.zip(cos.zip(sin)) {
            cpu.table.light().rope(sign, cos, sin, x, y);
        }
    });
}

/// The heads of one token.
#[inline(always)]
pub(super) fn token(sign: f32, cos: &[f32], sin: &[f32], x: &[f32], y: &mut [f32]) {
    let half = cos.len();
    for (x, y) in x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)) {
        let ((x0, x1), (y0, y1)) = (x.split_at(half), y.split_at_mut(half));
        map([x0, x1, cos, sin], y0, |[x0, x1, c, s]| x0 * c - x1 * (s * sign));
        map([x0, x1, cos, sin], y1, |[x0, x1, c, s]| x1 * c + x0 * (s * sign));
    }
}
