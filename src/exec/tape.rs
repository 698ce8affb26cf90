//! A piece of a model, recorded first and run when its values are asked for.
//!
//! Because all operations are known before the first one runs, each value is dropped after the last operation that reads
//! it. What backward reads stays, but for norms and activations, which cost next to nothing and are computed again.
//! Behind the last attention every row goes its own way: there a tape may run some tokens at a time, so that the wide
//! values of the feed-forward part exist for those only.

use super::interpreter::{Interpreter, Slot};
use super::lives::{self, Recorded};
use super::ops;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::{Exec, Op, Value};
use std::ops::Range;

/// Tokens of the smallest part that is worth running by itself.
const LEAST: usize = 16;

/// A recorded piece of a model over some tokens.
pub struct Tape<'p, B: Backend> {
    pub(super) it: Interpreter<'p, B>,
    pub(super) ops: Vec<Recorded>,
    /// Operations done.
    done: usize,
}

impl<'p, B: Backend> Tape<'p, B> {
    pub(super) fn new(it: Interpreter<'p, B>) -> Self {
        Self { it, ops: Vec::new(), done: 0 }
    }

    /// Whether something that it records is in training.
    #[must_use]
    pub fn learns(&self) -> bool {
        self.it.slots.iter().any(|slot| slot.needs_grad)
    }

    /// Keys and values of the attention that it records: of a layer of a model whose layers all keep such.
    pub(crate) fn keys_and_values(&self) -> [Value; 2] {
        let attention = self.ops.iter().find_map(|recorded| match recorded.op {
            Op::Attention { k, v, .. } => Some([k, v]),
            _ => None,
        });
        attention.expect("the model was asked for its states before")
    }

    /// The value `t`; what backward reads is kept beside it.
    ///
    /// # Errors
    /// Out of memory.
    pub fn value(&mut self, t: Value) -> Result<&mut B::Buffer> {
        if self.it.slots[t.0 as usize].data.is_none() {
            let mut keep = lives::kept_for_backward(&self.ops, self.it.slots.len());
            keep[t.0 as usize] = true;
            self.forward(self.ops.len(), &keep)?;
        }
        Ok(self.it.slots[t.0 as usize].data.as_mut().expect("forward has computed it"))
    }

    /// Takes the value `t` that [`Tape::value`] found; backward must not need it any more.
    pub fn take(&mut self, t: Value) -> B::Buffer {
        self.it.take(t)
    }

    /// The value `t`; all others are recycled.
    ///
    /// # Errors
    /// As [`Tape::value`].
    pub fn into_value(self, t: Value) -> Result<B::Buffer> {
        self.into_value_by(t, usize::MAX)
    }

    /// As [`Tape::into_value`], with `part` tokens at a time behind the last attention.
    ///
    /// # Errors
    /// As [`Tape::value`].
    pub fn into_value_by(mut self, t: Value, part: usize) -> Result<B::Buffer> {
        if self.it.slots[t.0 as usize].data.is_none() {
            match self.cut(part) {
                Some(cut) => self.forward_by(cut, t, part)?,
                None => {
                    let mut keep = vec![false; self.it.slots.len()];
                    keep[t.0 as usize] = true;
                    self.forward(self.ops.len(), &keep)?;
                }
            }
        }
        let kept = self.take(t);
        self.it.recycle();
        Ok(kept)
    }

    /// Runs the operations up to `end`, dropping values that neither those nor `keep` need.
    pub(super) fn forward(&mut self, end: usize, keep: &[bool]) -> Result<()> {
        let deaths = lives::deaths(&self.ops[..end], keep);
        for (Recorded { op, y, .. }, dying) in self.ops[..end].iter().zip(&deaths).skip(self.done) {
            match *op {
                // The sum takes the place of a term that nobody reads any more.
                Op::Add { a, b } if a != b && dying.contains(&a) => ops::add_in_place(&mut self.it, a, b, *y),
                Op::Add { a, b } if a != b && dying.contains(&b) => ops::add_in_place(&mut self.it, b, a, *y),
                _ => self.it.run(op, *y),
            }?;
            dying.iter().for_each(|t| self.it.free(*t));
        }
        self.done = self.done.max(end);
        Ok(())
    }

