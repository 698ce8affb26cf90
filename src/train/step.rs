//! Forward, loss and backward of one micro-batch, one layer at a time.

use super::layers::Depth;
use super::sums::Sums;
use super::{data::Sample, loss};
use crate::adapter::{Adapters, Dropout, Gradients};
use crate::base::{Base, Pool};
use crate::error::{Error, ErrorCode, Result};
use crate::exec::train::{Batch, Pass};
use crate::exec::virtual_ids;
use crate::memory::Peak;
use pocketlora_kernels::{Arithmetic, Backend, Call, narrow_width};
use pocketlora_models::Value;
use serde::{Serialize, Serializer};

/// Samples laid end to end with the rows whose next token is learned.
pub struct MicroBatch {
    batch: Batch,
    /// The number (0-based) of each sample in its data set.
    numbers: Vec<u32>,
    /// Rows whose next token is learned.
    pub(super) rows: Vec<u32>,
    /// That token, for each of `rows`, one of the batch's ids, which [`Pass::new`] checks; or the tokens of a distribution.
    pub(super) targets: Vec<u32>,
    /// The shares of these tokens, see [`pocketlora_kernels::Targets`]; empty where they are to be learned as they are.
    pub(super) shares: Vec<f32>,
    /// How much each of them counts, if not all count the same.
    weights: Option<Vec<f32>>,
}

impl MicroBatch {
    /// Joins samples, which are numbered from 0; nothing is padded.
    pub fn new<'s>(samples: impl IntoIterator<Item = &'s Sample>) -> Self {
        Self::numbered((0..).zip(samples))
    }

    /// Joins samples that have numbers in their data set.
    pub(super) fn numbered<'s>(samples: impl IntoIterator<Item = (u32, &'s Sample)>) -> Self {
        let mut out = Self::empty();
        for (number, sample) in samples {
            out.numbers.push(number);
            let start = out.batch.ids.len();
            for i in sample.trained.iter().filter(|&i| i > 0) {
                out.rows.push((start + i - 1) as u32);
                out.targets.push(sample.ids[i]);
            }
            out.batch.ids.extend(&sample.ids);
            out.batch.segments.push(sample.ids.len());
        }
        out
    }

    pub(super) fn empty() -> Self {
        let (rows, targets, shares) = (Vec::new(), Vec::new(), Vec::new());
        Self { batch: Batch::default(), numbers: Vec::new(), rows, targets, shares, weights: None }
    }

    /// Adds the text number `number`, whose last places are held to distributions over the tokens `targets`: `width` of them
    /// each, with their `shares`.
    pub(super) fn hold(
        &mut self,
        number: u32,
        ids: &[u32],
        targets: &[u32],
        shares: impl Iterator<Item = f32>,
        width: usize,
    ) {
        self.numbers.push(number);
        self.batch.ids.extend(ids);
        self.batch.segments.push(ids.len());
        let end = self.batch.ids.len();
        self.rows.extend((end - targets.len() / width..end).map(|row| row as u32));
        self.targets.extend(targets);
        self.shares.extend(shares);
    }

    /// Whether it is held to distributions, and not learned.
    #[must_use]
    pub(super) fn is_held(&self) -> bool {
        !self.shares.is_empty()
    }

    /// Tokens of each learned row's target.
    pub(super) fn target_width(&self) -> usize {
        self.targets.len() / self.rows.len().max(1)
    }

    /// Sequences of such lengths, with the last `learned` tokens' successors to be learned: to count what they take.
    pub(super) fn of_lengths(segments: Vec<usize>, learned: usize) -> Self {
        let tokens: usize = segments.iter().sum();
        let rows: Vec<u32> = (tokens.saturating_sub(learned)..tokens).map(|row| row as u32).collect();
        let numbers = (0..).take(segments.len()).collect();
        let batch = Batch { ids: vec![0; tokens], segments };
        Self { targets: vec![0; rows.len()], shares: Vec::new(), rows, numbers, batch, weights: None }
    }

    /// The same samples in as many passes as it takes for none to have more than `most` tokens, unless one sample has.
    pub(super) fn split(&self, most: usize) -> Vec<Self> {
        let mut passes: Vec<Self> = Vec::new();
        let (mut start, mut learned) = (0, 0);
        for (len, number) in self.batch.segments.iter().zip(&self.numbers) {
            let end = start + len;
            if passes.last().is_none_or(|pass| pass.tokens().saturating_add(*len) > most) {
                passes.push(Self::empty());
            }
            let pass = passes.last_mut().expect("pushed if there was none");
            let shift = start - pass.tokens();
            let until = learned + self.rows[learned..].partition_point(|row| (*row as usize) < end);
            pass.rows.extend(self.rows[learned..until].iter().map(|row| row - shift as u32));
            let tokens = learned * self.target_width()..until * self.target_width();
            pass.targets.extend(&self.targets[tokens.clone()]);
            pass.shares.extend(self.shares.get(tokens).unwrap_or_default());
            if let Some(weights) = &self.weights {
                pass.weights.get_or_insert_default().extend(&weights[learned..until]);
            }
            pass.batch.ids.extend(&self.batch.ids[start..end]);
            pass.batch.segments.push(*len);
            pass.numbers.push(*number);
            (start, learned) = (end, until);
        }
        passes
    }

    /// The same with so many virtual tokens before each sample; nothing is learned from their outputs.
    fn behind(&self, tokens: usize) -> Self {
        let (mut batch, mut rows, mut start) = (Batch::default(), Vec::with_capacity(self.rows.len()), 0);
        let mut learned = self.rows.iter().peekable();
        for len in &self.batch.segments {
            let end = start + len;
            batch.ids.extend(virtual_ids(tokens));
            batch.ids.extend(&self.batch.ids[start..end]);
            batch.segments.push(tokens + len);
            let shift = (batch.segments.len() * tokens) as u32;
            while let Some(row) = learned.next_if(|row| (**row as usize) < end) {
                rows.push(row + shift);
            }
            start = end;
        }
        let (numbers, targets, shares) = (self.numbers.clone(), self.targets.clone(), self.shares.clone());
        Self { batch, numbers, rows, targets, shares, weights: self.weights.clone() }
    }

    /// Tokens in all.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.batch.ids.len()
    }

    /// The tokens of each sample.
    pub(super) fn texts(&self) -> impl Iterator<Item = Vec<u32>> + '_ {
        let mut left = &self.batch.ids[..];
        self.batch.segments.iter().map(move |len| {
            let (own, rest) = left.split_at(*len);
            left = rest;
            own.to_vec()
        })
    }

    /// Tokens of all samples, end to end.
    #[cfg(test)]
    pub(super) fn ids(&self) -> &[u32] {
        &self.batch.ids
    }

    /// The number (0-based) of each sample in the data set that the batch was made of.
    #[must_use]
    pub fn numbers(&self) -> &[u32] {
        &self.numbers
    }

    /// Tokens learned.
    #[must_use]
    pub fn trained(&self) -> usize {
        self.rows.len()
    }

    /// The same with other tokens to be learned than those of the samples, in their order.
    #[must_use]
    pub fn with_targets(self, targets: Vec<u32>) -> Self {
        assert_eq!(targets.len(), self.trained());
        Self { targets, ..self }
    }

    /// The same with a weight for each learned token, in their order: its gradient is multiplied by it. Losses are not.
    #[must_use]
    pub fn weighted(self, weights: Vec<f32>) -> Self {
        assert_eq!(weights.len(), self.trained());
        Self { weights: Some(weights), ..self }
    }

    /// Factors on the gradients of the learned tokens: `scale` times their weights.
    pub(super) fn scaled_weights(&self, scale: f32) -> Vec<f32> {
        match &self.weights {
            Some(weights) => weights.iter().map(|weight| scale * weight).collect(),
            None => vec![scale; self.trained()],
        }
    }
}

