//! Forward of the last tokens over a key/value cache, whose rows are widened a block at a time.

use super::super::Cpu;
use super::super::cache::Cache;
use super::super::split::{run, with_scratch};
use super::super::tile::Rows;
use super::online::OnlineSoftmax;
use super::{KEYS, Shape, visible};
use crate::Attention;

/// See [`crate::Backend::attention_cached`].
pub(crate) fn forward(cpu: &Cpu, spec: &Attention, q: &[f32], cache: &Cache, y: &mut [f32]) {
    let shape = Shape::new(spec);
    let d = shape.head_dim;
    assert!(q.len() == y.len() && q.len().is_multiple_of(shape.q_width) && cache.width() == shape.kv_width);
    let tokens = q.len() / shape.q_width;
    assert!(tokens <= cache.len());
    let past = cache.len() - tokens;
    let block = shape.query_tokens();

    let mut tasks: Vec<Vec<&mut [f32]>> = Vec::new();
    tasks.resize_with(tokens.div_ceil(block) * shape.kv_heads, Vec::new);
    for (i, y) in y.chunks_exact_mut(d).enumerate() {
        let (t, head) = (i / spec.heads, i % spec.heads);
        tasks[t / block * shape.kv_heads + head / shape.group].push(y);
    }
    let small = tokens * cache.len() * shape.q_width < 64 * 1024;
    run(&cpu.team, tasks.into_iter().enumerate().collect(), small, |(task, mut y)| {
        let (token, kv_head) = (task / shape.kv_heads * block, task % shape.kv_heads);
        let mut softmax = OnlineSoftmax::new(cpu.table, d, y.len());
        for (i, y) in y.iter_mut().enumerate() {
            let (t, head) = (token + i / shape.group, kv_head * shape.group + i % shape.group);
            softmax.push(&q[t * shape.q_width + head * d..][..d], spec.scale, visible(spec, past + t));
            y.fill(0.0);
        }
        let span = softmax.span();
        with_scratch(2 * KEYS * d, |scratch| {
            for first in span.clone().step_by(KEYS) {
                let count = KEYS.min(span.end - first);
                let (k, rest) = scratch.split_at_mut(count * d);
                let v = &mut rest[..count * d];
                cache.read(cpu.table, first, kv_head, k, v);
                softmax.step(Rows::packed(k, d), Rows::packed(v, d), first, &mut y);
            }
        });
        softmax.finish(&mut y);
    });
}
