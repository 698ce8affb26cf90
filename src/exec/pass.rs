//! What one pass over a batch of tokens works on.

use super::Tape;
use super::interpreter::Interpreter;
use super::ops::Carried;
use crate::adapter::{Adapters, Dropout, last_invocation};
use crate::base::{Base, Pool};
use crate::error::Result;
use pocketlora_kernels::{Arithmetic, Backend};
use pocketlora_models::Param;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// The ids of virtual tokens, which no vocabulary has: this one and those behind it.
const VIRTUAL: u32 = 1 << 31;

/// Ids for so many virtual tokens, which an adapter has embeddings for.
pub(crate) fn virtual_ids(tokens: usize) -> impl Iterator<Item = u32> {
    (VIRTUAL..).take(tokens)
}

/// The number of the virtual token `id`, if it is one.
pub(crate) fn virtual_number(id: u32) -> Option<u32> {
    id.checked_sub(VIRTUAL)
}

/// Token sequences laid end to end: no padding, and none sees another.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// All tokens.
    pub ids: Vec<u32>,
    /// Tokens of each sequence; they sum to the number of tokens.
    pub segments: Vec<usize>,
}

impl Batch {
    /// The positions of each sequence's tokens, with how far it is taken to reach.
    fn texts(&self, places: impl IntoIterator<Item = Place>) -> Vec<(Range<usize>, usize)> {
        let text = |(&n, place): (&usize, Place)| {
            let end = place.start + n;
            (place.start..end, place.reach.max(end))
        };
        self.segments.iter().zip(places).map(text).collect()
    }
}

/// Where the tokens of a sequence are in its text.
#[derive(Clone, Copy, Default)]
pub(super) struct Place {
    /// Tokens before them, virtual ones among these.
    pub start: usize,
    /// Tokens that the text is taken to have in the end, if more than with these.
    pub reach: usize,
    /// From which of them on adapters with an invocation work.
    pub active: Option<usize>,
}

/// Rows of a pass that have the same adapters.
pub(super) struct Part<'a, B: Backend> {
    pub rows: Range<usize>,
    pub adapters: &'a Adapters<B>,
}

/// What one pass works on, shared by all of its layers.
pub struct Pass<'a, B: Backend> {
    pub(super) base: &'a Base<B>,
    /// They cover all rows, in order; there is at least one. None of several brings weights in place of the base's.
    pub(super) parts: Vec<Part<'a, B>>,
    pub(super) batch: &'a Batch,
    /// Of each token in its text.
    pub(super) positions: Vec<u32>,
    /// `cos` and `sin` `[T, D / 2]` of each rotary table.
    pub(super) angles: Vec<(B::Buffer, B::Buffer)>,
    pub(super) dropout: Option<Dropout>,
    /// Whether each token is behind the invocation of its text; empty where no adapter has one.
    pub(super) active: Vec<bool>,
    pub(super) arithmetic: Arithmetic,
    pub(super) choices: Choices,
    pub(super) carried: Carried<B>,
}

/// The experts that tokens took, by the router's weight: a layer that is run again for its gradients takes the same, though
/// its inputs may have been rounded meanwhile.
#[derive(Default)]
pub(super) struct Choices(Mutex<BTreeMap<u32, Vec<u16>>>);

/// Of a token that has not chosen yet. There are fewer experts.
const UNCHOSEN: u16 = u16::MAX;

impl Choices {
    /// What the tokens `rows` chose of `router`, `top` numbers each, if they did so before.
    pub fn of(&self, router: Param, rows: &Range<usize>, top: usize) -> Option<Vec<f32>> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let chosen = all.get(&router.0)?.get(rows.start * top..rows.end * top)?;
        (!chosen.contains(&UNCHOSEN)).then(|| chosen.iter().map(|&expert| f32::from(expert)).collect())
    }

    /// Keeps what they chose.
    pub fn keep(&self, router: Param, rows: &Range<usize>, top: usize, chosen: &[f32]) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let own = all.entry(router.0).or_default();
        if own.len() < rows.end * top {
            own.resize(rows.end * top, UNCHOSEN);
        }
        let own = &mut own[rows.start * top..rows.end * top];
        own.iter_mut().zip(chosen).for_each(|(own, &expert)| *own = expert as u16);
    }
}

