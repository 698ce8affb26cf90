//! The gated activations of feed-forward layers (Shazeer 2020): `y = act(gate) * up`, element by element.
//!
//! Both are `act(g) = g s` with a logistic function `s = 1 / (1 + e^-z)`: SiLU has `z = g`; GELU in its tanh form
//! (Hendrycks & Gimpel 2016) has `z = 2 sqrt(2 / pi) (g + 0.044715 g³)`, as `(1 + tanh(z / 2)) / 2 = s`.
//! Then `act'(g) = s (1 + g z' (1 - s))`. Backward computes `s` again.

use super::Cpu;
use super::exp::exp;
use super::split::{parts, parts2};
use crate::Activation;

/// `2 sqrt(2 / pi)`, and the cubic term's factor.
const GELU: (f32, f32) = (1.595_769_2, 0.044_715);
/// Beyond it `s` is 0 or 1 to the last bit of an f32 and `act'` no longer changes, while `g³` would overflow at some 1e13
/// and make a NaN of `inf * 0`.
const GELU_RANGE: f32 = 12.0;

/// `y` from `gate` and `up`, all of one length.
pub(crate) fn forward(cpu: &Cpu, kind: Activation, gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(gate.len() == y.len() && up.len() == y.len());
    let light = cpu.table.light();
    parts(&cpu.team, y, 1, |at, y| {
        let (gate, up) = (&gate[at..][..y.len()], &up[at..][..y.len()]);
        match kind {
            Activation::Silu => light.swiglu(gate, up, y),
            Activation::GeluTanh => light.geglu(gate, up, y),
        }
    });
}

/// `dup = dy act(gate)`, `dgate = dy up act'(gate)`.
pub(crate) fn vjp(
    cpu: &Cpu,
    kind: Activation,
    gate: &[f32],
    up: &[f32],
    dy: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    assert!(gate.len() == dup.len() && up.len() == dup.len() && dy.len() == dup.len());
    let light = cpu.table.light();
    parts2(&cpu.team, dgate, dup, |at, dgate, dup| {
        let [gate, up, dy] = [gate, up, dy].map(|x| &x[at..][..dup.len()]);
        match kind {
            Activation::Silu => light.swiglu_vjp(gate, up, dy, dgate, dup),
            Activation::GeluTanh => light.geglu_vjp(gate, up, dy, dgate, dup),
        }
    });
}

/// [`vjp`] where `gate` and `up` become their gradients.
pub(crate) fn vjp_in_place(cpu: &Cpu, kind: Activation, dy: &[f32], gate: &mut [f32], up: &mut [f32]) {
    assert!(gate.len() == dy.len() && up.len() == dy.len());
    let light = cpu.table.light();
    parts2(&cpu.team, gate, up, |at, gate, up| {
        let dy = &dy[at..][..up.len()];
        match kind {
            Activation::Silu => light.swiglu_vjp_in_place(dy, gate, up),
            Activation::GeluTanh => light.geglu_vjp_in_place(dy, gate, up),
        }
    });
}

/// [`forward`] on one thread.
#[inline(always)]
pub(super) fn value<const FMA: bool, const IS_GELU: bool>(gate: &[f32], up: &[f32], y: &mut [f32]) {
    super::loops::map([gate, up], y, |[g, u]| g * logistic::<FMA, IS_GELU>(g).0 * u);
}

/// [`vjp`] on one thread.
#[inline(always)]
pub(super) fn slope<const FMA: bool, const IS_GELU: bool>(
    gate: &[f32],
    up: &[f32],
    dy: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    let n = dup.len();
    assert!(gate.len() == n && up.len() == n && dy.len() == n && dgate.len() == n);
    let (gate, up, dy, dgate) = (&gate[..n], &up[..n], &dy[..n], &mut dgate[..n]);
    for i in 0..n {
        let (s, gz) = logistic::<FMA, IS_GELU>(gate[i]);
        dup[i] = dy[i] * gate[i] * s;
        dgate[i] = dy[i] * up[i] * s * (1.0 + gz * (1.0 - s));
    }
}

/// [`vjp_in_place`] on one thread.
#[inline(always)]
pub(super) fn slope_in_place<const FMA: bool, const IS_GELU: bool>(dy: &[f32], gate: &mut [f32], up: &mut [f32]) {
    let n = dy.len();
    assert!(gate.len() == n && up.len() == n);
    let (gate, up, dy) = (&mut gate[..n], &mut up[..n], &dy[..n]);
    for i in 0..n {
        let (g, u) = (gate[i], up[i]);
        let (s, gz) = logistic::<FMA, IS_GELU>(g);
        up[i] = dy[i] * g * s;
        gate[i] = dy[i] * u * s * (1.0 + gz * (1.0 - s));
    }
}

/// `s` and `g z'`.
#[inline(always)]
pub(super) fn logistic<const FMA: bool, const IS_GELU: bool>(g: f32) -> (f32, f32) {
    let (z, gz) = if IS_GELU {
        // Not `clamp`, which has a branch; a NaN passes.
        let g = if g > GELU_RANGE { GELU_RANGE } else { g };
        let g = if g < -GELU_RANGE { -GELU_RANGE } else { g };
        (GELU.0 * g * (1.0 + GELU.1 * g * g), GELU.0 * g * (1.0 + 3.0 * GELU.1 * g * g))
    } else {
        (g, g)
    };
    (1.0 / (1.0 + exp::<FMA>(-z)), gz)
}
