//! Forward with a tape and the backward pass over it.
//!
//! A tape holds one layer (or the head) at a time: training keeps only each layer's input, runs the layer again when
//! its gradient is due, and drops the tape. The base is frozen, so a linear layer's backward is the gradient of its
//! input plus whatever its adapters need.

use super::{Base, Pool, attention_spec};
use crate::adapter::{Adapters, Context, Dropout};
use crate::error::{Error, Result};
use pocketlora_kernels::{Arithmetic, Attention, Backend};
use pocketlora_models::{AttentionShape, Exec, Linear, Param, RopeTable, Tensor};
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
    base: &'a Base<B>,
    adapters: &'a Adapters<B>,
    batch: &'a Batch,
    angles: Vec<(B::Buffer, B::Buffer)>,
    dropout: Option<Dropout>,
    arithmetic: Arithmetic,
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
        base.check_ids(&batch.ids)?;
        let angles = base.rope_angles(&batch.positions(), pool)?;
        Ok(Self { base, adapters, batch, angles, dropout, arithmetic })
    }

    /// What the pass runs on.
    #[must_use]
    pub fn base(&self) -> &'a Base<B> {
        self.base
    }

    /// The head's weight, if the last norm's output times it is all there is to logits, and no adapter adds to them.
    #[must_use]
    pub fn plain_head(&self) -> Option<&'a B::Matrix> {
        let head = self.base.model.plain_head().filter(|head| head.bias.is_none())?;
        self.adapters.on(head.weight).is_empty().then(|| self.base.matrix(head.weight))
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

    /// An empty tape, whose first value will be `input` if there is one.
    pub fn tape<'p>(&'p self, input: Option<B::Buffer>, needs_grad: bool, pool: &'p mut Pool<B>) -> Tape<'p, B> {
        let mut tape = Tape { pass: self, pool, ops: Vec::new(), values: Vec::new(), error: None, replay: false };
        if let Some(buffer) = input {
            let len = self.base.backend.len(&buffer);
            tape.values.push(Value { data: Some(buffer), grad: None, needs_grad, len });
        }
        tape
    }

    /// A tape on which a layer is run again for its gradients alone: products and sums are computed when another
    /// operation asks for them. Nobody asks for the layer's output, nor for the last product that leads to it.
    pub fn replay<'p>(&'p self, input: B::Buffer, needs_grad: bool, pool: &'p mut Pool<B>) -> Tape<'p, B> {
        let mut tape = self.tape(Some(input), needs_grad, pool);
        tape.replay = true;
        tape
    }
}

/// An operation with the values it read and wrote; backward needs nothing else.
#[derive(Clone, Copy)]
enum Op {
    Embed,
    Linear { layer: Linear, x: Tensor, y: Tensor },
    RmsNorm { weight: Param, eps: f32, x: Tensor, y: Tensor },
    Rope { table: RopeTable, heads: usize, x: Tensor, y: Tensor },
    Attention { spec: Attention, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor },
    SwiGlu { gate: Tensor, up: Tensor, y: Tensor },
    Add { a: Tensor, b: Tensor, y: Tensor },
}

struct Value<B: Backend> {
    /// None after an error, while it waits to be asked for, and when it was taken.
    data: Option<B::Buffer>,
    grad: Option<B::Buffer>,
    needs_grad: bool,
    len: usize,
}

/// A recorded piece of forward. The first failure is kept and later operations do nothing.
pub struct Tape<'p, B: Backend> {
    pass: &'p Pass<'p, B>,
    pool: &'p mut Pool<B>,
    ops: Vec<Op>,
    values: Vec<Value<B>>,
    error: Option<Error>,
    replay: bool,
}

