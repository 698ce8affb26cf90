//! `y = softmax(scale q kᵀ) v` over the earlier tokens of the same sequence, and over an adapter's virtual ones before them.

use super::{Gradients, Interpreter, each_state};
use crate::adapter::Prefix;
use crate::error::Result;
use crate::exec::sequence::State;
use pocketlora_kernels::{Attention, Backend, Call};
use pocketlora_models::{AttentionShape, StateId, Value};

pub(super) fn run<B: Backend>(
    it: &mut Interpreter<'_, B>,
    shape: &AttentionShape,
    (state, shared): (StateId, bool),
    [q, k, v]: [Value; 3],
    y: Value,
) -> Result<()> {
    let prefix = it.pass.adapters().prefix();
    if let Some(prefix) = prefix.filter(|_| it.states.is_empty()) {
        let behind = Behind::new(prefix, state, &it.pass.batch.segments);
        return run_behind(it, &behind, shape, [q, k, v], y);
    }
    let mut out = it.buffer(it.len(y))?;
    if it.states.is_empty() {
        let lse = log_sum_exp(y);
        let mut sums = it.buffer(it.len(lse))?;
        // y = softmax(scale q kᵀ) v
        let segments = &it.pass.batch.segments;
        it.backend().run(Call::Attention {
            spec: &spec(shape),
            segments,
            q: it.data(q),
            k: it.data(k),
            v: it.data(v),
            sinks: sinks(it, shape),
            y: &mut out,
            lse: &mut sums,
        })?;
        it.set(lse, sums);
    } else {
        over_caches(it, shape, (state, shared), [q, k, v], &mut out)?;
    }
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    shape: &AttentionShape,
    state: StateId,
    [q, k, v]: [Value; 3],
    y: Value,
    dy: B::Buffer,
    grads: &mut Gradients<B>,
) -> Result<()> {
    if let Some(prefix) = it.pass.adapters().prefix() {
        let behind = Behind::new(prefix, state, &it.pass.batch.segments);
        return back_behind(it, &behind, shape, [q, k, v], y, dy, grads);
    }
    let [mut dq, mut dk, mut dv] = it.like([q, k, v])?;
    // y = softmax(scale q kᵀ) v
    let segments = &it.pass.batch.segments;
    let (vq, vk, vv, vy, sums) = (it.data(q), it.data(k), it.data(v), it.data(y), it.data(log_sum_exp(y)));
    it.backend().run(Call::AttentionVjp {
        spec: &spec(shape),
        segments,
        q: vq,
        k: vk,
        v: vv,
        y: vy,
        lse: sums,
        dy: &dy,
        dq: &mut dq,
        dk: &mut dk,
        dv: &mut dv,
    })?;
    it.put(dy);
    for (t, grad) in [(q, dq), (k, dk), (v, dv)] {
        it.add_grad(t, grad)?;
    }
    Ok(())
}

/// Rows of sequences that begin with a prefix's virtual tokens, in one layer. Kernels want as many queries as keys, so a
/// virtual token has a query as well, all zeros, whose output nobody reads and whose gradient is zero.
struct Behind<'p> {
    prefix: &'p Prefix,
    /// Number of the layer.
    layer: usize,
    /// Tokens of each sequence with its virtual ones.
    segments: Vec<usize>,
    /// Rows of the virtual tokens, sequence by sequence.
    before: Vec<u32>,
    /// Rows of the sequences' own tokens.
    own: Vec<u32>,
}

impl<'p> Behind<'p> {
    fn new(prefix: &'p Prefix, state: StateId, segments: &[usize]) -> Self {
        let (mut before, mut own, mut at) = (Vec::new(), Vec::new(), 0);
        for &tokens in segments {
            let first = at + prefix.tokens as u32;
            before.extend(at..first);
            at = first + tokens as u32;
            own.extend(first..at);
        }
        let segments = segments.iter().map(|tokens| prefix.tokens + tokens).collect();
        Self { prefix, layer: usize::from(state.0), segments, before, own }
    }

