//! The list of a model's parameters under the checkpoint's names.

use crate::config::Config;
use crate::op::{Linear, Norm, Param};

/// What a parameter is for; it decides how it is stored and whether an adapter may attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `[V, C]`, looked up by token; may double as the head.
    Embedding,
    /// `[out, in]` of a linear layer inside a decoder layer.
    Linear,
    /// `[V, C]` of an untied head.
    Head,
    /// One-dimensional: norm weights and biases.
    Vector,
}

/// Name, shape and role of one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    /// Name in the checkpoint, such as `model.norm.weight`.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
}

impl ParamSpec {
    /// Path of the module that holds it: the name without `.weight` or `.bias`.
    #[must_use]
    pub fn module(&self) -> &str {
        self.name.rsplit_once('.').map_or(&self.name, |(module, _)| module)
    }
}

/// Collects parameters while a family builds itself.
#[derive(Default)]
pub(crate) struct ParamList(pub(crate) Vec<ParamSpec>);

impl ParamList {
    fn push(&mut self, name: String, shape: Vec<usize>, role: Role) -> Param {
        self.0.push(ParamSpec { name, shape, role });
        Param(u32::try_from(self.0.len() - 1).expect("config bounds the number of layers"))
    }

    pub(crate) fn table(&mut self, module: &str, rows: usize, cols: usize, role: Role) -> Param {
        self.push(format!("{module}.weight"), vec![rows, cols], role)
    }

    pub(crate) fn vector(&mut self, name: String, width: usize) -> Param {
        self.push(name, vec![width], Role::Vector)
    }

    pub(crate) fn rms_norm(&mut self, module: &str, width: usize, eps: f32) -> Norm {
        let weight = self.vector(format!("{module}.weight"), width);
        Norm { weight: Some(weight), width, eps, plus_one: false }
    }

    pub(crate) fn linear(&mut self, module: &str, out: usize, input: usize, bias: bool) -> Linear {
        let weight = self.push(format!("{module}.weight"), vec![out, input], Role::Linear);
        let bias = bias.then(|| self.vector(format!("{module}.bias"), out));
        Linear { weight, bias }
    }

    /// The last product: with the embedding's table where they are tied, else with a table of its own.
    pub(crate) fn head(&mut self, config: &Config, embedding: Param) -> Linear {
        let weight = if config.tied_head {
            embedding
        } else {
            self.table("lm_head", config.vocab_size, config.hidden_size, Role::Head)
        };
        Linear { weight, bias: None }
    }
}
