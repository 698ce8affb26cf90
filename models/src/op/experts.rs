//! Experts, and how they are chosen.

use super::{Activation, Linear, Param};

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
    /// Gate and up by turns `[2 F, C]`: `clamped_swish(gate) * (clamp(up) + 1)`, see [`Map`](super::Map) (gpt-oss).
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
