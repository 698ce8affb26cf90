//! Backward over whole segments.
//!
//! Per query row, with `D = dy . y`: `dv += p dy`, `ds = scale p (dy . v - D)`, `dq = ds k`, `dk += ds q`.
//! A softcap `c` multiplies `ds` by `1 - tanh(s / c)²`.
//!
//! A task has the queries of a stretch of tokens and one key/value head, and owns their `dq`. Keys of the same stretch
//! get their gradients from it directly; for those of earlier stretches it has memory of its own that is added to them in
//! order at the end, at most [`STRETCHES`] times the keys and values. Stretches depend on the lengths alone.

use super::super::elementwise::{add_part, zero};
use super::super::split::{parts, run, with_scratch};
use super::super::table::Table;
use super::super::tile::{Coefficients, Rows};
use super::super::{Cost, Cpu};
use super::{KEYS, Shape, clip, columns, turn, visible};
use crate::Attention;
use std::ops::Range;

/// Query tokens of a block.
const TOKENS: usize = 32;
/// Tasks to aim for: as many as a CPU has cores, and enough that an uneven rest is small.
const TASKS: usize = 12;
/// Stretches of a segment at most.
const STRETCHES: usize = 8;
/// Tokens that are worth a stretch, and of which its length is a multiple.
const LEAST: (usize, usize) = (64, 16);

/// Some tokens of one segment.
struct Stretch {
    /// First token of the segment, and those of the stretch, counted from it.
    segment: usize,
    tokens: Range<usize>,
    /// First key that its tokens see.
    start: usize,
    /// Row of the first of its own gradients by keys of earlier stretches: by head, by keys before by values, by key.
    spare: usize,
}

impl Stretch {
    /// Keys of earlier stretches.
    fn earlier(&self) -> usize {
        self.tokens.start - self.start
    }
}

/// Gradients that one stretch and key/value head own: nothing else writes them.
struct Task<'a> {
    stretch: &'a Stretch,
    kv_head: usize,
    /// By head of the group, then token.
    dq: Vec<Vec<&'a mut [f32]>>,
    /// By key from the first that is seen on.
    dk: Vec<&'a mut [f32]>,
    dv: Vec<&'a mut [f32]>,
}

/// What a task reads.
struct Inputs<'a> {
    table: &'a Table,
    spec: &'a Attention,
    shape: Shape,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    y: &'a [f32],
    lse: &'a [f32],
    dy: &'a [f32],
}

/// See [`crate::Call::AttentionVjp`].
pub(crate) fn vjp(
    cpu: &Cpu,
    spec: &Attention,
    segments: &[usize],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    y: &[f32],
    lse: &[f32],
    dy: &[f32],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let shape = Shape::new(spec);
    let tokens: usize = segments.iter().sum();
    assert!([q.len(), y.len(), dy.len(), dq.len()] == [tokens * shape.q_width; 4]);
    assert!([k.len(), v.len(), dk.len(), dv.len()] == [tokens * shape.kv_width; 4]);
    assert_eq!(lse.len(), tokens * spec.heads);
    for gradient in [&mut *dq, &mut *dk, &mut *dv] {
        zero(&cpu.team, gradient);
    }
    let stretches = stretches(spec, segments);
    let rows: usize = stretches.iter().map(|stretch| 2 * shape.kv_heads * stretch.earlier()).sum();
    let mut spare = vec![0.0; rows * shape.head_dim];
    let inputs = Inputs { table: cpu.table, spec, shape, q, k, v, y, lse, dy };
    let small = is_small(&shape, tokens);
    run(&cpu.team, tasks(&shape, &stretches, &mut spare, dq, dk, dv), small, |task| inputs.task(task));
    if !spare.is_empty() {
        add_spare(cpu, &shape, &stretches, &spare, 0, dk);
        add_spare(cpu, &shape, &stretches, &spare, 1, dv);
    }
}

/// What [`vjp`] takes: gradients of earlier keys, and the scratch of its tasks.
pub(crate) fn cost(spec: &Attention, segments: &[usize]) -> Cost {
    let (shape, stretches) = (Shape::new(spec), stretches(spec, segments));
    let tokens: usize = segments.iter().sum();
    let longest = stretches.iter().map(|stretch| stretch.tokens.len()).max().unwrap_or(0);
    let earlier: usize = stretches.iter().map(Stretch::earlier).sum();
    let slices = tokens * spec.heads + 2 * (tokens + earlier) * spec.kv_heads;
    let spare = 2 * shape.kv_heads * earlier * shape.head_dim;
    Cost {
        passing: spare * size_of::<f32>() + slices * size_of::<&mut [f32]>(),
        ..Cost::scratch(task_scratch(&shape, longest), 0, is_small(&shape, tokens))
    }
}

