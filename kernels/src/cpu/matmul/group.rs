//! Several products of the same activations, with the low-rank terms of adapters, in one job for the threads.
//!
//! With one token the rows of all weights are tasks of one job. The down-projections of adapters come first: every
//! thread takes from them before it turns to its rows, so that whoever has computed a stretch of rows can add the
//! up-projection to it right there, while it is in cache, and `y` is touched once.

use super::super::Cpu;
use super::super::elementwise::{add_part, scale_part};
use super::super::matrix::{Elements, Matrix};
use super::super::q8::Q8;
use super::super::split::{run, with_scratch};
use super::one::{OneToken, rows_per_task};
use super::{forward, q8};
use crate::cpu::Buffer;
use crate::{Arithmetic, Error, FloatType, LowRank, Product};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// Rows of a down-projection in a task.
const DOWN_ROWS: usize = 8;

/// See [`crate::Backend::matmul_group`].
pub(crate) fn group(
    cpu: &Cpu,
    arithmetic: Arithmetic,
    x: &Buffer,
    products: &mut [Product<'_, Cpu>],
) -> Result<(), Error> {
    let Some(first) = products.first() else { return Ok(()) };
    let (_, k) = first.w.shape();
    assert!(products.iter().all(|p| p.w.shape().1 == k && (k == 0 || x.len() / k * p.w.shape().0 == p.y.len())));
    let dense = |m: &Matrix| matches!(m.elements(), Elements::Dense(..));
    let fusible = products.iter().flat_map(|p| &p.low_rank).all(|l| dense(l.a) && dense(l.b));
    if k > 0 && x.len() == k && fusible {
        one_token(cpu, arithmetic, x, products);
        return Ok(());
    }
    // Activations are rounded once for all.
    let eight = (k > 0 && arithmetic == Arithmetic::Int8 && products.iter().any(|p| q8::fits(p.w)) && x.len() > k)
        .then(|| Q8::new(cpu, x, k));
    for Product { w, low_rank, y } in products {
        match &eight {
            Some(x) if q8::fits(w) => q8::forward(cpu, w, x, y, false),
            _ => forward(cpu, arithmetic, w, x, y, false),
        }
        for LowRank { a, b, scale } in low_rank {
            let tokens = x.len().checked_div(k).unwrap_or(0);
            let mut h = Buffer::zeros(tokens * a.shape().0)?;
            forward(cpu, arithmetic, a, x, &mut h, false);
            super::super::elementwise::scale(&cpu.team, *scale, &mut h);
            forward(cpu, arithmetic, b, &h, y, true);
        }
    }
    Ok(())
}

/// One low-rank term on its way.
struct Low<'a> {
    a: (FloatType, &'a [u8]),
    b: (FloatType, &'a [u8]),
    scale: f32,
    /// `scale A x`, as bits: several threads fill it, all read it.
    h: Vec<AtomicU32>,
}

/// All of a layer's down-projections, cut into tasks.
struct Down<'a> {
    lows: Vec<Low<'a>>,
    /// Index of the term and its first row.
    tasks: Vec<(usize, usize)>,
    next: AtomicUsize,
    done: AtomicUsize,
}

/// Counts a task as done even if it panics, for others wait for the count.
struct Count<'a>(&'a AtomicUsize);

impl Drop for Count<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Release);
    }
}

impl Down<'_> {
    /// Takes tasks until none is left, then waits for those that other threads have in hand.
    fn finish(&self, cpu: &Cpu, x: &[f32]) {
        // Threads in a hurry look first: most come when all is done.
        while self.done.load(Ordering::Acquire) < self.tasks.len() {
            let next = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(&(low, row)) = self.tasks.get(next) else {
                std::hint::spin_loop();
                continue;
            };
            let _count = Count(&self.done);
            let Low { a: (dtype, bytes), scale, h, .. } = &self.lows[low];
            let h = &h[row..h.len().min(row + DOWN_ROWS)];
            let mut sums = [0.0; DOWN_ROWS];
            let sums = &mut sums[..h.len()];
            let size = x.len() * dtype.size();
            cpu.table.dense_matvec(*dtype, &bytes[row * size..][..h.len() * size], x, sums);
            scale_part(*scale, sums);
            h.iter().zip(sums).for_each(|(h, sum)| h.store(sum.to_bits(), Ordering::Relaxed));
        }
    }
}

impl Low<'_> {
    /// Rows `row..row + count` of `B`.
    fn up(&self, row: usize, count: usize) -> &[u8] {
        let size = self.h.len() * self.b.0.size();
        &self.b.1[row * size..][..count * size]
    }

    /// `y += B h` for the rows of `B` from `row` on.
    fn add(&self, cpu: &Cpu, row: usize, y: &mut [f32]) {
        with_scratch(self.h.len() + y.len(), |scratch| {
            let (h, sums) = scratch.split_at_mut(self.h.len());
            h.iter_mut().zip(&self.h).for_each(|(to, h)| *to = f32::from_bits(h.load(Ordering::Relaxed)));
            cpu.table.dense_matvec(self.b.0, self.up(row, y.len()), h, sums);
            add_part(sums, y);
        });
    }
}

fn one_token(cpu: &Cpu, arithmetic: Arithmetic, x: &[f32], products: &mut [Product<'_, Cpu>]) {
    let token = OneToken::new(cpu, arithmetic, x);
    let rows = rows_per_task(x.len());
    let mut down = Down { lows: Vec::new(), tasks: Vec::new(), next: AtomicUsize::new(0), done: AtomicUsize::new(0) };
    let mut tasks = Vec::new();
    for Product { w, low_rank, y } in products {
        let first = down.lows.len();
        for LowRank { a, b, scale } in low_rank.iter() {
            let (Elements::Dense(a_type, a_bytes), Elements::Dense(b_type, b_bytes)) = (a.elements(), b.elements())
            else {
                unreachable!("only terms of floats are fused")
            };
            let (rank, _) = a.shape();
            down.tasks.extend((0..rank).step_by(DOWN_ROWS).map(|row| (down.lows.len(), row)));
            let h = (0..rank).map(|_| AtomicU32::new(0)).collect();
            down.lows.push(Low { a: (a_type, a_bytes), b: (b_type, b_bytes), scale: *scale, h });
        }
        let lows = first..down.lows.len();
        let w: &Matrix = w;
        tasks.extend(y.chunks_mut(rows).enumerate().map(|(i, y)| (w, lows.clone(), i * rows, y)));
    }
    let small = tasks.len() < 3;
    run(&cpu.team, tasks, small, |(w, lows, row, y)| {
        // On its way while the base's rows are read: too short a piece for the processor to guess.
        down.lows[lows.clone()].iter().for_each(|low| cpu.table.prefetch(low.up(row, y.len())));
        token.rows(cpu, w, row, y);
        if !lows.is_empty() {
            down.finish(cpu, x);
            down.lows[lows].iter().for_each(|low| low.add(cpu, row, y));
        }
    });
}
