//! What adapters do while a model runs, by place. A method builds such forms ([`super::Method`]); executors know a form by
//! its place alone.
//!
//! On a linear layer a form changes what the layer reads, adds a term to its product, or changes what it gives:
//!
//! `y = g(f(x) Wᵀ + terms(f(x)) + b)`
//!
//! Several on one layer work in the order in which they were attached. Backward goes the other way, through `g`, then the
//! product and its terms, then `f`; the inputs of `g` and of `f` are computed once more rather than kept. The base's product
//! passes on the gradient of what it gave: the one that `g` has changed.

pub(super) mod activated;
pub(super) mod blocks;
pub(super) mod bottleneck;
pub(super) mod butterfly;
pub(super) mod circulant;
pub(super) mod hadamard;
pub(super) mod low_rank;
pub(super) mod output;
pub(super) mod reflect;
pub(super) mod rows;
pub(super) mod scale;
pub(super) mod scaled_term;
pub(super) mod sparse;

use super::held::{Held, TensorId};
use crate::base::Pool;
use crate::error::Result;
use pocketlora_kernels::{Arithmetic, Backend};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What a form computes with.
pub struct Context<'a, B: Backend> {
    /// The device.
    pub backend: &'a B,
    /// Scratch buffers.
    pub pool: &'a mut Pool<B>,
    /// The adapters' tensors.
    pub held: &'a Held<B>,
    /// Of the products.
    pub arithmetic: Arithmetic,
    /// Dropout of a term's input, in training only.
    pub dropout: Option<Dropout>,
    /// The frozen weight of the layer that a term is on; nothing else is given it.
    pub weight: Option<&'a B::Matrix>,
    /// Of each row that a form is given, whether it comes behind its text's invocation; empty where no adapter has one.
    pub active: &'a [bool],
}

/// Dropout of an adapter's input: which elements fall is a function of `key` and their position alone, so that
/// recomputing a layer drops the same ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability that an element is dropped.
    pub p: f32,
    /// Selects the random stream; differs by step, micro-batch and layer.
    pub key: u64,
    /// Position in the stream of the input's first element; of a pass, that of its first token.
    pub first: u64,
    /// What falls together.
    pub form: DropoutForm,
}

/// What dropout leaves out of a low-rank term, see `low_rank.rs`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DropoutForm {
    /// Single elements of what it reads.
    #[default]
    Input,
    /// Ranks, the same ones for all tokens of a pass.
    Rank,
    /// Tokens: the term is there for a token or is not, as DropKey (Li et al. 2023) leaves whole keys out.
    Token,
}

/// Gradients of the tensors in training and of what is made of them. Fixed tensors have none, and neither have those of
/// adapters that are attached beside.
pub struct Gradients<B: Backend> {
    /// By the number of the tensor.
    pub tensors: Vec<Option<B::Buffer>>,
    /// Which of them rest: they are asked for none. Empty where none does.
    pub resting: Vec<bool>,
}

impl<B: Backend> Gradients<B> {
    /// The gradient of a tensor, to be added to, if it has one and does not rest.
    pub fn of(&mut self, id: TensorId) -> Option<&mut B::Buffer> {
        if self.resting.get(id.0) == Some(&true) {
            return None;
        }
        self.tensors.get_mut(id.0)?.as_mut()
    }
}

/// `factor (x Aᵀ) Bᵀ`: a term that the base's product takes along.
pub struct LowRankFactors<'a, B: Backend> {
    /// `[r, in]`.
    pub a: &'a B::Matrix,
    /// `[out, r]`.
    pub b: &'a B::Matrix,
    /// On the whole.
    pub factor: f32,
}

/// A term of a linear layer's product.
pub trait Term<B: Backend>: Send + Sync {
    /// Adds the term to `y` `[T, out]`, given `x` `[T, in]`.
    ///
    /// # Errors
    /// Out of memory.
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()>;

    /// The same as low-rank factors, where it is such: the base's product then takes it along, and `apply` is not called.
    fn low_rank<'a>(&self, _held: &'a Held<B>) -> Option<LowRankFactors<'a, B>> {
        None
    }

    /// Given the gradient `dy` of what the product and its terms give, adds to the gradients of its tensors; returns what
    /// [`Term::backward_x`] needs of it. In two steps, so that `x` may be gone before `dx` is there. Of a term with
    /// [`Term::low_rank`] that is `dh`, the gradient of `x Aᵀ`.
    ///
    /// # Errors
    /// Out of memory.
    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: &B::Buffer,
        dy: &B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<B::Buffer>;

    /// Adds the term's part to the input's gradient `dx`. The base's product takes `dh A` along where [`Term::low_rank`] is
    /// one and nothing of `x` was dropped, and this is not called.
    ///
    /// # Errors
    /// Out of memory.
    fn backward_x(&self, cx: &mut Context<'_, B>, carried: &B::Buffer, dx: &mut B::Buffer) -> Result<()>;
}

/// A change of what a linear layer reads or gives, row by row: `y = f(x)`, both `[T, C]`.
pub trait Change<B: Backend>: Send + Sync {
    /// Writes `f(x)` to `y`.
    ///
    /// # Errors
    /// Out of memory.
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()>;

