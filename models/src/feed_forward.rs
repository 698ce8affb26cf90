//! The gated feed-forward part of a layer (Shazeer 2020).

use crate::exec::Exec;
use crate::op::{Activation, Expert, Linear, Op, Value};
use crate::outline::Builder;

pub(crate) struct FeedForward {
    activation: Activation,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl FeedForward {
    /// Declares the projections `names` (gate, up, down) of the module `at`, with `width` in between.
    pub(crate) fn new(b: &mut Builder, at: &str, names: [&str; 3], width: usize, bias: bool) -> Self {
        let (hidden, [gate, up, down]) = (b.config.hidden_size, names);
        Self {
            activation: Activation::Silu,
            gate: b.linear(&format!("{at}.{gate}"), width, hidden, bias),
            up: b.linear(&format!("{at}.{up}"), width, hidden, bias),
            down: b.linear(&format!("{at}.{down}"), hidden, width, bias),
        }
    }

    /// The same with another activation than SiLU.
    pub(crate) fn with(self, activation: Activation) -> Self {
        Self { activation, ..self }
    }

    /// Its projections.
    pub(crate) fn expert(&self) -> Expert {
        Expert { gate: self.gate, up: self.up, down: self.down }
    }

    pub(crate) fn run(&self, ex: &mut dyn Exec, h: Value) -> Value {
        let [gate, up] = ex.linear_group([self.gate, self.up], h);
        let h = ex.run(Op::Gate { activation: self.activation, gate, up });
        ex.linear(self.down, h)
    }
}

/// Experts, and what chooses among them (Shazeer et al. 2017).
pub(crate) struct Mixture {
    pub(crate) router: Linear,
    pub(crate) experts: Vec<Expert>,
    /// Experts for a token.
    pub(crate) top: usize,
    /// The weights of a token's experts are divided by their sum.
    pub(crate) normalize: bool,
}

impl Mixture {
    pub(crate) fn run(&self, ex: &mut dyn Exec, h: Value) -> Value {
        ex.mixture(self.router, &self.experts, self.top, self.normalize, h)
    }
}

/// What most checkpoints call gate, up and down.
pub(crate) const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
