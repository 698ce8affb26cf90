//! Functions of single elements.

use super::Param;

/// What a gate is put through before it multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// GELU in its tanh form (Hendrycks & Gimpel 2016).
    GeluTanh,
}

/// A function of one element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Map {
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `x / (1 + e^-x)`.
    Silu,
    /// GELU in its tanh form (Hendrycks & Gimpel 2016).
    GeluTanh,
    /// `cap tanh(x / cap)` (Gemma 2).
    Softcap(f32),
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
}

/// xIELU (Huang & Schlag 2025): with `p = softplus(positive)` and `n = beta + softplus(negative)`, `p x² + beta x` above 0, else
/// `n (e^min(x, eps) - 1 - x) + beta x`. All are parameters of one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xielu {
    /// See above, as are the others.
    pub positive: Param,
    /// Below 0.
    pub negative: Param,
    /// The slope at 0.
    pub beta: Param,
    /// A bound just below 0.
    pub eps: Param,
}
