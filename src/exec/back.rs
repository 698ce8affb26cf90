//! Backward over a tape.
//!
//! The base is frozen, so a linear layer's backward is the gradient of its input plus whatever its adapters need. Values
//! are freed with the last operation that reads them, and gradients take their places where they can.

use super::tape::{Op, Tape};
use super::train::Gradients;
use crate::adapter::{Adapter, Context};
use crate::error::Result;
use pocketlora_kernels::{Arithmetic, Backend};
use pocketlora_models::{Linear, Tensor};

impl<'p, B: Backend> Tape<'p, B> {
    /// Walks the tape backward from the gradient `dy` of `y`, adding to `grads`; returns the gradient of the input
    /// (value 0), if it was said to need one. Values that were not computed yet are, if some gradient needs them.
    ///
    /// # Errors
    /// Out of memory.
    pub fn backward(self, y: Tensor, dy: B::Buffer, grads: &mut Gradients<B>) -> Result<Option<B::Buffer>> {
        self.backward_by(y, dy, grads, usize::MAX, &mut || ())
    }

    /// As [`Tape::backward`], with `part` tokens at a time behind the last attention. `fullest` is called where most is
    /// held.
    ///
    /// # Errors
    /// As [`Tape::backward`].
    pub fn backward_by(
        mut self,
        y: Tensor,
        dy: B::Buffer,
        grads: &mut Gradients<B>,
        part: usize,
        fullest: &mut dyn FnMut(),
    ) -> Result<Option<B::Buffer>> {
        match self.cut(part) {
            Some(cut) => self.back_by(cut, y, dy, grads, part, fullest)?,
            None => {
                self.replay()?;
                self.values[y.0 as usize].grad = Some(dy);
                self.walk(grads, fullest)?;
            }
        }
        let dx = self.values[0].grad.take();
        self.recycle();
        Ok(dx)
    }

    /// Computes what backward reads, as far as it is not there: a layer's last product and its output are left out.
    fn replay(&mut self) -> Result<()> {
        let keep = self.kept_for_backward(0..self.ops.len());
        let makes = |op: &Op| keep[op.output().0 as usize];
        let end = self.ops.iter().rposition(makes).map_or(0, |last| last + 1);
        self.forward(end, &keep)
    }

    /// The operations from `cut` on, `part` tokens at a time, then those before it.
    fn back_by(
        &mut self,
        cut: usize,
        y: Tensor,
        dy: B::Buffer,
        grads: &mut Gradients<B>,
        part: usize,
        fullest: &mut dyn FnMut(),
    ) -> Result<()> {
        let backend = &self.pass.base.backend;
        let crossing = self.crossing(cut);
        let mut keep = self.kept_for_backward(0..cut);
        crossing.iter().for_each(|t| keep[t.0 as usize] = true);
        self.forward(cut, &keep)?;
        for t in crossing.iter().filter(|t| self.values[t.0 as usize].needs_grad).copied().collect::<Vec<_>>() {
            let mut grad = self.pool.take(backend, self.len(t))?;
            backend.zero(&mut grad);
            self.values[t.0 as usize].grad = Some(grad);
        }
        let width = self.values[y.0 as usize].width;
        for rows in self.parts(part) {
            let ids: Vec<u32> = rows.clone().map(|row| row as u32).collect();
            let mut part_dy = self.pool.take(backend, width * ids.len())?;
            backend.gather_rows(&dy, &ids, &mut part_dy);
            let mut tape = self.part(cut, &crossing, rows)?;
            tape.replay()?;
            tape.values[y.0 as usize].grad = Some(part_dy);
            tape.walk(grads, fullest)?;
            let found: Vec<_> =
                crossing.iter().filter_map(|t| Some((*t, tape.values[t.0 as usize].grad.take()?))).collect();
            tape.recycle();
            for (t, grad) in found {
                if let Some(all) = &mut self.values[t.0 as usize].grad {
                    backend.scatter_add_rows(&grad, &ids, all);
                }
                self.pool.put(backend, grad);
            }
        }
        self.pool.put(backend, dy);
        self.ops.truncate(cut);
        let keep = self.kept_for_backward(0..cut);
        crossing.into_iter().filter(|t| !keep[t.0 as usize]).for_each(|t| self.free(t));
        self.walk(grads, fullest)
    }

