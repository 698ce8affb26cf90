//! A backend without memory or numbers, which counts what the CPU backend would hold: the same calls that train on a
//! device tell here, in microseconds, what they will take.
//!
//! A buffer is a place in an endless region, so that [`Backend::cut`] and [`Backend::join`] do what they do on the CPU.
//! Nothing is computed; what is read is zero.

use crate::cpu::{
    BAND, Scratch, attention_bytes, attention_vjp_scratch, linear_cross_entropy_bytes, matmul_bytes, matmul_scratch,
    vjp_w_scratch,
};
use crate::{
    AdamW, Arithmetic, Attention, Backend, CacheType, Error, Lion, LowRank, MatrixSource, Product, Sgd, WorkType,
};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Floats of a cache line, to which parts of a region are aligned.
const LINE: usize = 16;

/// See the module's text.
#[derive(Debug, Default)]
pub struct Counted {
    /// Threads of the device that is counted for.
    threads: usize,
    /// Regions made.
    made: AtomicUsize,
    /// Floats up to the highest end of a part of the first region and of all others.
    high: [AtomicUsize; 2],
    /// Bytes of the largest activations in 16 bits, which stay.
    rounded: AtomicUsize,
    /// Bytes that single operations take while they run: products, attention, loss.
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
    /// Counts for the CPU on `threads` threads.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self { threads, ..Self::default() }
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

    /// Notes a product of activations of so many tokens, of which `width` are multiplied, with a weight `[O, K]` and
    /// adapters of `ranks`.
    fn product(&self, arithmetic: Arithmetic, tokens: usize, width: usize, shape: (usize, usize), ranks: &[usize]) {
        let (rounded, passing) = matmul_bytes(arithmetic, tokens, [width].into_iter().chain(ranks.iter().copied()));
        self.rounded.fetch_max(rounded, Ordering::Relaxed);
        self.products.fetch_max(passing, Ordering::Relaxed);
        self.scratch(matmul_scratch(arithmetic, tokens, shape, ranks.iter().sum()));
    }

    fn scratch(&self, scratch: Scratch) {
        for panels in &self.panels[..1 + usize::from(scratch.all)] {
            for (most, bytes) in panels.iter().zip(scratch.bytes) {
                most.fetch_max(bytes, Ordering::Relaxed);
            }
        }
    }
}

impl Backend for Counted {
    type Buffer = Span;
    type Matrix = Shape;
    type Cache = ();
    type Codes = ();

