//! Forward with what sequences remember of earlier tokens: prompts, decoding and evaluation.

use super::interpreter::Interpreter;
use super::pass::{Batch, Part, Pass, Place, virtual_ids};
pub use super::sequence::{Sequence, state_bytes};
use crate::adapter::Adapters;
use crate::base::{Base, Pool};
use crate::error::{Error, ErrorCode, Result};
use pocketlora_kernels::{Arithmetic, Backend, CacheType, Call};
use pocketlora_models::{Exec, Op, Value};
use std::ops::Range;

/// Tokens run through the layers at once; bounds the activations of a long prompt.
pub const PREFILL_CHUNK: usize = 256;
/// Rows of logits that are held at once.
const LOGIT_ROWS: usize = 32;

/// How numbers are kept and multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// Keys and values.
    pub cache: CacheType,
    /// Products with weights.
    pub arithmetic: Arithmetic,
}

/// What steps need beside their sequences: buffers that the next step uses again.
pub struct Workspace<B: Backend> {
    pool: Pool<B>,
    /// Tokens of the last batch.
    tokens: usize,
    arithmetic: Arithmetic,
    /// What comes of rows is the head's input, `[rows, C]` after the last norm, and not its logits.
    states: bool,
    /// Logits on the host. The system maps and clears so much memory anew where it is not used again.
    logits: Vec<f32>,
}

impl<B: Backend> Workspace<B> {
    /// Without buffers yet, for products in `arithmetic`.
    #[must_use]
    pub fn new(arithmetic: Arithmetic) -> Self {
        Self { pool: Pool::default(), tokens: 0, arithmetic, states: false, logits: Vec::new() }
    }

    /// The same for states `[rows, C]` after the last norm, in the place of logits `[rows, V]`.
    #[must_use]
    pub fn for_states(arithmetic: Arithmetic) -> Self {
        Self { states: true, ..Self::new(arithmetic) }
    }
}

/// One part of a batch: tokens that continue a sequence.
pub struct Step<'a, B: Backend> {
    /// What is continued.
    pub sequence: &'a mut Sequence<B>,
    /// The tokens; at least one.
    pub ids: &'a [u32],
    /// The adapters of this sequence.
    pub adapters: &'a Adapters<B>,
    /// Which of `ids` (numbers from 0, ascending) logits are wanted after.
    pub logits: Range<usize>,
}

/// Logits that a batch asked for.
pub struct Logits {
    /// Row by row: the number of the step, and that of the token in it.
    pub places: Vec<(usize, usize)>,
    /// `[rows, V]`.
    pub values: Vec<f32>,
}

