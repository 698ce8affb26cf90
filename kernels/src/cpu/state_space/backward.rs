//! Backward of whole segments.
//!
//! A task (a segment and some heads of a group) goes through the segment once for each head and notes the states before
//! chunks of [`CHUNK`] tokens, then takes chunk by chunk from the last, with the gradient by the state behind it. Heads of
//! a group share `b` and `c`: each task adds up what its own heads pass on to them, and the sums of tasks are added last.
//!
//! ```text
//! y_i = sum_(j <= i) K_ij W_ij d_j x_j + e^(g_i) S_0ᵀ c_i + skip x_i,  K_ij = c_i . b_j, W_ij = e^(g_i - g_j):
//!   dK_ij = W_ij d_j (dy_i . x_j), dc_i += sum_j dK_ij b_j, db_j += sum_i dK_ij c_i, du_j += sum_i K_ij W_ij dy_i
//!   dc_i += e^(g_i) S_0 dy_i, dS_0 += e^(g_i) c_i dy_iᵀ
//! S = e^(g_last) S_0 + sum_j e^(g_last - g_j) b_j u_jᵀ,  u_j = d_j x_j:
//!   db_j += e^(g_last - g_j) dS u_j, du_j += e^(g_last - g_j) dSᵀ b_j, dS_0 += e^(g_last) dS
//! dx_j = d_j du_j + skip dy_j, dd_j = x_j . du_j - e^rate sum_(i >= j) dg_i
//! ```

use super::super::light::Light;
use super::super::split::{parts, run, with_scratch};
use super::super::{Cost, Cpu};
use super::chunk::{Chunk, Steps, cut};
use super::{CHUNK, Inputs, heads_of_tasks, is_small};
use crate::StateSpace;
use std::ops::Range;

/// Tasks that a segment is cut into, where it has so many heads: each holds gradients of `b` and `c` of its own.
const TASKS: usize = 8;

/// Gradients that some heads of one segment own, token by token, and their share `[tokens, 2, N]` of those by `b` and `c`.
struct Task<'a> {
    tokens: Range<usize>,
    heads: Range<usize>,
    shared: &'a mut [f32],
    dx: Vec<&'a mut [f32]>,
    ddt: Vec<&'a mut [f32]>,
}

/// Overwrites `d`, the gradients by `x`, `b`, `c` and `dt`, from `dy`.
pub(crate) fn vjp(cpu: &Cpu, inputs: Inputs, segments: &[usize], dy: &[f32], [dx, db, dc, ddt]: [&mut [f32]; 4]) {
    let (spec, tokens) = (inputs.spec, segments.iter().sum());
    inputs.check(tokens);
    assert_eq!([dy.len(), dx.len()], [inputs.x.len(); 2]);
    assert!(db.len() == inputs.b.len() && dc.len() == inputs.c.len() && ddt.len() == inputs.dt.len());
    let heads = heads_of_tasks(spec, most_heads(spec));
    let width = 2 * spec.state_dim;
    let mut shared = vec![0.0; heads.len() * tokens * width];
    let mut tasks: Vec<Task> = Vec::with_capacity(segments.len() * heads.len());
    for (heads, mut rest) in heads.iter().zip(shared.chunks_mut((tokens * width).max(1))) {
        let mut start = 0;
        for len in segments {
            let (shared, later) = rest.split_at_mut(len * width);
            let rows = || Vec::with_capacity(*len);
            tasks.push(Task { tokens: start..start + len, heads: heads.clone(), shared, dx: rows(), ddt: rows() });
            (start, rest) = (start + len, later);
        }
    }
    let (mut xs, mut dts) = (dx.chunks_exact_mut(spec.heads * spec.head_dim), ddt.chunks_exact_mut(spec.heads));
    for (segment, len) in segments.iter().enumerate() {
        for (mut dx, mut ddt) in xs.by_ref().zip(dts.by_ref()).take(*len) {
            for task in tasks.iter_mut().skip(segment).step_by(segments.len()) {
                let (x, later_x) = dx.split_at_mut(task.heads.len() * spec.head_dim);
                let (dt, later_dt) = ddt.split_at_mut(task.heads.len());
                task.dx.push(x);
                task.ddt.push(dt);
                (dx, ddt) = (later_x, later_dt);
            }
        }
    }
    run(&cpu.team, tasks, is_small(spec, tokens), |task| Walk { light: cpu.table.light(), inputs, dy }.task(task));
    for (which, grad) in [db, dc].into_iter().enumerate() {
        sum(cpu, spec, &heads, &shared, which, tokens, grad);
    }
}

