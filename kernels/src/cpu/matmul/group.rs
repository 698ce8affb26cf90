//! Several products of the same activations, with the low-rank terms of adapters, in one job for the threads.
//!
//! With one token the rows of all weights are tasks of one job. After its first stretch of rows every thread takes from the
//! down-projections of adapters, so that whoever has computed a stretch can add the up-projection to it right there, while
//! it is in cache, and `y` is touched once.

use super::super::Cpu;
use super::super::elementwise::{add_part, scale_part};
use super::super::matrix::{Elements, Matrix};
use super::super::q8::{Down, GROUP, Hidden, Q8, Up};
use super::super::split::{run, with_scratch};
use super::one::{OneToken, rows_per_task};
use super::{forward, q8};
use crate::cpu::Buffer;
use crate::{Arithmetic, Error, FloatType, LowRank, Product};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// Rows of a down-projection in a task: what one of them computes is rounded with one unit.
const DOWN_ROWS: usize = GROUP;

/// See [`crate::Call::MatmulGroup`].
pub(crate) fn group(
    cpu: &Cpu,
    arithmetic: Arithmetic,
    x: &Buffer,
    products: &mut [Product<'_, Cpu>],
) -> Result<(), Error> {
    let Some(first) = products.first() else { return Ok(()) };
    let (_, k) = first.w.shape();
    let tokens = x.len().checked_div(k).unwrap_or(0);
    assert!(products.iter().all(|p| p.w.shape().1 == k && (k == 0 || tokens * p.w.shape().0 == p.y.len())));
    if products.iter().flat_map(|p| &p.low_rank).any(|term| term.rows_of(tokens) != (0..tokens)) {
        return by_rows(cpu, arithmetic, x, products);
    }
    let dense = |m: &Matrix| matches!(m.elements(), Elements::Dense(..));
    let fusible = products.iter().flat_map(|p| &p.low_rank).all(|l| dense(l.a) && dense(l.b));
    if k > 0 && x.len() == k && fusible {
        return one_token(cpu, arithmetic, x, products);
    }
    if arithmetic == Arithmetic::Bf16 && super::takes_bf16(cpu, tokens, k) {
        return super::bf16::group(cpu, x, products);
    }
    // Activations are rounded once for all.
    let eight = (k > 0 && arithmetic == Arithmetic::Int8 && products.iter().any(|p| q8::fits(p.w)) && x.len() > k)
        .then(|| Q8::new(cpu, x, k));
    for Product { w, low_rank, y } in products {
        match &eight {
            Some(x) if q8::fits(w) => q8::forward(cpu, w, x, y, false),
            _ => forward(cpu, arithmetic, w, x, y, false),
        }
        for term in &*low_rank {
            add_term(cpu, arithmetic, term, x, y)?;
        }
    }
    Ok(())
}

/// Products of a batch whose rows do not all have the same terms: the weights multiply all rows at once, then every term
/// its own.
fn by_rows(cpu: &Cpu, arithmetic: Arithmetic, x: &Buffer, products: &mut [Product<'_, Cpu>]) -> Result<(), Error> {
    let mut alone = Vec::with_capacity(products.len());
    alone.extend(products.iter_mut().map(|p| Product { w: p.w, low_rank: Vec::new(), y: &mut *p.y }));
    group(cpu, arithmetic, x, &mut alone)?;
    for Product { low_rank, y, .. } in products {
        for term in &*low_rank {
            add_term(cpu, arithmetic, term, x, y)?;
        }
    }
    Ok(())
}

/// Adds a low-rank term to its rows of `y`.
fn add_term(cpu: &Cpu, arithmetic: Arithmetic, term: &LowRank<'_, Cpu>, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
    let LowRank { a, b, scale, .. } = term;
    let (rank, k) = a.shape();
    let rows = term.rows_of(x.len().checked_div(k).unwrap_or(0));
    let (o, _) = b.shape();
    let mut h = Buffer::zeros(rows.len() * rank)?;
    forward(cpu, arithmetic, a, &x[rows.start * k..rows.end * k], &mut h, false);
    super::super::elementwise::scale(&cpu.team, *scale, &mut h);
    forward(cpu, arithmetic, b, &h, &mut y[rows.start * o..rows.end * o], true);
    Ok(())
}

/// The factors of one low-rank term.
enum Factors<'a> {
    /// In 8 bits, beside a weight that is multiplied so.
    Eight {
        a: &'a Down,
        b: &'a Up,
    },
    Dense {
        a: (FloatType, &'a [u8]),
        b: (FloatType, &'a [u8]),
    },
}

/// One low-rank term on its way.
struct Low<'a> {
    factors: Factors<'a>,
    scale: f32,
    rank: usize,
    /// Number of its first task; each has [`DOWN_ROWS`] of its rows.
    first: usize,
}

/// All of a group's down-projections, cut into tasks.
struct Downs<'a> {
    x: &'a OneToken<'a>,
    lows: Vec<Low<'a>>,
    /// `scale A x` of terms in floats, as bits, [`DOWN_ROWS`] for each task: several threads fill it, all read it.
    h: Vec<AtomicU32>,
    /// That of terms in 8 bits, one for each task.
    rounded: Vec<Hidden>,
    tasks: usize,
    /// Tasks that somebody has taken, and more where threads found none left.
    taken: AtomicUsize,
    done: AtomicUsize,
}

/// Counts a task as done even if it panics, for others wait for the count.
struct Count<'a>(&'a AtomicUsize);

impl Drop for Count<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Release);
    }
}

