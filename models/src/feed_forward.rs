//! The feed-forward part of a layer.

use crate::config::ConfigError;
use crate::exec::Exec;
use crate::op::{Activation, Expert, GateUp, Linear, Map, Op, Routing, Value};
use crate::outline::Builder;
use crate::params::Stack;

/// What comes between its two products.
#[derive(Clone, Copy)]
pub(crate) enum Inner {
    /// A gate (Shazeer 2020).
    Gated(Activation),
    /// A gate whose matrix is one with the other's, in the first of these names.
    FusedGate(Activation, [&'static str; 2]),
    /// A function, without a gate, between projections of these names.
    Plain(Map, [&'static str; 2]),
}

pub(crate) struct FeedForward {
    input: Input,
    down: Linear,
}

enum Input {
    Gated(Activation, [Linear; 2]),
    FusedGate(Activation, Linear, usize),
    Plain(Map, Linear),
}

impl FeedForward {
    /// Declares the projections of the module `at`, with `width` in between.
    pub(crate) fn new(b: &mut Builder, at: &str, inner: Inner, width: usize, bias: bool) -> Self {
        let hidden = b.config.hidden_size;
        let mut input = |name: &str, out| b.linear(&format!("{at}.{name}"), out, hidden, bias);
        let input = match inner {
            Inner::Gated(activation) => {
                Input::Gated(activation, ["gate_proj", "up_proj"].map(|name| input(name, width)))
            }
            Inner::FusedGate(activation, [gate_up, _]) => {
                Input::FusedGate(activation, input(gate_up, 2 * width), width)
            }
            Inner::Plain(map, [up, _]) => Input::Plain(map, input(up, width)),
        };
        let down = match inner {
            Inner::Gated(_) => "down_proj",
            Inner::FusedGate(_, [_, down]) | Inner::Plain(_, [_, down]) => down,
        };
        Self { input, down: b.linear(&format!("{at}.{down}"), hidden, width, bias) }
    }

    /// A SiLU gate whose projections are `gate`, `up` and `down`.
    pub(crate) fn of([gate, up, down]: [Linear; 3]) -> Self {
        Self { input: Input::Gated(Activation::Silu, [gate, up]), down }
    }

    pub(crate) fn run(&self, ex: &mut dyn Exec, h: Value) -> Value {
        let h = match self.input {
            Input::Gated(activation, gate_up) => {
                let [gate, up] = ex.linear_group(gate_up, h);
                ex.run(Op::Gate { activation, gate, up })
            }
            Input::FusedGate(activation, gate_up, width) => {
                let gate_up = ex.linear(gate_up, h);
                let [gate, up] = ex.split(gate_up, [width; 2]);
                ex.run(Op::Gate { activation, gate, up })
            }
            Input::Plain(map, up) => {
                let h = ex.linear(up, h);
                ex.map(map, h)
            }
        };
        ex.linear(self.down, h)
    }
}

/// Declares the projections `names` (gate, up, down) of the module `at`, with `width` in between.
pub(crate) fn projections(b: &mut Builder, at: &str, names: [&str; 3], width: usize) -> [Linear; 3] {
    let (hidden, [gate, up, down]) = (b.config.hidden_size, names);
    [
        b.linear(&format!("{at}.{gate}"), width, hidden, false),
        b.linear(&format!("{at}.{up}"), width, hidden, false),
        b.linear(&format!("{at}.{down}"), hidden, width, false),
    ]
}

/// The same as an expert with a SiLU gate.
pub(crate) fn expert(b: &mut Builder, at: &str, names: [&str; 3], width: usize) -> Expert {
    let [gate, up, down] = projections(b, at, names, width);
    Expert { inner: GateUp::Apart(Activation::Silu, [gate, up]), down }
}

/// Experts whose gates and ups are one stack `[experts, 2 * width, in]` in the tensor `names[0]`, and whose downs are one
/// `[experts, in, width]` in `names[1]`.
pub(crate) fn stacked_experts(
    b: &mut Builder,
    names: [&str; 2],
    experts: usize,
    width: usize,
    activation: Activation,
) -> Vec<Expert> {
    let hidden = b.config.hidden_size;
    let gate_up = |index, first| Stack { shape: [experts, 2 * width, hidden], index, first };
    let down = |index| Stack { shape: [experts, hidden, width], index, first: 0 };
    let expert = |index| {
        let gate_up = [0, width].map(|first| b.stacked(names[0], gate_up(index, first), width));
        Expert { inner: GateUp::Apart(activation, gate_up), down: b.stacked(names[1], down(index), hidden) }
    };
    (0..experts).map(expert).collect()
}

/// Experts, and what chooses among them (Shazeer et al. 2017).
pub(crate) struct Mixture {
    pub(crate) router: Linear,
    pub(crate) experts: Vec<Expert>,
    pub(crate) routing: Routing,
    /// Factor on what they give.
    pub(crate) scale: f32,
}

/// Upper bound on the experts of all layers, so that a list of their parameters is small whatever a file says.
const MAX_EXPERTS: usize = 1 << 16;

/// Checks that each of `layers` may have so many experts, and a token `top` of them.
pub(crate) fn check_experts(experts: usize, top: usize, layers: usize) -> Result<(), ConfigError> {
    if experts > MAX_EXPERTS / layers {
        let expected = format!("at most {MAX_EXPERTS} experts in {layers} layers");
        return Err(ConfigError::new("num_experts", expected, experts));
    }
    if experts > 0 && top > experts {
        return Err(ConfigError::new("num_experts_per_tok", format!("at most {experts}"), top));
    }
    Ok(())
}

impl Mixture {
    pub(crate) fn run(&self, ex: &mut dyn Exec, h: Value) -> Value {
        let y = ex.mixture(self.router, &self.experts, self.routing, h);
        if self.scale == 1.0 { y } else { ex.scale(self.scale, y) }
    }
}

/// Experts, and one that all tokens go through, as far as the sigmoid of `gate` lets it.
pub(crate) struct SharedMixture {
    pub(crate) mixture: Mixture,
    pub(crate) shared: FeedForward,
    /// `[1, C]`.
    pub(crate) gate: Linear,
}

impl SharedMixture {
    pub(crate) fn run(&self, ex: &mut dyn Exec, h: Value) -> Value {
        let y = self.mixture.run(ex, h);
        let shared = self.shared.run(ex, h);
        let gate = ex.linear(self.gate, h);
        let gate = ex.map(Map::Sigmoid, gate);
        let shared = ex.scale_heads(gate, shared);
        ex.add(y, shared)
    }
}

/// What most checkpoints call gate and up as one matrix, and down.
pub(crate) const FUSED: [&str; 2] = ["gate_up_proj", "down_proj"];
/// What most checkpoints call gate, up and down.
pub(crate) const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