    fn scope<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        work()
    }

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

    fn embed(&self, _table: &Shape, _ids: &[u32], _y: &mut Span) {}

    fn gather_rows(&self, _x: &Span, _rows: &[u32], _y: &mut Span) {}

    fn scatter_add_rows(&self, _x: &Span, _rows: &[u32], _y: &mut Span) {}

    fn matmul(&self, arithmetic: Arithmetic, w: &Shape, x: &Span, _y: &mut Span, _accumulate: bool) {
        self.product(arithmetic, x.len / w.1.max(1), w.1, (w.0, w.1), &[]);
    }

    fn matmul_group(&self, arithmetic: Arithmetic, x: &Span, products: &mut [Product<'_, Self>]) -> Result<(), Error> {
        for Product { w, low_rank, .. } in products {
            let tokens = x.len / w.1.max(1);
            let ranks: Vec<usize> = low_rank.iter().map(|term| term.a.0).collect();
            self.product(arithmetic, tokens, w.1, (w.0, w.1), &ranks);
            for LowRank { a, .. } in low_rank {
                self.scratch(matmul_scratch(arithmetic, tokens, (a.0, a.1), 0));
                let (_, slices) = matmul_bytes(arithmetic, tokens, [a.0].into_iter());
                self.products.fetch_max(tokens * a.0 * size_of::<f32>() + slices, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn matmul_vjp_x(&self, arithmetic: Arithmetic, w: &Shape, dy: &Span, _dx: &mut Span, _accumulate: bool) {
        self.product(arithmetic, dy.len / w.0.max(1), w.0, (w.0, w.1), &[]);
    }

    fn matmul_vjp_x_sum(&self, arithmetic: Arithmetic, terms: &[(&Shape, &Span)], _dx: &mut Span, _accumulate: bool) {
        let Some(((w, dy), more)) = terms.split_first() else { return };
        let ranks: Vec<usize> = more.iter().map(|(a, _)| a.0).collect();
        self.product(arithmetic, dy.len / w.0.max(1), w.0, (w.0, w.1), &ranks);
    }

    fn matmul_vjp_w(&self, tokens: usize, dy: &Span, x: &Span, _dw: &mut Span) {
        let tokens = tokens.max(1);
        self.scratch(vjp_w_scratch(dy.len / tokens, x.len / tokens));
    }

    fn add_bias(&self, _bias: &Span, _y: &mut Span) {}

    fn add(&self, _a: &Span, _b: &Span, _y: &mut Span) {}

    fn add_assign(&self, _x: &Span, _y: &mut Span) {}

    fn scale(&self, _factor: f32, _x: &mut Span) {}

    fn dropout(&self, _p: f32, _key: u64, _first: u64, _x: &Span, _y: &mut Span) {}

    fn copy(&self, _x: &Span, _y: &mut Span) {}

    fn narrow(&self, _width: usize, _x: &Span, _y: &mut Span) {}

    fn widen(&self, _width: usize, _x: &Span, _y: &mut Span) {}

    fn zero(&self, _x: &mut Span) {}

    fn rms_norm(&self, _w: &Span, _eps: f32, _x: &Span, _y: &mut Span) {}

    fn rms_norm_vjp_x(&self, _w: &Span, _eps: f32, _x: &Span, _dy: &Span, _dx: &mut Span) {}

    fn rope(&self, _: usize, _: usize, _cos: &Span, _sin: &Span, _x: &Span, _inverse: bool, _y: &mut Span) {}

    fn geglu(&self, _gate: &Span, _up: &Span, _y: &mut Span) {}

    fn geglu_vjp(&self, _gate: &Span, _up: &Span, _dy: &Span, _dgate: &mut Span, _dup: &mut Span) {}

    fn swiglu(&self, _gate: &Span, _up: &Span, _y: &mut Span) {}

    fn swiglu_vjp(&self, _gate: &Span, _up: &Span, _dy: &Span, _dgate: &mut Span, _dup: &mut Span) {}

    fn swiglu_vjp_in_place(&self, _dy: &Span, _gate: &mut Span, _up: &mut Span) {}

    fn attention(
        &self,
        spec: &Attention,
        segments: &[usize],
        _q: &Span,
        _k: &Span,
        _v: &Span,
        _y: &mut Span,
        _lse: &mut Span,
    ) {
        self.attention.fetch_max(attention_bytes(spec, segments).0, Ordering::Relaxed);
    }

    fn attention_vjp(
        &self,
        spec: &Attention,
        segments: &[usize],
        _q: &Span,
        _k: &Span,
        _v: &Span,
        _y: &Span,
        _lse: &Span,
        _dy: &Span,
        _dq: &mut Span,
        _dk: &mut Span,
        _dv: &mut Span,
    ) {
        self.attention.fetch_max(attention_bytes(spec, segments).1, Ordering::Relaxed);
        self.scratch(attention_vjp_scratch(spec, segments));
    }

    fn cache(&self, _kv_heads: usize, _head_dim: usize, _dtype: CacheType) {}

    fn cache_len(&self, _cache: &()) -> usize {
        0
    }

    fn cache_append(&self, _cache: &mut (), _k: &Span, _v: &Span) -> Result<(), Error> {
        Ok(())
    }

    fn cache_truncate(&self, _cache: &mut (), _len: usize) {}

    fn attention_cached(&self, _spec: &Attention, _q: &Span, _cache: &(), _y: &mut Span) {}

    fn cross_entropy(&self, _targets: &[u32], _scale: f32, _logits: &mut Span, _losses: &mut Span) {}

    fn linear_cross_entropy(
        &self,
        arithmetic: Arithmetic,
        w: &Shape,
        targets: &[u32],
        _scale: f32,
        _x: &Span,
        _losses: &mut Span,
        _dx: Option<&mut Span>,
    ) -> Result<(), Error> {
        self.loss.fetch_max(linear_cross_entropy_bytes(targets.len(), w.1, w.0), Ordering::Relaxed);
        self.scratch(matmul_scratch(arithmetic, targets.len(), (w.0.min(BAND), w.1), 0));
        Ok(())
    }

    fn linear_cross_entropy_bytes(&self, rows: usize, width: usize, vocab: usize) -> usize {
        linear_cross_entropy_bytes(rows, width, vocab)
    }

    fn sum_squares(&self, _x: &Span) -> Result<f64, Error> {
        Ok(0.0)
    }

    fn adamw(&self, _step: &AdamW, _grad: &Span, _param: &mut Span, _m: &mut Span, _v: &mut Span) {}

    fn sgd(&self, _step: &Sgd, _grad: &Span, _param: &mut Span, _m: Option<&mut Span>) {}

    fn lion(&self, _step: &Lion, _grad: &Span, _param: &mut Span, _m: &mut Span) {}

    fn codes(&self, _len: usize, _signed: bool) -> Result<(), Error> {
        Ok(())
    }

    fn read_codes(&self, _src: &(), codes: &mut [u8], absmax: &mut [f32]) -> Result<(), Error> {
        codes.fill(0);
        absmax.fill(0.0);
        Ok(())
    }

    fn codes_len(&self, _codes: &()) -> usize {
        0
    }

    fn write_codes(&self, _dst: &mut (), _codes: &[u8], _absmax: &[f32]) {}

    fn adamw8(&self, _step: &AdamW, _grad: &Span, _param: &mut Span, _m: &mut (), _v: &mut ()) {}
}
