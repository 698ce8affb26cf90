//! A piece of a model, recorded first and run when its values are asked for.
//!
//! Because all operations are known before the first one runs, each value is dropped after the last operation that reads
//! it. What backward reads stays, but for norms and activations, which cost next to nothing and are computed again.
//! Behind the last attention every row goes its own way: there a tape may run some tokens at a time, so that the wide
//! values of the feed-forward part exist for those only.

use super::train::Pass;
use super::{Pool, attention_spec};
use crate::error::Result;
use pocketlora_kernels::{Arithmetic, Attention, Backend};
use pocketlora_models::{AttentionShape, Exec, Linear, Param, RopeTable, Tensor};
use std::ops::Range;

/// Tokens of the smallest part that is worth running by itself.
const LEAST: usize = 16;

/// An operation with the values it reads and writes.
#[derive(Clone, Copy)]
pub(super) enum Op {
    Embed { table: Param, y: Tensor },
    Linear { layer: Linear, x: Tensor, y: Tensor },
    RmsNorm { weight: Param, eps: f32, x: Tensor, y: Tensor },
    Rope { table: RopeTable, heads: usize, x: Tensor, y: Tensor },
    Attention { spec: Attention, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor },
    SwiGlu { gate: Tensor, up: Tensor, y: Tensor },
    Add { a: Tensor, b: Tensor, y: Tensor },
}

impl Op {
    /// What forward reads.
    fn reads(&self) -> Vec<Tensor> {
        match *self {
            Self::Embed { .. } => Vec::new(),
            Self::Linear { x, .. } | Self::RmsNorm { x, .. } | Self::Rope { x, .. } => vec![x],
            Self::Attention { q, k, v, .. } => vec![q, k, v],
            Self::SwiGlu { gate, up, .. } => vec![gate, up],
            Self::Add { a, b, .. } => vec![a, b],
        }
    }

    pub(super) fn output(&self) -> Tensor {
        match *self {
            Self::Embed { y, .. }
            | Self::Linear { y, .. }
            | Self::RmsNorm { y, .. }
            | Self::Rope { y, .. }
            | Self::Attention { y, .. }
            | Self::SwiGlu { y, .. }
            | Self::Add { y, .. } => y,
        }
    }

    /// Its output is computed again rather than kept.
    fn is_cheap(&self) -> bool {
        matches!(self, Self::RmsNorm { .. } | Self::SwiGlu { .. })
    }

    /// Rows of its output depend on the same rows of its inputs alone, wherever they are.
    fn is_row_wise(&self) -> bool {
        !matches!(self, Self::Embed { .. } | Self::Attention { .. } | Self::Rope { .. })
    }
}

pub(super) struct Value<B: Backend> {
    /// None before it is computed, and when nobody needs it any more.
    pub data: Option<B::Buffer>,
    pub grad: Option<B::Buffer>,
    pub needs_grad: bool,
    /// Floats of a row; there is one for each token.
    pub width: usize,
}

/// A recorded piece of a model over some tokens.
pub struct Tape<'p, B: Backend> {
    pub(super) pass: &'p Pass<'p, B>,
    pub(super) pool: &'p mut Pool<B>,
    pub(super) ops: Vec<Op>,
    pub(super) values: Vec<Value<B>>,
    /// Tokens of the batch that it runs.
    pub(super) rows: Range<usize>,
    /// Operations done.
    done: usize,
}

impl<'p, B: Backend> Tape<'p, B> {
    pub(super) fn new(
        pass: &'p Pass<'p, B>,
        input: Option<B::Buffer>,
        needs_grad: bool,
        pool: &'p mut Pool<B>,
    ) -> Self {
        let width = pass.base.model.config().hidden_size;
        let tokens = input.as_ref().map_or(pass.batch.ids.len(), |input| pass.base.backend.len(input) / width);
        let values = input.map(|buffer| Value { data: Some(buffer), grad: None, needs_grad, width });
        Self { pass, pool, ops: Vec::new(), values: values.into_iter().collect(), rows: 0..tokens, done: 0 }
    }

    /// The value `t`; what backward reads is kept beside it.
    ///
    /// # Errors
    /// Out of memory.
    pub fn value(&mut self, t: Tensor) -> Result<&mut B::Buffer> {
        if self.values[t.0 as usize].data.is_none() {
            let mut keep = self.kept_for_backward(0..self.ops.len());
            keep[t.0 as usize] = true;
            self.forward(self.ops.len(), &keep)?;
        }
        Ok(self.values[t.0 as usize].data.as_mut().expect("forward has computed it"))
    }

    /// Takes the value `t` that [`Tape::value`] found; backward must not need it any more.
    pub fn take(&mut self, t: Tensor) -> B::Buffer {
        self.values[t.0 as usize].data.take().expect("taken once, after `value` found it")
    }

