//! What a family may ask of an executor: operations as data.
//!
//! An operation names the values that it reads; the executor numbers the values that it writes. Values are activations
//! `[T, width]`, one row for each token. What forward and backward need to know of an operation, such as which values
//! they read, is said here and nowhere else.

mod experts;
mod functions;
mod layers;

pub use experts::{Expert, GateUp, Routing, Scores};
pub use functions::{Activation, Map, Xielu};
pub use layers::{AttentionShape, Conv, DeltaRuleShape, Linear, Norm, Piece, StateSpace, StateSpec};

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
