//! How fast the states of a gated delta rule fade (Yang et al. 2024), from a value `a` for each token and head:
//! `g = -e^rate softplus(a + bias)` with `softplus(z) = ln(1 + e^z)`, so that `e^g` lies in `(0, 1]`. `rate` (`A_log` in
//! checkpoints) and `bias` (`dt_bias`) are frozen and `[H]`.
//! Backward: `da = -dg e^rate / (1 + e^-z)`.

use super::split::parts;
use super::team::Team;

/// `g[T, H]` from `a[T, H]`.
pub(crate) fn forward(team: &Team, rate: &[f32], bias: &[f32], a: &[f32], g: &mut [f32]) {
    each(team, rate, bias, a, g, |_, rate, z, g| {
        // Beside a large `z` the logarithm is nothing, and `e^z` would overflow.
        let softplus = z.max(0.0) + (-z.abs()).exp().ln_1p();
        *g = -rate.exp() * softplus;
    });
}

/// `da[T, H]` from `dg[T, H]`.
pub(crate) fn vjp(team: &Team, rate: &[f32], bias: &[f32], a: &[f32], dg: &[f32], da: &mut [f32]) {
    assert_eq!(dg.len(), da.len());
    each(team, rate, bias, a, da, |i, rate, z, da| *da = -dg[i] * rate.exp() / (1.0 + (-z).exp()));
}

/// Calls `work(i, rate, a + bias, y[i])` for each element.
fn each(
    team: &Team,
    rate: &[f32],
    bias: &[f32],
    a: &[f32],
    y: &mut [f32],
    work: impl Fn(usize, f32, f32, &mut f32) + Sync,
) {
    let heads = rate.len();
    assert!(bias.len() == heads && a.len() == y.len() && a.len().is_multiple_of(heads.max(1)));
    parts(team, y, heads, |at, y| {
        for (i, y) in (at..).zip(y) {
            work(i, rate[i % heads], a[i] + bias[i % heads], y);
        }
    });
}
