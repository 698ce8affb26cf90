//! What a model family may ask of an executor.

/// A value of the running computation: activations `[T, width]`, owned by the executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tensor(pub u32);

/// A parameter: an index into [`crate::Model::params`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param(pub u32);

/// A rotary table: an index into [`crate::Model::ropes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeTable(pub u8);

/// A linear layer `y = x Wᵀ + b`; adapters attach to these.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Param,
    /// `[out]`, if the layer has one.
    pub bias: Option<Param>,
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
    /// A token sees the last `window` tokens, itself included; `None` sees all.
    pub window: Option<usize>,
}

/// Runs a model's operations. Tokens, their positions and the key/value cache belong to the executor, so one
/// forward text serves a prompt, a decode step and a training batch.
pub trait Exec {
    /// Rows of `table` `[V, C]` for the current tokens.
    fn embed(&mut self, table: Param) -> Tensor;
    /// `y = x Wᵀ + b`, plus whatever adapters are attached, for each of `layers`: those that read the same `x` are asked
    /// for together, so that it is read once. Model files call
    /// `linear` and `linear_group`.
    fn linears(&mut self, layers: &[Linear], x: Tensor, ys: &mut [Tensor]);
    /// RMSNorm with weight `weight` `[C]`.
    fn rms_norm(&mut self, weight: Param, eps: f32, x: Tensor) -> Tensor;
    /// Rotary position embedding of `heads` heads.
    fn rope(&mut self, table: RopeTable, heads: usize, x: Tensor) -> Tensor;
    /// Causal attention of layer number `layer` (which names its cache).
    fn attention(&mut self, layer: usize, shape: &AttentionShape, q: Tensor, k: Tensor, v: Tensor) -> Tensor;
    /// `silu(gate) * up`.
    fn swiglu(&mut self, gate: Tensor, up: Tensor) -> Tensor;
    /// `a + b`.
    fn add(&mut self, a: Tensor, b: Tensor) -> Tensor;
}

impl dyn Exec + '_ {
    /// `y = x Wᵀ + b`, plus whatever adapters are attached to `layer`.
    pub fn linear(&mut self, layer: Linear, x: Tensor) -> Tensor {
        let [y] = self.linear_group([layer], x);
        y
    }

    /// As many layers that read the same `x`.
    pub fn linear_group<const N: usize>(&mut self, layers: [Linear; N], x: Tensor) -> [Tensor; N] {
        let mut ys = [Tensor(0); N];
        self.linears(&layers, x, &mut ys);
        ys
    }
}
