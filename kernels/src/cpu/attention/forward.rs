//! Forward over whole segments.

use super::super::split::{chunks, run};
use super::super::tile::Rows;
use super::super::{Cost, Cpu};
use super::online::{OnlineSoftmax, SoFar};
use super::{KEYS, Shape, columns, turn, visible};
use crate::Attention;

/// Outputs of some tokens and the heads of one group, token by token.
struct Task<'a> {
    /// First token of the segment, its first block of keys, first token of the task, and the key/value head.
    segment: usize,
    block: usize,
    token: usize,
    kv_head: usize,
    y: Vec<&'a mut [f32]>,
    lse: Vec<&'a mut f32>,
}

/// See [`crate::Call::Attention`].
pub(crate) fn forward(
    cpu: &Cpu,
    spec: &Attention,
    segments: &[usize],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    sinks: Option<&[f32]>,
    y: &mut [f32],
    lse: &mut [f32],
) {
    let shape = Shape::new(spec);
    let tokens: usize = segments.iter().sum();
    assert!(q.len() == tokens * shape.q_width && y.len() == q.len() && lse.len() == tokens * spec.heads);
    assert!(k.len() == tokens * shape.kv_width && v.len() == k.len());
    assert!(sinks.is_none_or(|sinks| sinks.len() == spec.heads));
    let small = tokens * tokens * shape.q_width < 64 * 1024;
    let turned = turned(cpu, &shape, segments, small, k);
    let tasks = tasks(&shape, segments, y, lse);
    run(&cpu.team, tasks, small, |mut task| {
        let mut softmax = OnlineSoftmax::new(cpu.table.light(), spec.softcap, shape.head_dim, task.y.len());
        for i in 0..task.y.len() {
            let (t, head) = (task.token + i / shape.group, task.kv_head * shape.group + i % shape.group);
            let q = &q[t * shape.q_width + head * shape.head_dim..][..shape.head_dim];
            softmax.push(q, spec.scale, visible(spec, t - task.segment), SoFar::begin(sinks, head));
            task.y[i].fill(0.0);
        }
        let span = softmax.span();
        for first in (span.start / KEYS * KEYS..span.end).step_by(KEYS) {
            let count = KEYS.min(span.end - first);
            let block = (task.block + first / KEYS) * shape.kv_heads + task.kv_head;
            let keys = &turned[block * shape.turned()..][..shape.turned()];
            let keys = Rows::new(keys, KEYS, shape.head_dim, columns(count));
            let at = (task.segment + first) * shape.kv_width + task.kv_head * shape.head_dim;
            let values = Rows::new(&v[at..], shape.kv_width, count, shape.head_dim);
            softmax.step(
                first,
                count,
                columns(count),
                None,
                |queries, scores| cpu.table.tile_axpy(queries, keys, scores),
                |p, y| cpu.table.tile_axpy(p, values, y),
                &mut task.y,
            );
        }
        softmax.finish(&mut task.y);
        for (row, lse) in softmax.so_far().zip(task.lse) {
            *lse = row.lse();
        }
    });
}

/// What [`forward`] takes: turned keys, and the slices of outputs that tasks own.
pub(crate) fn cost(spec: &Attention, segments: &[usize]) -> Cost {
    let (shape, tokens) = (Shape::new(spec), segments.iter().sum::<usize>());
    let blocks: usize = segments.iter().map(|len| len.div_ceil(KEYS)).sum();
    let rows = tokens * spec.heads * (size_of::<&mut [f32]>() + size_of::<&mut f32>());
    Cost { passing: blocks * shape.kv_heads * shape.turned() * size_of::<f32>() + rows, ..Cost::default() }
}

/// The keys in blocks of a segment and head, turned: once here instead of once for each block of queries.
fn turned(cpu: &Cpu, shape: &Shape, segments: &[usize], small: bool, k: &[f32]) -> Vec<f32> {
    let mut blocks = Vec::new();
    let mut segment = 0;
    for len in segments {
        blocks.extend((0..*len).step_by(KEYS).map(|first| (segment + first, KEYS.min(len - first))));
        segment += len;
    }
    let mut turned = vec![0.0; blocks.len() * shape.kv_heads * shape.turned()];
    chunks(&cpu.team, &mut turned, shape.kv_heads * shape.turned(), small, |i, turned| {
        let (first, count) = blocks[i];
        for (head, turned) in turned.chunks_exact_mut(shape.turned()).enumerate() {
            let at = first * shape.kv_width + head * shape.head_dim;
            turn(Rows::new(&k[at..], shape.kv_width, count, shape.head_dim), turned);
        }
    });
    turned
}

fn tasks<'a>(shape: &Shape, segments: &[usize], y: &'a mut [f32], lse: &'a mut [f32]) -> Vec<Task<'a>> {
    let mut rows = y.chunks_exact_mut(shape.head_dim).zip(lse);
    let mut tasks = Vec::new();
    let (mut segment, mut block) = (0, 0);
    for len in segments {
        for token in (segment..segment + len).step_by(shape.query_tokens()) {
            let end = (token + shape.query_tokens()).min(segment + len);
            let made = tasks.len();
            let empty = |kv_head| Task { segment, block, token, kv_head, y: Vec::new(), lse: Vec::new() };
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
        block += len.div_ceil(KEYS);
    }
    tasks
}
