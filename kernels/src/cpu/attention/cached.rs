//! Forward of the last tokens over a key/value cache.
//!
//! A few rows of queries multiply by the tiles of the cache as they are, many by tiles widened to f32 first. Where one
//! token or a few leave less tasks than a CPU may have cores, the keys are cut into parts whose outputs are put together
//! afterwards (Dao et al. 2023): parts that depend on the lengths alone, in their order.
//!
//! While the kernel multiplies by a tile it asks memory for its head's next tile. A tile is too short a stream for the
//! processor to read ahead by itself.

use super::super::Cpu;
use super::super::cache::Cache;
use super::super::loops::update;
use super::super::split::{run, with_scratch};
use super::super::tile::Rows;
use super::online::{OnlineSoftmax, SoFar};
use super::{KEYS, Shape, columns, visible};
use crate::Attention;
use std::ops::Range;

/// Rows of queries from which widening a tile pays.
const MANY: usize = 18;
/// Tasks that a call of few tokens is cut into at most, some more for rounding.
const TASKS: usize = 24;
/// Blocks of keys that are worth a task: with 64-wide heads in f16, 64 KiB in 2 us.
const PART: usize = 4;
/// Products of elements below which waking other threads costs more than it saves.
const SMALL: usize = 32 * 1024;

/// Outputs of some tokens and the heads of one group, token by token, from a part of the keys.
struct Task<'a> {
    token: usize,
    kv_head: usize,
    /// Blocks of the cache.
    blocks: Range<usize>,
    y: Vec<&'a mut [f32]>,
    so_far: Option<&'a mut [SoFar]>,
}

/// See [`crate::Call::AttentionCached`].
pub(crate) fn forward(
    cpu: &Cpu,
    spec: &Attention,
    q: &[f32],
    cache: &Cache,
    sinks: Option<&[f32]>,
    y: &mut [f32],
    rows: Range<usize>,
) {
    let shape = Shape::new(spec);
    assert!(q.len() == y.len() && q.len().is_multiple_of(shape.q_width) && cache.width() == shape.kv_width);
    assert!(sinks.is_none_or(|sinks| sinks.len() == spec.heads));
    let rows = rows.start * shape.q_width..rows.end * shape.q_width;
    let (q, y) = (&q[rows.clone()], &mut y[rows]);
    let tokens = q.len() / shape.q_width;
    assert!(tokens <= cache.len());
    if tokens == 0 {
        return;
    }
    let past = cache.len() - tokens;
    let blocks = visible(spec, past).start / KEYS..cache.len().div_ceil(KEYS);
    let small = tokens * blocks.len() * KEYS * shape.q_width < SMALL;
    let queries = Queries { cpu, spec, shape, q, cache, sinks, past };

    let parts = if tokens <= shape.query_tokens() { TASKS.div_ceil(shape.kv_heads) } else { 1 };
    let length = blocks.len().div_ceil(parts).max(PART);
    let parts = blocks.len().div_ceil(length);
    if parts < 2 {
        let tasks = tasks(&shape, tokens, blocks, y);
        return run(&cpu.team, tasks, small, |task| queries.part(task));
    }
    let rows = tokens * spec.heads;
    let mut outputs = vec![0.0; parts * y.len()];
    let mut so_far = vec![SoFar::START; parts * rows];
    let mut all = Vec::with_capacity(parts * shape.kv_heads);
    let group = tokens * shape.group;
    for (i, (y, so_far)) in outputs.chunks_exact_mut(y.len()).zip(so_far.chunks_exact_mut(rows)).enumerate() {
        let first = blocks.start + i * length;
        let mut part = tasks(&shape, tokens, first..blocks.end.min(first + length), y);
        for (task, so_far) in part.iter_mut().zip(so_far.chunks_exact_mut(group)) {
            task.so_far = Some(so_far);
        }
        all.append(&mut part);
    }
    run(&cpu.team, all, small, |task| queries.part(task));
    for (i, y) in y.chunks_exact_mut(shape.head_dim).enumerate() {
        // They lie as tasks have them: by group, then token.
        let (t, head) = (i / spec.heads, i % spec.heads);
        let row = head / shape.group * group + t * shape.group + head % shape.group;
        let so_far = so_far.iter().skip(row).step_by(rows);
        combine(SoFar::begin(sinks, head), so_far, outputs.chunks_exact(shape.head_dim).skip(i).step_by(rows), y);
    }
}