/// Adds the shares of all tasks in the order of their heads.
fn sum(
    cpu: &Cpu,
    spec: &StateSpace,
    heads: &[Range<usize>],
    shared: &[f32],
    which: usize,
    tokens: usize,
    y: &mut [f32],
) {
    let (row, n) = (spec.groups * spec.state_dim, spec.state_dim);
    let group_of = |heads: &Range<usize>| heads.start / (spec.heads / spec.groups);
    parts(&cpu.team, y, row, |at, y| {
        for (t, y) in (at / row..).zip(y.chunks_exact_mut(row)) {
            y.fill(0.0);
            for (i, heads) in heads.iter().enumerate() {
                let share = &shared[(2 * (i * tokens + t) + which) * n..][..n];
                y[group_of(heads) * n..][..n].iter_mut().zip(share).for_each(|(y, share)| *y += share);
            }
        }
    });
}

/// What [`vjp`] takes: shares, slices for each task and token, the states and matrices of the longest segment.
pub(crate) fn cost(spec: &StateSpace, segments: &[usize]) -> Cost {
    let (tokens, longest) = (segments.iter().sum::<usize>(), segments.iter().copied().max().unwrap_or(0));
    let tasks = heads_of_tasks(spec, most_heads(spec)).len();
    let each = tokens * (2 * spec.state_dim * size_of::<f32>() + 2 * size_of::<&mut [f32]>());
    Cost {
        passing: tasks * (each + segments.len() * 2 * size_of::<Task>()),
        ..Cost::scratch(floats(spec, longest), 0, is_small(spec, tokens))
    }
}

fn most_heads(spec: &StateSpace) -> usize {
    spec.heads.div_ceil(TASKS)
}

/// Floats of scratch for a segment of so many tokens: the states before chunks, what [`Matrices`] holds.
fn floats(spec: &StateSpace, tokens: usize) -> usize {
    let (n, size) = (CHUNK.min(tokens), spec.state_dim * spec.head_dim);
    (tokens.div_ceil(CHUNK) + 4) * size
        + n * (3 * spec.state_dim + spec.head_dim + 2 * n)
        + spec.state_dim
        + spec.head_dim
}

/// Scratch for a chunk of one head.
struct Matrices<'a> {
    /// `dS` `[N, P]`, the gradient by the state behind the chunk, then by that before it.
    ds: &'a mut [f32],
    /// The same `[P, N]`.
    ds_columns: &'a mut [f32],
    /// The state before the chunk `[P, N]`.
    state_columns: &'a mut [f32],
    /// `[N, tokens]`.
    b_columns: &'a mut [f32],
    /// `[N, tokens]`.
    c_columns: &'a mut [f32],
    /// As large.
    faded: &'a mut [f32],
    /// `[P, tokens]`.
    x_columns: &'a mut [f32],
    /// `K`, then `K W`, `[tokens, tokens]`.
    k: &'a mut [f32],
    /// `dy_i . x_j`, then `dK`.
    dk: &'a mut [f32],
    /// `[N]`.
    row: &'a mut [f32],
    /// `[P]`.
    du: &'a mut [f32],
}

/// What all tasks read.
struct Walk<'a> {
    light: &'a Light,
    inputs: Inputs<'a>,
    dy: &'a [f32],
}

