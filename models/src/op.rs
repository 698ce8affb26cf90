//! What a family may ask of an executor: operations as data.
//!
//! An operation names the values that it reads; the executor numbers the values that it writes. Values are activations
//! `[T, width]`, one row for each token. What forward and backward need to know of an operation, such as which values
//! they read, is said here and nowhere else.

use std::ops::Range;

/// A value of the running computation: activations `[T, width]`, owned by the executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value(pub u32);

/// A parameter: an index into [`crate::Model::params`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param(pub u32);

/// A rotary table: an index into [`crate::Model::ropes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeTable(pub u8);

/// What a layer remembers of earlier tokens: an index into [`crate::Model::states`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateId(pub u16);

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

/// How a token's experts are chosen, and how much each counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routing {
    /// Experts for a token: those with the largest scores.
    pub top: usize,
    /// What logits become.
    pub scores: Scores,
    /// The weights of a token, which are the chosen scores, are divided by their sum.
    pub normalize: bool,
    /// `[experts]`: a factor on the weight of each, after that.
    pub factors: Option<Param>,
}

/// The scores of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scores {
    /// The softmax of all logits.
    Softmax,
    /// The sigmoid of each; `bias` `[experts]`, if there is one, is added for the choice alone.
    Sigmoid {
        /// See above.
        bias: Option<Param>,
    },
}

/// One expert of a mixture: a gated feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Expert {
    /// What comes before `down`.
    pub inner: GateUp,
    /// `[C, F]`.
    pub down: Linear,
}

/// The gate of an expert, and what passes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum GateUp {
    /// `activation(gate) * up`, of a gate and an up `[F, C]`.
    Apart(Activation, [Linear; 2]),
    /// Gate and up by turns `[2 F, C]`: `clamped_swish(gate) * (clamp(up) + 1)`, see [`Map`] (gpt-oss).
    ByTurns {
        /// Their one layer.
        layer: Linear,
        /// `F`.
        width: usize,
        /// How steep the gate is.
        alpha: f32,
        /// The largest gate, and the largest up of either sign.
        limit: f32,
    },
}

