//! Backward over whole segments.
//!
//! Per query row, with `D = dy . y`: `dv += p dy`, `ds = scale p (dy . v - D)`, `dq = ds k`, `dk += ds q`.

use super::super::Cpu;
use super::super::elementwise::zero;
use super::super::lanes::sum;
use super::super::softmax;
use super::super::split::run;
use super::super::table::Table;
use super::super::tile::{Coefficients, Rows};
use super::{KEYS, Shape, clip, visible};
use crate::Attention;

/// Query tokens of a block.
const TOKENS: usize = 32;

/// Gradients that one segment and key/value head own: nothing else writes them.
struct Task<'a> {
    segment: usize,
    kv_head: usize,
    /// By head of the group, then token.
    dq: Vec<Vec<&'a mut [f32]>>,
    dk: Vec<&'a mut [f32]>,
    dv: Vec<&'a mut [f32]>,
}

/// What a task reads.
struct Inputs<'a> {
    spec: &'a Attention,
    shape: Shape,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    y: &'a [f32],
    lse: &'a [f32],
    dy: &'a [f32],
}

/// See [`crate::Backend::attention_vjp`].
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
    let inputs = Inputs { spec, shape, q, k, v, y, lse, dy };
    let tasks = tasks(&shape, segments, dq, dk, dv);
    run(&cpu.team, tasks, tokens * tokens * shape.q_width < 64 * 1024, |task| inputs.segment(cpu.table, task));
}

fn tasks<'a>(
    shape: &Shape,
    segments: &[usize],
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
) -> Vec<Task<'a>> {
    let d = shape.head_dim;
    let (mut dq, mut dk, mut dv) = (dq.chunks_exact_mut(d), dk.chunks_exact_mut(d), dv.chunks_exact_mut(d));
    let mut tasks: Vec<Task> = Vec::new();
    let mut segment = 0;
    for len in segments {
        let made = tasks.len();
        tasks.extend((0..shape.kv_heads).map(|kv_head| {
            let dq = (0..shape.group).map(|_| Vec::with_capacity(*len)).collect();
            Task { segment, kv_head, dq, dk: Vec::with_capacity(*len), dv: Vec::with_capacity(*len) }
        }));
        for _ in 0..*len {
            for task in &mut tasks[made..] {
                task.dk.extend(dk.next());
                task.dv.extend(dv.next());
                for head in &mut task.dq {
                    head.extend(dq.next());
                }
            }
        }
        segment += len;
    }
    tasks
}

impl Inputs<'_> {
    /// All heads of the task's group over its segment.
    fn segment(&self, table: &Table, mut task: Task) {
        // Probabilities and their gradients of one block.
        let mut p = vec![0.0; TOKENS * KEYS];
        let mut ds = vec![0.0; TOKENS * KEYS];
        let len = task.dk.len();
        for r in 0..self.shape.group {
            for token in (0..len).step_by(TOKENS) {
                let count = TOKENS.min(len - token);
                let end = token + count;
                for key in (visible(self.spec, token).start..end).step_by(KEYS) {
                    let keys = KEYS.min(end - key);
                    self.block(table, &mut task, r, (token, count), (key, keys), &mut p, &mut ds);
                }
            }
        }
    }

    /// `count` queries from `token` on against `keys` keys from `key` on, counted from the segment's start.
    fn block(
        &self,
        table: &Table,
        task: &mut Task,
        r: usize,
        (token, count): (usize, usize),
        (key, keys): (usize, usize),
        p: &mut [f32],
        ds: &mut [f32],
    ) {
        let Shape { group, head_dim: d, q_width, kv_width, .. } = self.shape;
        let head = task.kv_head * group + r;
        let q_at = (task.segment + token) * q_width + head * d;
        let kv_at = (task.segment + key) * kv_width + task.kv_head * d;
        let [q, dy, y] = [self.q, self.dy, self.y].map(|x| Rows::new(&x[q_at..], q_width, count, d));
        let [k, v] = [self.k, self.v].map(|x| Rows::new(&x[kv_at..], kv_width, keys, d));

        let products = |x: Rows, w: Rows, out: &mut [f32]| {
            out.fill(0.0);
            let mut rows: Vec<_> = out.chunks_exact_mut(KEYS).take(count).collect();
            table.tile_dot(x, w, &mut rows, 0);
        };
        products(q, k, p);
        products(dy, v, ds);
        for (i, (p, ds)) in p.chunks_exact_mut(KEYS).zip(ds.chunks_exact_mut(KEYS)).take(count).enumerate() {
            let seen = clip(&visible(self.spec, token + i), key, keys);
            for row in [&mut *p, &mut *ds] {
                row[..seen.start].fill(0.0);
                row[seen.end..].fill(0.0);
            }
            let lse = self.lse[(task.segment + token + i) * self.spec.heads + head];
            table.exp(self.spec.scale, lse, &mut p[seen.clone()]);
            let along = sum([dy.row(i), y.row(i)], |[dy, y]| dy * y);
            softmax::vjp(&p[seen.clone()], along, self.spec.scale, &mut ds[seen]);
        }

        let transposed = |data| Coefficients { data, row: 1, col: KEYS };
        table.tile_axpy(transposed(p), dy, &mut task.dv[key..key + keys]);
        table.tile_axpy(transposed(ds), q, &mut task.dk[key..key + keys]);
        let ds = Coefficients { data: ds, row: KEYS, col: 1 };
        table.tile_axpy(ds, k, &mut task.dq[r][token..token + count]);
    }
}