/// `y = sum_i e^(max_i - m) y_i / sum_i e^(max_i - m) sum_i` over the parts `i`, with `m` the largest `max_i`; `begin` is what
/// was there before the first, and has no output.
fn combine<'a>(
    begin: SoFar,
    so_far: impl Iterator<Item = &'a SoFar> + Clone,
    parts: impl Iterator<Item = &'a [f32]>,
    y: &mut [f32],
) {
    let max = so_far.clone().fold(begin.max, |max, row| max.max(row.max));
    let weight = |row: &SoFar| if row.max == max { 1.0 } else { f64::from(row.max - max).exp() };
    let sum: f64 = so_far.clone().map(|row| weight(row) * row.sum).sum();
    let sum = weight(&begin) * begin.sum + sum;
    y.fill(0.0);
    for (row, part) in so_far.zip(parts) {
        let factor = (weight(row) / sum) as f32;
        update(y, [part], |y, [part]| y + factor * part);
    }
}

/// Cuts the outputs `y` of all tokens into tasks over `blocks`.
fn tasks<'a>(shape: &Shape, tokens: usize, blocks: Range<usize>, y: &'a mut [f32]) -> Vec<Task<'a>> {
    let block = shape.query_tokens();
    let mut tasks = Vec::with_capacity(tokens.div_ceil(block) * shape.kv_heads);
    for token in (0..tokens).step_by(block) {
        let rows = block.min(tokens - token) * shape.group;
        tasks.extend((0..shape.kv_heads).map(|kv_head| {
            let y = Vec::with_capacity(rows);
            Task { token, kv_head, blocks: blocks.clone(), y, so_far: None }
        }));
    }
    for (i, y) in y.chunks_exact_mut(shape.head_dim).enumerate() {
        let (token, kv_head) = (i / shape.group / shape.kv_heads, i / shape.group % shape.kv_heads);
        tasks[token / block * shape.kv_heads + kv_head].y.push(y);
    }
    tasks
}

/// What all tasks read.
struct Queries<'a> {
    cpu: &'a Cpu,
    spec: &'a Attention,
    shape: Shape,
    q: &'a [f32],
    cache: &'a Cache,
    sinks: Option<&'a [f32]>,
    /// Tokens in the cache before the first query's.
    past: usize,
}

