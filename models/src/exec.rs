//! Operations under the names that model files use.

use crate::op::{
    Activation, AttentionShape, Conv, DeltaRuleShape, Expert, Linear, Map, Norm, Op, Param, Piece, RopeTable, Routing,
    StateId, StateSpace, Value, Xielu,
};
use std::ops::Range;

/// Runs a model's operations. Tokens, their positions and what is remembered of earlier ones belong to the executor, so
/// one forward text serves a prompt, a decode step, a batch of sequences and training.
pub trait Exec {
    /// Runs `op`, now or later; returns the first of its outputs. Further ones have the numbers behind it.
    fn run(&mut self, op: Op) -> Value;
}

impl dyn Exec + '_ {
    /// Rows of `table` `[V, C]` for the current tokens.
    pub fn embed(&mut self, table: Param) -> Value {
        self.run(Op::Embed { table })
    }

    /// Rows of `table` `[P, C]` for the positions of the current tokens.
    pub fn embed_positions(&mut self, table: Param) -> Value {
        self.run(Op::EmbedPositions { table })
    }

    /// `y = x Wᵀ + b`, plus whatever adapters are attached to `layer`.
    pub fn linear(&mut self, layer: Linear, x: Value) -> Value {
        self.run(Op::Linears { layers: vec![layer], x })
    }

    /// As many layers that read the same `x`, so that it is read once.
    pub fn linear_group<const N: usize>(&mut self, layers: [Linear; N], x: Value) -> [Value; N] {
        let first = self.run(Op::Linears { layers: layers.to_vec(), x });
        std::array::from_fn(|i| Value(first.0 + i as u32))
    }

    /// See [`Norm`].
    pub fn norm(&mut self, norm: Norm, x: Value) -> Value {
        self.run(Op::Norm { norm, x })
    }

    /// `x / sqrt(sum(x²) + eps)` of each `width` neighbouring elements of a row.
    pub fn l2_norm(&mut self, width: usize, eps: f32, x: Value) -> Value {
        // The mean square is the sum by the width.
        let x = self.norm(Norm::bare(width, eps / width as f32), x);
        self.scale((width as f32).sqrt().recip(), x)
    }

    /// Rotary position embedding of `heads` heads.
    pub fn rope(&mut self, table: RopeTable, heads: usize, x: Value) -> Value {
        self.run(Op::Rope { table, heads, x })
    }

    /// Causal attention over what `state` keeps.
    pub fn attention(&mut self, state: StateId, shape: AttentionShape, q: Value, k: Value, v: Value) -> Value {
        self.run(Op::Attention { shape, state, shared: false, q, k, v })
    }

    /// The same over what an earlier layer has put into `state`: `k` and `v` are that layer's.
    pub fn shared_attention(&mut self, state: StateId, shape: AttentionShape, q: Value, k: Value, v: Value) -> Value {
        self.run(Op::Attention { shape, state, shared: true, q, k, v })
    }

    /// `x` itself, which later layers find under the number `slot`.
    pub fn carry(&mut self, slot: u16, x: Value) -> Value {
        self.run(Op::Carry { slot, x })
    }

    /// The elements `part` of each row of what was carried under `slot`.
    pub fn carried(&mut self, slot: u16, part: Range<usize>) -> Value {
        self.run(Op::Carried { slot, part })
    }

    /// `factor * x` with the one value of a parameter.
    pub fn scale_by(&mut self, factor: Param, x: Value) -> Value {
        self.run(Op::ScaleBy { factor, x })
    }

    /// `silu(gate) * up`.
    pub fn swiglu(&mut self, gate: Value, up: Value) -> Value {
        self.run(Op::Gate { activation: Activation::Silu, gate, up })
    }

    /// `gelu(gate) * up`, with GELU's tanh form.
    pub fn geglu(&mut self, gate: Value, up: Value) -> Value {
        self.run(Op::Gate { activation: Activation::GeluTanh, gate, up })
    }

    /// `factor * x`.
    pub fn scale(&mut self, factor: f32, x: Value) -> Value {
        self.run(Op::Scale { factor, x })
    }

    /// A function of each element.
    pub fn map(&mut self, map: Map, x: Value) -> Value {
        self.run(Op::Map { map, x })
    }

    /// See [`Xielu`].
    pub fn xielu(&mut self, xielu: Xielu, x: Value) -> Value {
        self.run(Op::Xielu { xielu, x })
    }

    /// `a * b`.
    pub fn multiply(&mut self, a: Value, b: Value) -> Value {
        self.run(Op::Multiply { a, b })
    }

    /// Parts of a row whose widths are `widths`, one after the other.
    pub fn split<const N: usize>(&mut self, x: Value, widths: [usize; N]) -> [Value; N] {
        self.split_heads(x, 1, widths)
    }

    /// As `split` for each of `heads` heads, whose parts lie side by side in what is returned.
    pub fn split_heads<const N: usize>(&mut self, x: Value, heads: usize, widths: [usize; N]) -> [Value; N] {
        let (width, mut start) = (widths.iter().sum(), 0);
        widths.map(|part| {
            let part: Range<usize> = start..start + part;
            start = part.end;
            self.run(Op::Columns { x, blocks: heads, width, part })
        })
    }

    /// See [`Conv`].
    pub fn conv(&mut self, state: StateId, conv: Conv, x: Value) -> Value {
        self.run(Op::Conv { conv, state, x })
    }

    /// See [`Op::Decay`].
    pub fn decay(&mut self, rate: Param, bias: Param, a: Value) -> Value {
        self.run(Op::Decay { rate, bias, a })
    }

    /// See [`Op::DeltaRule`]; `qkv` are its queries, keys and values.
    pub fn delta_rule(
        &mut self,
        state: StateId,
        shape: DeltaRuleShape,
        qkv: [Value; 3],
        g: Value,
        beta: Value,
    ) -> Value {
        let [q, k, v] = qkv;
        self.run(Op::DeltaRule { shape, state, q, k, v, g, beta })
    }

    /// See [`Op::StateSpace`]; `xbc` are its `x`, `b` and `c`.
    pub fn state_space(&mut self, state: StateId, space: StateSpace, xbc: [Value; 3], dt: Value) -> Value {
        let [x, b, c] = xbc;
        self.run(Op::StateSpace { space, state, x, b, c, dt })
    }

    /// Each head of `x` times its factor of `factors` `[T, heads]`.
    pub fn scale_heads(&mut self, factors: Value, x: Value) -> Value {
        self.run(Op::ScaleHeads { factors, x })
    }

    /// For each of `heads`, `pieces` side by side.
    pub fn join(&mut self, heads: usize, pieces: &[Piece]) -> Value {
        self.run(Op::Join { heads, pieces: pieces.to_vec() })
    }

    /// Parts of a row, each times a factor of its own: `parts` are their widths and factors.
    pub fn scale_parts(&mut self, parts: &[(usize, f32)], x: Value) -> Value {
        self.run(Op::ScaleParts { parts: parts.to_vec(), x })
    }

    /// See [`Op::Route`] and [`Op::Experts`].
    pub fn mixture(&mut self, router: Linear, experts: &[Expert], routing: Routing, x: Value) -> Value {
        let logits = self.linear(router, x);
        let weights = self.run(Op::Route { router: router.weight, routing, logits });
        self.run(Op::Experts { experts: experts.to_vec(), x, weights })
    }

    /// `a + b`.
    pub fn add(&mut self, a: Value, b: Value) -> Value {
        self.run(Op::Add { a, b })
    }
}