    /// Computes `t` again if it was dropped.
    pub(super) fn demand(&mut self, t: Value) -> Result<()> {
        if self.it.slots[t.0 as usize].data.is_some() {
            return Ok(());
        }
        let Recorded { op, y, .. } =
            lives::maker(&self.ops, t).expect("only cheap values are dropped before backward reads them");
        self.it.run(op, *y)
    }

    /// Where the tape may be cut to run `part` tokens at a time from there on, if they are fewer than all.
    pub(super) fn cut(&self, part: usize) -> Option<usize> {
        let rows = &self.it.rows;
        let whole = *rows == (0..self.it.pass.batch.ids.len());
        if !whole || rows.len() < part.saturating_add(LEAST) {
            return None;
        }
        lives::rows_part_at(&self.ops)
    }

    /// The rows in pieces of `part`, the last no shorter than [`LEAST`].
    pub(super) fn parts(&self, part: usize) -> Vec<Range<usize>> {
        let part = part.max(1).next_multiple_of(LEAST);
        let mut parts = Vec::new();
        let Range { mut start, end: last } = self.it.rows;
        while start < last {
            let end = if last - start < part + LEAST { last } else { start + part };
            parts.push(start..end);
            start = end;
        }
        parts
    }

    /// The operations from `cut` on over some rows of the crossing values.
    pub(super) fn part<'s>(&'s mut self, cut: usize, crossing: &[Value], rows: Range<usize>) -> Result<Tape<'s, B>> {
        let backend = self.it.backend();
        let ids: Vec<u32> = rows.clone().map(|row| row as u32).collect();
        let empty = |slot: &Slot<B>| Slot { data: None, grad: None, needs_grad: slot.needs_grad, width: slot.width };
        let mut slots: Vec<Slot<B>> = self.it.slots.iter().map(empty).collect();
        for t in crossing {
            let slot = &mut slots[t.0 as usize];
            let mut data = self.it.buffer(slot.width * rows.len())?;
            backend.run(Call::GatherRows { x: self.it.data(*t), rows: &ids, y: &mut data })?;
            slot.data = Some(data);
        }
        let it = Interpreter { pass: self.it.pass, pool: self.it.pool, slots, rows, states: Vec::new() };
        Ok(Tape { it, ops: self.ops[cut..].to_vec(), done: 0 })
    }

    /// Computes `y`, `part` tokens at a time from `cut` on.
    fn forward_by(&mut self, cut: usize, y: Value, part: usize) -> Result<()> {
        let backend = self.it.backend();
        let crossing = lives::crossing(&self.ops, cut);
        let mut keep = vec![false; self.it.slots.len()];
        crossing.iter().for_each(|t| keep[t.0 as usize] = true);
        self.forward(cut, &keep)?;
        let mut all = self.it.buffer(self.it.len(y))?;
        backend.run(Call::Zero { x: &mut all })?;
        for rows in self.parts(part) {
            let ids: Vec<u32> = rows.clone().map(|row| row as u32).collect();
            let piece = self.part(cut, &crossing, rows)?.into_value(y)?;
            backend.run(Call::ScatterAddRows { x: &piece, rows: &ids, y: &mut all })?;
            self.it.put(piece);
        }
        self.it.set(y, all);
        Ok(())
    }
}

impl<B: Backend> Exec for Tape<'_, B> {
    fn run(&mut self, op: Op) -> Value {
        let y = self.it.declare(&op);
        self.it.note_gradients(&op, y);
        let keeps = self.it.keeps(&op, y);
        lives::record(&mut self.ops, op, y, keeps);
        y
    }
}