impl<B: Backend> Base<B> {
    /// Runs `steps` together: prompts and single tokens, with the same or with different adapters. `on_logits` takes the
    /// logits that they ask for, in the order of the steps, some rows at a time. `keep_going` is asked between layers.
    ///
    /// A step of at most `PREFILL_CHUNK` tokens is sensible.
    ///
    /// # Errors
    /// An id outside the vocabulary, out of memory, device lost, stopped, and those of `on_logits`. Sequences are then as
    /// [`Sequence::rewind`] leaves them: look at their lengths.
    pub fn forward(
        &self,
        work: &mut Workspace<B>,
        steps: &mut [Step<'_, B>],
        keep_going: &mut dyn FnMut() -> bool,
        on_logits: &mut dyn FnMut(&Logits) -> Result<()>,
    ) -> Result<()> {
        for step in &mut *steps {
            self.begin(work, step, keep_going)?;
            self.read_anew(work, step, keep_going)?;
            self.activate(work, step, keep_going)?;
        }
        let starts: Vec<usize> = steps.iter().map(|step| step.sequence.len).collect();
        // Rows whose adapters bring other weights in place of the base's cannot share a product.
        let together = |a: &Step<'_, B>, b: &Step<'_, B>| {
            std::ptr::eq(a.adapters, b.adapters) || !a.adapters.is_alone() && !b.adapters.is_alone()
        };
        let (mut first, mut result) = (0, Ok(()));
        for group in steps.chunk_by_mut(together) {
            result = self.forward_together(work, first, group, keep_going, on_logits);
            if result.is_err() {
                break;
            }
            first += group.len();
        }
        if result.is_err() {
            for (step, start) in steps.iter_mut().zip(starts) {
                step.sequence.rewind(self, start);
            }
        }
        result
    }

    /// Puts the virtual tokens of the step's adapters before the first token of its sequence, and reads those that are read.
    fn begin(
        &self,
        work: &mut Workspace<B>,
        step: &mut Step<'_, B>,
        keep_going: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        let tokens = step.sequence.begin(self, step.adapters)?;
        if tokens == 0 {
            return Ok(());
        }
        let ids: Vec<u32> = virtual_ids(tokens).collect();
        step.sequence.stretch(self, tokens + step.ids.len());
        for ids in ids.chunks(PREFILL_CHUNK) {
            let mut one = [Step { sequence: &mut *step.sequence, ids, adapters: step.adapters, logits: 0..0 }];
            let read = self.forward_together(work, 0, &mut one, keep_going, &mut |_| Ok(()));
            if read.is_err() {
                step.sequence.clear(self);
                return read;
            }
        }
        Ok(())
    }

    /// Runs what the sequence of `step` holds once more, as far as the adapters' invocation is elsewhere with the step's tokens.
    fn activate(
        &self,
        work: &mut Workspace<B>,
        step: &mut Step<'_, B>,
        keep_going: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        let again = step.sequence.activate(self, step.adapters, step.ids)?;
        if again.is_empty() {
            return Ok(());
        }
        let active = step.sequence.active;
        self.begin(work, step, keep_going)?;
        for ids in again.chunks(PREFILL_CHUNK) {
            let mut one = [Step { sequence: &mut *step.sequence, ids, adapters: step.adapters, logits: 0..0 }];
            if let Err(e) = self.forward_together(work, 0, &mut one, keep_going, &mut |_| Ok(())) {
                // What it holds was read for an invocation that it does not have.
                step.sequence.active = None;
                step.sequence.rewind(self, 0);
                return Err(e);
            }
            step.sequence.active = active;
        }
        Ok(())
    }

    /// Runs what the sequence of `step` holds once more, if with the step's tokens it becomes so long that its model turns
    /// all of them by other angles.
    fn read_anew(
        &self,
        work: &mut Workspace<B>,
        step: &mut Step<'_, B>,
        keep_going: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        let reach = step.adapters.virtual_tokens() + step.sequence.len + step.ids.len();
        let ids = step.sequence.stretch(self, reach);
        if ids.is_empty() {
            return Ok(());
        }
        // The virtual tokens went with the rest.
        self.begin(work, step, keep_going)?;
        for ids in ids.chunks(PREFILL_CHUNK) {
            let mut again = [Step { sequence: &mut *step.sequence, ids, adapters: step.adapters, logits: 0..0 }];
            self.forward(work, &mut again, keep_going, &mut |_| Ok(()))?;
        }
        Ok(())
    }

    /// As [`Base::forward`], for steps from number `first` on that multiply by the same weights.
    fn forward_together(
        &self,
        work: &mut Workspace<B>,
        first: usize,
        steps: &mut [Step<'_, B>],
        keep_going: &mut dyn FnMut() -> bool,
        on_logits: &mut dyn FnMut(&Logits) -> Result<()>,
    ) -> Result<()> {
        let batch = Batch {
            ids: steps.iter().flat_map(|step| step.ids).copied().collect(),
            segments: steps.iter().map(|step| step.ids.len()).collect(),
        };
        if work.tokens != batch.ids.len() {
            work.pool.clear();
            work.tokens = batch.ids.len();
        }
        let adapters: Vec<&Adapters<B>> = steps.iter().map(|step| step.adapters).collect();
        let parts = parts(adapters.iter().copied().zip(batch.segments.iter().copied()));
        let place = |step: &Step<'_, B>| Place {
            start: step.sequence.before + step.sequence.len,
            reach: step.sequence.reach,
            active: step.sequence.active.map(|at| at.saturating_sub(step.sequence.len)),
        };
        let places: Vec<Place> = steps.iter().map(place).collect();
        let pass = Pass::after(self, parts, &batch, places, work.arithmetic, &mut work.pool)?;

        let mut run = Infer { it: Interpreter::new(&pass, None, false, &mut work.pool), error: None };
        run.it.states = steps.iter_mut().map(|step| std::mem::take(&mut step.sequence.states)).collect();
        let mut x = self.model.embed(&mut run);
        for layer in 0..self.model.config().layers {
            if !keep_going() {
                run.error.get_or_insert_with(stopped);
            }
            if run.error.is_some() {
                break;
            }
            x = self.model.layer(&mut run, layer, x);
            x = run.keep_only(x);
        }
        for (step, states) in steps.iter_mut().zip(std::mem::take(&mut run.it.states)) {
            step.sequence.states = states;
            // Also where it failed: some layers may hold them.
            step.sequence.extend(self, step.ids);
        }
        let hidden = run.finish(x);
        pass.finish(&mut work.pool);
        let hidden = hidden?;

        let wanted: Vec<(usize, usize)> =
            steps.iter().enumerate().flat_map(|(i, step)| step.logits.clone().map(move |row| (i, row))).collect();
        for places in wanted.chunks(LOGIT_ROWS) {
            self.logits(work, &batch, &adapters, &hidden, places)?;
            let of_all = places.iter().map(|(step, row)| (first + step, *row)).collect();
            let made = Logits { places: of_all, values: std::mem::take(&mut work.logits) };
            on_logits(&made)?;
            work.logits = made.values;
        }
        work.pool.put(&self.backend, hidden);
        Ok(())
    }

    /// Reads the logits `[rows, V]` of some rows of `hidden` back to the host.
    fn logits(
        &self,
        work: &mut Workspace<B>,
        batch: &Batch,
        adapters: &[&Adapters<B>],
        hidden: &B::Buffer,
        places: &[(usize, usize)],
    ) -> Result<()> {
        let backend = &self.backend;
        let start = |step: usize| batch.segments[..step].iter().sum::<usize>();
        let rows: Vec<u32> = places.iter().map(|&(step, row)| (start(step) + row) as u32).collect();
        let mut x = work.pool.take(backend, rows.len() * self.model.config().hidden_size)?;
        backend.run(Call::GatherRows { x: hidden, rows: &rows, y: &mut x })?;
        let parts = parts(places.iter().map(|&(step, _)| (adapters[step], 1)));
        let no_tokens = Batch::default();
        let pass = Pass::after(self, parts, &no_tokens, [], work.arithmetic, &mut work.pool)?;
        let mut run = Infer { it: Interpreter::new(&pass, Some(x), false, &mut work.pool), error: None };
        let y = match work.states {
            true => self.model.norm(&mut run, Value(0)),
            false => self.model.head(&mut run, Value(0)),
        };
        let y = run.finish(y)?;
        pass.finish(&mut work.pool);
        work.logits.resize(backend.len(&y), 0.0);
        backend.read(&y, &mut work.logits)?;
        work.pool.put(backend, y);
        Ok(())
    }
}

fn stopped() -> Error {
    Error::new(ErrorCode::Cancelled, "generation", "stopped between two layers")
}

/// Rows with the same adapters, from the adapters of so many rows each.
fn parts<'a, B: Backend>(rows: impl Iterator<Item = (&'a Adapters<B>, usize)>) -> Vec<Part<'a, B>> {
    let mut parts: Vec<Part<'a, B>> = Vec::new();
    for (adapters, count) in rows {
        match parts.last_mut() {
            Some(part) if std::ptr::eq(part.adapters, adapters) => part.rows.end += count,
            last => {
                let start = last.map_or(0, |part| part.rows.end);
                parts.push(Part { rows: start..start + count, adapters });
            }
        }
    }
    parts
}

/// Runs operations at once. The first failure is kept and the operations after it do nothing, so that model files stay
/// free of error handling.
struct Infer<'a, B: Backend> {
    it: Interpreter<'a, B>,
    error: Option<Error>,
}

impl<B: Backend> Infer<'_, B> {
    /// Recycles every value but `x`, which becomes number 0.
    fn keep_only(&mut self, x: Value) -> Value {
        let mut slot = self.it.slots.swap_remove(x.0 as usize);
        self.it.recycle();
        slot.grad = None;
        self.it.slots.push(slot);
        Value(0)
    }

    /// Recycles everything else and returns `y`, or the first error.
    fn finish(mut self, y: Value) -> Result<B::Buffer> {
        let y = self.keep_only(y);
        match self.error {
            Some(error) => Err(error),
            None => Ok(self.it.take(y)),
        }
    }
}

impl<B: Backend> Exec for Infer<'_, B> {
    fn run(&mut self, op: Op) -> Value {
        let y = self.it.declare(&op);
        if self.error.is_none() {
            self.error = self.it.run(&op, y).err();
        }
        y
    }
}
