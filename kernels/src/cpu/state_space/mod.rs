//! Mamba 2's state space duality (Dao & Gu 2024): linear attention whose state fades by a factor of its own for each token
//! and head.
//!
//! Each head has a state `S` `[N, P]`, zero before the first token. With the token's `x` `[P]`, its `b` and `c` `[N]` (of
//! the group that the head is in) and its step `d = softplus(dt + bias)`, held between limits:
//! `S = e^(-e^rate d) S + b (d x)ᵀ`, `y = Sᵀ c + skip x`.
//!
//! A chunk of tokens is done at once, by products of matrices: with `g` the sum of the decays' logarithms up to a token,
//! `y_i = sum_(j <= i) (c_i . b_j) e^(g_i - g_j) d_j x_j + e^(g_i) S_0ᵀ c_i + skip x_i`. A few tokens, as when text is
//! written, take the formula above one by one. So a text in parts has the numbers of the text in one up to rounding.
//!
//! A task is some neighbouring heads of one group, which share the products `c_i . b_j`.

mod backward;
mod chunk;
mod loops;

pub(crate) use backward::{cost as vjp_cost, vjp};
pub(crate) use loops::{add_rows, pairs, pairs_vjp, step};

use super::split::{run, with_scratch};
use super::{Cost, Cpu};
use crate::StateSpace;
use chunk::Chunk;
use std::ops::Range;

/// Tokens that are done at once.
pub(super) const CHUNK: usize = 64;
/// Fewer than so many tokens are done one by one.
const FEW: usize = 4;
/// Heads of a task.
const HEADS: usize = 4;
/// Multiplications below which waking other threads costs more than it saves.
const SMALL: usize = 64 * 1024;

/// What all tasks read: `rate`, `bias`, `skip` `[H]`, `x` `[T, H * P]`, `b`, `c` `[T, G * N]`, `dt` `[T, H]`.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub spec: &'a StateSpace,
    pub rate: &'a [f32],
    pub bias: &'a [f32],
    pub skip: &'a [f32],
    pub x: &'a [f32],
    pub b: &'a [f32],
    pub c: &'a [f32],
    pub dt: &'a [f32],
}

/// Some heads of one group in one segment, and what its tokens yield.
struct Task<'a> {
    heads: Range<usize>,
    /// First token.
    start: usize,
    /// Where the heads' states stay; without it, they begin with zeros and are forgotten.
    state: Option<&'a mut [f32]>,
    y: Vec<&'a mut [f32]>,
}

/// `y[T, H * P]` of `segments` (lengths that sum to `T`), each of which begins with a state of zeros.
pub(crate) fn forward(cpu: &Cpu, inputs: Inputs, segments: &[usize], y: &mut [f32]) {
    let (spec, tokens) = (inputs.spec, segments.iter().sum());
    inputs.check(tokens);
    let mut tasks = Vec::with_capacity(segments.len() * heads_of_tasks(spec, HEADS).len());
    let (mut start, mut rest) = (0, y);
    for len in segments {
        let (part, later) = rest.split_at_mut(len * spec.heads * spec.head_dim);
        tasks.extend(tasks_of(spec, start, part));
        (start, rest) = (start + len, later);
    }
    assert!(rest.is_empty());
    run_all(cpu, inputs, tasks, tokens);
}

/// As [`forward`] for the tokens `rows` alone, which go on from `state`; it becomes the state after them.
pub(crate) fn forward_from(cpu: &Cpu, inputs: Inputs, state: &mut [f32], y: &mut [f32], rows: Range<usize>) {
    let spec = inputs.spec;
    let width = spec.heads * spec.head_dim;
    inputs.check(y.len() / width.max(1));
    assert_eq!(state.len(), spec.state_len());
    let mut tasks = tasks_of(spec, rows.start, &mut y[rows.start * width..rows.end * width]);
    let mut rest = state;
    for task in &mut tasks {
        let (state, later) = rest.split_at_mut(task.heads.len() * spec.state_dim * spec.head_dim);
        (task.state, rest) = (Some(state), later);
    }
    run_all(cpu, inputs, tasks, rows.len());
}