impl Expert {
    /// All its layers.
    #[must_use]
    pub fn layers(&self) -> Vec<Linear> {
        match self.inner {
            GateUp::Apart(_, [gate, up]) => vec![gate, up, self.down],
            GateUp::ByTurns { layer, .. } => vec![layer, self.down],
        }
    }
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

/// An operation with the values it reads. What it writes is `[T, ..]` as [`Op::outputs`] says.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Rows of `table` `[V, C]` for the current tokens.
    Embed {
        /// The embedding.
        table: Param,
    },
    /// Rows of `table` `[P, C]` for the positions of the current tokens.
    EmbedPositions {
        /// The table.
        table: Param,
    },
    /// `y = x Wᵀ + b`, plus whatever adapters are attached, for each of `layers`, which read the same `x`.
    Linears {
        /// One output for each.
        layers: Vec<Linear>,
        /// `[T, in]`.
        x: Value,
    },
    /// See [`Norm`].
    Norm {
        /// Which one.
        norm: Norm,
        /// What is normed.
        x: Value,
    },
    /// Rotary position embedding (Su et al. 2021) of `heads` heads: their first elements, as many as the table turns.
    Rope {
        /// Its angles.
        table: RopeTable,
        /// Heads in a row of `x`.
        heads: usize,
        /// `[T, heads * D]`.
        x: Value,
    },
    /// Causal attention over the earlier tokens of each sequence, which `state` keeps.
    Attention {
        /// Heads, scale, window.
        shape: AttentionShape,
        /// A [`StateSpec::Kv`].
        state: StateId,
        /// Keys and values are those of an earlier layer, which has put them into the state.
        shared: bool,
        /// Queries `[T, heads * D]`.
        q: Value,
        /// Keys `[T, kv_heads * D]`.
        k: Value,
        /// Values, as wide as the keys.
        v: Value,
    },
    /// `activation(gate) * up` (Shazeer 2020).
    Gate {
        /// Of the gate.
        activation: Activation,
        /// `[T, F]`.
        gate: Value,
        /// `[T, F]`.
        up: Value,
    },
    /// `factor * x`.
    Scale {
        /// The factor.
        factor: f32,
        /// Any value.
        x: Value,
    },
    /// Each head times a factor of its own.
    ScaleHeads {
        /// `[T, heads]`.
        factors: Value,
        /// `[T, heads * D]`.
        x: Value,
    },
    /// For each head, `pieces` side by side.
    Join {
        /// Heads.
        heads: usize,
        /// What each has.
        pieces: Vec<Piece>,
    },
    /// Parts of a row, each times a factor of its own.
    ScaleParts {
        /// Widths of the parts, which are the whole row, with their factors.
        parts: Vec<(usize, f32)>,
        /// Any value.
        x: Value,
    },
    /// `factor * x` with the one value of a parameter `[1]`.
    ScaleBy {
        /// The factor.
        factor: Param,
        /// Any value.
        x: Value,
    },
    /// `x` itself, which later layers find under a number, too.
    Carry {
        /// The number.
        slot: u16,
        /// Any value.
        x: Value,
    },
    /// The elements `part` of each row of what [`Op::Carry`] has put under a number before.
    Carried {
        /// The number.
        slot: u16,
        /// Elements of each row.
        part: Range<usize>,
    },
    /// A function of each element.
    Map {
        /// Which one.
        map: Map,
        /// Any value.
        x: Value,
    },
    /// See [`Xielu`].
    Xielu {
        /// Its constants.
        xielu: Xielu,
        /// Any value.
        x: Value,
    },
    /// `a * b`, element by element.
    Multiply {
        /// A factor.
        a: Value,
        /// As wide as `a`.
        b: Value,
    },
    /// The elements `part` of each of `blocks` equal blocks of a row, side by side.
    Columns {
        /// `[T, blocks * width]`.
        x: Value,
        /// Blocks in a row.
        blocks: usize,
        /// Width of a block.
        width: usize,
        /// Elements of each block.
        part: Range<usize>,
    },
    /// See [`Conv`]; goes on after the rows that `state` keeps.
    Conv {
        /// Which one.
        conv: Conv,
        /// A [`StateSpec::Conv`].
        state: StateId,
        /// `[T, channels]`.
        x: Value,
    },
    /// `-e^rate softplus(a + bias)`: the logarithm of how much of each head's state is kept.
    Decay {
        /// `[heads]`.
        rate: Param,
        /// `[heads]`.
        bias: Param,
        /// `[T, heads]`.
        a: Value,
    },
    /// The gated delta rule: each head of values has a matrix `S`, and for each token `S = e^g S`,
    /// `S = S + k (beta (v - Sᵀ k))ᵀ`, `y = Sᵀ q`.
    DeltaRule {
        /// Heads and their widths.
        shape: DeltaRuleShape,
        /// A [`StateSpec::Matrix`].
        state: StateId,
        /// Queries `[T, key_heads * key_dim]`.
        q: Value,
        /// Keys, as wide.
        k: Value,
        /// Values `[T, value_heads * value_dim]`.
        v: Value,
        /// `[T, value_heads]`, see [`Op::Decay`].
        g: Value,
        /// `[T, value_heads]`, from 0 to 1.
        beta: Value,
    },
    /// A state space: each head has a matrix `S` `[state_dim, head_dim]`, and for each token, with the step
    /// `d = softplus(dt + bias)` held between limits, `S = e^(-e^rate d) S + b (d x)ᵀ`, `y = Sᵀ c + skip x`.
    StateSpace {
        /// Its constants and widths.
        space: StateSpace,
        /// A [`StateSpec::Matrix`].
        state: StateId,
        /// `[T, heads * head_dim]`.
        x: Value,
        /// What is written into the state `[T, groups * state_dim]`.
        b: Value,
        /// What is read from it, as wide.
        c: Value,
        /// `[T, heads]`.
        dt: Value,
    },
    /// Chooses experts for each token. Writes their weights `[T, top]` and their numbers `[T, top]`.
    Route {
        /// The weight that made the logits. A layer that training runs again takes the experts that it took first, which
        /// this is the key to: rounded inputs might choose others.
        router: Param,
        /// By what.
        routing: Routing,
        /// `[T, experts]`.
        logits: Value,
    },
    /// The sum of what a token's chosen experts make of it, `down(inner(x))`, each times its weight.
    Experts {
        /// All of them.
        experts: Vec<Expert>,
        /// `[T, C]`.
        x: Value,
        /// What [`Op::Route`] wrote; its second output is read as well.
        weights: Value,
    },
    /// `a + b`.
    Add {
        /// A term.
        a: Value,
        /// As wide as `a`.
        b: Value,
    },
}

/// Width of a value that an operation writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// As wide as another value.
    Like(Value),
    /// The rows of a weight `[rows, cols]`.
    Rows(Param),
    /// Its columns.
    Cols(Param),
    /// So many floats.
    Of(usize),
}

impl Op {
    /// The values that forward reads.
    #[must_use]
    pub fn reads(&self) -> Vec<Value> {
        match *self {
            Self::Join { ref pieces, .. } => pieces.iter().filter_map(|piece| piece.value).collect(),
            Self::ScaleHeads { factors, x } => vec![factors, x],
            Self::Xielu { x, .. } => vec![x],
            Self::Embed { .. } | Self::EmbedPositions { .. } | Self::Carried { .. } => Vec::new(),
            Self::ScaleBy { x, .. } | Self::Carry { x, .. } => vec![x],
            Self::Linears { x, .. } | Self::Norm { x, .. } | Self::Rope { x, .. } | Self::Scale { x, .. } => vec![x],
            Self::Map { x, .. } | Self::Columns { x, .. } | Self::Conv { x, .. } => vec![x],
            Self::Decay { a, .. } => vec![a],
            Self::DeltaRule { q, k, v, g, beta, .. } => vec![q, k, v, g, beta],
            Self::StateSpace { x, b, c, dt, .. } => vec![x, b, c, dt],
            Self::ScaleParts { x, .. } => vec![x],
            Self::Route { logits, .. } => vec![logits],
            Self::Experts { x, weights, .. } => vec![x, weights, chosen(weights)],
            Self::Attention { q, k, v, .. } => vec![q, k, v],
            Self::Gate { gate, up, .. } => vec![gate, up],
            Self::Add { a, b } | Self::Multiply { a, b } => vec![a, b],
        }
    }