impl<'a> Downs<'a> {
    fn new<'t>(x: &'a OneToken<'a>, terms: impl Iterator<Item = &'t LowRank<'t, Cpu>>) -> Self {
        let (count, rank) = terms.fold((0, 0), |(count, rank), term| (count + 1, rank + term.a.shape().0));
        Self {
            x,
            lows: Vec::with_capacity(count),
            h: Vec::new(),
            rounded: Vec::with_capacity(count + rank / DOWN_ROWS),
            tasks: 0,
            taken: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
        }
    }

    fn push(&mut self, cpu: &Cpu, term: &LowRank<'a, Cpu>) -> Result<(), Error> {
        let LowRank { a, b, scale, .. } = *term;
        let eight = match self.x.q8() {
            Some(_) => a.down(cpu)?.zip(b.up(cpu)?),
            None => None,
        };
        let factors = match (eight, a.elements(), b.elements()) {
            (Some((a, b)), ..) => Factors::Eight { a, b },
            (None, Elements::Dense(a_type, a), Elements::Dense(b_type, b)) => {
                Factors::Dense { a: (a_type, a), b: (b_type, b) }
            }
            _ => unreachable!("only terms of floats are fused"),
        };
        let ((rank, _), first) = (a.shape(), self.tasks);
        self.tasks += rank.div_ceil(DOWN_ROWS);
        match factors {
            Factors::Eight { .. } => self.rounded.resize_with(self.tasks, Default::default),
            Factors::Dense { .. } => self.h.resize_with(self.tasks * DOWN_ROWS, Default::default),
        }
        self.lows.push(Low { factors, scale, rank, first });
        Ok(())
    }

    /// Does the tasks that nobody has taken yet, then waits for those that others have in hand.
    #[inline]
    fn finish(&self, cpu: &Cpu) {
        // Most come when all is done.
        if self.done.load(Ordering::Acquire) < self.tasks {
            self.work(cpu);
        }
    }

    #[cold]
    fn work(&self, cpu: &Cpu) {
        loop {
            let task = self.taken.fetch_add(1, Ordering::Relaxed);
            if task >= self.tasks {
                break;
            }
            let _count = Count(&self.done);
            self.task(cpu, task);
        }
        while self.done.load(Ordering::Acquire) < self.tasks {
            std::hint::spin_loop();
        }
    }

    fn task(&self, cpu: &Cpu, number: usize) {
        let low = self.lows.iter().rfind(|low| low.first <= number).expect("the first term begins with task 0");
        let Low { factors, scale, rank, first } = low;
        let (tile, row) = (number - first, (number - first) * DOWN_ROWS);
        let (mut all, count) = ([0.0; DOWN_ROWS], DOWN_ROWS.min(rank - row));
        match factors {
            Factors::Eight { a, .. } => {
                cpu.table.q8_down(a, tile, self.x.q8().expect("asked for in `push`"), &mut all);
                scale_part(*scale, &mut all);
                self.rounded[number].set(&all[..count]);
            }
            Factors::Dense { a: (dtype, bytes), .. } => {
                let (size, sums) = (self.x.x().len() * dtype.size(), &mut all[..count]);
                cpu.table.dense_matvec(*dtype, &bytes[row * size..][..count * size], self.x.x(), sums);
                scale_part(*scale, sums);
                let h = &self.h[number * DOWN_ROWS..];
                h.iter().zip(sums).for_each(|(h, sum)| h.store(sum.to_bits(), Ordering::Relaxed));
            }
        }
    }

    /// `y += B h` for the rows of `B` from `row` on.
    fn add(&self, cpu: &Cpu, low: &Low, row: usize, y: &mut [f32]) {
        match &low.factors {
            Factors::Eight { b, .. } => {
                let h = &self.rounded[low.first..][..low.rank.div_ceil(DOWN_ROWS)];
                cpu.table.q8_add_columns(b, row, h, y);
            }
            Factors::Dense { b: (dtype, b), .. } => with_scratch(low.rank + y.len(), |scratch| {
                let (h, sums) = scratch.split_at_mut(low.rank);
                h.iter_mut()
                    .zip(&self.h[low.first * DOWN_ROWS..])
                    .for_each(|(h, bits)| *h = f32::from_bits(bits.load(Ordering::Relaxed)));
                let size = low.rank * dtype.size();
                cpu.table.dense_matvec(*dtype, &b[row * size..][..y.len() * size], h, sums);
                add_part(sums, y);
            }),
        }
    }
}

fn one_token(cpu: &Cpu, arithmetic: Arithmetic, x: &[f32], products: &mut [Product<'_, Cpu>]) -> Result<(), Error> {
    let token = OneToken::new(cpu, arithmetic, x, products.iter().map(|p| p.w));
    let total = products.iter().map(|p| p.y.len()).sum();
    let rows = rows_per_task(x.len(), total);
    let mut down = Downs::new(&token, products.iter().flat_map(|p| &p.low_rank));
    let mut tasks = Vec::with_capacity(total / rows + products.len());
    if token.q8().is_some() {
        // In the order in which they are read: see the shelf.
        for term in products.iter().flat_map(|p| &p.low_rank) {
            term.a.down(cpu)?;
        }
    }
    for Product { w, low_rank, y } in products {
        let first = down.lows.len();
        for term in low_rank.iter().filter(|term| term.a.shape().0 > 0) {
            down.push(cpu, term)?;
        }
        let lows = first..down.lows.len();
        let w: &Matrix = w;
        tasks.extend(y.chunks_mut(rows).enumerate().map(|(i, y)| (w, lows.clone(), i * rows, y)));
    }
    let small = tasks.len() < 3;
    run(&cpu.team, tasks, small, |(w, lows, row, y)| {
        let lows = &down.lows[lows];
        token.rows(cpu, w, row, y);
        if !lows.is_empty() {
            down.finish(cpu);
            lows.iter().for_each(|low| down.add(cpu, low, row, y));
        }
    });
    Ok(())
}
