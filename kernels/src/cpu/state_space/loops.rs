//! The inner loops: sums of rows, the weights of pairs of tokens, and one token by itself.

use super::super::exp::exp;
use super::super::loops::multiply_add;

/// `y += sum_j a[j a_step] x[j x_step ..]`, `rows` terms: one row of a product of matrices.
#[inline(always)]
pub(crate) fn add_rows<const FMA: bool>(
    a: &[f32],
    a_step: usize,
    x: &[f32],
    x_step: usize,
    rows: usize,
    y: &mut [f32],
) {
    // Blocks of a width that is known when this is compiled keep their sums in registers.
    let mut at = 0;
    while at + 64 <= y.len() {
        block::<FMA, 64>(a, a_step, x, x_step, rows, y, at);
        at += 64;
    }
    while at + 16 <= y.len() {
        block::<FMA, 16>(a, a_step, x, x_step, rows, y, at);
        at += 16;
    }
    while at < y.len() {
        block::<FMA, 1>(a, a_step, x, x_step, rows, y, at);
        at += 1;
    }
}

#[inline(always)]
fn block<const FMA: bool, const WIDTH: usize>(
    a: &[f32],
    a_step: usize,
    x: &[f32],
    x_step: usize,
    rows: usize,
    y: &mut [f32],
    at: usize,
) {
    let y: &mut [f32; WIDTH] = (&mut y[at..at + WIDTH]).try_into().expect("a whole block");
    let mut sums = *y;
    for j in 0..rows {
        let a = a[j * a_step];
        let x: &[f32; WIDTH] = (&x[j * x_step + at..][..WIDTH]).try_into().expect("a whole block");
        for i in 0..WIDTH {
            sums[i] = multiply_add::<FMA>(a, x[i], sums[i]);
        }
    }
    *y = sums;
}

/// How much the tokens up to the last count for it: `weights[j] = cb[j] e^(g_last - g[j]) d[j]`, all of one length.
#[inline(always)]
pub(crate) fn pairs<const FMA: bool>(g: &[f64], d: &[f32], cb: &[f32], weights: &mut [f32]) {
    let n = weights.len();
    assert!(n > 0 && g.len() == n && d.len() == n && cb.len() == n);
    let last = g[n - 1];
    for j in 0..n {
        weights[j] = cb[j] * exp::<FMA>((last - g[j]) as f32) * d[j];
    }
}

/// Backward of [`pairs`]: of `e`, the gradients by the weights, to those by `cb`; `cb` becomes `cb e^(g_last - g[j])`. Takes
/// the gradients by `g[j]` away from `dg`, and returns their sum, the gradient by `g_last`.
#[inline(always)]
pub(crate) fn pairs_vjp<const FMA: bool>(g: &[f64], d: &[f32], cb: &mut [f32], e: &mut [f32], dg: &mut [f64]) -> f64 {
    let n = cb.len();
    assert!(n > 0 && g.len() == n && d.len() == n && e.len() == n && dg.len() == n);
    let last = g[n - 1];
    let mut sum = 0.0;
    for j in 0..n {
        let faded = exp::<FMA>((last - g[j]) as f32);
        let by_pair = faded * d[j] * e[j];
        let by_g = f64::from(cb[j] * by_pair);
        dg[j] -= by_g;
        sum += by_g;
        cb[j] *= faded;
        e[j] = by_pair;
    }
    sum
}

/// Takes the state `s` `[N, P]` past a token of `x` `[P]`, `b` and `c` `[N]`: `s = decay s + b (d x)ᵀ`, `y += sᵀ c`.
#[inline(always)]
pub(crate) fn step<const FMA: bool>(decay: f32, d: f32, [x, b, c]: [&[f32]; 3], s: &mut [f32], y: &mut [f32]) {
    let width = y.len();
    assert!(width > 0 && x.len() == width && b.len() == c.len() && s.len() == b.len() * width);
    let mut at = 0;
    while at + 64 <= width {
        step_block::<FMA, 64>(decay, d, [x, b, c], s, y, at);
        at += 64;
    }
    while at + 16 <= width {
        step_block::<FMA, 16>(decay, d, [x, b, c], s, y, at);
        at += 16;
    }
    while at < width {
        step_block::<FMA, 1>(decay, d, [x, b, c], s, y, at);
        at += 1;
    }
}

#[inline(always)]
fn step_block<const FMA: bool, const WIDTH: usize>(
    decay: f32,
    d: f32,
    [x, b, c]: [&[f32]; 3],
    s: &mut [f32],
    y: &mut [f32],
    at: usize,
) {
    let width = y.len();
    let y: &mut [f32; WIDTH] = (&mut y[at..at + WIDTH]).try_into().expect("a whole block");
    let x: &[f32; WIDTH] = (&x[at..at + WIDTH]).try_into().expect("a whole block");
    let (mut sums, u) = (*y, x.map(|x| d * x));
    for ((s, b), c) in s.chunks_exact_mut(width).zip(b).zip(c) {
        let s: &mut [f32; WIDTH] = (&mut s[at..at + WIDTH]).try_into().expect("a whole block");
        for i in 0..WIDTH {
            s[i] = multiply_add::<FMA>(*b, u[i], decay * s[i]);
            sums[i] = multiply_add::<FMA>(*c, s[i], sums[i]);
        }
    }
    *y = sums;
}