    /// The value `t`; all others are recycled.
    ///
    /// # Errors
    /// As [`Tape::value`].
    pub fn into_value(self, t: Tensor) -> Result<B::Buffer> {
        self.into_value_by(t, usize::MAX)
    }

    /// As [`Tape::into_value`], with `part` tokens at a time behind the last attention.
    ///
    /// # Errors
    /// As [`Tape::value`].
    pub fn into_value_by(mut self, t: Tensor, part: usize) -> Result<B::Buffer> {
        if self.values[t.0 as usize].data.is_none() {
            match self.cut(part) {
                Some(cut) => self.forward_by(cut, t, part)?,
                None => {
                    let mut keep = vec![false; self.values.len()];
                    keep[t.0 as usize] = true;
                    self.forward(self.ops.len(), &keep)?;
                }
            }
        }
        let kept = self.take(t);
        self.recycle();
        Ok(kept)
    }

    pub(super) fn recycle(&mut self) {
        let backend = &self.pass.base.backend;
        for value in self.values.drain(..) {
            for buffer in [value.data, value.grad].into_iter().flatten() {
                self.pool.put(backend, buffer);
            }
        }
    }

    pub(super) fn data(&self, t: Tensor) -> &B::Buffer {
        self.values[t.0 as usize].data.as_ref().expect("an operation runs after those whose values it reads")
    }

    /// Frees the value `t`.
    pub(super) fn free(&mut self, t: Tensor) {
        if let Some(buffer) = self.values[t.0 as usize].data.take() {
            self.pool.put(&self.pass.base.backend, buffer);
        }
    }

    /// Floats of the value `t`.
    pub(super) fn len(&self, t: Tensor) -> usize {
        self.values[t.0 as usize].width * self.rows.len()
    }

    /// Values that backward through the operations `range` reads, or computes again from.
    pub(super) fn backward_reads(&self, op: &Op) -> Vec<Tensor> {
        match *op {
            Op::Embed { .. } | Op::Rope { .. } | Op::Add { .. } => Vec::new(),
            Op::Linear { layer, .. } if self.pass.adapters.on(layer.weight).is_empty() => Vec::new(),
            Op::Linear { x, .. } | Op::RmsNorm { x, .. } => vec![x],
            Op::Attention { q, k, v, y, lse, .. } => vec![q, k, v, y, lse],
            Op::SwiGlu { gate, up, .. } => vec![gate, up],
        }
    }

    /// Which values must stay for backward through `range`: what it reads and cannot cheaply compute again.
    pub(super) fn kept_for_backward(&self, range: Range<usize>) -> Vec<bool> {
        let mut keep = vec![false; self.values.len()];
        for op in &self.ops[range.clone()] {
            self.backward_reads(op).into_iter().for_each(|t| keep[t.0 as usize] = true);
        }
        for op in self.ops[range].iter().filter(|op| op.is_cheap()) {
            keep[op.output().0 as usize] = false;
        }
        keep
    }

    /// Runs the operations up to `end`, dropping values that neither those nor `keep` need.
    pub(super) fn forward(&mut self, end: usize, keep: &[bool]) -> Result<()> {
        let mut last = vec![0; self.values.len()];
        for (i, op) in self.ops[..end].iter().enumerate() {
            op.reads().into_iter().for_each(|t| last[t.0 as usize] = i);
        }
        while self.done < end {
            let first = self.done;
            self.done = self.run(first, end, |t, i| last[t.0 as usize] <= i && !keep[t.0 as usize])?;
            let reads: Vec<Tensor> = self.ops[first..self.done].iter().flat_map(Op::reads).collect();
            for t in reads {
                if last[t.0 as usize] < self.done && !keep[t.0 as usize] {
                    self.free(t);
                }
            }
            // Its output may lead nowhere that is run.
            let outputs: Vec<(usize, Tensor)> = (first..self.done).map(|i| (i, self.ops[i].output())).collect();
            for (i, t) in outputs {
                if last[t.0 as usize] <= i && !keep[t.0 as usize] {
                    self.free(t);
                }
            }
        }
        Ok(())
    }

