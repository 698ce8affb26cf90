//! `y = softmax(scale q kᵀ) v` over the earlier tokens of the same sequence.

use super::Interpreter;
use crate::error::Result;
use crate::exec::sequence::State;
use pocketlora_kernels::{Attention, Backend};
use pocketlora_models::{AttentionShape, StateId, Value};

pub(super) fn run<B: Backend>(
    it: &mut Interpreter<'_, B>,
    shape: &AttentionShape,
    state: StateId,
    [q, k, v]: [Value; 3],
    y: Value,
) -> Result<()> {
    let mut out = it.buffer(it.len(y))?;
    if it.states.is_empty() {
        let lse = log_sum_exp(y);
        let mut sums = it.buffer(it.len(lse))?;
        // y = softmax(scale q kᵀ) v
        let segments = &it.pass.batch.segments;
        it.backend().attention(&spec(shape), segments, it.data(q), it.data(k), it.data(v), &mut out, &mut sums);
        it.set(lse, sums);
    } else {
        over_caches(it, shape, state, [q, k, v], &mut out)?;
    }
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    shape: &AttentionShape,
    [q, k, v]: [Value; 3],
    y: Value,
    dy: B::Buffer,
) -> Result<()> {
    let [mut dq, mut dk, mut dv] = it.like([q, k, v])?;
    // y = softmax(scale q kᵀ) v
    let segments = &it.pass.batch.segments;
    let (vq, vk, vv, vy, sums) = (it.data(q), it.data(k), it.data(v), it.data(y), it.data(log_sum_exp(y)));
    it.backend().attention_vjp(&spec(shape), segments, vq, vk, vv, vy, sums, &dy, &mut dq, &mut dk, &mut dv);
    it.put(dy);
    for (t, grad) in [(q, dq), (k, dk), (v, dv)] {
        it.add_grad(t, grad);
    }
    Ok(())
}

/// The second output: the log-sum-exp of each head's scores.
fn log_sum_exp(y: Value) -> Value {
    Value(y.0 + 1)
}

/// Each sequence's queries over its cache, which takes its new keys and values first.
fn over_caches<B: Backend>(
    it: &mut Interpreter<'_, B>,
    shape: &AttentionShape,
    state: StateId,
    [q, k, v]: [Value; 3],
    out: &mut B::Buffer,
) -> Result<()> {
    let (backend, spec, segments) = (it.backend(), spec(shape), &it.pass.batch.segments);
    let mut states = std::mem::take(&mut it.states);
    let caches = states.iter_mut().map(|states| match &mut states[state.0 as usize] {
        State::Kv(cache) => cache,
        _ => unreachable!("attention names a state of keys and values"),
    });
    let (mut made, mut start) = (Ok(()), 0);
    for (cache, tokens) in caches.zip(segments) {
        let rows = start..start + tokens;
        start = rows.end;
        made = backend.cache_append(cache, it.data(k), it.data(v), rows.clone());
        if made.is_err() {
            break;
        }
        backend.attention_cached(&spec, it.data(q), cache, out, rows);
    }
    it.states = states;
    Ok(made?)
}

/// The kernels' form of a model's attention shape.
fn spec(shape: &AttentionShape) -> Attention {
    let AttentionShape { heads, kv_heads, head_dim, scale, window } = *shape;
    Attention { heads, kv_heads, head_dim, scale, window }
}
