//! What layers are made of, and what they remember.

use super::{Param, Value};

/// What a state holds. Layers may share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateSpec {
    /// Keys and values of the tokens so far.
    Kv {
        /// Key/value heads.
        kv_heads: usize,
        /// Width of a head.
        head_dim: usize,
        /// Only the last `window` tokens are seen again; `None` keeps all.
        window: Option<usize>,
    },
    /// The last `taps - 1` inputs of a convolution along the text, `[taps - 1, channels]`.
    Conv {
        /// Width of a row.
        channels: usize,
        /// Rows that one output sees, its own included.
        taps: usize,
    },
    /// A matrix `[key, value]` for each head, as linear attention keeps it.
    Matrix {
        /// Heads.
        heads: usize,
        /// Width of a key.
        key: usize,
        /// Width of a value.
        value: usize,
    },
}

/// A linear layer `y = x Wᵀ + b`; adapters attach to these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Param,
    /// `[out]`, if the layer has one.
    pub bias: Option<Param>,
}

/// A root-mean-square norm (Zhang & Sennrich 2019) of each `width` neighbouring elements of a row: `x / rms(x) * w`, or a
/// layer norm (Ba et al. 2016), `(x - mean(x)) / rms(x - mean(x)) * w + b`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// `[width]`, or that of several such parts one after the other; without one nothing is multiplied.
    pub weight: Option<Param>,
    /// Elements that are normed together: the row's width, or that of a head.
    pub width: usize,
    /// Added to the mean square.
    pub eps: f32,
    /// The file holds `w - 1`.
    pub plus_one: bool,
    /// It is a layer norm, whose weight is there and stored whole.
    pub centered: bool,
    /// `[width]`, of a layer norm that has it.
    pub bias: Option<Param>,
}

impl Norm {
    /// A root-mean-square norm that multiplies nothing.
    #[must_use]
    pub fn bare(width: usize, eps: f32) -> Self {
        Self { weight: None, width, eps, plus_one: false, centered: false, bias: None }
    }
}

/// Shape and masking of an attention layer. Attention is always causal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads, each shared by `heads / kv_heads` query heads (Ainslie et al. 2023).
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the scores before the softmax.
    pub scale: f32,
    /// Scaled scores `s` become `cap tanh(s / cap)` (Gemma 2).
    pub softcap: Option<f32>,
    /// A token sees the last `window` tokens, itself included; `None` sees all.
    pub window: Option<usize>,
    /// `[heads]`: one more score of each head, of no key (Xiao et al. 2023).
    pub sinks: Option<Param>,
}

/// A causal convolution of each channel by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv {
    /// `[channels, 1, taps]`; the last tap meets the token itself.
    pub weight: Param,
    /// `[channels]`, if it has one.
    pub bias: Option<Param>,
}

/// Shape of a gated delta rule (Yang et al. 2024).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaRuleShape {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values, each with a state of its own; neighbours share a head of keys.
    pub value_heads: usize,
    /// Width of a query or key.
    pub key_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
}

/// A state space of Mamba 2 (Dao & Gu 2024).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StateSpace {
    /// `[heads]`, `A_log` in checkpoints.
    pub rate: Param,
    /// `[heads]`, `dt_bias`.
    pub bias: Param,
    /// `[heads]`, `D`.
    pub skip: Param,
    /// Heads, each with a state of its own.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Groups of neighbouring heads that share `b` and `c`.
    pub groups: usize,
    /// Rows of a head's state.
    pub state_dim: usize,
    /// Least and greatest step.
    pub limits: (f32, f32),
}

/// A part of each head that is put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// `[T, heads * width]`, or `[T, width]` if it is shared; without one it is zeros.
    pub value: Option<Value>,
    /// Elements of a head.
    pub width: usize,
    /// All heads have the same.
    pub shared: bool,
}

impl Piece {
    /// A piece of each head.
    #[must_use]
    pub fn of_heads(value: Value, width: usize) -> Self {
        Self { value: Some(value), width, shared: false }
    }

    /// One that all heads have.
    #[must_use]
    pub fn of_all(value: Value, width: usize) -> Self {
        Self { value: Some(value), width, shared: true }
    }

    /// Zeros.
    #[must_use]
    pub fn zeros(width: usize) -> Self {
        Self { value: None, width, shared: false }
    }
}
