//! Settings of calls: which arithmetic, which shape, which step of an optimizer.

/// Arithmetic of the products with weights. Results are f32 in all of them. A device that lacks one takes a more exact
/// one instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Arithmetic {
    /// f32 products and sums, of the weights' exact values.
    #[default]
    Exact,
    /// Products of operands rounded to bf16, summed in f32; f32 where the device has no such instruction.
    Bf16,
    /// Products of activations rounded to 8 bits per 64 elements with 8-bit codes of the weight, summed exactly within
    /// such a block. For weights in 4 or 8 bits whose rows are whole blocks; exact for all others.
    Int8,
}

/// Number type of a key/value cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheType {
    /// 4 bytes an element, no rounding.
    F32,
    /// 2 bytes an element.
    F16,
    /// 1 byte an element and a scale for each head's row.
    I8,
}

/// Number type of a small trainable matrix as forward and backward see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkType {
    /// The f32 master itself.
    F32,
    /// The master rounded to f16, as the adapter file will hold it.
    F16,
}

/// The activation of a gate. Both have the form `act(g) = g s` with a logistic function `s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `g / (1 + e^-g)` (Elfwing et al. 2017, also called swish).
    Silu,
    /// The tanh form of GELU (Hendrycks & Gimpel 2016).
    GeluTanh,
}

/// What the logits of a router become before the chosen ones count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scores {
    /// Their softmax.
    Softmax,
    /// `1 / (1 + e^-l)` of each by itself.
    Sigmoid,
}

/// Shape and masking of one attention call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads (`H`), a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads (`G`).
    pub kv_heads: usize,
    /// Width of one head (`D`).
    pub head_dim: usize,
    /// Factor on the scores before the softmax, usually `1 / sqrt(D)`.
    pub scale: f32,
    /// Scaled scores `s` become `cap tanh(s / cap)`, so that none is beyond it (Gemma 2).
    pub softcap: Option<f32>,
    /// A query sees the last `window` keys, itself included; `None` sees all before it.
    pub window: Option<usize>,
}

/// Where some columns lie in an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns {
    /// Width of the array's rows. To take a part of each head, it is the width of a head.
    pub of: usize,
    /// The first of them.
    pub first: usize,
}

/// Shape of a product with one small matrix for each block of columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// How many blocks there are.
    pub count: usize,
    /// `[out, in]` of a matrix.
    pub shape: [usize; 2],
    /// Columns side by side that share a row or column of the matrix.
    pub inner: usize,
}

/// Shape of a gated delta rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaRule {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values, a multiple of `key_heads`: as many neighbours share one head of keys.
    pub value_heads: usize,
    /// Width of a head of keys (`K`).
    pub key_dim: usize,
    /// Width of a head of values (`V`).
    pub value_dim: usize,
}

impl DeltaRule {
    /// Values of the state of one sequence: a matrix `[K, V]` for each head of values. How they lie is the device's
    /// business; zeros are the state before the first token.
    #[must_use]
    pub fn state_len(&self) -> usize {
        self.value_heads * self.key_dim * self.value_dim
    }
}

/// Shape of a state space of Mamba 2.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StateSpace {
    /// Heads (`H`), each with a state of its own.
    pub heads: usize,
    /// Width of a head (`P`).
    pub head_dim: usize,
    /// Groups of neighbouring heads that share `b` and `c` (`G`), a divisor of `heads`.
    pub groups: usize,
    /// Rows of a head's state, as wide as the head (`N`).
    pub state_dim: usize,
    /// Least and greatest step.
    pub limits: (f32, f32),
}

impl StateSpace {
    /// Values of the state of one sequence, a matrix `[N, P]` for each head; zeros are the state before the first token.
    #[must_use]
    pub fn state_len(&self) -> usize {
        self.heads * self.state_dim * self.head_dim
    }
}

/// AdamW's settings for one step (Loshchilov & Hutter 2019, decoupled decay, as torch.optim.AdamW).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// 1-based number of this step, for bias correction.
    pub step: u32,
}

/// SGD's settings for one step, with decoupled decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate of this step.
    pub lr: f32,
    /// What is kept of the moment.
    pub momentum: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

/// Lion's settings for one step (Chen et al. 2023).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lion {
    /// Learning rate of this step.
    pub lr: f32,
    /// Share of the moment in the update.
    pub beta1: f32,
    /// Decay of the moment.
    pub beta2: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

/// Elements of a moment in 8 bits that share an absmax.
pub const MOMENT_BLOCK: usize = 256;

/// Values that a row of `width` takes when packed by [`crate::Call::Narrow`]: its unit, and pairs.
#[must_use]
pub const fn narrow_width(width: usize) -> usize {
    1 + width.div_ceil(2)
}