/// Floats of scratch of a task of so many tokens.
fn task_scratch(shape: &Shape, tokens: usize) -> usize {
    2 * shape.turned() + 2 * TOKENS * KEYS + shape.group * tokens
}

/// Whether one thread does it all.
fn is_small(shape: &Shape, tokens: usize) -> bool {
    tokens * tokens * shape.q_width < 64 * 1024
}

/// Cuts segments into stretches of about the same work.
fn stretches(spec: &Attention, segments: &[usize]) -> Vec<Stretch> {
    let filled = segments.iter().filter(|len| **len > 0).count().max(1);
    let most = TASKS.div_ceil(filled * spec.kv_heads).min(STRETCHES);
    let mut stretches: Vec<Stretch> = Vec::new();
    let (mut segment, mut spare) = (0, 0);
    for len in segments {
        let count = most.min(len / LEAST.0).max(1);
        let work: usize = (0..*len).map(|t| visible(spec, t).len()).sum();
        let (mut first, mut done, mut cut) = (0, 0, 1);
        for t in 0..*len {
            done += visible(spec, t).len();
            let end = t + 1;
            if end == *len || cut < count && end.is_multiple_of(LEAST.1) && done * count >= work * cut {
                let stretch = Stretch { segment, tokens: first..end, start: visible(spec, first).start, spare };
                spare += 2 * spec.kv_heads * stretch.earlier();
                stretches.push(stretch);
                (first, cut) = (end, cut + 1);
            }
        }
        segment += len;
    }
    stretches
}

fn tasks<'a>(
    shape: &Shape,
    stretches: &'a [Stretch],
    spare: &'a mut [f32],
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
) -> Vec<Task<'a>> {
    let d = shape.head_dim;
    let mut spare = spare.chunks_exact_mut(d);
    let (mut dq, mut dk, mut dv) = (dq.chunks_exact_mut(d), dk.chunks_exact_mut(d), dv.chunks_exact_mut(d));
    let mut tasks: Vec<Task> = Vec::with_capacity(stretches.len() * shape.kv_heads);
    for stretch in stretches {
        let made = tasks.len();
        let (tokens, keys) = (stretch.tokens.len(), stretch.tokens.end - stretch.start);
        for kv_head in 0..shape.kv_heads {
            let dq = (0..shape.group).map(|_| Vec::with_capacity(tokens)).collect();
            let [mut dk, mut dv] = [0; 2].map(|_| Vec::with_capacity(keys));
            dk.extend(spare.by_ref().take(stretch.earlier()));
            dv.extend(spare.by_ref().take(stretch.earlier()));
            tasks.push(Task { stretch, kv_head, dq, dk, dv });
        }
        for _ in 0..tokens {
            for task in &mut tasks[made..] {
                task.dk.extend(dk.next());
                task.dv.extend(dv.next());
                for head in &mut task.dq {
                    head.extend(dq.next());
                }
            }
        }
    }
    tasks
}

/// Adds what later stretches found for keys of earlier ones; `side` is 0 for keys, 1 for values.
fn add_spare(cpu: &Cpu, shape: &Shape, stretches: &[Stretch], spare: &[f32], side: usize, gradient: &mut [f32]) {
    let d = shape.head_dim;
    parts(&cpu.team, gradient, shape.kv_width, |at, gradient| {
        let first = at / shape.kv_width;
        let tokens = first..first + gradient.len() / shape.kv_width;
        for stretch in stretches {
            let earlier = stretch.segment + stretch.start..stretch.segment + stretch.tokens.start;
            for t in earlier.start.max(tokens.start)..earlier.end.min(tokens.end) {
                for head in 0..shape.kv_heads {
                    let row = stretch.spare + (2 * head + side) * earlier.len() + t - earlier.start;
                    let to = (t - tokens.start) * shape.kv_width + head * d;
                    add_part(&spare[row * d..][..d], &mut gradient[to..][..d]);
                }
            }
        }
    });
}

/// Scratch of a task.
struct Scratch<'a> {
    /// The block's keys and values, turned.
    k: &'a mut [f32],
    v: &'a mut [f32],
    /// Probabilities and their gradients, `[TOKENS, KEYS]`.
    p: &'a mut [f32],
    ds: &'a mut [f32],
    /// `dy . y` by head of the group, then token.
    along: &'a mut [f32],
}