    fn rows(&self) -> usize {
        self.before.len() + self.own.len()
    }

    /// Queries, keys and values of all rows: the prefix's, and those of the sequences' own tokens behind them.
    fn inputs<B: Backend>(&self, it: &mut Interpreter<'_, B>, [q, k, v]: [Value; 3]) -> Result<[B::Buffer; 3]> {
        Ok([self.spread_value(it, q)?, self.join(it, 0, k)?, self.join(it, 1, v)?])
    }

    /// `t`, of the own tokens, behind rows of zeros for the virtual ones.
    fn spread<B: Backend>(&self, it: &mut Interpreter<'_, B>, t: &B::Buffer) -> Result<B::Buffer> {
        let backend = it.backend();
        let width = backend.len(t) / self.own.len();
        let mut all = it.buffer(self.rows() * width)?;
        backend.run(Call::Zero { x: &mut all })?;
        backend.run(Call::ScatterAddRows { x: t, rows: &self.own, y: &mut all })?;
        Ok(all)
    }

    /// As [`Behind::spread`], of a value.
    fn spread_value<B: Backend>(&self, it: &mut Interpreter<'_, B>, t: Value) -> Result<B::Buffer> {
        let data = it.take(t);
        let all = self.spread(it, &data);
        it.set(t, data);
        all
    }

    /// The value `t` behind the prefix's keys (`part` 0) or values (`part` 1).
    fn join<B: Backend>(&self, it: &mut Interpreter<'_, B>, part: usize, t: Value) -> Result<B::Buffer> {
        let backend = it.backend();
        let mut all = self.spread_value(it, t)?;
        let width = backend.len(&all) / self.rows();
        let mut rows = it.buffer(self.before.len() * width)?;
        let of_each = self.prefix.rows(self.layer, part).repeat(self.segments.len());
        let x = it.pass.adapters().held().buffer(self.prefix.tensor());
        backend.run(Call::GatherRows { x, rows: &of_each, y: &mut rows })?;
        backend.run(Call::ScatterAddRows { x: &rows, rows: &self.before, y: &mut all })?;
        it.put(rows);
        Ok(all)
    }

    /// The rows of the sequences' own tokens.
    fn own<B: Backend>(&self, it: &mut Interpreter<'_, B>, all: B::Buffer) -> Result<B::Buffer> {
        let backend = it.backend();
        let width = backend.len(&all) / self.rows();
        let mut own = it.buffer(self.own.len() * width)?;
        backend.run(Call::GatherRows { x: &all, rows: &self.own, y: &mut own })?;
        it.put(all);
        Ok(own)
    }

    /// Adds to the prefix's gradient, if it is in training, what all sequences pass on to its keys and values.
    fn learn<B: Backend>(
        &self,
        it: &mut Interpreter<'_, B>,
        parts: [&B::Buffer; 2],
        grads: &mut Gradients<B>,
    ) -> Result<()> {
        let backend = it.backend();
        let Some(dp) = grads.of(self.prefix.tensor()) else { return Ok(()) };
        let width = backend.len(parts[0]) / self.rows();
        let mut rows = it.buffer(self.prefix.tokens * width)?;
        for (part, all) in parts.into_iter().enumerate() {
            let to = self.prefix.rows(self.layer, part);
            for from in self.before.chunks(self.prefix.tokens) {
                backend.run(Call::GatherRows { x: all, rows: from, y: &mut rows })?;
                backend.run(Call::ScatterAddRows { x: &rows, rows: &to, y: dp })?;
            }
        }
        it.put(rows);
        Ok(())
    }
}

