//! What a parameter is.

/// What a parameter is for; it decides how it is stored and whether an adapter may attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `[V, C]`, looked up by token; may double as the head.
    Embedding,
    /// `[out, in]` of a linear layer inside a decoder layer.
    Linear,
    /// The same, but no adapter may attach: PEFT refuses it, or it is no module there.
    Fixed,
    /// `[V, C]` of an untied head.
    Head,
    /// `[E, C]`, scores a layer's experts. Too small to be worth fewer bits, and a wrong choice costs much.
    Router,
    /// Small, and used as f32: norm weights, biases, taps of a convolution.
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
    /// How the tensor of that name holds it.
    pub layout: Layout,
    /// Path of the module that holds it, where that is not the name's beginning: adapters name it so.
    pub module: Option<String>,
}

/// How a tensor holds a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// As it is.
    Whole,
    /// A matrix `[out, in]` as `[in, out]`. In bitsandbytes' 4 bits it is as it is.
    Transposed,
    /// Among others.
    Stacked(Stack),
}

/// Rows of one of several matrices that are stored as one tensor `[matrices, rows, in]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stack {
    /// The tensor's shape.
    pub shape: [usize; 3],
    /// Which matrix.
    pub index: usize,
    /// Its first row of it.
    pub first: usize,
}

impl ParamSpec {
    /// The shape of the tensor that it lies in, if that is not in 4 bits.
    #[must_use]
    pub fn stored(&self) -> Vec<usize> {
        match self.layout {
            Layout::Whole => self.shape.clone(),
            Layout::Transposed => self.shape.iter().rev().copied().collect(),
            Layout::Stacked(stack) => stack.shape.to_vec(),
        }
    }

    /// Path of the module that holds it: usually the name without `.weight` or `.bias`.
    #[must_use]
    pub fn module(&self) -> &str {
        if let Some(module) = &self.module {
            return module;
        }
        self.name.rsplit_once('.').map_or(&self.name, |(module, _)| module)
    }
}
