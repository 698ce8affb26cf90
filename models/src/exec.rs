//! Operations under the names that model files use.

use crate::op::{Activation, AttentionShape, Linear, Norm, Op, Param, RopeTable, StateId, Value};

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
    pub fn rms_norm(&mut self, norm: Norm, x: Value) -> Value {
        self.run(Op::Norm { norm, x })
    }

    /// Rotary position embedding of `heads` heads.
    pub fn rope(&mut self, table: RopeTable, heads: usize, x: Value) -> Value {
        self.run(Op::Rope { table, heads, x })
    }

    /// Causal attention over what `state` keeps.
    pub fn attention(&mut self, state: StateId, shape: AttentionShape, q: Value, k: Value, v: Value) -> Value {
        self.run(Op::Attention { shape, state, q, k, v })
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

    /// `a + b`.
    pub fn add(&mut self, a: Value, b: Value) -> Value {
        self.run(Op::Add { a, b })
    }
}