impl<B: Backend> Tape<'_, B> {
    /// The value `t`, or the first error of the forward pass.
    ///
    /// # Errors
    /// What made the forward pass fail.
    pub fn value(&mut self, t: Tensor) -> Result<&mut B::Buffer> {
        match self.error.take() {
            Some(error) => Err(error),
            None => Ok(self.values[t.0 as usize].data.as_mut().expect("without an error every value was computed")),
        }
    }

    /// Takes the value `t` out of a tape whose forward pass succeeded; backward must not need it any more.
    pub fn take(&mut self, t: Tensor) -> B::Buffer {
        self.values[t.0 as usize].data.take().expect("taken once, after `value` found it")
    }

    /// The value `t`; all others are recycled.
    ///
    /// # Errors
    /// As [`Tape::value`].
    pub fn into_value(mut self, t: Tensor) -> Result<B::Buffer> {
        self.value(t)?;
        let kept = self.take(t);
        self.recycle();
        Ok(kept)
    }

    /// The tape's input and its value `t`; all others are recycled.
    ///
    /// # Errors
    /// As [`Tape::value`].
    pub fn into_input_and(mut self, t: Tensor) -> Result<(B::Buffer, B::Buffer)> {
        self.value(t)?;
        let (input, kept) = (self.take(Tensor(0)), self.take(t));
        self.recycle();
        Ok((input, kept))
    }

    /// Walks the tape backward from the gradient `dy` of `y`, adding to `grads`; returns the gradient of the input
    /// (value 0), if it was said to need one.
    ///
    /// # Errors
    /// Out of memory.
    pub fn backward(mut self, y: Tensor, dy: B::Buffer, grads: &mut Gradients<B>) -> Result<Option<B::Buffer>> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        self.values[y.0 as usize].grad = Some(dy);
        while let Some(op) = self.ops.pop() {
            self.step_back(op, grads)?;
        }
        let dx = self.values[0].grad.take();
        self.recycle();
        Ok(dx)
    }

    fn recycle(&mut self) {
        let backend = &self.pass.base.backend;
        for value in self.values.drain(..) {
            for buffer in [value.data, value.grad].into_iter().flatten() {
                self.pool.put(backend, buffer);
            }
        }
    }

    fn needs(&self, t: Tensor) -> bool {
        self.values[t.0 as usize].needs_grad
    }

    fn data(&self, t: Tensor) -> &B::Buffer {
        self.values[t.0 as usize].data.as_ref().expect("backward runs only over computed values")
    }

    /// The gradient of `t` so far, to be added to, and whether it holds anything yet.
    fn take_grad(&mut self, t: Tensor) -> Result<(B::Buffer, bool)> {
        let value = &mut self.values[t.0 as usize];
        match value.grad.take() {
            Some(grad) => Ok((grad, true)),
            None => {
                let len = value.len;
                Ok((self.pool.take(&self.pass.base.backend, len)?, false))
            }
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

    fn step_back(&mut self, op: Op, grads: &mut Gradients<B>) -> Result<()> {
        let (pass, base) = (self.pass, self.pass.base);
        let backend = &base.backend;
        match op {
            Op::Embed => {}
            Op::Add { a, b, y } => {
                // y = a + b
                let Some(dy) = self.values[y.0 as usize].grad.take() else { return Ok(()) };
                if self.needs(a) && self.needs(b) {
                    let (mut db, started) = self.take_grad(b)?;
                    if !started {
                        backend.zero(&mut db);
                    }
                    backend.add_assign(&dy, &mut db);
                    self.values[b.0 as usize].grad = Some(db);
                    self.add_grad(a, dy);
                } else {
                    self.add_grad(if self.needs(a) { a } else { b }, dy);
                }
            }
            Op::Linear { layer, x, y } => {
                // y = x Wᵀ + b + adapters(x)
                let Some(dy) = self.values[y.0 as usize].grad.take() else { return Ok(()) };
                let mut dx = None;
                if self.needs(x) {
                    let (mut buffer, started) = self.take_grad(x)?;
                    backend.matmul_vjp_x(pass.arithmetic, base.matrix(layer.weight), &dy, &mut buffer, started);
                    dx = Some(buffer);
                }
                self.adapters_back(layer, x, &dy, dx.as_mut(), grads)?;
                self.values[x.0 as usize].grad = dx;
                self.pool.put(backend, dy);
            }
            Op::RmsNorm { weight, eps, x, y } => {
                // y = x / rms(x) * weight
                let Some(dy) = self.values[y.0 as usize].grad.take() else { return Ok(()) };
                let (mut dx, started) = self.take_grad(x)?;
                if !started {
                    backend.zero(&mut dx);
                }
                backend.rms_norm_vjp_x(base.vector(weight), eps, self.data(x), &dy, &mut dx);
                self.values[x.0 as usize].grad = Some(dx);
                self.pool.put(backend, dy);
            }
            Op::Rope { table, heads, x, y } => {
                // y = R x with R a rotation, so dx = R⁻¹ dy
                let Some(dy) = self.values[y.0 as usize].grad.take() else { return Ok(()) };
                let (cos, sin) = &pass.angles[table.0 as usize];
                let mut dx = self.pool.take(backend, backend.len(&dy))?;
                backend.rope(heads, base.rope_dim(table), cos, sin, &dy, true, &mut dx);
                self.pool.put(backend, dy);
                self.add_grad(x, dx);
            }
            Op::Attention { spec, q, k, v, y, lse } => {
                // y = softmax(scale q kᵀ) v
                let Some(dy) = self.values[y.0 as usize].grad.take() else { return Ok(()) };
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
            Op::SwiGlu { gate, up, y } => {
                // y = silu(gate) * up
                let Some(dy) = self.values[y.0 as usize].grad.take() else { return Ok(()) };
                let [mut dgate, mut dup] = self.like([gate, up])?;
                backend.swiglu_vjp(self.data(gate), self.data(up), &dy, &mut dgate, &mut dup);
                self.pool.put(backend, dy);
                self.add_grad(gate, dgate);
                self.add_grad(up, dup);
            }
        }
        Ok(())
    }

    /// New buffers as long as the given values.
    fn like<const N: usize>(&mut self, of: [Tensor; N]) -> Result<[B::Buffer; N]> {
        let backend = &self.pass.base.backend;
        let mut made = Vec::with_capacity(N);
        for t in of {
            let len = backend.len(self.data(t));
            made.push(self.pool.take(backend, len)?);
        }
        Ok(made.try_into().unwrap_or_else(|_| unreachable!("one buffer for each of the N values")))
    }

    /// The adapters' share of a linear layer's backward. Only the layer's first adapter is in training; others
    /// attached beside it pass gradients on.
    fn adapters_back(
        &mut self,
        layer: Linear,
        x: Tensor,
        dy: &B::Buffer,
        mut dx: Option<&mut B::Buffer>,
        grads: &mut Gradients<B>,
    ) -> Result<()> {
        let pass = self.pass;
        let dropout = pass.layer_dropout(layer.weight);
        let x = self.values[x.0 as usize].data.as_ref().expect("backward runs only over computed values");
        for adapter in pass.adapters.on(layer.weight) {
            let mut cx =
                Context { backend: &pass.base.backend, pool: &mut *self.pool, arithmetic: pass.arithmetic, dropout };
            let Some(range) = grads.ranges[layer.weight.0 as usize].clone() else { continue };
            adapter.backward(&mut cx, x, dy, &mut grads.tensors[range], dx.as_deref_mut())?;
        }
        Ok(())
    }

    fn push(&mut self, data: Option<B::Buffer>, needs_grad: bool, len: usize) -> Tensor {
        self.values.push(Value { data, grad: None, needs_grad, len });
        Tensor(self.values.len() as u32 - 1)
    }

    /// What `result` holds, or nothing and the error kept, if it is the first.
    fn kept(&mut self, result: Result<B::Buffer>) -> Option<B::Buffer> {
        result.map_err(|e| self.error.get_or_insert(e)).ok()
    }

    /// A new value of `len` elements that `fill` computes from `inputs`; it needs a gradient if any of them does.
    fn op<const N: usize>(
        &mut self,
        inputs: [Tensor; N],
        len: usize,
        fill: impl FnOnce(&Pass<'_, B>, [&B::Buffer; N], &mut B::Buffer),
    ) -> Tensor {
        let needs_grad = inputs.iter().any(|&t| self.needs(t));
        let data = self.compute(inputs, len, fill);
        self.push(data, needs_grad, len)
    }

    /// The data of [`Tape::op`].
    fn compute<const N: usize>(
        &mut self,
        inputs: [Tensor; N],
        len: usize,
        fill: impl FnOnce(&Pass<'_, B>, [&B::Buffer; N], &mut B::Buffer),
    ) -> Option<B::Buffer> {
        inputs.into_iter().for_each(|t| self.demand(t));
        if self.error.is_some() {
            return None;
        }
        let result = self.pool.take(&self.pass.base.backend, len).map(|mut y| {
            fill(self.pass, inputs.map(|t| self.data(t)), &mut y);
            y
        });
        self.kept(result)
    }

    /// Computes the value `t` if it waits for that, with all products of the same input that wait, too.
    fn demand(&mut self, t: Tensor) {
        if self.values[t.0 as usize].data.is_some() || self.error.is_some() {
            return;
        }
        let made = |op: &&Op| matches!(op, Op::Linear { y, .. } | Op::Add { y, .. } if *y == t);
        match self.ops.iter().find(made).copied() {
            Some(Op::Add { a, b, .. }) => {
                let len = self.len(t);
                self.values[t.0 as usize].data = self.compute([a, b], len, |p, [a, b], y| p.base.backend.add(a, b, y));
            }
            Some(Op::Linear { x, .. }) => {
                let waits = |op: &Op| match *op {
                    Op::Linear { layer, x: input, y } if input == x && self.values[y.0 as usize].data.is_none() => {
                        Some((layer, y))
                    }
                    _ => None,
                };
                let (layers, ys): (Vec<_>, Vec<_>) = self.ops.iter().filter_map(waits).unzip();
                for (y, data) in ys.into_iter().zip(self.products(&layers, x)) {
                    self.values[y.0 as usize].data = Some(data);
                }
            }
            _ => {}
        }
    }

    /// `x` through each of `layers`; nothing after an error.
    fn products(&mut self, layers: &[Linear], x: Tensor) -> Vec<B::Buffer> {
        self.demand(x);
        if self.error.is_some() {
            return Vec::new();
        }
        let pass = self.pass;
        let input = self.values[x.0 as usize].data.as_ref().expect("without an error every value was computed");
        let dropout = |weight| pass.layer_dropout(weight);
        match pass.base.linears(pass.adapters, pass.arithmetic, dropout, layers, input, self.pool) {
            Ok(ys) => ys,
            Err(e) => {
                self.error = Some(e);
                Vec::new()
            }
        }
    }

    fn len(&self, t: Tensor) -> usize {
        self.values[t.0 as usize].len
    }
}

impl<B: Backend> Pass<'_, B> {
    /// Each layer drops by a stream of its own.
    fn layer_dropout(&self, weight: Param) -> Option<Dropout> {
        self.dropout.map(|d| Dropout { key: crate::rng::mix(d.key, u64::from(weight.0)), ..d })
    }
}

impl<B: Backend> Exec for Tape<'_, B> {
    fn embed(&mut self, table: Param) -> Tensor {
        let width = self.pass.base.model.config().hidden_size;
        self.ops.push(Op::Embed);
        self.op([], self.pass.batch.ids.len() * width, |p, [], y| {
            p.base.backend.embed(p.base.matrix(table), &p.batch.ids, y);
        })
    }

    fn linears(&mut self, layers: &[Linear], x: Tensor, ys: &mut [Tensor]) {
        let base = self.pass.base;
        let mut results = if self.replay { Vec::new() } else { self.products(layers, x) }.into_iter();
        for (layer, y) in layers.iter().zip(ys) {
            let (out, input) = base.backend.shape(base.matrix(layer.weight));
            let needs_grad = self.needs(x) || !self.pass.adapters.on(layer.weight).is_empty();
            *y = self.push(results.next(), needs_grad, self.len(x) / input * out);
            self.ops.push(Op::Linear { layer: *layer, x, y: *y });
        }
    }

    fn rms_norm(&mut self, weight: Param, eps: f32, x: Tensor) -> Tensor {
        let y = self.op([x], self.len(x), |p, [x], y| p.base.backend.rms_norm(p.base.vector(weight), eps, x, y));
        self.ops.push(Op::RmsNorm { weight, eps, x, y });
        y
    }

    fn rope(&mut self, table: RopeTable, heads: usize, x: Tensor) -> Tensor {
        let y = self.op([x], self.len(x), |p, [x], y| {
            let (cos, sin) = &p.angles[table.0 as usize];
            p.base.backend.rope(heads, p.base.rope_dim(table), cos, sin, x, false, y);
        });
        self.ops.push(Op::Rope { table, heads, x, y });
        y
    }

    fn attention(&mut self, _layer: usize, shape: &AttentionShape, q: Tensor, k: Tensor, v: Tensor) -> Tensor {
        let spec = attention_spec(shape);
        let tokens = self.pass.batch.ids.len();
        let lse = self.op([], tokens * spec.heads, |_, [], _| ());
        let mut rows = self.values[lse.0 as usize].data.take();
        let y = self.op([q, k, v], self.len(q), |p, [q, k, v], y| {
            let lse = rows.as_mut().expect("taken above unless an error stopped all work");
            p.base.backend.attention(&spec, &p.batch.segments, q, k, v, y, lse);
        });
        self.values[lse.0 as usize].data = rows;
        self.ops.push(Op::Attention { spec, q, k, v, y, lse });
        y
    }

    fn swiglu(&mut self, gate: Tensor, up: Tensor) -> Tensor {
        let y = self.op([gate, up], self.len(gate), |p, [gate, up], y| p.base.backend.swiglu(gate, up, y));
        self.ops.push(Op::SwiGlu { gate, up, y });
        y
    }

    fn add(&mut self, a: Tensor, b: Tensor) -> Tensor {
        let len = self.len(a);
        let y = if self.replay {
            let needs_grad = self.needs(a) || self.needs(b);
            self.push(None, needs_grad, len)
        } else {
            self.op([a, b], len, |p, [a, b], y| p.base.backend.add(a, b, y))
        };
        self.ops.push(Op::Add { a, b, y });
        y
    }
}
