//! Forward over whole segments.

use super::super::Cpu;
use super::super::split::run;
use super::super::tile::Rows;
use super::online::OnlineSoftmax;
use super::{KEYS, Shape, visible};
use crate::Attention;

/// Outputs of some tokens and the heads of one group, token by token.
struct Task<'a> {
    /// First token of the segment, first token of the task, and the key/value head.
    segment: usize,
    token: usize,
    kv_head: usize,
    y: Vec<&'a mut [f32]>,
    lse: Vec<&'a mut f32>,
}

/// See [`crate::Backend::attention`].
pub(crate) fn forward(
    cpu: &Cpu,
    spec: &Attention,
    segments: &[usize],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    y: &mut [f32],
    lse: &mut [f32],
) {
    let shape = Shape::new(spec);
    let tokens: usize = segments.iter().sum();
    assert!(q.len() == tokens * shape.q_width && y.len() == q.len() && lse.len() == tokens * spec.heads);
    assert!(k.len() == tokens * shape.kv_width && v.len() == k.len());
    let tasks = tasks(&shape, segments, y, lse);
    run(&cpu.team, tasks, tokens * tokens * shape.q_width < 64 * 1024, |mut task| {
        let mut softmax = OnlineSoftmax::new(cpu.table, shape.head_dim, task.y.len());
        for i in 0..task.y.len() {
            let (t, head) = (task.token + i / shape.group, task.kv_head * shape.group + i % shape.group);
            let q = &q[t * shape.q_width + head * shape.head_dim..][..shape.head_dim];
            softmax.push(q, spec.scale, visible(spec, t - task.segment));
            task.y[i].fill(0.0);
        }
        let span = softmax.span();
        for first in span.clone().step_by(KEYS) {
            let at = (task.segment + first) * shape.kv_width + task.kv_head * shape.head_dim;
            let count = KEYS.min(span.end - first);
            let block = |x| Rows::new(x, shape.kv_width, count, shape.head_dim);
            softmax.step(block(&k[at..]), block(&v[at..]), first, &mut task.y);
        }
        softmax.finish(&mut task.y);
        for (i, lse) in task.lse.into_iter().enumerate() {
            *lse = softmax.lse(i);
        }
    });
}

fn tasks<'a>(shape: &Shape, segments: &[usize], y: &'a mut [f32], lse: &'a mut [f32]) -> Vec<Task<'a>> {
    let mut rows = y.chunks_exact_mut(shape.head_dim).zip(lse);
    let mut tasks = Vec::new();
    let mut segment = 0;
    for len in segments {
        for token in (segment..segment + len).step_by(shape.query_tokens()) {
            let end = (token + shape.query_tokens()).min(segment + len);
            let made = tasks.len();
            let empty = |kv_head| Task { segment, token, kv_head, y: Vec::new(), lse: Vec::new() };
            tasks.extend((0..shape.kv_heads).map(empty));
            for _ in token..end {
                for task in &mut tasks[made..] {
                    for (y, lse) in rows.by_ref().take(shape.group) {
                        task.y.push(y);
                        task.lse.push(lse);
                    }
                }
            }
        }
        segment += len;
    }
    tasks
}