/// Forward over whole sequences behind the virtual tokens of a prefix.
fn run_behind<B: Backend>(
    it: &mut Interpreter<'_, B>,
    behind: &Behind<'_>,
    shape: &AttentionShape,
    qkv: [Value; 3],
    y: Value,
) -> Result<()> {
    let backend = it.backend();
    let [q, k, v] = behind.inputs(it, qkv)?;
    let mut out = it.buffer(backend.len(&q))?;
    let mut sums = it.buffer(behind.rows() * shape.heads)?;
    // y = softmax(scale q [p k]ᵀ) [p v]
    backend.run(Call::Attention {
        spec: &spec(shape),
        segments: &behind.segments,
        q: &q,
        k: &k,
        v: &v,
        sinks: sinks(it, shape),
        y: &mut out,
        lse: &mut sums,
    })?;
    [q, k, v].into_iter().for_each(|buffer| it.put(buffer));
    let (out, sums) = (behind.own(it, out)?, behind.own(it, sums)?);
    it.set(y, out);
    it.set(log_sum_exp(y), sums);
    Ok(())
}

/// Its gradient.
fn back_behind<B: Backend>(
    it: &mut Interpreter<'_, B>,
    behind: &Behind<'_>,
    shape: &AttentionShape,
    qkv: [Value; 3],
    y: Value,
    dy: B::Buffer,
    grads: &mut Gradients<B>,
) -> Result<()> {
    let backend = it.backend();
    let [q, k, v] = behind.inputs(it, qkv)?;
    let (out, sums) = (behind.spread_value(it, y)?, behind.spread_value(it, log_sum_exp(y))?);
    let dout = behind.spread(it, &dy)?;
    it.put(dy);
    let (mut dq, mut dk) = (it.buffer(backend.len(&q))?, it.buffer(backend.len(&k))?);
    let mut dv = it.buffer(backend.len(&v))?;
    // y = softmax(scale q [p k]ᵀ) [p v]
    backend.run(Call::AttentionVjp {
        spec: &spec(shape),
        segments: &behind.segments,
        q: &q,
        k: &k,
        v: &v,
        y: &out,
        lse: &sums,
        dy: &dout,
        dq: &mut dq,
        dk: &mut dk,
        dv: &mut dv,
    })?;
    [q, k, v, out, sums, dout].into_iter().for_each(|buffer| it.put(buffer));
    behind.learn(it, [&dk, &dv], grads)?;
    for (t, all) in qkv.into_iter().zip([dq, dk, dv]) {
        let grad = behind.own(it, all)?;
        it.add_grad(t, grad)?;
    }
    Ok(())
}

/// The second output: the log-sum-exp of each head's scores.
fn log_sum_exp(y: Value) -> Value {
    Value(y.0 + 1)
}

/// Each sequence's queries over its cache, which takes its new keys and values first, unless it is one that an earlier layer
/// has done that for.
fn over_caches<B: Backend>(
    it: &mut Interpreter<'_, B>,
    shape: &AttentionShape,
    (state, shared): (StateId, bool),
    [q, k, v]: [Value; 3],
    out: &mut B::Buffer,
) -> Result<()> {
    let (backend, spec) = (it.backend(), &spec(shape));
    each_state(it, state, |it, state, rows| {
        let State::Kv(cache) = state else { unreachable!("attention names a state of keys and values") };
        let (q, k, v) = (it.data(q), it.data(k), it.data(v));
        if !shared {
            backend.run(Call::CacheAppend { cache, k, v, rows: rows.clone() })?;
        }
        Ok(backend.run(Call::AttentionCached { spec, q, cache, sinks: sinks(it, shape), y: out, rows })?)
    })
}

/// The sinks of its heads, if it has any.
fn sinks<'p, B: Backend>(it: &Interpreter<'p, B>, shape: &AttentionShape) -> Option<&'p B::Buffer> {
    shape.sinks.map(|sinks| it.pass.vector(sinks))
}

/// The kernels' form of a model's attention shape.
fn spec(shape: &AttentionShape) -> Attention {
    let AttentionShape { heads, kv_heads, head_dim, scale, softcap, window, .. } = *shape;
    Attention { heads, kv_heads, head_dim, scale, softcap, window }
}