/// Where a pass may be told to stop, and where it measures memory.
pub struct Watch<'a> {
    /// Asked between layers; `false` abandons the pass.
    pub keep_going: &'a mut dyn FnMut() -> bool,
    /// Sampled where most is held.
    pub peak: &'a mut Peak,
}

impl Watch<'_> {
    pub(super) fn check(&mut self) -> Result<()> {
        if (self.keep_going)() {
            return Ok(());
        }
        Err(Error::new(ErrorCode::Cancelled, "training", "stopped between two layers; the step is not counted"))
    }
}

/// How a pass trades time for memory. Results are the same but for the rounding of kept inputs to 16 bits, and for the
/// order in which gradients of parts are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Layout {
    /// Layer inputs are kept in 16 bits.
    pub narrow: bool,
    /// Every so many layers an input is kept, but for the first one's, which the ids give; layers between are run again
    /// from there. As many as the model has: all are recomputed from its input.
    pub every: usize,
    /// Inputs of the layers between are kept while their gradients are due, or else are computed from the kept one for
    /// each of them again.
    pub between: bool,
    /// Tokens that the feed-forward part of a layer runs at a time; `usize::MAX` for all, null in JSON.
    #[serde(serialize_with = "bound")]
    pub part: usize,
    /// Learned tokens whose loss is computed at a time; `usize::MAX` for as many as speed asks for, null in JSON.
    #[serde(serialize_with = "bound")]
    pub loss_rows: usize,
}

/// `usize::MAX` is no bound; as a number it is none that JSON's readers keep exactly.
fn bound<S: Serializer>(value: &usize, to: S) -> std::result::Result<S::Ok, S::Error> {
    Some(*value).filter(|v| *v != usize::MAX).serialize(to)
}