    /// The width of each value that it writes. Values that only backward reads come last and lead to no other operation.
    #[must_use]
    pub fn outputs(&self) -> Vec<Width> {
        match self {
            Self::Embed { table } | Self::EmbedPositions { table } => vec![Width::Cols(*table)],
            Self::Linears { layers, .. } => layers.iter().map(|layer| Width::Rows(layer.weight)).collect(),
            // The second one is the log-sum-exp of each head's scores.
            Self::Attention { shape, q, .. } => vec![Width::Like(*q), Width::Of(shape.heads)],
            Self::Norm { x, .. } | Self::Rope { x, .. } | Self::Scale { x, .. } => vec![Width::Like(*x)],
            Self::Gate { gate: like, .. } | Self::Add { a: like, .. } | Self::Multiply { a: like, .. } => {
                vec![Width::Like(*like)]
            }
            Self::Map { x, .. } | Self::Conv { x, .. } | Self::Experts { x, .. } => vec![Width::Like(*x)],
            Self::Columns { blocks, part, .. } => vec![Width::Of(blocks * part.len())],
            Self::Decay { a, .. } => vec![Width::Like(*a)],
            Self::DeltaRule { v, .. } => vec![Width::Like(*v)],
            Self::StateSpace { x, .. } | Self::ScaleParts { x, .. } => vec![Width::Like(*x)],
            Self::ScaleBy { x, .. } | Self::Carry { x, .. } | Self::ScaleHeads { x, .. } => vec![Width::Like(*x)],
            Self::Xielu { x, .. } => vec![Width::Like(*x)],
            Self::Join { heads, pieces } => {
                vec![Width::Of(heads * pieces.iter().map(|piece| piece.width).sum::<usize>())]
            }
            Self::Carried { part, .. } => vec![Width::Of(part.len())],
            Self::Route { routing, .. } => vec![Width::Of(routing.top); 2],
        }
    }

    /// The values that backward reads, of an operation whose first output is `y`. A linear layer without an adapter in
    /// training reads none: the base is frozen.
    #[must_use]
    pub fn keeps(&self, y: Value) -> Vec<Value> {
        match *self {
            Self::Embed { .. } | Self::EmbedPositions { .. } => Vec::new(),
            Self::Rope { .. } | Self::Scale { .. } | Self::Add { .. } => Vec::new(),
            Self::Linears { x, .. } | Self::Norm { x, .. } => vec![x],
            Self::Attention { q, k, v, .. } => vec![q, k, v, y, Value(y.0 + 1)],
            Self::Gate { gate, up, .. } => vec![gate, up],
            Self::Columns { .. } | Self::Conv { .. } | Self::ScaleParts { .. } => Vec::new(),
            Self::ScaleBy { .. } | Self::Carry { .. } | Self::Carried { .. } | Self::Join { .. } => Vec::new(),
            Self::ScaleHeads { factors, x } => vec![factors, x],
            Self::StateSpace { x, b, c, dt, .. } => vec![x, b, c, dt],
            Self::Map { x, .. } | Self::Xielu { x, .. } => vec![x],
            Self::Multiply { a, b } => vec![a, b],
            Self::Decay { a, .. } => vec![a],
            Self::DeltaRule { q, k, v, g, beta, .. } => vec![q, k, v, g, beta],
            Self::Route { logits, .. } => vec![logits, chosen(y)],
            Self::Experts { x, weights, .. } => vec![x, weights, chosen(weights)],
        }
    }

    /// Whether its output costs so little that it is computed again for backward rather than kept.
    #[must_use]
    pub fn is_cheap(&self) -> bool {
        matches!(
            self,
            Self::Norm { .. }
                | Self::Gate { .. }
                | Self::Scale { .. }
                | Self::Map { .. }
                | Self::Xielu { .. }
                | Self::Multiply { .. }
                | Self::Columns { .. }
                | Self::Decay { .. }
                | Self::ScaleParts { .. }
                | Self::ScaleBy { .. }
                | Self::ScaleHeads { .. }
                | Self::Join { .. }
                | Self::Carried { .. }
        )
    }

    /// Whether rows of its output depend on the same rows of its inputs alone, wherever they are in a text.
    #[must_use]
    pub fn is_row_wise(&self) -> bool {
        !matches!(
            self,
            Self::Embed { .. }
                | Self::EmbedPositions { .. }
                | Self::Attention { .. }
                | Self::Rope { .. }
                | Self::Conv { .. }
                | Self::DeltaRule { .. }
                | Self::StateSpace { .. }
                | Self::Carry { .. }
                | Self::Carried { .. }
        )
    }
}

/// The second output of [`Op::Route`], of which `weights` is the first: numbers of experts, as floats.
fn chosen(weights: Value) -> Value {
    Value(weights.0 + 1)
}