    /// Runs operation `i`, with it the linear layers behind it that read the same input; returns the next one. `dies` tells
    /// whether a value is read by nobody after an operation.
    fn run(&mut self, i: usize, end: usize, dies: impl Fn(Tensor, usize) -> bool) -> Result<usize> {
        match self.ops[i] {
            Op::Linear { x, .. } => {
                let same = |op: &&Op| matches!(op, Op::Linear { x: other, .. } if *other == x);
                let group: Vec<Op> = self.ops[i..end].iter().take_while(same).copied().collect();
                self.products(&group, x)?;
                return Ok(i + group.len());
            }
            // The sum takes the place of a term that nobody reads any more.
            Op::Add { a, b, y } if a != b && (dies(a, i) || dies(b, i)) => {
                let (into, term) = if dies(a, i) { (a, b) } else { (b, a) };
                let mut sum = self.values[into.0 as usize].data.take().expect("computed before");
                self.pass.base.backend.add_assign(self.data(term), &mut sum);
                self.values[y.0 as usize].data = Some(sum);
            }
            op => self.compute(&op)?,
        }
        Ok(i + 1)
    }

    /// Runs one operation that is no linear layer.
    pub(super) fn compute(&mut self, op: &Op) -> Result<()> {
        let (pass, base) = (self.pass, self.pass.base);
        let (backend, replaced) = (&base.backend, pass.adapters.replaced());
        let mut y = self.pool.take(backend, self.len(op.output()))?;
        match *op {
            Op::Embed { table, .. } => backend.embed(base.table_with(replaced, table), &pass.batch.ids, &mut y),
            Op::RmsNorm { weight, eps, x, .. } => {
                backend.rms_norm(base.vector_with(replaced, weight), eps, self.data(x), &mut y);
            }
            Op::Rope { table, heads, x, .. } => {
                let (cos, sin) = &pass.angles[table.0 as usize];
                backend.rope(heads, base.rope_dim(table), cos, sin, self.data(x), false, &mut y);
            }
            Op::Attention { spec, q, k, v, lse, .. } => {
                let mut sums = self.pool.take(backend, self.len(lse))?;
                let segments = &pass.batch.segments;
                backend.attention(&spec, segments, self.data(q), self.data(k), self.data(v), &mut y, &mut sums);
                self.values[lse.0 as usize].data = Some(sums);
            }
            Op::SwiGlu { gate, up, .. } => backend.swiglu(self.data(gate), self.data(up), &mut y),
            Op::Add { a, b, .. } => backend.add(self.data(a), self.data(b), &mut y),
            Op::Linear { .. } => unreachable!("linear layers run in groups"),
        }
        self.values[op.output().0 as usize].data = Some(y);
        Ok(())
    }

    /// `x` through each of the linear layers `group`.
    fn products(&mut self, group: &[Op], x: Tensor) -> Result<()> {
        let (pass, first) = (self.pass, self.rows.start);
        let (layers, ys): (Vec<Linear>, Vec<Tensor>) = group
            .iter()
            .filter_map(|op| match *op {
                Op::Linear { layer, y, .. } => Some((layer, y)),
                _ => None,
            })
            .unzip();
        let input = self.values[x.0 as usize].data.as_ref().expect("computed before");
        let dropout = |weight| pass.layer_dropout(weight, first);
        let made = pass.base.linears(pass.adapters, pass.arithmetic, dropout, &layers, input, self.pool)?;
        for (y, data) in ys.into_iter().zip(made) {
            self.values[y.0 as usize].data = Some(data);
        }
        Ok(())
    }

    /// Computes `t` again if it was dropped.
    pub(super) fn demand(&mut self, t: Tensor) -> Result<()> {
        if self.values[t.0 as usize].data.is_some() {
            return Ok(());
        }
        let op = self.ops.iter().find(|op| op.output() == t && op.is_cheap()).copied();
        self.compute(&op.expect("only cheap values are dropped before backward reads them"))
    }

    /// Where the tape may be cut to run `part` tokens at a time from there on, if they are fewer than all.
    pub(super) fn cut(&self, part: usize) -> Option<usize> {
        let whole = self.rows == (0..self.pass.batch.ids.len());
        if !whole || self.rows.len() < part.saturating_add(LEAST) {
            return None;
        }
        let cut = self.ops.iter().rposition(|op| !op.is_row_wise())? + 1;
        (cut < self.ops.len()).then_some(cut)
    }

    /// Values from before `cut` that are read behind it.
    pub(super) fn crossing(&self, cut: usize) -> Vec<Tensor> {
        let made: Vec<Tensor> = self.ops[cut..].iter().map(Op::output).collect();
        let mut crossing: Vec<Tensor> = self.ops[cut..].iter().flat_map(Op::reads).collect();
        crossing.retain(|t| !made.contains(t));
        crossing.sort_unstable_by_key(|t| t.0);
        crossing.dedup();
        crossing
    }

    /// The rows in pieces of `part`, the last no shorter than [`LEAST`].
    pub(super) fn parts(&self, part: usize) -> Vec<Range<usize>> {
        let part = part.max(1).next_multiple_of(LEAST);
        let mut parts = Vec::new();
        let mut start = self.rows.start;
        while start < self.rows.end {
            let end = if self.rows.end - start < part + LEAST { self.rows.end } else { start + part };
            parts.push(start..end);
            start = end;
        }
        parts
    }