    /// Backward through all operations, from gradients that are there.
    fn walk(&mut self, grads: &mut Gradients<B>, fullest: &mut dyn FnMut()) -> Result<()> {
        let mut readers = vec![0_usize; self.values.len()];
        for op in &self.ops {
            self.backward_reads(op).into_iter().for_each(|t| readers[t.0 as usize] += 1);
        }
        let most = self.ops.iter().rposition(|op| matches!(op, Op::SwiGlu { .. } | Op::Attention { .. })).unwrap_or(0);
        while let Some(op) = self.ops.last().copied() {
            for t in self.backward_reads(&op) {
                self.demand(t)?;
                readers[t.0 as usize] -= 1;
            }
            let dying: Vec<Tensor> =
                self.backward_reads(&op).into_iter().filter(|t| readers[t.0 as usize] == 0).collect();
            if self.ops.len() == most + 1 {
                fullest();
            }
            if let Some(dy) = self.values[op.output().0 as usize].grad.take() {
                self.step_back(&op, dy, &dying, grads)?;
            }
            dying.into_iter().for_each(|t| self.free(t));
            // After its own step nobody computes the output again.
            self.free(op.output());
            self.ops.pop();
        }
        Ok(())
    }

    fn needs(&self, t: Tensor) -> bool {
        self.values[t.0 as usize].needs_grad
    }

    /// The gradient of `t` so far, to be added to, and whether it holds anything yet.
    fn take_grad(&mut self, t: Tensor) -> Result<(B::Buffer, bool)> {
        match self.values[t.0 as usize].grad.take() {
            Some(grad) => Ok((grad, true)),
            None => Ok((self.pool.take(&self.pass.base.backend, self.len(t))?, false)),
        }
    }

    /// Adds `part` to the gradient of `t` and recycles it.
    fn add_grad(&mut self, t: Tensor, part: B::Buffer) {
        let backend = &self.pass.base.backend;
        let value = &mut self.values[t.0 as usize];
        match &mut value.grad {
            _ if !value.needs_grad => self.pool.put(backend, part),
            Some(grad) => {
                backend.add_assign(&part, grad);
                self.pool.put(backend, part);
            }
            none => *none = Some(part),
        }
    }

    /// One operation back, given the gradient of its output. `dying` are the values that nobody reads after it.
    fn step_back(&mut self, op: &Op, dy: B::Buffer, dying: &[Tensor], grads: &mut Gradients<B>) -> Result<()> {
        let (pass, base) = (self.pass, self.pass.base);
        let backend = &base.backend;
        match *op {
            Op::Embed { .. } => self.pool.put(backend, dy),
            Op::Add { a, b, .. } => {
                // y = a + b
                if self.needs(a) && self.needs(b) {
                    let (mut db, started) = self.take_grad(b)?;
                    if started {
                        backend.add_assign(&dy, &mut db);
                    } else {
                        backend.copy(&dy, &mut db);
                    }
                    self.values[b.0 as usize].grad = Some(db);
                    self.add_grad(a, dy);
                } else {
                    self.add_grad(if self.needs(a) { a } else { b }, dy);
                }
            }
            Op::Linear { layer, x, .. } => self.linear_back(layer, x, dy, dying.contains(&x), grads)?,
            Op::RmsNorm { weight, eps, x, .. } => {
                // y = x / rms(x) * weight
                let (mut dx, started) = self.take_grad(x)?;
                if !started {
                    backend.zero(&mut dx);
                }
                backend.rms_norm_vjp_x(
                    base.vector_with(pass.adapters.replaced(), weight),
                    eps,
                    self.data(x),
                    &dy,
                    &mut dx,
                );
                self.values[x.0 as usize].grad = Some(dx);
                self.pool.put(backend, dy);
            }
            Op::Rope { table, heads, x, .. } => {
                // y = R x with R a rotation, so dx = R⁻¹ dy
                let (cos, sin) = &pass.angles[table.0 as usize];
                let mut dx = self.pool.take(backend, backend.len(&dy))?;
                backend.rope(heads, base.rope_dim(table), cos, sin, &dy, true, &mut dx);
                self.pool.put(backend, dy);
                self.add_grad(x, dx);
            }
            Op::Attention { spec, q, k, v, y, lse } => {
                // y = softmax(scale q kᵀ) v
                let [mut dq, mut dk, mut dv] = self.like([q, k, v])?;
                let segments = &pass.batch.segments;
                let (vq, vk, vv) = (self.data(q), self.data(k), self.data(v));
                let (vy, vl) = (self.data(y), self.data(lse));
                backend.attention_vjp(&spec, segments, vq, vk, vv, vy, vl, &dy, &mut dq, &mut dk, &mut dv);
                self.pool.put(backend, dy);
                for (t, grad) in [(q, dq), (k, dk), (v, dv)] {
                    self.add_grad(t, grad);
                }
            }
            Op::SwiGlu { gate, up, .. } => self.swiglu_back(gate, up, dy, dying)?,
        }
        Ok(())
    }