impl<'a, B: Backend> Pass<'a, B> {
    /// Prepares a training pass over `batch`, whose sequences begin in it.
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
        let parts = vec![Part { rows: 0..batch.ids.len(), adapters }];
        // Virtual tokens that are read are in the batch.
        let before = adapters.prefix().map_or(0, |prefix| prefix.tokens);
        let ends = batch.segments.iter().scan(0, |end, len| {
            *end += len;
            Some(*end)
        });
        let places = ends.zip(&batch.segments).map(|(end, len)| {
            let own = &batch.ids[end - len..end];
            let active = adapters.invocation().and_then(|invocation| last_invocation(invocation, own));
            Place { start: before, reach: 0, active }
        });
        let pass = Self { dropout, ..Self::after(base, parts, batch, places, arithmetic, pool)? };
        Ok(pass)
    }

    /// Prepares a pass over `batch`, whose sequences' tokens are at `places`.
    ///
    /// # Errors
    /// As [`Pass::new`].
    pub(super) fn after(
        base: &'a Base<B>,
        parts: Vec<Part<'a, B>>,
        batch: &'a Batch,
        places: impl IntoIterator<Item = Place>,
        arithmetic: Arithmetic,
        pool: &mut Pool<B>,
    ) -> Result<Self> {
        for part in &parts {
            let ids = batch.ids.get(part.rows.clone()).unwrap_or_default();
            let known = |id: &u32| virtual_number(*id).is_some_and(|i| (i as usize) < part.adapters.prompt_tokens());
            if ids.iter().any(known) {
                let own: Vec<u32> = ids.iter().copied().filter(|id| !known(id)).collect();
                part.adapters.replaced().check_ids(base, &own)?;
            } else {
                part.adapters.replaced().check_ids(base, ids)?;
            }
        }
        let places: Vec<Place> = places.into_iter().collect();
        let mut active = Vec::new();
        if parts.iter().any(|part| part.adapters.invocation().is_some()) {
            for (len, place) in batch.segments.iter().zip(&places) {
                active.extend((0..*len).map(|row| place.active.is_some_and(|first| row >= first)));
            }
        }
        let texts = batch.texts(places);
        let positions = texts.iter().flat_map(|(positions, _)| positions.clone()).map(|p| p as u32).collect();
        let angles = base.rope_angles(&texts, pool)?;
        let (choices, carried) = (Choices::default(), Carried::default());
        Ok(Self { base, parts, batch, positions, angles, dropout: None, active, arithmetic, choices, carried })
    }

    /// The same pass over some `rows` (ascending) of its tokens, for what each row is by itself: rotary tables stay behind.
    pub(super) fn of_rows(&self, rows: &[u32]) -> Pass<'_, B> {
        let at = |row: usize| rows.partition_point(|&r| (r as usize) < row);
        let own = |part: &Part<'a, B>| Part { rows: at(part.rows.start)..at(part.rows.end), adapters: part.adapters };
        let parts = self.parts.iter().map(own).filter(|part| !part.rows.is_empty()).collect();
        let Self { base, batch, dropout, arithmetic, .. } = *self;
        let (angles, choices, carried) = (Vec::new(), Choices::default(), Carried::default());
        let active = rows.iter().filter_map(|row| self.active.get(*row as usize).copied()).collect();
        Pass { base, parts, batch, positions: Vec::new(), angles, dropout, active, arithmetic, choices, carried }
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

    /// Whether what was carried into layers has a gradient that nothing has taken.
    pub fn carries_gradient(&self) -> bool {
        self.carried.has_gradient()
    }

    /// The adapters whose weights stand in for the base's: those of all rows, for only passes of one part have such.
    pub(super) fn adapters(&self) -> &'a Adapters<B> {
        self.parts[0].adapters
    }

    /// The head's weight, if the last norm's output times it is all there is to logits, and no adapter adds to them.
    #[must_use]
    pub fn plain_head(&self) -> Option<&'a B::Matrix> {
        let head = self.base.model.plain_head().filter(|head| head.bias.is_none())?;
        let plain = self.parts.iter().all(|part| part.adapters.on(head.weight).is_empty());
        plain.then(|| self.factor(head.weight, Arithmetic::Exact))
    }

    /// The matrix of `p` that products in `arithmetic` read: the base's, unless an adapter brings another.
    pub(super) fn factor(&self, p: Param, arithmetic: Arithmetic) -> &'a B::Matrix {
        self.adapters().replaced().factor(self.base, p, arithmetic)
    }

    /// The vector `p`, unless an adapter brings another.
    pub(super) fn vector(&self, p: Param) -> &'a B::Buffer {
        self.adapters().vector(self.base, p)
    }

    /// Whether something that is added to what the embedding gives is in training.
    pub fn embedding_learns(&self) -> bool {
        self.adapters().learns_embedding(self.base)
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
        self.carried.finish(&self.base.backend, pool);
    }

    /// An empty tape, whose first value will be `input` if there is one: a row for each token of the batch, or for some.
    pub fn tape<'p>(&'p self, input: Option<B::Buffer>, needs_grad: bool, pool: &'p mut Pool<B>) -> Tape<'p, B> {
        Tape::new(Interpreter::new(self, input, needs_grad, pool))
    }

    /// Each layer drops by a stream of its own; `first` is the position of the input's first token.
    pub(super) fn layer_dropout(&self, weight: Param, first: usize) -> Option<Dropout> {
        self.dropout.map(|d| {
            let (_, width) = self.base.backend.shape(self.base.matrix(weight));
            let key = crate::rng::mix(d.key, u64::from(weight.0));
            Dropout { key, first: (d.first + first as u64) * width as u64, ..d }
        })
    }
}