impl Walk<'_> {
    fn task(&self, mut task: Task) {
        with_scratch(floats(self.inputs.spec, task.tokens.len()), |scratch| {
            for i in 0..task.heads.len() {
                self.head(&mut task, i, scratch);
            }
        });
    }

    fn chunk(&self, task: &Task, number: usize) -> Chunk<'_> {
        let start = task.tokens.start + number * CHUNK;
        Chunk { light: self.light, inputs: self.inputs, start, tokens: CHUNK.min(task.tokens.end - start) }
    }

    /// Head number `i` of the task.
    fn head(&self, task: &mut Task, i: usize, scratch: &mut [f32]) {
        let StateSpace { state_dim, head_dim, .. } = *self.inputs.spec;
        let (head, size, longest) = (task.heads.start + i, state_dim * head_dim, CHUNK.min(task.tokens.len()));
        let chunks = task.tokens.len().div_ceil(CHUNK);
        let (before, rest) = scratch.split_at_mut(chunks * size);
        let ([state, ds, ds_columns, state_columns], rest) = cut(rest, [size; 4]);
        let ([b_columns, c_columns, faded], rest) = cut(rest, [state_dim * longest; 3]);
        let ([x_columns, k, dk, row, du], _) =
            cut(rest, [head_dim * longest, longest * longest, longest * longest, state_dim, head_dim]);

        state.fill(0.0);
        for (number, before) in before.chunks_exact_mut(size).enumerate() {
            before.copy_from_slice(state);
            if number + 1 < chunks {
                let chunk = self.chunk(task, number);
                chunk.columns(|t| self.inputs.token(t, head)[1], b_columns);
                chunk.advance(&chunk.steps(head), head, b_columns, faded, state);
            }
        }

        ds.fill(0.0);
        for number in (0..chunks).rev() {
            let chunk = self.chunk(task, number);
            let n = chunk.tokens;
            let m = Matrices {
                ds: &mut *ds,
                ds_columns: &mut *ds_columns,
                state_columns: &mut *state_columns,
                b_columns: &mut b_columns[..state_dim * n],
                c_columns: &mut c_columns[..state_dim * n],
                faded: &mut faded[..state_dim * n],
                x_columns: &mut x_columns[..head_dim * n],
                k: &mut k[..n * n],
                dk: &mut dk[..n * n],
                row: &mut *row,
                du: &mut *du,
            };
            self.back(task, i, number * CHUNK, &chunk, &before[number * size..][..size], m);
        }
    }

    /// `dy` of `head` from token `t` on, and how far rows are apart.
    fn dy_from(&self, t: usize, head: usize) -> (&[f32], usize) {
        let StateSpace { heads, head_dim, .. } = *self.inputs.spec;
        (&self.dy[(t * heads + head) * head_dim..], heads * head_dim)
    }

    /// One chunk of head number `i` of the task; `first` is the chunk's first token in the task.
    fn back(&self, task: &mut Task, i: usize, first: usize, chunk: &Chunk<'_>, before: &[f32], m: Matrices<'_>) {
        let StateSpace { state_dim, head_dim, groups, .. } = *self.inputs.spec;
        let (light, n, head, start) = (self.light, chunk.tokens, task.heads.start + i, chunk.start);
        let token = |t: usize| self.inputs.token(start + t, head);
        let dy_of = |t: usize| &self.dy_from(start + t, head).0[..head_dim];
        let steps = chunk.steps(head);
        chunk.columns(|t| self.inputs.token(t, head)[1], m.b_columns);
        chunk.columns(|t| self.inputs.token(t, head)[2], m.c_columns);
        chunk.columns(|t| self.inputs.token(t, head)[0], m.x_columns);
        chunk.products(head, m.b_columns, m.k);
        transpose(before, head_dim, m.state_columns);
        transpose(m.ds, head_dim, m.ds_columns);
        let mut dg = [0.0; CHUNK];

        // Pairs of tokens in the chunk.
        for t in 0..n {
            let (k, dk) = (&mut m.k[t * n..][..=t], &mut m.dk[t * n..][..=t]);
            dk.fill(0.0);
            light.add_rows(dy_of(t), 1, m.x_columns, n, head_dim, dk);
            let by_g = light.state_pairs_vjp(&steps.g[..=t], &steps.d[..=t], k, dk, &mut dg[..=t]);
            dg[t] += by_g;
        }
        for t in 0..n {
            let ([x, b, c], dy) = (token(t), dy_of(t));
            let shared = &mut task.shared[(first + t) * 2 * state_dim..][..2 * state_dim];
            let (db, dc) = shared.split_at_mut(state_dim);
            let group = groups * state_dim;
            let b_rows = &self.inputs.b[self.at_group(start, head)..];
            light.add_rows(&m.dk[t * n..], 1, b_rows, group, t + 1, dc);
            let c_rows = &self.inputs.c[self.at_group(start + t, head)..];
            light.add_rows(&m.dk[t * n + t..], n, c_rows, group, n - t, db);
            m.du.fill(0.0);
            let (dy_rows, step) = self.dy_from(start + t, head);
            light.add_rows(&m.k[t * n + t..], n, dy_rows, step, n - t, m.du);

            // The state before the chunk, of which each token sees what is left.
            let left = steps.left(t);
            m.row.fill(0.0);
            light.add_rows(dy, 1, m.state_columns, state_dim, head_dim, m.row);
            dg[t] += f64::from(left) * f64::from(light.dot(c, m.row));
            dc.iter_mut().zip(m.row.iter()).for_each(|(dc, row)| *dc += left * row);

            // The state after it, to which each token adds.
            let kept = steps.kept(t, n);
            m.row.fill(0.0);
            light.add_rows(x, 1, m.ds_columns, state_dim, head_dim, m.row);
            let written = kept * steps.d[t];
            let by_g = f64::from(written) * f64::from(light.dot(b, m.row));
            dg[t] -= by_g;
            dg[n - 1] += by_g;
            db.iter_mut().zip(m.row.iter()).for_each(|(db, row)| *db += written * row);
            let dx = &mut task.dx[first + t][i * head_dim..][..head_dim];
            dx.fill(0.0);
            light.add_rows(b, 1, m.ds, head_dim, state_dim, dx);
            let (d, skip) = (steps.d[t], self.inputs.skip[head]);
            let mut by_d = 0.0;
            for ((dx, du), (x, dy)) in dx.iter_mut().zip(m.du.iter()).zip(x.iter().zip(dy)) {
                let du = kept * *dx + du;
                by_d += f64::from(x * du);
                *dx = d * du + skip * dy;
            }
            task.ddt[first + t][i] = by_d as f32;
        }
        let left = steps.left(n - 1);
        dg[n - 1] += f64::from(left) * f64::from(light.dot(m.ds, before));
        self.to_steps(task, i, first, head, &steps, &dg[..n]);

        // dS_0 = e^g_last dS + sum_i e^(g_i) c_i dy_iᵀ
        let (dy_rows, step) = self.dy_from(start, head);
        let mut grown = [0.0; CHUNK];
        (0..n).for_each(|t| grown[t] = steps.left(t));
        for ((c, faded), ds) in
            m.c_columns.chunks_exact(n).zip(m.faded.chunks_exact_mut(n)).zip(m.ds.chunks_exact_mut(head_dim))
        {
            (0..n).for_each(|t| faded[t] = c[t] * grown[t]);
            ds.iter_mut().for_each(|ds| *ds *= left);
            light.add_rows(faded, 1, dy_rows, step, n, ds);
        }
    }

    /// Where the group of `head` begins in `b` and `c` of token `t`.
    fn at_group(&self, t: usize, head: usize) -> usize {
        let StateSpace { heads, groups, state_dim, .. } = *self.inputs.spec;
        (t * groups + head / (heads / groups)) * state_dim
    }

    /// Takes the gradients by `g` to those by `dt`, which hold those by `d` as a factor of `x` before.
    fn to_steps(&self, task: &mut Task, i: usize, first: usize, head: usize, steps: &Steps, dg: &[f64]) {
        let (rate, mut behind) = (f64::from(self.inputs.rate[head]).exp(), 0.0);
        for (t, dg) in dg.iter().enumerate().rev() {
            behind += dg;
            let ddt = &mut task.ddt[first + t][i];
            *ddt = ((f64::from(*ddt) - rate * behind) * f64::from(steps.slope[t])) as f32;
        }
    }
}

/// Columns of rows of `width`.
fn transpose(rows: &[f32], width: usize, columns: &mut [f32]) {
    let height = rows.len() / width;
    for (i, row) in rows.chunks_exact(width).enumerate() {
        row.iter().enumerate().for_each(|(j, value)| columns[j * height + i] = *value);
    }
}