/// What [`forward`] takes: a slice for each task and token, and a task's states with its matrices.
pub(crate) fn cost(spec: &StateSpace, segments: &[usize]) -> Cost {
    let (tasks, tokens) = (heads_of_tasks(spec, HEADS).len(), segments.iter().sum());
    let longest = segments.iter().copied().max().unwrap_or(0);
    let states = HEADS.min(spec.heads) * spec.state_dim * spec.head_dim;
    Cost {
        passing: tasks * (tokens * size_of::<&mut [f32]>() + segments.len() * 2 * size_of::<Task>()),
        ..Cost::scratch(states + floats(spec, longest), 0, is_small(spec, tokens))
    }
}

/// Floats of the matrices for a chunk of a segment of so many tokens.
fn floats(spec: &StateSpace, tokens: usize) -> usize {
    let chunk = CHUNK.min(tokens);
    2 * chunk * (spec.state_dim + chunk)
}

fn run_all(cpu: &Cpu, inputs: Inputs, tasks: Vec<Task>, tokens: usize) {
    let (spec, light) = (inputs.spec, cpu.table.light());
    let size = spec.state_dim * spec.head_dim;
    run(&cpu.team, tasks, is_small(spec, tokens), |mut task| {
        let fresh = if task.state.is_none() { task.heads.len() * size } else { 0 };
        with_scratch(fresh + floats(spec, task.y.len()), |scratch| {
            let (fresh, scratch) = scratch.split_at_mut(fresh);
            fresh.fill(0.0);
            let states = task.state.take().unwrap_or(fresh);
            for (i, y) in task.y.chunks_mut(CHUNK).enumerate() {
                let chunk = Chunk { light, inputs, start: task.start + i * CHUNK, tokens: y.len() };
                chunk.forward(&task.heads, states, y, scratch);
            }
        });
    });
}

/// The heads of each task: at most `most` neighbours of one group.
fn heads_of_tasks(spec: &StateSpace, most: usize) -> Vec<Range<usize>> {
    let group = spec.heads / spec.groups;
    let starts = (0..spec.heads).step_by(group);
    starts.flat_map(|g| (g..g + group).step_by(most).map(move |h| h..(g + group).min(h + most))).collect()
}

/// One for each range of heads, for tokens from `start` on whose outputs are `y`.
fn tasks_of<'a>(spec: &StateSpace, start: usize, y: &'a mut [f32]) -> Vec<Task<'a>> {
    let tokens = y.len() / (spec.heads * spec.head_dim).max(1);
    let task = |heads| Task { heads, start, state: None, y: Vec::with_capacity(tokens) };
    let mut tasks: Vec<Task> = heads_of_tasks(spec, HEADS).into_iter().map(task).collect();
    for row in y.chunks_exact_mut((spec.heads * spec.head_dim).max(1)) {
        let mut rest = row;
        for task in &mut tasks {
            let (y, later) = rest.split_at_mut(task.heads.len() * spec.head_dim);
            task.y.push(y);
            rest = later;
        }
    }
    tasks
}

/// Whether one thread does it all.
fn is_small(spec: &StateSpace, tokens: usize) -> bool {
    tokens * spec.state_len() < SMALL
}

impl<'a> Inputs<'a> {
    fn check(&self, tokens: usize) {
        let StateSpace { heads, head_dim, groups, state_dim, .. } = *self.spec;
        assert!(groups > 0 && heads > 0 && heads.is_multiple_of(groups));
        assert!([self.rate.len(), self.bias.len(), self.skip.len()] == [heads; 3]);
        assert!([self.b.len(), self.c.len()] == [tokens * groups * state_dim; 2]);
        assert!(self.x.len() == tokens * heads * head_dim && self.dt.len() == tokens * heads);
    }

    /// `x`, `b` and `c` of a token.
    fn token(&self, t: usize, head: usize) -> [&'a [f32]; 3] {
        let StateSpace { heads, head_dim, groups, state_dim, .. } = *self.spec;
        let group = (t * groups + head / (heads / groups)) * state_dim;
        let x = &self.x[(t * heads + head) * head_dim..][..head_dim];
        [x, &self.b[group..][..state_dim], &self.c[group..][..state_dim]]
    }
}