impl Layout {
    /// The fastest one, which is also as lean as costs no speed.
    #[must_use]
    pub fn fast(narrow: bool) -> Self {
        Self { narrow, every: 1, between: true, part: usize::MAX, loss_rows: usize::MAX }
    }
}

/// Adds the losses (natural log) of the learned tokens to number `at` of `sums`, and to `grads` the gradient of `scale` times
/// the sum of the losses, each times its weight. Without `grads` only the losses are computed. `depth` tells which layers
/// backward goes through.
///
/// # Errors
/// Out of memory, a stop, an id outside the vocabulary. The pool has lost buffers then and should be cleared.
pub fn micro_step<B: Backend>(
    base: &Base<B>,
    adapters: &Adapters<B>,
    micro: &MicroBatch,
    scale: f32,
    dropout: Option<Dropout>,
    arithmetic: Arithmetic,
    layout: &Layout,
    (mut grads, depth): (Option<&mut Gradients<B>>, &mut Depth<B>),
    pool: &mut Pool<B>,
    sums: (&mut Sums<B>, usize),
    watch: &mut Watch<'_>,
) -> Result<()> {
    let behind = (adapters.prompt_tokens() > 0).then(|| micro.behind(adapters.prompt_tokens()));
    let micro = behind.as_ref().unwrap_or(micro);
    let pass = Pass::new(base, adapters, &micro.batch, dropout, arithmetic, pool)?;
    let layers = base.model.config().layers;
    let mut inputs = Inputs { pass: &pass, layout, kept: (0..layers).map(|_| None).collect() };

    // Forward: of some layers the input stays.
    let mut x = inputs.embed(pool)?;
    for layer in 0..layers {
        watch.check()?;
        // What is below the lowest that learns is needed only to come to that one's input.
        let used = layer + layout.every > depth.lowest;
        if grads.is_some() && used && layer > 0 && layer.is_multiple_of(layout.every) {
            inputs.keep(layer, &x, pool)?;
        }
        x = inputs.forward(layer, x, pool)?;
    }

    let dx = loss::loss(&pass, x, micro, scale, layout.loss_rows, grads.as_deref_mut(), pool, sums, watch)?;

    // Backward: each layer runs once more, now with its tape kept until its gradient is through,
    // and without what no gradient needs.
    if let (Some(grads), Some(dx)) = (grads, dx) {
        let mut dx = Some(dx);
        for layer in (depth.lowest..layers).rev() {
            let Some(dy) = dx.take() else { break };
            watch.check()?;
            if depth.leaves_out(layer) {
                // y = x + f(x) as if f were a constant
                inputs.forget(layer, pool);
                dx = Some(dy);
                continue;
            }
            let x = inputs.restore(layer, pool, watch)?;
            let before = depth.before(&base.backend, &dy, pool)?;
            let needed = layer > depth.lowest || pass.embedding_learns() || before.is_some();
            let mut tape = pass.tape(Some(x), needed, pool);
            let y = base.model.layer(&mut tape, layer, Value(0));
            dx = tape.backward_by(y, dy, grads, layout.part, &mut || watch.peak.sample())?;
            depth.measure(&base.backend, layer, before, dx.as_ref(), pool)?;
        }
        (0..layers).for_each(|layer| inputs.forget(layer, pool));
        before_layers(&pass, dx, grads, pool)?;
    }
    pass.finish(pool);
    Ok(())
}

/// Backward through what a family computes of the embeddings and carries to its layers, where something in it is in training;
/// `dx` is the gradient by the first layer's input, if there is one.
fn before_layers<B: Backend>(
    pass: &Pass<'_, B>,
    dx: Option<B::Buffer>,
    grads: &mut Gradients<B>,
    pool: &mut Pool<B>,
) -> Result<()> {
    let (base, backend) = (pass.base(), &pass.base().backend);
    if !pass.carries_gradient() && !pass.embedding_learns() {
        dx.into_iter().for_each(|dx| pool.put(backend, dx));
        return Ok(());
    }
    let dx = match dx {
        Some(dx) => dx,
        None => {
            // Embeddings that nothing is added to are frozen.
            let mut dx = pool.take(backend, pass.tokens() * base.model.config().hidden_size)?;
            backend.run(Call::Zero { x: &mut dx })?;
            dx
        }
    };
    let mut tape = pass.tape(None, false, pool);
    let x = base.model.embed(&mut tape);
    if !tape.learns() {
        drop(tape);
        pool.put(backend, dx);
        return Ok(());
    }
    if let Some(dx) = tape.backward(x, dx, grads)? {
        pool.put(backend, dx);
    }
    Ok(())
}

/// The inputs of layers, kept or to be had again.
struct Inputs<'a, B: Backend> {
    pass: &'a Pass<'a, B>,
    layout: &'a Layout,
    kept: Vec<Option<B::Buffer>>,
}