    /// Whether a gradient of its tensors depends on `x`: only then [`Change::backward`] is given it.
    fn learns(&self, grads: &mut Gradients<B>) -> bool;

    /// Given the gradient `dy` of `f(x)`, writes that of `x` to `dx`, and adds to the gradients of its tensors: to those that
    /// depend on `x` if it is there.
    ///
    /// # Errors
    /// Out of memory.
    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: Option<&B::Buffer>,
        dy: &B::Buffer,
        dx: &mut B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<()>;
}

/// A term of what an embedding gives.
pub trait Lookup<B: Backend>: Send + Sync {
    /// Adds the term for the tokens `ids` to the rows `rows` of `y` `[T, C]`, one row for each token.
    ///
    /// # Errors
    /// Out of memory.
    fn apply(&self, cx: &mut Context<'_, B>, ids: &[u32], rows: &[u32], y: &mut B::Buffer) -> Result<()>;

    /// Given the gradient `dy` `[T, C]` of what the embedding gives, adds to the gradients of its tensors; takes out of `dy`
    /// what does not go back to terms before it.
    ///
    /// # Errors
    /// Out of memory.
    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        ids: &[u32],
        rows: &[u32],
        dy: &mut B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<()>;
}

/// A form on a linear layer or an embedding, by what it works on. Several sets of adapters may share one.
pub enum LayerForm<B: Backend> {
    /// Adds to what the embedding gives.
    Lookup(Arc<dyn Lookup<B>>),
    /// Changes what the layer reads.
    Input(Arc<dyn Change<B>>),
    /// Adds to its product.
    Term(Arc<dyn Term<B>>),
    /// Changes what it gives.
    Output(Arc<dyn Change<B>>),
}

impl<B: Backend> Clone for LayerForm<B> {
    fn clone(&self) -> Self {
        match self {
            Self::Lookup(form) => Self::Lookup(Arc::clone(form)),
            Self::Input(form) => Self::Input(Arc::clone(form)),
            Self::Term(form) => Self::Term(Arc::clone(form)),
            Self::Output(form) => Self::Output(Arc::clone(form)),
        }
    }
}

/// The forms on one linear layer or embedding, each kind in the order in which they were attached.
pub struct OnLayer<B: Backend> {
    /// What changes the layer's input.
    pub inputs: Vec<Arc<dyn Change<B>>>,
    /// Terms of its product.
    pub terms: Vec<Arc<dyn Term<B>>>,
    /// What changes the layer's output, its bias included.
    pub outputs: Vec<Arc<dyn Change<B>>>,
    /// Of an embedding: terms of what is looked up. A tied head is the same parameter, and does not see them.
    pub lookups: Vec<Arc<dyn Lookup<B>>>,
}

impl<B: Backend> Default for OnLayer<B> {
    fn default() -> Self {
        Self { inputs: Vec::new(), terms: Vec::new(), outputs: Vec::new(), lookups: Vec::new() }
    }
}

impl<B: Backend> OnLayer<B> {
    /// Whether there is none on a product.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.inputs.is_empty() && self.terms.is_empty() && self.outputs.is_empty()
    }

    /// Attaches a further one.
    pub(crate) fn push(&mut self, form: LayerForm<B>) {
        match form {
            LayerForm::Lookup(form) => self.lookups.push(form),
            LayerForm::Input(form) => self.inputs.push(form),
            LayerForm::Term(form) => self.terms.push(form),
            LayerForm::Output(form) => self.outputs.push(form),
        }
    }
}

/// What comes before each sequence's own tokens, which have positions from `tokens` on: keys and values in every layer's
/// attention, without rotary positions; or embeddings, which a model reads as it reads tokens.
#[derive(Clone, Debug)]
pub struct Prefix {
    /// Its virtual tokens.
    pub tokens: usize,
    /// `[tokens, 2 layers, width]`: of each layer a key, then a value; or embeddings `[tokens, C]`.
    pub(crate) values: TensorId,
    /// Layers of the model; 0 for embeddings.
    pub(crate) layers: usize,
    /// Tells it from others: a sequence is begun with one, and goes on with no other.
    mark: Arc<()>,
}

impl Prefix {
    /// The prefix whose keys and values are `values`.
    pub(crate) fn new(tokens: usize, layers: usize, values: TensorId) -> Self {
        Self { tokens, values, layers, mark: Arc::new(()) }
    }

    /// Virtual tokens with the embeddings `values`.
    pub(crate) fn of_embeddings(tokens: usize, values: TensorId) -> Self {
        Self::new(tokens, 0, values)
    }

    /// Whether a model reads them as it reads tokens.
    #[must_use]
    pub fn is_read(&self) -> bool {
        self.layers == 0
    }

    /// Whether they are the same one, and not only alike.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.mark, &other.mark)
    }

    /// Number of the tensor that holds the keys and values.
    #[must_use]
    pub fn tensor(&self) -> TensorId {
        self.values
    }

    /// The rows of [`Prefix::tensor`], as a matrix as wide as a key, that are the keys (`part` 0) or values (`part` 1) of
    /// a layer.
    #[must_use]
    pub fn rows(&self, layer: usize, part: usize) -> Vec<u32> {
        (0..self.tokens).map(|token| (2 * (token * self.layers + layer) + part) as u32).collect()
    }
}