    /// The operations from `cut` on over some rows of the crossing values.
    pub(super) fn part<'s>(&'s mut self, cut: usize, crossing: &[Tensor], rows: Range<usize>) -> Result<Tape<'s, B>> {
        let backend = &self.pass.base.backend;
        let ids: Vec<u32> = rows.clone().map(|row| row as u32).collect();
        let empty = |v: &Value<B>| Value { data: None, grad: None, needs_grad: v.needs_grad, width: v.width };
        let mut values: Vec<Value<B>> = self.values.iter().map(empty).collect();
        for t in crossing {
            let value = &mut values[t.0 as usize];
            let mut data = self.pool.take(backend, value.width * rows.len())?;
            backend.gather_rows(self.data(*t), &ids, &mut data);
            value.data = Some(data);
        }
        let ops = self.ops[cut..].to_vec();
        Ok(Tape { pass: self.pass, pool: self.pool, ops, values, rows, done: 0 })
    }

    /// Computes `y`, `part` tokens at a time from `cut` on.
    fn forward_by(&mut self, cut: usize, y: Tensor, part: usize) -> Result<()> {
        let backend = &self.pass.base.backend;
        let crossing = self.crossing(cut);
        let mut keep = vec![false; self.values.len()];
        crossing.iter().for_each(|t| keep[t.0 as usize] = true);
        self.forward(cut, &keep)?;
        let mut all = self.pool.take(backend, self.len(y))?;
        backend.zero(&mut all);
        for rows in self.parts(part) {
            let ids: Vec<u32> = rows.clone().map(|row| row as u32).collect();
            let piece = self.part(cut, &crossing, rows)?.into_value(y)?;
            backend.scatter_add_rows(&piece, &ids, &mut all);
            self.pool.put(backend, piece);
        }
        self.values[y.0 as usize].data = Some(all);
        Ok(())
    }

    fn push(&mut self, width: usize, needs_grad: bool) -> Tensor {
        self.values.push(Value { data: None, grad: None, needs_grad, width });
        Tensor(self.values.len() as u32 - 1)
    }

    /// A value as wide as `like`, that needs a gradient if one of `from` does.
    fn derived(&mut self, like: Tensor, from: &[Tensor]) -> Tensor {
        let needs_grad = from.iter().any(|t| self.values[t.0 as usize].needs_grad);
        self.push(self.values[like.0 as usize].width, needs_grad)
    }
}

impl<B: Backend> Exec for Tape<'_, B> {
    fn embed(&mut self, table: Param) -> Tensor {
        let y = self.push(self.pass.base.model.config().hidden_size, false);
        self.ops.push(Op::Embed { table, y });
        y
    }

    fn linears(&mut self, layers: &[Linear], x: Tensor, ys: &mut [Tensor]) {
        let base = self.pass.base;
        for (layer, y) in layers.iter().zip(ys) {
            let replaced = self.pass.adapters.replaced();
            let (out, _) = base.backend.shape(base.factor_with(replaced, layer.weight, Arithmetic::Exact));
            let adapted = !self.pass.adapters.on(layer.weight).is_empty();
            *y = self.push(out, adapted || self.values[x.0 as usize].needs_grad);
            self.ops.push(Op::Linear { layer: *layer, x, y: *y });
        }
    }

    fn rms_norm(&mut self, weight: Param, eps: f32, x: Tensor) -> Tensor {
        let y = self.derived(x, &[x]);
        self.ops.push(Op::RmsNorm { weight, eps, x, y });
        y
    }

    fn rope(&mut self, table: RopeTable, heads: usize, x: Tensor) -> Tensor {
        let y = self.derived(x, &[x]);
        self.ops.push(Op::Rope { table, heads, x, y });
        y
    }

    fn attention(&mut self, _layer: usize, shape: &AttentionShape, q: Tensor, k: Tensor, v: Tensor) -> Tensor {
        let spec = attention_spec(shape);
        let lse = self.push(spec.heads, false);
        let y = self.derived(q, &[q, k, v]);
        self.ops.push(Op::Attention { spec, q, k, v, y, lse });
        y
    }

    fn swiglu(&mut self, gate: Tensor, up: Tensor) -> Tensor {
        let y = self.derived(gate, &[gate, up]);
        self.ops.push(Op::SwiGlu { gate, up, y });
        y
    }

    fn add(&mut self, a: Tensor, b: Tensor) -> Tensor {
        let y = self.derived(a, &[a, b]);
        self.ops.push(Op::Add { a, b, y });
        y
    }
}