impl<B: Backend> Inputs<'_, B> {
    /// The first layer's.
    fn embed(&self, pool: &mut Pool<B>) -> Result<B::Buffer> {
        let mut tape = self.pass.tape(None, false, pool);
        let x = self.pass.base().model.embed(&mut tape);
        tape.into_value(x)
    }

    /// Layer number `layer` applied to `x`.
    fn forward(&self, layer: usize, x: B::Buffer, pool: &mut Pool<B>) -> Result<B::Buffer> {
        let mut tape = self.pass.tape(Some(x), false, pool);
        let y = self.pass.base().model.layer(&mut tape, layer, Value(0));
        tape.into_value_by(y, self.layout.part)
    }

    fn keep(&mut self, layer: usize, x: &B::Buffer, pool: &mut Pool<B>) -> Result<()> {
        let (backend, width) = (&self.pass.base().backend, self.pass.base().model.config().hidden_size);
        let len = backend.len(x);
        let kept = if self.layout.narrow {
            let mut kept = pool.kept().take(backend, len / width * narrow_width(width))?;
            backend.run(Call::Narrow { width, x, y: &mut kept })?;
            kept
        } else {
            let mut kept = pool.kept().take(backend, len)?;
            backend.run(Call::Copy { x, y: &mut kept })?;
            kept
        };
        self.kept[layer] = Some(kept);
        Ok(())
    }

    /// Gives back what is kept of the input of `layer`, if anything: nobody needs it any more.
    fn forget(&mut self, layer: usize, pool: &mut Pool<B>) {
        if let Some(kept) = self.kept[layer].take() {
            pool.kept().put(&self.pass.base().backend, kept);
        }
    }

    /// The input of `layer` from what is kept, which is needed no more if it is this layer's own.
    fn restore(&mut self, layer: usize, pool: &mut Pool<B>, watch: &mut Watch<'_>) -> Result<B::Buffer> {
        let (backend, width) = (&self.pass.base().backend, self.pass.base().model.config().hidden_size);
        let from = (0..=layer).rev().find(|from| self.kept[*from].is_some());
        let mut x = match from {
            Some(from) => {
                let kept = self.kept[from].take().expect("found just now");
                let mut x = pool.take(backend, self.pass.tokens() * width)?;
                if self.layout.narrow {
                    backend.run(Call::Widen { width, x: &kept, y: &mut x })?;
                } else {
                    backend.run(Call::Copy { x: &kept, y: &mut x })?;
                }
                if from == layer {
                    pool.kept().put(backend, kept);
                } else {
                    self.kept[from] = Some(kept);
                }
                x
            }
            None => self.embed(pool)?,
        };
        let from = from.unwrap_or(0);
        for between in from..layer {
            watch.check()?;
            if self.layout.between && between > from {
                self.keep(between, &x, pool)?;
            }
            x = self.forward(between, x, pool)?;
        }
        Ok(x)
    }
}

#[cfg(test)]
mod tests {
    use super::MicroBatch;

    #[test]
    fn weights_go_with_their_tokens_when_a_batch_is_split() {
        let batch = MicroBatch::of_lengths(vec![3, 1, 2], 4);
        assert_eq!(batch.scaled_weights(0.5), [0.5; 4]);
        let batch = batch.weighted(vec![2.0, 0.0, -1.0, 3.0]);
        assert_eq!(batch.scaled_weights(0.5), [1.0, 0.0, -0.5, 1.5]);
        let passes: Vec<_> = batch.split(4).iter().map(|pass| pass.scaled_weights(1.0)).collect();
        assert_eq!(passes, [vec![2.0, 0.0], vec![-1.0, 3.0]]);
    }

    #[test]
    fn distributions_go_with_their_places_when_a_batch_is_split() {
        let mut batch = MicroBatch::empty();
        batch.hold(4, &[1, 2, 3], &[7, 8, 9, 10], [0.5, 0.25, 0.75, 0.0].into_iter(), 2);
        batch.hold(2, &[4, 5], &[11, 12], [0.125, 0.5].into_iter(), 2);
        assert!(batch.is_held() && batch.trained() == 3 && batch.rows == [1, 2, 4]);
        let passes = batch.split(3);
        let parts: Vec<_> = passes.iter().map(|p| (&p.rows[..], &p.targets[..], &p.shares[..], p.numbers())).collect();
        type Part<'a> = (&'a [u32], &'a [u32], &'a [f32], &'a [u32]);
        let expected: [Part<'_>; 2] =
            [(&[1, 2], &[7, 8, 9, 10], &[0.5, 0.25, 0.75, 0.0], &[4]), (&[1], &[11, 12], &[0.125, 0.5], &[2])];
        assert_eq!(parts, expected);
    }
}
