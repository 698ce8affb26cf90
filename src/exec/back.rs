//! Backward over a tape.
//!
//! The base is frozen, so a linear layer's backward is the gradient of its input plus whatever its adapters need. Values
//! are freed with the last operation that reads them, and gradients take their places where they can.

use super::lives;
use super::ops;
use super::tape::Tape;
use crate::adapter::Gradients;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::Value;

impl<B: Backend> Tape<'_, B> {
    /// Walks the tape backward from the gradient `dy` of `y`, adding to `grads`; returns the gradient of the input
    /// (value 0), if it was said to need one. Values that were not computed yet are, if some gradient needs them.
    ///
    /// # Errors
    /// Out of memory.
    pub fn backward(self, y: Value, dy: B::Buffer, grads: &mut Gradients<B>) -> Result<Option<B::Buffer>> {
        self.backward_by(y, dy, grads, usize::MAX, &mut || ())
    }

    /// As [`Tape::backward`], with `part` tokens at a time behind the last attention. `fullest` is called where most is
    /// held.
    ///
    /// # Errors
    /// As [`Tape::backward`].
    pub fn backward_by(
        mut self,
        y: Value,
        dy: B::Buffer,
        grads: &mut Gradients<B>,
        part: usize,
        fullest: &mut dyn FnMut(),
    ) -> Result<Option<B::Buffer>> {
        match self.cut(part) {
            Some(cut) => self.back_by(cut, y, dy, grads, part, fullest)?,
            None => {
                self.replay()?;
                self.it.set_grad(y, dy);
                self.walk(grads, fullest)?;
            }
        }
        let dx = self.it.slots[0].grad.take();
        self.it.recycle();
        Ok(dx)
    }

    /// Computes what backward reads, as far as it is not there: a layer's last product and its output are left out.
    fn replay(&mut self) -> Result<()> {
        let keep = lives::kept_for_backward(&self.ops, self.it.slots.len());
        self.forward(lives::replayed(&self.ops, &keep), &keep)
    }

    /// The operations from `cut` on, `part` tokens at a time, then those before it.
    fn back_by(
        &mut self,
        cut: usize,
        y: Value,
        dy: B::Buffer,
        grads: &mut Gradients<B>,
        part: usize,
        fullest: &mut dyn FnMut(),
    ) -> Result<()> {
        let backend = self.it.backend();
        let values = self.it.slots.len();
        let crossing = lives::crossing(&self.ops, cut);
        let mut keep = lives::kept_for_backward(&self.ops[..cut], values);
        crossing.iter().for_each(|t| keep[t.0 as usize] = true);
        self.forward(cut, &keep)?;
        for t in crossing.iter().copied().filter(|t| self.it.needs(*t)).collect::<Vec<_>>() {
            let mut grad = self.it.buffer(self.it.len(t))?;
            backend.run(Call::Zero { x: &mut grad })?;
            self.it.set_grad(t, grad);
        }
        let width = self.it.slots[y.0 as usize].width;
        for rows in self.parts(part) {
            let ids: Vec<u32> = rows.clone().map(|row| row as u32).collect();
            let mut part_dy = self.it.buffer(width * ids.len())?;
            backend.run(Call::GatherRows { x: &dy, rows: &ids, y: &mut part_dy })?;
            let mut tape = self.part(cut, &crossing, rows)?;
            tape.replay()?;
            tape.it.set_grad(y, part_dy);
            tape.walk(grads, fullest)?;
            let found: Vec<_> =
                crossing.iter().filter_map(|t| Some((*t, tape.it.slots[t.0 as usize].grad.take()?))).collect();
            tape.it.recycle();
            for (t, grad) in found {
                if let Some(all) = &mut self.it.slots[t.0 as usize].grad {
                    backend.run(Call::ScatterAddRows { x: &grad, rows: &ids, y: all })?;
                }
                self.it.put(grad);
            }
        }
        self.it.put(dy);
        self.ops.truncate(cut);
        let keep = lives::kept_for_backward(&self.ops, values);
        crossing.into_iter().filter(|t| !keep[t.0 as usize]).for_each(|t| self.it.free(t));
        self.walk(grads, fullest)
    }

    /// Backward through all operations, from gradients that are there.
    fn walk(&mut self, grads: &mut Gradients<B>, fullest: &mut dyn FnMut()) -> Result<()> {
        let mut readers = lives::backward_readers(&self.ops, self.it.slots.len());
        let most = lives::fullest(&self.ops, |t| self.it.slots[t.0 as usize].width);
        while let Some(recorded) = self.ops.pop() {
            for t in &recorded.keeps {
                self.demand(*t)?;
                readers[t.0 as usize] -= 1;
            }
            let dying: Vec<Value> = recorded.keeps.iter().copied().filter(|t| readers[t.0 as usize] == 0).collect();
            if self.ops.len() == most {
                fullest();
            }
            ops::back(&mut self.it, &recorded.op, recorded.y, &dying, grads)?;
            // After its own step nobody computes an output again.
            dying.into_iter().chain(recorded.outputs()).for_each(|t| self.it.free(t));
        }
        Ok(())
    }
}