impl Inputs<'_> {
    fn task(&self, mut task: Task) {
        let (Stretch { segment, tokens, start, .. }, Shape { group, head_dim: d, q_width, kv_width, .. }) =
            (task.stretch, self.shape);
        let (turned, block) = (self.shape.turned(), TOKENS * KEYS);
        with_scratch(task_scratch(&self.shape, tokens.len()), |scratch| {
            let (k, rest) = scratch.split_at_mut(turned);
            let (v, rest) = rest.split_at_mut(turned);
            let (p, rest) = rest.split_at_mut(block);
            let (ds, along) = rest.split_at_mut(block);
            for (r, along) in along.chunks_exact_mut(tokens.len()).enumerate() {
                for (t, along) in tokens.clone().zip(along) {
                    let at = (segment + t) * q_width + (task.kv_head * group + r) * d;
                    *along = self.table.light().dot(&self.dy[at..][..d], &self.y[at..][..d]);
                }
            }
            let mut scratch = Scratch { k, v, p, ds, along };
            for key in (*start..tokens.end).step_by(KEYS) {
                let keys = KEYS.min(tokens.end - key);
                let at = (segment + key) * kv_width + task.kv_head * d;
                turn(Rows::new(&self.k[at..], kv_width, keys, d), scratch.k);
                turn(Rows::new(&self.v[at..], kv_width, keys, d), scratch.v);
                for r in 0..group {
                    for token in tokens.clone().step_by(TOKENS) {
                        let count = TOKENS.min(tokens.end - token);
                        let seen = visible(self.spec, token).start..token + count;
                        if seen.start < key + keys && key < seen.end {
                            let keys = keys.min(seen.end - key);
                            self.block(&mut task, r, (token, count), (key, keys), &mut scratch);
                        }
                    }
                }
            }
        });
    }

    /// `count` queries from `token` on against `keys` keys from `key` on, counted from the segment's start.
    fn block(
        &self,
        task: &mut Task,
        r: usize,
        (token, count): (usize, usize),
        (key, keys): (usize, usize),
        scratch: &mut Scratch,
    ) {
        let Shape { group, head_dim: d, q_width, kv_width, .. } = self.shape;
        let Stretch { segment, tokens, start, .. } = task.stretch;
        let head = task.kv_head * group + r;
        let (q_at, kv_at) = ((segment + token) * q_width + head * d, (segment + key) * kv_width + task.kv_head * d);
        let [q, dy] = [self.q, self.dy].map(|x| Rows::new(&x[q_at..], q_width, count, d));
        let k = Rows::new(&self.k[kv_at..], kv_width, keys, d);

        let width = columns(keys);
        let products = |x: &[f32], turned: &[f32], out: &mut [f32]| {
            out.fill(0.0);
            let mut rows: Vec<_> = out.chunks_exact_mut(KEYS).take(count).map(|row| &mut row[..width]).collect();
            let x = Coefficients { data: &x[q_at..], row: q_width, col: 1 };
            self.table.tile_axpy(x, Rows::new(turned, KEYS, d, width), &mut rows);
        };
        products(self.q, scratch.k, scratch.p);
        products(self.dy, scratch.v, scratch.ds);
        let along = &scratch.along[r * tokens.len() + token - tokens.start..][..count];
        let rows = scratch.p.as_chunks_mut().0.iter_mut().zip(scratch.ds.as_chunks_mut().0).zip(along).enumerate();
        for (i, ((p, ds), along)) in rows {
            let lse = self.lse[(segment + token + i) * self.spec.heads + head];
            let (light, scale) = (self.table.light(), self.spec.scale);
            match self.spec.softcap {
                None => light.softmax_vjp(scale, lse, *along, p, ds),
                Some(cap) => light.softmax_vjp_capped([scale, cap], lse, *along, p, ds),
            }
            let seen = clip(&visible(self.spec, token + i), key, keys);
            for row in [p, ds] {
                row[..seen.start].fill(0.0);
                row[seen.end..].fill(0.0);
            }
        }

        let transposed = |data| Coefficients { data, row: 1, col: KEYS };
        let own = key - start..key - start + keys;
        self.table.tile_axpy(transposed(scratch.p), dy, &mut task.dv[own.clone()]);
        self.table.tile_axpy(transposed(scratch.ds), q, &mut task.dk[own]);
        let ds = Coefficients { data: scratch.ds, row: KEYS, col: 1 };
        self.table.tile_axpy(ds, k, &mut task.dq[r][token - tokens.start..][..count]);
    }
}
