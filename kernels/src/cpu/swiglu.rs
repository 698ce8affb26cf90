//! The gated activation of Llama-like models (Shazeer 2020): `y = silu(gate) * up`, element by element, with
//! `silu(g) = g s` and `s = 1 / (1 + e^-g)`. Backward computes `s` again.

use super::lanes::LANES;
use super::lanes::{load, map, sigmoid, store};
use super::split::{parts, parts2};
use wide::f32x8;

/// `y` from `gate` and `up`, all of one length.
pub(crate) fn forward(gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(gate.len() == y.len() && up.len() == y.len());
    parts(y, 1, |at, y| {
        let n = y.len();
        map([&gate[at..][..n], &up[at..][..n]], y, |[g, u]| g * sigmoid(g) * u);
    });
}

/// `dup = dy g s`, `dgate = dy up s (1 + g (1 - s))`.
pub(crate) fn vjp(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    assert!(gate.len() == dup.len() && up.len() == dup.len() && dy.len() == dup.len());
    parts2(dgate, dup, |at, dgate, dup| {
        let n = dup.len();
        let (gate, up, dy) = (&gate[at..][..n], &up[at..][..n], &dy[at..][..n]);
        for i in (0..n).step_by(LANES) {
            let (g, u, dy) = (load(&gate[i..]), load(&up[i..]), load(&dy[i..]));
            let s = sigmoid(g);
            store(&mut dup[i..], dy * g * s);
            store(&mut dgate[i..], dy * u * s * (f32x8::ONE + g * (f32x8::ONE - s)));
        }
    });
}
