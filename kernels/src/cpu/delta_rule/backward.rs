//! Backward of whole segments.
//!
//! A token needs the states before and after it. A task (a segment and a head of keys) goes through the segment once and
//! notes the states between chunks of [`CHUNK`] tokens, then takes chunk by chunk from the last: computes its states again
//! and walks back through them. So the states of one chunk are there at a time, for [`BLOCK`] columns.

use super::super::light::Light;
use super::super::split::{run, with_scratch};
use super::super::{Cost, Cpu};
use super::{BLOCK, Gradients, Inputs, blocks, is_small};
use crate::DeltaRule;
use std::ops::Range;

/// Tokens whose states are kept at a time: with 128 rows, 512 KiB, about what a core has for itself.
const CHUNK: usize = 32;

/// Gradients that one segment and head of keys own, token by token. Those by `v`, `g` and `beta` are of all heads of
/// values that share its keys.
struct Task<'a> {
    tokens: Range<usize>,
    key_head: usize,
    dq: Vec<&'a mut [f32]>,
    dk: Vec<&'a mut [f32]>,
    dv: Vec<&'a mut [f32]>,
    dg: Vec<&'a mut [f32]>,
    dbeta: Vec<&'a mut [f32]>,
}

/// Overwrites `d`, the gradients by `q`, `k`, `v`, `g` and `beta`, from `dy`.
pub(crate) fn vjp(cpu: &Cpu, inputs: Inputs, segments: &[usize], dy: &[f32], d: [&mut [f32]; 5]) {
    let (spec, tokens) = (inputs.spec, segments.iter().sum());
    inputs.check(tokens);
    assert_eq!(dy.len(), inputs.v.len());
    let lens = [inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta].map(<[f32]>::len);
    assert!(d.iter().map(|d| d.len()).eq(lens));
    let tasks = tasks(spec, segments, d);
    run(&cpu.team, tasks, is_small(spec, tokens), |task| Walk { light: cpu.table.light(), inputs, dy }.task(task));
}

/// What [`vjp`] takes: slices for each task and token, and the states of the longest segment.
pub(crate) fn cost(spec: &DeltaRule, segments: &[usize]) -> Cost {
    let (tokens, longest) = (segments.iter().sum(), segments.iter().copied().max().unwrap_or(0));
    let slices = 5 * tokens * size_of::<&mut [f32]>();
    Cost {
        passing: spec.key_heads * (slices + segments.len() * 2 * size_of::<Task>()),
        ..Cost::scratch(floats(spec, longest), 0, is_small(spec, tokens))
    }
}

/// Floats of scratch for a segment of so many tokens: states between chunks and of one chunk, with its first, their
/// gradient, and what each token of a chunk did not know.
fn floats(spec: &DeltaRule, tokens: usize) -> usize {
    let (width, chunk) = (BLOCK.min(spec.value_dim), CHUNK.min(tokens));
    (tokens.div_ceil(CHUNK) + chunk + 2) * spec.key_dim * width + chunk * width
}

fn tasks<'a>(spec: &DeltaRule, segments: &[usize], d: [&'a mut [f32]; 5]) -> Vec<Task<'a>> {
    let mut tasks = Vec::with_capacity(segments.len() * spec.key_heads);
    let mut start = 0;
    for len in segments {
        let rows = || Vec::with_capacity(*len);
        tasks.extend((0..spec.key_heads).map(|key_head| Task {
            tokens: start..start + len,
            key_head,
            dq: rows(),
            dk: rows(),
            dv: rows(),
            dg: rows(),
            dbeta: rows(),
        }));
        start += len;
    }
    let group = spec.value_heads / spec.key_heads;
    let widths = [spec.key_dim, spec.key_dim, group * spec.value_dim, group, group];
    for (which, (d, width)) in d.into_iter().zip(widths).enumerate() {
        let mut rows = d.chunks_exact_mut(width.max(1));
        for of_segment in tasks.chunks_mut(spec.key_heads) {
            for _ in of_segment[0].tokens.clone() {
                for (task, row) in of_segment.iter_mut().zip(rows.by_ref().take(spec.key_heads)) {
                    [&mut task.dq, &mut task.dk, &mut task.dv, &mut task.dg, &mut task.dbeta][which].push(row);
                }
            }
        }
    }
    tasks
}

/// What all tasks read.
struct Walk<'a> {
    light: &'a Light,
    inputs: Inputs<'a>,
    dy: &'a [f32],
}

impl Walk<'_> {
    fn task(&self, mut task: Task) {
        let spec = self.inputs.spec;
        for rows in [&mut task.dq, &mut task.dk, &mut task.dg, &mut task.dbeta] {
            rows.iter_mut().for_each(|row| row.fill(0.0));
        }
        with_scratch(floats(spec, task.tokens.len()), |scratch| {
            for of_group in 0..spec.value_heads / spec.key_heads {
                for columns in blocks(spec) {
                    self.columns(&mut task, of_group, &columns, scratch);
                }
            }
        });
    }

    /// Some columns of head `of_group` among those that share the task's keys.
    fn columns(&self, task: &mut Task, of_group: usize, columns: &Range<usize>, scratch: &mut [f32]) {
        let (spec, tokens) = (self.inputs.spec, task.tokens.clone());
        let (width, size) = (columns.len(), spec.key_dim * columns.len());
        let head = task.key_head * (spec.value_heads / spec.key_heads) + of_group;
        let token = |t: usize| self.inputs.token(tokens.start + t, head, columns);
        let chunks = tokens.len().div_ceil(CHUNK);
        let (between, rest) = scratch.split_at_mut(chunks * size);
        let (ds, rest) = rest.split_at_mut(size);
        let (states, r) = rest.split_at_mut((CHUNK.min(tokens.len()) + 1) * size);
        let mut y = [0.0; BLOCK];

        let (state, r_unused) = (&mut states[..size], &mut [0.0; BLOCK][..width]);
        state.fill(0.0);
        for (chunk, between) in between.chunks_exact_mut(size.max(1)).enumerate() {
            between.copy_from_slice(state);
            // What comes after the last note is computed again anyway.
            let end = if chunk + 1 < chunks { (chunk + 1) * CHUNK } else { 0 };
            for t in chunk * CHUNK..end {
                self.light.delta_step(token(t), state, r_unused, &mut y[..width]);
            }
        }

        ds.fill(0.0);
        for chunk in (0..chunks).rev() {
            let part = chunk * CHUNK..tokens.len().min((chunk + 1) * CHUNK);
            states[..size].copy_from_slice(&between[chunk * size..][..size]);
            for (i, t) in part.clone().enumerate() {
                let (past, state) = states[i * size..][..2 * size].split_at_mut(size);
                state.copy_from_slice(past);
                self.light.delta_step(token(t), state, &mut r[i * width..][..width], &mut y[..width]);
            }
            for (i, t) in part.enumerate().rev() {
                let at = ((tokens.start + t) * spec.value_heads + head) * spec.value_dim;
                let dy = &self.dy[at..][columns.clone()];
                let dv = &mut task.dv[t][of_group * spec.value_dim..][columns.clone()];
                let out = Gradients { q: task.dq[t], k: task.dk[t], v: dv };
                let (before, after) = states[i * size..][..2 * size].split_at(size);
                let r = &r[i * width..][..width];
                let [dg, dbeta] = self.light.delta_back(token(t), [before, after], r, dy, ds, out);
                task.dg[t][of_group] += dg;
                task.dbeta[t][of_group] += dbeta;
            }
        }
    }
}