impl Queries<'_> {
    /// One task.
    fn part(&self, mut task: Task) {
        let Shape { group, head_dim: d, q_width, .. } = self.shape;
        let table = self.cpu.table;
        let mut softmax = OnlineSoftmax::new(table.light(), self.spec.softcap, d, task.y.len());
        for (i, y) in task.y.iter_mut().enumerate() {
            let (t, head) = (task.token + i / group, task.kv_head * group + i % group);
            // Where parts are put together, that is where sinks come in.
            let begin = SoFar::begin(self.sinks.filter(|_| task.so_far.is_none()), head);
            let q = &self.q[t * q_width + head * d..][..d];
            softmax.push(q, self.spec.scale, visible(self.spec, self.past + t), begin);
            y.fill(0.0);
        }
        let span = softmax.span();
        let blocks = task.blocks.start.max(span.start / KEYS)..task.blocks.end.min(span.end.div_ceil(KEYS));
        if task.y.len() < MANY {
            for block in blocks {
                self.narrow(block, &span, &mut softmax, &mut task);
            }
        } else {
            with_scratch(2 * KEYS * d, |scratch| {
                for block in blocks {
                    self.wide(block, &span, &mut softmax, &mut task, scratch);
                }
            });
        }
        match task.so_far {
            Some(so_far) => so_far.iter_mut().zip(softmax.so_far()).for_each(|(to, from)| *to = from),
            None => softmax.finish(&mut task.y),
        }
    }

    fn narrow(&self, block: usize, span: &Range<usize>, softmax: &mut OnlineSoftmax, task: &mut Task) {
        let (table, first) = (self.cpu.table, block * KEYS);
        let count = KEYS.min(span.end - first);
        let keys = self.cache.keys(block, task.kv_head, columns(count));
        let values = self.cache.values(block, task.kv_head, count);
        softmax.step(
            first,
            count,
            columns(count),
            self.cache.scales(block, task.kv_head),
            |queries, scores| table.tile_axpy_narrow(queries, keys, scores),
            |p, y| table.tile_axpy_narrow(p, values, y),
            &mut task.y,
        );
    }

    fn wide(
        &self,
        block: usize,
        span: &Range<usize>,
        softmax: &mut OnlineSoftmax,
        task: &mut Task,
        scratch: &mut [f32],
    ) {
        let (table, first, d) = (self.cpu.table, block * KEYS, self.shape.head_dim);
        let count = KEYS.min(span.end - first);
        let (k, v) = scratch.split_at_mut(KEYS * d);
        self.cache.decode(table, block, task.kv_head, k, v);
        let keys = Rows::new(k, KEYS, d, columns(count));
        let values = Rows::new(v, d, count, d);
        softmax.step(
            first,
            count,
            columns(count),
            None,
            |queries, scores| table.tile_axpy(queries, keys, scores),
            |p, y| table.tile_axpy(p, values, y),
            &mut task.y,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CacheType;
    use crate::cpu::cache::BLOCK;

    const SPEC: Attention = Attention { heads: 4, kv_heads: 2, head_dim: 8, scale: 0.4, softcap: None, window: None };
    const WIDTH: usize = 16;

    /// Rows of `[-1, 1)` that differ from each other.
    fn rows(tokens: usize, width: usize, seed: usize) -> Vec<f32> {
        (0..tokens * width).map(|i| ((i + seed) * 7919 % 1009) as f32 / 504.5 - 1.0).collect()
    }

    /// Two caches that get the same tokens, one of which drops what its window has passed.
    struct Pair {
        cpu: Cpu,
        spec: Attention,
        all: Cache,
        windowed: Cache,
    }

    impl Pair {
        fn new(dtype: CacheType, window: usize) -> Self {
            let new = |window| Cache::new(SPEC.kv_heads, SPEC.head_dim, dtype, window);
            let spec = Attention { window: Some(window), ..SPEC };
            Self { cpu: Cpu::new(1), spec, all: new(None), windowed: new(Some(window)) }
        }

        /// Appends so many tokens and compares what their queries get.
        fn step(&mut self, tokens: usize, seed: usize) {
            let (k, v, q) =
                (rows(tokens, WIDTH, seed), rows(tokens, WIDTH, seed + 5), rows(tokens, 2 * WIDTH, seed + 9));
            let outputs = [&mut self.all, &mut self.windowed].map(|cache| {
                cache.append(self.cpu.table.light(), &k, &v, 0..tokens).unwrap();
                let mut y = vec![f32::NAN; q.len()];
                forward(&self.cpu, &self.spec, &q, cache, None, &mut y, 0..tokens);
                y
            });
            assert_eq!(outputs[0], outputs[1], "window {:?} at {}", self.spec.window, self.all.len());
            assert_eq!(self.all.len(), self.windowed.len());
        }

        /// Most tokens that the windowed cache may hold after so many new ones.
        fn assert_small(&self, tokens: usize) {
            let held = self.windowed.bytes() * self.all.len() / self.all.bytes();
            let most = self.spec.window.unwrap() + BLOCK + tokens;
            assert!(held < most, "{held} of {} tokens held, expected less than {most}", self.all.len());
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "too long")]
    fn a_window_changes_no_number_and_holds_no_more_than_it_needs() {
        for dtype in [CacheType::F32, CacheType::F16, CacheType::I8] {
            for window in [1, 5, 63, 64, 65, 130] {
                let mut pair = Pair::new(dtype, window);
                for (seed, tokens) in [1, 62, 2, 1, 1, 130, 64, 300, 1, 3, 64, 63, 1].into_iter().enumerate() {
                    pair.step(tokens, seed);
                    pair.assert_small(tokens);
                }
                for seed in 20..20 + 2 * BLOCK {
                    pair.step(1, seed);
                    pair.assert_small(1);
                }
                let (kv_heads, len) = (pair.spec.kv_heads, pair.all.len());
                let most = |window| Cache::most_bytes(kv_heads, pair.spec.head_dim, dtype, window, len);
                assert_eq!(pair.all.bytes(), most(None));
                // The memory of the long steps went back.
                let most = most(Some(window));
                assert!(pair.windowed.bytes() <= most && most < pair.all.bytes(), "{window}");
                assert!(pair.windowed.capacity() <= most * 3 / 2 + 128, "{} of {most}", pair.windowed.capacity());
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "too long")]
    fn a_windowed_cache_goes_back_as_far_as_its_keys_reach() {
        let mut pair = Pair::new(CacheType::F16, 70);
        pair.step(300, 1);
        pair.step(1, 2);
        // The query at 300 saw tokens from 231 on, so blocks are held from 192 on: enough for a query at 261 or later.
        for len in [301, 299, 270, 262, 261] {
            assert_eq!([pair.all.rewind(len), pair.windowed.rewind(len)], [len, len]);
            pair.step(3, len);
        }
        assert_eq!(pair.windowed.rewind(260), 0);
        assert_eq!((pair.windowed.len(), pair.windowed.bytes()), (0, 0));
        // And begins anew.
        pair.all.rewind(0);
        pair.step(200, 3);
        pair.assert_small(200);
    }
}
