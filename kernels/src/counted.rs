//! A backend without memory or numbers, which counts what the CPU backend would hold: the same calls that train on a
//! device tell here, in microseconds, what they will take.
//!
//! A buffer is a place in an endless region, so that [`Memory::cut`] and [`Memory::join`] do what they do on the CPU.
//! Nothing is computed; what is read is zero.

use crate::cpu::{Table, cost};
use crate::{Backend, CacheType, Call, Error, MatrixSource, Memory, WorkType};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Floats of a cache line, to which parts of a region are aligned.
const LINE: usize = 16;

/// See the module's text.
pub struct Counted {
    /// Kernels and threads of the device that is counted for.
    table: &'static Table,
    threads: usize,
    /// Regions made.
    made: AtomicUsize,
    /// Floats up to the highest end of a part of the first region and of all others.
    high: [AtomicUsize; 2],
    /// Bytes of the largest activations in 16 bits, which stay.
    rounded: AtomicUsize,
    /// Bytes that single calls take while they run: products and all others, attention, loss.
    products: AtomicUsize,
    attention: AtomicUsize,
    loss: AtomicUsize,
    /// Bytes of panels in f32 and in bf16 that the thread which calls keeps, and those that each other keeps.
    panels: [[AtomicUsize; 2]; 2],
}

/// Bytes that were counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// Of the first region and of the others, up to the highest in use.
    pub regions: [usize; 2],
    /// That attention takes while it runs.
    pub attention: usize,
    /// That a loss without logits takes while it runs.
    pub loss: usize,
    /// That products take, and threads keep for them.
    pub kernels: usize,
}

/// A place in the region, or a buffer by itself.
#[derive(Debug)]
pub struct Span {
    region: usize,
    at: usize,
    len: usize,
    /// Floats up to the next part; 0 for a buffer by itself.
    extent: usize,
}

/// `(O, K)`, with the values of a matrix that is its own master.
#[derive(Debug)]
pub struct Shape(usize, usize, Span);

impl Counted {
    /// Counts for [`crate::Cpu`] with the kernels of `table` on `threads` threads.
    #[must_use]
    pub fn new(table: &'static Table, threads: usize) -> Self {
        Self {
            table,
            threads,
            made: AtomicUsize::default(),
            high: Default::default(),
            rounded: AtomicUsize::default(),
            products: AtomicUsize::default(),
            attention: AtomicUsize::default(),
            loss: AtomicUsize::default(),
            panels: Default::default(),
        }
    }

    /// What was counted so far.
    #[must_use]
    pub fn count(&self) -> Count {
        let get = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        let [own, other] = self.panels.each_ref().map(|panels| panels.iter().map(get).sum::<usize>());
        Count {
            regions: [0, 1].map(|region| get(&self.high[region]) * size_of::<f32>()),
            attention: get(&self.attention),
            loss: get(&self.loss),
            kernels: get(&self.rounded) + get(&self.products) + own + self.threads.saturating_sub(1) * other,
        }
    }
}

impl Memory for Counted {
    type Buffer = Span;
    type Matrix = Shape;
    type Cache = ();
    type Codes = ();

    fn buffer(&self, len: usize) -> Result<Span, Error> {
        Ok(Span { region: 0, at: 0, len, extent: 0 })
    }

    fn len(&self, buffer: &Span) -> usize {
        buffer.len
    }

    fn region(&self, _len: usize) -> Result<Span, Error> {
        // One that no run fills, so that all its parts are cut from one.
        let extent = usize::MAX / 64 * LINE;
        let region = self.made.fetch_add(1, Ordering::Relaxed).min(1);
        Ok(Span { region, at: 0, len: extent, extent })
    }

    fn capacity(&self, buffer: &Span) -> usize {
        buffer.extent.max(buffer.len)
    }

    fn cut(&self, buffer: Span, len: usize) -> Result<(Span, Option<Span>), Span> {
        if len > buffer.extent {
            return Err(buffer);
        }
        let extent = len.next_multiple_of(LINE);
        self.high[buffer.region].fetch_max(buffer.at + extent, Ordering::Relaxed);
        let left = buffer.extent - extent;
        let Span { region, at, .. } = buffer;
        let rest = (left > 0).then_some(Span { region, at: at + extent, len: left, extent: left });
        Ok((Span { region, at, len, extent }, rest))
    }

    fn join(&self, first: Span, second: Span) -> Result<Span, (Span, Span)> {
        let apart = first.region != second.region || first.at + first.extent != second.at;
        if apart || first.extent == 0 || second.extent == 0 {
            return Err((first, second));
        }
        let extent = first.extent + second.extent;
        Ok(Span { region: first.region, at: first.at, len: extent, extent })
    }

    fn address(&self, buffer: &Span) -> usize {
        buffer.at
    }

    fn write(&self, dst: &mut Span, src: &[f32]) {
        assert_eq!(dst.len, src.len());
    }

    fn read(&self, src: &Span, dst: &mut [f32]) -> Result<(), Error> {
        assert_eq!(src.len, dst.len());
        dst.fill(0.0);
        Ok(())
    }

    fn matrix(&self, source: MatrixSource) -> Result<Shape, Error> {
        Ok(Shape(source.rows, source.cols, self.buffer(0)?))
    }

    fn work_matrix(&self, rows: usize, cols: usize, _dtype: WorkType) -> Result<Shape, Error> {
        Ok(Shape(rows, cols, self.buffer(rows.saturating_mul(cols))?))
    }

    fn set_matrix(&self, _dst: &mut Shape, _master: &Span) {}

    fn with_values(&self, matrix: &mut Shape, work: &mut dyn FnMut(&mut Span)) {
        work(&mut matrix.2);
    }

    fn read_matrix(&self, _matrix: &Shape, dst: &mut [f32]) -> Result<(), Error> {
        dst.fill(0.0);
        Ok(())
    }

    fn shape(&self, matrix: &Shape) -> (usize, usize) {
        (matrix.0, matrix.1)
    }

    fn cache(&self, _kv_heads: usize, _head_dim: usize, _dtype: CacheType, _window: Option<usize>) {}

    fn cache_len(&self, _cache: &()) -> usize {
        0
    }

    fn cache_rewind(&self, _cache: &mut (), len: usize) -> usize {
        len
    }

    fn codes(&self, _len: usize, _signed: bool) -> Result<(), Error> {
        Ok(())
    }

    fn codes_len(&self, _codes: &()) -> usize {
        0
    }

    fn read_codes(&self, _src: &(), codes: &mut [u8], absmax: &mut [f32]) -> Result<(), Error> {
        codes.fill(0);
        absmax.fill(0.0);
        Ok(())
    }

    fn write_codes(&self, _dst: &mut (), _codes: &[u8], _absmax: &[f32]) {}
}

impl Backend for Counted {
    fn run(&self, call: Call<'_, Self>) -> Result<(), Error> {
        let cost = cost(self.table, self, &call);
        let passing = match call {
            Call::Attention { .. } | Call::AttentionVjp { .. } => &self.attention,
            Call::LinearCrossEntropy { .. } => &self.loss,
            _ => &self.products,
        };
        passing.fetch_max(cost.passing, Ordering::Relaxed);
        self.rounded.fetch_max(cost.rounded, Ordering::Relaxed);
        for (panels, bytes) in self.panels.iter().zip([cost.own, cost.others]) {
            for (most, bytes) in panels.iter().zip(bytes) {
                most.fetch_max(bytes, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn threads(&self) -> usize {
        self.threads
    }

    fn table(&self) -> &'static Table {
        self.table
    }
}
