//! Functions of one element: `y[i] = f(x[i])`. Backward computes what it needs from `x` again.

use super::Cpu;
use super::exp::exp;
use super::gated::logistic;
use super::loops::{map, multiply_add, update};
use super::split::parts;

/// A function of one element, `y = f(x)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Map {
    /// `factor x`.
    Scale(f32),
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `x / (1 + e^-x)`.
    Silu,
    /// `cap tanh(x / cap)`: nearly `x`, but never beyond `cap` (Gemma 2).
    Softcap(f32),
    /// GELU in its tanh form (Hendrycks & Gimpel 2016).
    GeluTanh,
    /// `max(x, 0)²` (So et al. 2021).
    SquaredRelu,
    /// `x / (1 + e^(-alpha x))` with `x` at most `limit`.
    ClampedSwish {
        /// How steep it is.
        alpha: f32,
        /// The largest `x`.
        limit: f32,
    },
    /// `x`, not beyond `limit` on either side, plus `plus`.
    Clamp {
        /// The largest magnitude.
        limit: f32,
        /// Added to it.
        plus: f32,
    },
    /// xIELU (Huang & Schlag 2025): `positive x² + beta x` above 0, else `negative (e^min(x, eps) - 1 - x) + beta x`.
    Xielu {
        /// How fast it grows above 0.
        positive: f32,
        /// How fast it bends below 0.
        negative: f32,
        /// Its slope at 0.
        beta: f32,
        /// A bound just below 0.
        eps: f32,
    },
}

/// `y` from `x` of the same length.
pub(crate) fn forward(cpu: &Cpu, kind: Map, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    parts(&cpu.team, y, 1, |at, y| cpu.table.light().map(kind, &x[at..][..y.len()], y));
}

/// `dx = dy f'(x)`.
pub(crate) fn vjp(cpu: &Cpu, kind: Map, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    assert!(x.len() == dx.len() && dy.len() == dx.len());
    parts(&cpu.team, dx, 1, |at, dx| {
        let n = dx.len();
        cpu.table.light().map_vjp(kind, &x[at..][..n], &dy[at..][..n], dx);
    });
}

/// [`forward`] on one thread.
#[inline(always)]
pub(super) fn values<const FMA: bool>(kind: Map, x: &[f32], y: &mut [f32]) {
    match kind {
        Map::Scale(factor) => map([x], y, |[x]| factor * x),
        Map::Sigmoid => map([x], y, |[x]| sigmoid::<FMA>(x)),
        Map::Silu => map([x], y, |[x]| x * sigmoid::<FMA>(x)),
        Map::Softcap(cap) => map([x], y, |[x]| cap * tanh::<FMA>(x / cap)),
        Map::GeluTanh => map([x], y, |[x]| x * logistic::<FMA, true>(x).0),
        Map::SquaredRelu => map([x], y, |[x]| relu(x) * relu(x)),
        Map::ClampedSwish { alpha, limit } => map([x], y, |[x]| {
            let x = if x > limit { limit } else { x };
            x * sigmoid::<FMA>(alpha * x)
        }),
        Map::Clamp { limit, plus } => map([x], y, |[x]| {
            let low = if x < -limit { -limit } else { x };
            plus + if low > limit { limit } else { low }
        }),
        Map::Xielu { positive, negative, beta, eps } => map([x], y, |[x]| {
            let low = if x > eps { eps } else { x };
            let bent = negative * (exp::<FMA>(low) - 1.0 - x);
            beta * x + if x > 0.0 { positive * x * x } else { bent }
        }),
    }
}

/// [`vjp`] on one thread.
#[inline(always)]
pub(super) fn slopes<const FMA: bool>(kind: Map, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    match kind {
        Map::Scale(factor) => map([dy], dx, |[dy]| factor * dy),
        Map::Sigmoid => map([x, dy], dx, |[x, dy]| {
            let s = sigmoid::<FMA>(x);
            dy * s * (1.0 - s)
        }),
        Map::Silu => map([x, dy], dx, |[x, dy]| {
            let s = sigmoid::<FMA>(x);
            dy * s * (1.0 + x * (1.0 - s))
        }),
        Map::Softcap(cap) => map([x, dy], dx, |[x, dy]| {
            let y = tanh::<FMA>(x / cap);
            dy * (1.0 - y * y)
        }),
        Map::GeluTanh => map([x, dy], dx, |[x, dy]| {
            let (s, xz) = logistic::<FMA, true>(x);
            dy * s * (1.0 + xz * (1.0 - s))
        }),
        Map::SquaredRelu => map([x, dy], dx, |[x, dy]| 2.0 * dy * relu(x)),
        Map::ClampedSwish { alpha, limit } => map([x, dy], dx, |[x, dy]| {
            let s = sigmoid::<FMA>(alpha * x);
            let slope = s * (1.0 + alpha * x * (1.0 - s));
            if x > limit { 0.0 } else { dy * slope }
        }),
        Map::Clamp { limit, .. } => map([x, dy], dx, |[x, dy]| if x.abs() > limit { 0.0 } else { dy }),
        Map::Xielu { positive, negative, beta, eps } => map([x, dy], dx, |[x, dy]| {
            let rise = if x < eps { exp::<FMA>(x) } else { 0.0 };
            let slope = if x > 0.0 { 2.0 * positive * x } else { negative * (rise - 1.0) };
            dy * (beta + slope)
        }),
    }
}

/// `x = cap tanh(x / cap)`.
#[inline(always)]
pub(super) fn softcap<const FMA: bool>(cap: f32, x: &mut [f32]) {
    update(x, [], |x, []| cap * tanh::<FMA>(x / cap));
}

/// Not `max`, which passes over a NaN.
#[inline(always)]
fn relu(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

#[inline(always)]
fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// Below it the difference in [`tanh`] would cancel.
const SMALL: f32 = 0.625;
/// `(tanh(x) / x - 1) / x²` on `[-SMALL, SMALL]` in powers of `x²`, highest first: Cephes' `tanhf`.
const TANH: [f32; 5] = [-5.704_988_7e-3, 2.063_909e-2, -5.373_971_6e-2, 0.133_314_42, -0.333_332_8];

/// Within 2 ulp, without branches.
#[inline(always)]
pub(super) fn tanh<const FMA: bool>(x: f32) -> f32 {
    let square = x * x;
    let mut p = TANH[0];
    for c in &TANH[1..] {
        p = multiply_add::<FMA>(p, square, *c);
    }
    let near = multiply_add::<FMA>(p * square, x, x);
    let far = 1.0 - 2.0 / (1.0 + exp::<FMA>(2.0 * x.abs()));
    if x.abs() < SMALL { near } else { far.copysign(x) }
}
