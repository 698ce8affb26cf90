//! Values of a pass, and what operations do with them.

use super::ops;
use super::pass::Pass;
use super::sequence::State;
use crate::base::Pool;
use crate::error::Result;
use pocketlora_kernels::{Arithmetic, Backend, Call};
use pocketlora_models::{Linear, Op, Value, Width};
use std::ops::Range;

/// Where a value is held.
pub(super) struct Slot<B: Backend> {
    /// None before it is computed, and when nobody needs it any more.
    pub data: Option<B::Buffer>,
    pub grad: Option<B::Buffer>,
    pub needs_grad: bool,
    /// Floats of a row; there is one for each token.
    pub width: usize,
}

/// Runs operations on the values of a pass: the one place where both executors have that done.
pub(super) struct Interpreter<'p, B: Backend> {
    pub pass: &'p Pass<'p, B>,
    pub pool: &'p mut Pool<B>,
    pub slots: Vec<Slot<B>>,
    /// Tokens of the batch that it runs.
    pub rows: Range<usize>,
    /// What the sequences of the batch remember, one list for each of them. None in training, where all that a sequence
    /// sees is in the batch.
    pub states: Vec<Vec<State<B>>>,
}

impl<'p, B: Backend> Interpreter<'p, B> {
    /// Without values, or with `input` `[T, C]` as the first.
    pub fn new(pass: &'p Pass<'p, B>, input: Option<B::Buffer>, needs_grad: bool, pool: &'p mut Pool<B>) -> Self {
        let width = pass.base.model.config().hidden_size;
        let tokens = input.as_ref().map_or(pass.batch.ids.len(), |input| pass.base.backend.len(input) / width);
        let slots = input.map(|buffer| Slot { data: Some(buffer), grad: None, needs_grad, width });
        Self { pass, pool, slots: slots.into_iter().collect(), rows: 0..tokens, states: Vec::new() }
    }

    pub fn backend(&self) -> &'p B {
        &self.pass.base.backend
    }

    /// Adds slots for what `op` writes; returns the first. None needs a gradient until [`Interpreter::note_gradients`].
    pub fn declare(&mut self, op: &Op) -> Value {
        let first = Value(self.slots.len() as u32);
        for width in op.outputs() {
            let shape = |p| self.backend().shape(self.pass.factor(p, Arithmetic::Exact));
            let width = match width {
                Width::Like(t) => self.slots[t.0 as usize].width,
                Width::Rows(p) => shape(p).0,
                Width::Cols(p) => shape(p).1,
                Width::Of(width) => width,
            };
            self.slots.push(Slot { data: None, grad: None, needs_grad: false, width });
        }
        first
    }

    /// Notes which of the slots that were just declared for `op`, from `y` on, need gradients. Inference asks for none.
    pub fn note_gradients(&mut self, op: &Op, y: Value) {
        let inherited = op.reads().iter().any(|t| self.needs(*t));
        for i in 0..self.slots.len() - y.0 as usize {
            self.slots[y.0 as usize + i].needs_grad = inherited || self.is_adapted(op, i);
        }
    }

    /// Whether an adapter is on what computes output number `i` of `op`.
    fn is_adapted(&self, op: &Op, i: usize) -> bool {
        let adapters = self.pass.adapters();
        let learns = |p| adapters.learned_vector(p).is_some();
        let adapted = |layer: &Linear| !adapters.on(layer.weight).is_empty() || learns(layer.bias);
        match op {
            Op::Linears { layers, .. } => adapted(&layers[i]),
            Op::Experts { experts, .. } => experts.iter().any(|expert| expert.layers().iter().any(adapted)),
            // Layers before may have something in training.
            Op::Carried { .. } => true,
            Op::Attention { .. } => i == 0 && adapters.prefix().is_some(),
            Op::Norm { norm, .. } => learns(norm.weight) || learns(norm.bias),
            Op::Embed { table } => !adapters.on(*table).lookups.is_empty(),
            _ => false,
        }
    }

    /// The values that backward through `op`, whose first output is `y`, reads.
    pub fn keeps(&self, op: &Op, y: Value) -> Vec<Value> {
        match op {
            Op::Linears { layers, .. } if !(0..layers.len()).any(|i| self.is_adapted(op, i)) => Vec::new(),
            _ => op.keeps(y),
        }
    }

    /// Computes what `op` writes, from `y` on.
    ///
    /// # Errors
    /// Out of memory.
    pub fn run(&mut self, op: &Op, y: Value) -> Result<()> {
        ops::run(self, op, y)
    }

    pub fn needs(&self, t: Value) -> bool {
        self.slots[t.0 as usize].needs_grad
    }

    pub fn data(&self, t: Value) -> &B::Buffer {
        self.slots[t.0 as usize].data.as_ref().expect("an operation runs after those whose values it reads")
    }

    pub fn set(&mut self, t: Value, data: B::Buffer) {
        self.slots[t.0 as usize].data = Some(data);
    }

    /// Takes the data of `t`, which nobody reads any more.
    pub fn take(&mut self, t: Value) -> B::Buffer {
        self.slots[t.0 as usize].data.take().expect("an operation runs after those whose values it reads")
    }

    /// Frees the value `t`.
    pub fn free(&mut self, t: Value) {
        if let Some(buffer) = self.slots[t.0 as usize].data.take() {
            self.put(buffer);
        }
    }

    /// Floats of the value `t`.
    pub fn len(&self, t: Value) -> usize {
        self.slots[t.0 as usize].width * self.rows.len()
    }

    /// A buffer of `len` values, which holds anything.
    pub fn buffer(&mut self, len: usize) -> Result<B::Buffer> {
        self.pool.take(self.backend(), len)
    }

    /// As many buffers as long as the values `of`.
    pub fn like<const N: usize>(&mut self, of: [Value; N]) -> Result<[B::Buffer; N]> {
        let mut made = Vec::with_capacity(N);
        for t in of {
            made.push(self.buffer(self.len(t))?);
        }
        Ok(made.try_into().unwrap_or_else(|_| unreachable!("one buffer for each of the N values")))
    }

    pub fn put(&mut self, buffer: B::Buffer) {
        self.pool.put(self.backend(), buffer);
    }

    /// The gradient of `t` so far, to be added to, and whether it holds anything yet.
    pub fn take_grad(&mut self, t: Value) -> Result<(B::Buffer, bool)> {
        match self.slots[t.0 as usize].grad.take() {
            Some(grad) => Ok((grad, true)),
            None => Ok((self.buffer(self.len(t))?, false)),
        }
    }

    pub fn set_grad(&mut self, t: Value, grad: B::Buffer) {
        self.slots[t.0 as usize].grad = Some(grad);
    }

    /// Adds `part` to the gradient of `t` and recycles it.
    ///
    /// # Errors
    /// Those of the device.
    pub fn add_grad(&mut self, t: Value, part: B::Buffer) -> Result<()> {
        let backend = self.backend();
        let slot = &mut self.slots[t.0 as usize];
        match &mut slot.grad {
            _ if !slot.needs_grad => self.pool.put(backend, part),
            Some(grad) => {
                backend.run(Call::AddAssign { x: &part, y: grad })?;
                self.pool.put(backend, part);
            }
            none => *none = Some(part),
        }
        Ok(())
    }

    /// Recycles all values.
    pub fn recycle(&mut self) {
        let backend = self.backend();
        for slot in self.slots.drain(..) {
            for buffer in [slot.data, slot.grad].into_iter().flatten() {
                self.pool.put(backend, buffer);
            }
        }
    }
}
