//! The gated delta rule (Yang et al. 2024, "Gated Delta Networks"): linear attention whose state forgets, and that writes
//! only what it does not know yet.
//!
//! Each head of values has a state `S` `[K, V]`, zero before the first token. With the token's `q`, `k` (of the head of
//! keys that it shares with its neighbours), `v`, its decay `d = e^g` and strength `b = beta`:
//! `S' = d S`, `r = v - S'ᵀ k`, `u = b r`, `S = S' + k uᵀ`, `y = Sᵀ q`.
//!
//! Columns of `S` do not know of each other. So a task takes [`BLOCK`] of them through all tokens, while they stay in
//! first-level cache; a state in memory lies block by block, `[heads, V / BLOCK, K, BLOCK]`, the last block narrower.
//! Tokens follow one another in any case, so that a text in parts has the bits of the text in one.

mod backward;
mod token;

pub(crate) use backward::{cost as vjp_cost, vjp};
pub(crate) use token::{Gradients, Token, back, step};

use super::split::{run, with_scratch};
use super::{Cost, Cpu};
use crate::DeltaRule;
use std::ops::Range;

/// Columns of a state that a task has: 16 KiB with 128 rows.
pub(crate) const BLOCK: usize = 32;
/// Multiplications below which waking other threads costs more than it saves.
const SMALL: usize = 64 * 1024;

/// What all tasks read, token by token: `q`, `k` `[T, key_heads * K]`, `v` `[T, heads * V]`, `g`, `beta` `[T, heads]`.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub spec: &'a DeltaRule,
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub g: &'a [f32],
    pub beta: &'a [f32],
}

/// Some columns of one head's state, and what its tokens yield.
struct Task<'a> {
    head: usize,
    columns: Range<usize>,
    /// First token.
    start: usize,
    /// Where the state stays; without it, it begins with zeros and is forgotten.
    state: Option<&'a mut [f32]>,
    y: Vec<&'a mut [f32]>,
}

/// `y[T, heads * V]` of `segments` (lengths that sum to `T`), each of which begins with a state of zeros.
pub(crate) fn forward(cpu: &Cpu, inputs: Inputs, segments: &[usize], y: &mut [f32]) {
    let tokens: usize = segments.iter().sum();
    inputs.check(tokens);
    let mut tasks = Vec::with_capacity(segments.len() * inputs.spec.value_heads * blocks(inputs.spec).len());
    let (mut start, mut rest) = (0, y);
    for len in segments {
        let (part, later) = rest.split_at_mut(len * inputs.spec.value_heads * inputs.spec.value_dim);
        tasks.extend(tasks_of(inputs.spec, start, part));
        (start, rest) = (start + len, later);
    }
    assert!(rest.is_empty());
    run_all(cpu, inputs, tasks, tokens);
}

/// As [`forward`] for the tokens `rows` alone, which go on from `state`; it becomes the state after them.
pub(crate) fn forward_from(cpu: &Cpu, inputs: Inputs, state: &mut [f32], y: &mut [f32], rows: Range<usize>) {
    let spec = inputs.spec;
    let width = spec.value_heads * spec.value_dim;
    inputs.check(y.len() / width.max(1));
    assert_eq!(state.len(), spec.state_len());
    let mut tasks = tasks_of(spec, rows.start, &mut y[rows.start * width..rows.end * width]);
    let mut rest = state;
    for task in &mut tasks {
        let (state, later) = rest.split_at_mut(spec.key_dim * task.columns.len());
        (task.state, rest) = (Some(state), later);
    }
    run_all(cpu, inputs, tasks, rows.len());
}

/// What [`forward`] takes: a slice for each task and token, and the columns of a state.
pub(crate) fn cost(spec: &DeltaRule, segments: &[usize]) -> Cost {
    let (tasks, tokens) = (spec.value_heads * blocks(spec).len(), segments.iter().sum());
    Cost {
        passing: tasks * (tokens * size_of::<&mut [f32]>() + segments.len() * 2 * size_of::<Task>()),
        ..Cost::scratch(spec.key_dim * BLOCK.min(spec.value_dim), 0, is_small(spec, tokens))
    }
}

fn run_all(cpu: &Cpu, inputs: Inputs, tasks: Vec<Task>, tokens: usize) {
    run(&cpu.team, tasks, is_small(inputs.spec, tokens), |task| {
        let work = |state: &mut [f32]| {
            let mut r = [0.0; BLOCK];
            for (t, y) in (task.start..).zip(task.y) {
                let token = inputs.token(t, task.head, &task.columns);
                cpu.table.light().delta_step(token, state, &mut r[..task.columns.len()], y);
            }
        };
        match task.state {
            Some(state) => work(state),
            None => with_scratch(inputs.spec.key_dim * task.columns.len(), |state| {
                state.fill(0.0);
                work(state);
            }),
        }
    });
}

/// By head, then by block, for tokens from `start` on whose outputs are `y`.
fn tasks_of<'a>(spec: &DeltaRule, start: usize, y: &'a mut [f32]) -> Vec<Task<'a>> {
    let blocks = blocks(spec);
    let tokens = y.len() / (spec.value_heads * spec.value_dim).max(1);
    let mut tasks = Vec::with_capacity(spec.value_heads * blocks.len());
    for head in 0..spec.value_heads {
        let task = |columns: &Range<usize>| Task {
            head,
            columns: columns.clone(),
            start,
            state: None,
            y: Vec::with_capacity(tokens),
        };
        tasks.extend(blocks.iter().map(task));
    }
    for (i, y) in y.chunks_exact_mut(spec.value_dim.max(1)).enumerate() {
        let head = i % spec.value_heads;
        for (task, y) in tasks[head * blocks.len()..].iter_mut().zip(y.chunks_mut(BLOCK)).take(blocks.len()) {
            task.y.push(y);
        }
    }
    tasks
}

/// Columns of a head's blocks.
fn blocks(spec: &DeltaRule) -> Vec<Range<usize>> {
    (0..spec.value_dim).step_by(BLOCK).map(|first| first..spec.value_dim.min(first + BLOCK)).collect()
}

/// Whether one thread does it all.
fn is_small(spec: &DeltaRule, tokens: usize) -> bool {
    tokens * spec.state_len() < SMALL
}

impl<'a> Inputs<'a> {
    fn check(&self, tokens: usize) {
        let DeltaRule { key_heads, value_heads, key_dim, value_dim } = *self.spec;
        assert!(key_heads > 0 && value_heads.is_multiple_of(key_heads));
        assert!([self.q.len(), self.k.len()] == [tokens * key_heads * key_dim; 2]);
        assert!(self.v.len() == tokens * value_heads * value_dim);
        assert!([self.g.len(), self.beta.len()] == [tokens * value_heads; 2]);
    }

    /// What some columns of one head read of a token.
    fn token(&self, t: usize, head: usize, columns: &Range<usize>) -> Token<'a> {
        let DeltaRule { key_heads, value_heads, key_dim, value_dim } = *self.spec;
        let key = (t * key_heads + head / (value_heads / key_heads)) * key_dim;
        let value = t * value_heads + head;
        Token {
            q: &self.q[key..][..key_dim],
            k: &self.k[key..][..key_dim],
            v: &self.v[value * value_dim..][columns.clone()],
            decay: self.g[value].exp(),
            beta: self.beta[value],
        }
    }
}
