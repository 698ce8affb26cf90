//! One token of some columns of one head, forward and backward: the loops over the state.

use super::super::loops::{multiply_add, sum};
use super::BLOCK;

/// What a token brings. Letters are those of the module above; `v` has the task's columns only.
#[derive(Clone, Copy)]
pub(crate) struct Token<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub decay: f32,
    pub beta: f32,
}

/// Gradients by what a token brought: `q` and `k` are added to, for columns and heads share them; `v` is written.
pub(crate) struct Gradients<'a> {
    pub q: &'a mut [f32],
    pub k: &'a mut [f32],
    pub v: &'a mut [f32],
}

/// Takes the state `s` `[K, columns]` past a token and writes `r` and `y`.
///
/// The state is read once for both of its products, as `y = d Sᵀ q + (k . q) u` with `S` as it was before, and once more
/// to be changed.
#[inline(always)]
pub(crate) fn step<const FMA: bool>(token: Token, s: &mut [f32], r: &mut [f32], y: &mut [f32]) {
    // A width that is known when this is compiled keeps the sums in registers.
    if y.len() == BLOCK { step_of::<FMA>(BLOCK, token, s, r, y) } else { step_of::<FMA>(y.len(), token, s, r, y) }
}

#[inline(always)]
fn step_of<const FMA: bool>(width: usize, token: Token, s: &mut [f32], r: &mut [f32], y: &mut [f32]) {
    let Token { q, k, v, decay, beta } = token;
    assert!(width > 0 && width <= BLOCK && s.len() == k.len() * width && q.len() == k.len());
    assert!(v.len() == width && r.len() == width && y.len() == width);
    let (v, r, y) = (&v[..width], &mut r[..width], &mut y[..width]);
    let (mut by_k, mut by_q) = ([0.0; BLOCK], [0.0; BLOCK]);
    for (s, (k, q)) in s.chunks_exact(width).zip(k.iter().zip(q)) {
        for j in 0..width {
            by_k[j] = multiply_add::<FMA>(*k, s[j], by_k[j]);
            by_q[j] = multiply_add::<FMA>(*q, s[j], by_q[j]);
        }
    }
    let own = dot(k, q);
    let mut u = [0.0; BLOCK];
    for j in 0..width {
        r[j] = v[j] - decay * by_k[j];
        u[j] = beta * r[j];
        y[j] = multiply_add::<FMA>(own, u[j], decay * by_q[j]);
    }
    for (s, k) in s.chunks_exact_mut(width).zip(k) {
        for j in 0..width {
            s[j] = multiply_add::<FMA>(*k, u[j], decay * s[j]);
        }
    }
}

/// Takes the gradient `ds` by the state after a token, to which later tokens have added theirs, to that by the state
/// before it. `before` and `after` are those states, `r` is what [`step`] wrote. Returns the gradients by `g` and `beta`.
///
/// ```text
/// y = Sᵀ q:         dS += q dyᵀ, dq = S dy
/// S = S' + k uᵀ:    dS' = dS, du = dSᵀ k, dk = dS u
/// u = b r:          db = du . r, dr = b du
/// r = v - S'ᵀ k:    dv = dr, dS' -= k drᵀ, dk -= S' dr
/// S' = e^g S:       dS = e^g dS', dg = sum of dS' S'
/// ```
#[inline(always)]
pub(crate) fn back<const FMA: bool>(
    token: Token,
    states: [&[f32]; 2],
    r: &[f32],
    dy: &[f32],
    ds: &mut [f32],
    out: Gradients,
) -> [f32; 2] {
    if dy.len() == BLOCK {
        back_of::<FMA>(BLOCK, token, states, r, dy, ds, out)
    } else {
        back_of::<FMA>(dy.len(), token, states, r, dy, ds, out)
    }
}

#[inline(always)]
fn back_of<const FMA: bool>(
    width: usize,
    token: Token,
    [before, after]: [&[f32]; 2],
    r: &[f32],
    dy: &[f32],
    ds: &mut [f32],
    out: Gradients,
) -> [f32; 2] {
    let Token { q, k, decay, beta, .. } = token;
    let (rows, n) = (k.len(), k.len() * width);
    assert!(width > 0 && width <= BLOCK && q.len() == rows && out.q.len() == rows && out.k.len() == rows);
    assert!(before.len() == n && after.len() == n && ds.len() == n);
    assert!(r.len() == width && dy.len() == width && out.v.len() == width);
    let (r, dy) = (&r[..width], &dy[..width]);
    let (mut u, mut du) = ([0.0; BLOCK], [0.0; BLOCK]);
    for j in 0..width {
        u[j] = beta * r[j];
    }
    for (i, (after, ds)) in after.chunks_exact(width).zip(ds.chunks_exact_mut(width)).enumerate() {
        for j in 0..width {
            ds[j] = multiply_add::<FMA>(q[i], dy[j], ds[j]);
            du[j] = multiply_add::<FMA>(k[i], ds[j], du[j]);
        }
        out.q[i] += dot(after, dy);
        out.k[i] += dot(ds, &u[..width]);
    }
    let mut dr = [0.0; BLOCK];
    for j in 0..width {
        dr[j] = beta * du[j];
        out.v[j] = dr[j];
    }
    let mut faded = [0.0; BLOCK];
    for (i, (before, ds)) in before.chunks_exact(width).zip(ds.chunks_exact_mut(width)).enumerate() {
        out.k[i] -= decay * dot(before, &dr[..width]);
        for j in 0..width {
            let d = multiply_add::<FMA>(-k[i], dr[j], ds[j]);
            faded[j] = multiply_add::<FMA>(d, before[j], faded[j]);
            ds[j] = decay * d;
        }
    }
    [decay * sum([&faded[..width]], |[x]| x), dot(&du[..width], r)]
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum([a, b], |[a, b]| a * b)
}
