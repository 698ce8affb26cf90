//! Rotary position embedding (Su et al. 2021), in the half-split order of most Hugging Face checkpoints.
//!
//! For each token, head and `i < R`, with `c = cos[t, i]` and `s = sin[t, i]`:
//! `y[i] = x[i] c - x[i + R] s`, `y[i + R] = x[i + R] c + x[i] s`; elements from `2 R` on are copied. The inverse (`s`
//! negated) is the transpose of the rotation and so its gradient. In the order of the paper, `pairs`, `2 i` and `2 i + 1`
//! take the places of `i` and `i + R`.

use super::Cpu;
use super::elementwise::copy;
use super::loops::map;
use super::split::parts;

/// `y[T, heads * D]` from `x` of the same shape and `cos`, `sin` `[T, R]`.
pub(crate) fn forward(
    cpu: &Cpu,
    heads: usize,
    head_dim: usize,
    cos: &[f32],
    sin: &[f32],
    x: &[f32],
    inverse: bool,
    pairs: bool,
    y: &mut [f32],
) {
    let width = heads * head_dim;
    assert!(x.len() == y.len() && cos.len() == sin.len());
    if x.is_empty() {
        return;
    }
    let tokens = x.len() / width;
    let turned = cos.len() / tokens;
    assert!(x.len() == tokens * width && cos.len() == tokens * turned && 2 * turned <= head_dim);
    if turned == 0 {
        return copy(&cpu.team, x, y);
    }
    let sign = if inverse { -1.0 } else { 1.0 };
    parts(&cpu.team, y, width, |at, y| {
        let rows = x[at..].chunks_exact(width).zip(y.chunks_exact_mut(width));
        let [cos, sin] = [cos, sin].map(|angles| angles[at / width * turned..].chunks_exact(turned));
        for ((x, y), (cos, sin)) in rows.zip(cos.zip(sin)) {
            match pairs {
                false => cpu.table.light().rope(head_dim, sign, cos, sin, x, y),
                true => cpu.table.light().rope_pairs(head_dim, sign, cos, sin, x, y),
            }
        }
    });
}

/// The heads of one token.
#[inline(always)]
pub(super) fn token(head_dim: usize, sign: f32, cos: &[f32], sin: &[f32], x: &[f32], y: &mut [f32]) {
    let half = cos.len();
    for (x, y) in x.chunks_exact(head_dim).zip(y.chunks_exact_mut(head_dim)) {
        let ((x, rest), (y, rest_y)) = (x.split_at(2 * half), y.split_at_mut(2 * half));
        rest_y.copy_from_slice(rest);
        let ((x0, x1), (y0, y1)) = (x.split_at(half), y.split_at_mut(half));
        map([x0, x1, cos, sin], y0, |[x0, x1, c, s]| x0 * c - x1 * (s * sign));
        map([x0, x1, cos, sin], y1, |[x0, x1, c, s]| x1 * c + x0 * (s * sign));
    }
}

/// The same in the order of the paper.
#[inline(always)]
pub(super) fn token_pairs(head_dim: usize, sign: f32, cos: &[f32], sin: &[f32], x: &[f32], y: &mut [f32]) {
    let turned = 2 * cos.len();
    for (x, y) in x.chunks_exact(head_dim).zip(y.chunks_exact_mut(head_dim)) {
        y[turned..].copy_from_slice(&x[turned..]);
        let pairs = x[..turned].as_chunks().0.iter().zip(y[..turned].as_chunks_mut().0);
        for (([x0, x1], y), (c, s)) in pairs.zip(cos.iter().zip(sin)) {
            *y = [x0 * c - x1 * (s * sign), x1 * c + x0 * (s * sign)];
        }
    }
}