    /// `y = silu(gate) * up`.
    fn swiglu_back(&mut self, gate: Tensor, up: Tensor, dy: B::Buffer, dying: &[Tensor]) -> Result<()> {
        let backend = &self.pass.base.backend;
        let [dgate, dup] = if gate != up && dying.contains(&gate) && dying.contains(&up) {
            let [mut dgate, mut dup] =
                [gate, up].map(|t| self.values[t.0 as usize].data.take().expect("demanded before"));
            backend.swiglu_vjp_in_place(&dy, &mut dgate, &mut dup);
            [dgate, dup]
        } else {
            let [mut dgate, mut dup] = self.like([gate, up])?;
            backend.swiglu_vjp(self.data(gate), self.data(up), &dy, &mut dgate, &mut dup);
            [dgate, dup]
        };
        self.pool.put(backend, dy);
        self.add_grad(gate, dgate);
        self.add_grad(up, dup);
        Ok(())
    }

    /// `y = x Wᵀ + b + adapters(x)`. Only the layer's first adapter is in training; others attached beside it pass
    /// gradients on.
    fn linear_back(
        &mut self,
        layer: Linear,
        x: Tensor,
        dy: B::Buffer,
        x_dies: bool,
        grads: &mut Gradients<B>,
    ) -> Result<()> {
        let (pass, backend) = (self.pass, &self.pass.base.backend);
        let dropout = pass.layer_dropout(layer.weight, self.rows.start);
        // The base's product takes low-rank terms along, unless what they pass on is dropped in part.
        let fused = |adapter: &'p dyn Adapter<B>| adapter.low_rank().filter(|_| dropout.is_none()).map(|term| term.a);
        let mut carried = Vec::new();
        for adapter in pass.adapters.on(layer.weight).iter().map(Box::as_ref) {
            let Some(range) = grads.ranges[layer.weight.0 as usize].clone() else { continue };
            let data = self.values[x.0 as usize].data.as_ref().expect("demanded before");
            let mut cx = Context { backend, pool: &mut *self.pool, arithmetic: pass.arithmetic, dropout };
            carried.push((adapter, adapter.backward(&mut cx, data, &dy, &mut grads.tensors[range])?));
        }
        // Its gradient may take its place.
        if x_dies {
            self.free(x);
        }
        let mut dx = None;
        if self.needs(x) {
            let (mut buffer, started) = self.take_grad(x)?;
            let weight = pass.base.factor_with(pass.adapters.replaced(), layer.weight, Arithmetic::Exact);
            let mut terms = vec![(weight, &dy)];
            terms.extend(carried.iter().filter_map(|(adapter, carried)| Some((fused(*adapter)?, carried))));
            backend.matmul_vjp_x_sum(pass.arithmetic, &terms, &mut buffer, started);
            dx = Some(buffer);
        }
        for (adapter, carried) in carried {
            if let Some(dx) = &mut dx
                && fused(adapter).is_none()
            {
                let mut cx = Context { backend, pool: &mut *self.pool, arithmetic: pass.arithmetic, dropout };
                adapter.backward_x(&mut cx, &carried, dx)?;
            }
            self.pool.put(backend, carried);
        }
        self.values[x.0 as usize].grad = dx;
        self.pool.put(backend, dy);
        Ok(())
    }

    /// New buffers as long as the given values.
    fn like<const N: usize>(&mut self, of: [Tensor; N]) -> Result<[B::Buffer; N]> {
        let backend = &self.pass.base.backend;
        let mut made = Vec::with_capacity(N);
        for t in of {
            made.push(self.pool.take(backend, self.len(t))?);
        }
        Ok(made.try_into().unwrap_or_else(|_| unreachable!("one buffer for each of the N values")))
    }
}
