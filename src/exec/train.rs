//! Forward with a tape and the backward pass over it.
//!
//! A [`Tape`] holds one layer (or the head) at a time: training keeps some layers' inputs, runs each layer again when its
//! gradient is due, and drops the tape.

pub use super::tape::Tape;

use super::{Base, Pool};
use crate::adapter::{Adapters, Dropout};
use crate::error::Result;
use pocketlora_kernels::{Arithmetic, Backend};
use pocketlora_models::Param;
use std::ops::Range;

/// Token sequences laid end to end: no padding, and none sees another.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// All tokens.
    pub ids: Vec<u32>,
    /// Length of each sequence; they sum to the number of tokens.
    pub segments: Vec<usize>,
}

impl Batch {
    /// Position of each token within its sequence.
    fn positions(&self) -> Vec<u32> {
        self.segments.iter().flat_map(|&n| 0..n as u32).collect()
    }
}

/// The tensors of the adapter in training: which belong to which linear layer, and their gradients.
pub struct Gradients<B: Backend> {
    /// For each parameter of the base, its adapter's range in `tensors`.
    pub ranges: Vec<Option<Range<usize>>>,
    /// One gradient for each trained tensor.
    pub tensors: Vec<B::Buffer>,
}

/// What one pass works on, shared by the tapes of all layers.
pub struct Pass<'a, B: Backend> {
    pub(super) base: &'a Base<B>,
    pub(super) adapters: &'a Adapters<B>,
    pub(super) batch: &'a Batch,
    pub(super) angles: Vec<(B::Buffer, B::Buffer)>,
    dropout: Option<Dropout>,
    pub(super) arithmetic: Arithmetic,
}

impl<'a, B: Backend> Pass<'a, B> {
    /// Prepares a pass over `batch`.
    ///
    /// # Errors
    /// An id outside the vocabulary, out of memory.
    pub fn new(
        base: &'a Base<B>,
        adapters: &'a Adapters<B>,
        batch: &'a Batch,
        dropout: Option<Dropout>,
        arithmetic: Arithmetic,
        pool: &mut Pool<B>,
    ) -> Result<Self> {
        base.check_ids(adapters.replaced(), &batch.ids)?;
        let angles = base.rope_angles(&batch.positions(), pool)?;
        Ok(Self { base, adapters, batch, angles, dropout, arithmetic })
    }

    /// What the pass runs on.
    #[must_use]
    pub fn base(&self) -> &'a Base<B> {
        self.base
    }

    /// Tokens of the batch.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.batch.ids.len()
    }

    /// The head's weight, if the last norm's output times it is all there is to logits, and no adapter adds to them.
    #[must_use]
    pub fn plain_head(&self) -> Option<&'a B::Matrix> {
        let head = self.base.model.plain_head().filter(|head| head.bias.is_none())?;
        let (replaced, by) = (self.adapters.replaced(), Arithmetic::Exact);
        self.adapters.on(head.weight).is_empty().then(|| self.base.factor_with(replaced, head.weight, by))
    }

    /// Arithmetic of the products.
    #[must_use]
    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// Hands the pass's buffers back.
    pub fn finish(self, pool: &mut Pool<B>) {
        for (cos, sin) in self.angles {
            pool.put(&self.base.backend, cos);
            pool.put(&self.base.backend, sin);
        }
    }

    /// An empty tape, whose first value will be `input` if there is one: a row for each token of the batch, or for some.
    pub fn tape<'p>(&'p self, input: Option<B::Buffer>, needs_grad: bool, pool: &'p mut Pool<B>) -> Tape<'p, B> {
        Tape::new(self, input, needs_grad, pool)
    }
}

impl<B: Backend> Pass<'_, B> {
    /// Each layer drops by a stream of its own; `first` is the position of the input's first token.
    pub(super) fn layer_dropout(&self, weight: Param, first: usize) -> Option<Dropout> {
        let (_, width) = self.base.backend.shape(self.base.matrix(weight));
        self.dropout.map(|d| {
            let key = crate::rng::mix(d.key, u64::from(weight.0));
            Dropout { key, first: (d.first + first as u64) * width as u64, ..d }
        })
    }
}
