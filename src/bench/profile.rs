//! Where a training step's time goes: a backend that passes every operation on and measures it.
//!
//! On a device that only records work the times are those of recording.

use super::{Options, Progress, Sessions, learn};
use crate::error::Result;
use crate::exec::Base;
use crate::format::Checkpoint;
use crate::train::Trainer;
use pocketlora_kernels::cpu::{Cpu, Table};
use pocketlora_kernels::{
    AdamW, Arithmetic, Attention, Backend, CacheType, Error, Lion, LowRank, MatrixSource, Product, Sgd, WorkType,
};
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time of a training step by operation.
#[derive(Clone, Debug, Serialize)]
pub struct Profile {
    /// Steps that were measured.
    pub steps: usize,
    /// Mean time of one, in milliseconds.
    pub step_ms: f64,
    /// What was outside of the backend's operations, as a fraction of the step.
    pub rest: f64,
    /// Operations, those that took longest first.
    pub ops: Vec<OpTime>,
}

/// One operation; products apart by the shape of their weight.
#[derive(Clone, Debug, Serialize)]
pub struct OpTime {
    /// Its name in [`Backend`].
    pub op: &'static str,
    /// `[O, K]` of the weight, or of the first one of a group.
    pub shape: Option<(usize, usize)>,
    /// Calls in a step.
    pub calls: f64,
    /// Time in a step, in milliseconds.
    pub ms: f64,
    /// Fraction of the step.
    pub share: f64,
}

/// Profiles training steps of the model that `sessions` open, the first not counted.
pub(super) fn measure(
    sessions: &Sessions<'_>,
    threads: usize,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<Profile> {
    let checkpoint = Checkpoint::open(sessions.dir)?;
    let backend = Profiled::new(Cpu::with_table(threads, Table::from_env()?));
    let base = Arc::new(Base::load(backend, &checkpoint)?);
    let run = learn::Run::new(&base, options)?;
    let (config, data, out) = (run.config, run.data, run.out.path());
    let fingerprint = checkpoint.fingerprint();
    let mut trainer = Trainer::new(Arc::clone(&base), fingerprint, None, config, data, None, None, out)?;
    let mut total = Duration::ZERO;
    let steps = learn::steps(&mut trainer, options, progress, &mut |report| match report {
        Some(report) => total += report.time,
        None => base.backend.reset(),
    })?;
    Ok(base.backend.profile(steps, total))
}

type Key = (&'static str, Option<(usize, usize)>);

/// A backend that measures the operations of another.
struct Profiled<B> {
    inner: B,
    times: Mutex<BTreeMap<Key, (u64, Duration)>>,
}

impl<B: Backend> Profiled<B> {
    fn new(inner: B) -> Self {
        Self { inner, times: Mutex::default() }
    }

    fn timed<R>(&self, op: &'static str, shape: Option<(usize, usize)>, work: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = work();
        let elapsed = start.elapsed();
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        let (calls, time) = times.entry((op, shape)).or_default();
        *calls += 1;
        *time += elapsed;
        result
    }

    /// Forgets what was measured.
    fn reset(&self) {
        self.times.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// What was measured since, in `steps` that took `total`.
    fn profile(&self, steps: usize, total: Duration) -> Profile {
        let times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        let (n, total) = (steps as f64, total.as_secs_f64());
        let one = |(&(op, shape), &(calls, time)): (&Key, &(u64, Duration))| {
            let seconds = time.as_secs_f64();
            OpTime { op, shape, calls: calls as f64 / n, ms: 1e3 * seconds / n, share: seconds / total }
        };
        let mut ops: Vec<OpTime> = times.iter().map(one).collect();
        ops.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        let rest = 1.0 - ops.iter().map(|op| op.share).sum::<f64>();
        Profile { steps, step_ms: 1e3 * total / n, rest, ops }
    }
}

/// Operations that are passed on as they are.
macro_rules! pass_on {
    ($(fn $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)?;)*) => {
        $(
            fn $name(&self, $($arg: $type),*) $(-> $out)? {
                self.timed(stringify!($name), None, || self.inner.$name($($arg),*))
            }
        )*
    };
}

impl<B: Backend> Backend for Profiled<B> {
    type Buffer = B::Buffer;
    type Matrix = B::Matrix;
    type Cache = B::Cache;
    type Codes = B::Codes;

    fn scope<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.inner.scope(work)
    }

    fn threads(&self) -> usize {
        self.inner.threads()
    }

    fn len(&self, buffer: &B::Buffer) -> usize {
        self.inner.len(buffer)
    }

    fn capacity(&self, buffer: &B::Buffer) -> usize {
        self.inner.capacity(buffer)
    }

    fn cut(&self, buffer: B::Buffer, len: usize) -> Result<(B::Buffer, Option<B::Buffer>), B::Buffer> {
        self.inner.cut(buffer, len)
    }

    fn join(&self, first: B::Buffer, second: B::Buffer) -> Result<B::Buffer, (B::Buffer, B::Buffer)> {
        self.inner.join(first, second)
    }

    fn address(&self, buffer: &B::Buffer) -> usize {
        self.inner.address(buffer)
    }

    /// Not timed: what `work` calls is.
    fn with_values(&self, matrix: &mut B::Matrix, work: &mut dyn FnMut(&mut B::Buffer)) {
        self.inner.with_values(matrix, work);
    }

    fn codes_len(&self, codes: &B::Codes) -> usize {
        self.inner.codes_len(codes)
    }

    fn shape(&self, matrix: &B::Matrix) -> (usize, usize) {
        self.inner.shape(matrix)
    }

    fn linear_cross_entropy_bytes(&self, rows: usize, width: usize, vocab: usize) -> usize {
        self.inner.linear_cross_entropy_bytes(rows, width, vocab)
    }

    fn cache(&self, kv_heads: usize, head_dim: usize, dtype: CacheType) -> B::Cache {
        self.inner.cache(kv_heads, head_dim, dtype)
    }

    fn cache_len(&self, cache: &B::Cache) -> usize {
        self.inner.cache_len(cache)
    }

    fn matmul(&self, arithmetic: Arithmetic, w: &B::Matrix, x: &B::Buffer, y: &mut B::Buffer, accumulate: bool) {
        let shape = Some(self.shape(w));
        self.timed("matmul", shape, || self.inner.matmul(arithmetic, w, x, y, accumulate));
    }

    fn matmul_group(
        &self,
        arithmetic: Arithmetic,
        x: &B::Buffer,
        products: &mut [Product<'_, Self>],
    ) -> Result<(), Error> {
        let shape = products.first().map(|product| self.shape(product.w));
        let mut inner: Vec<Product<'_, B>> = Vec::with_capacity(products.len());
        for Product { w, low_rank, y } in products {
            let low_rank = low_rank.iter().map(|l| LowRank { a: l.a, b: l.b, scale: l.scale }).collect();
            inner.push(Product { w, low_rank, y });
        }
        self.timed("matmul_group", shape, || self.inner.matmul_group(arithmetic, x, &mut inner))
    }

    fn matmul_vjp_x(&self, arithmetic: Arithmetic, w: &B::Matrix, dy: &B::Buffer, dx: &mut B::Buffer, add: bool) {
        let shape = Some(self.shape(w));
        self.timed("matmul_vjp_x", shape, || self.inner.matmul_vjp_x(arithmetic, w, dy, dx, add));
    }

    fn matmul_vjp_x_sum(
        &self,
        arithmetic: Arithmetic,
        terms: &[(&B::Matrix, &B::Buffer)],
        dx: &mut B::Buffer,
        accumulate: bool,
    ) {
        let shape = terms.first().map(|(w, _)| self.shape(w));
        self.timed("matmul_vjp_x_sum", shape, || self.inner.matmul_vjp_x_sum(arithmetic, terms, dx, accumulate));
    }

    fn matmul_vjp_w(&self, tokens: usize, dy: &B::Buffer, x: &B::Buffer, dw: &mut B::Buffer) {
        let shape = [dy, x].map(|b| self.len(b).checked_div(tokens).unwrap_or(0));
        self.timed("matmul_vjp_w", Some((shape[0], shape[1])), || self.inner.matmul_vjp_w(tokens, dy, x, dw));
    }

    fn linear_cross_entropy(
        &self,
        arithmetic: Arithmetic,
        w: &B::Matrix,
        targets: &[u32],
        scale: f32,
        x: &B::Buffer,
        losses: &mut B::Buffer,
        dx: Option<&mut B::Buffer>,
    ) -> Result<(), Error> {
        let shape = Some(self.shape(w));
        self.timed("linear_cross_entropy", shape, || {
            self.inner.linear_cross_entropy(arithmetic, w, targets, scale, x, losses, dx)
        })
    }

    pass_on! {
        fn buffer(len: usize) -> Result<B::Buffer, Error>;
        fn region(len: usize) -> Result<B::Buffer, Error>;
        fn write(dst: &mut B::Buffer, src: &[f32]);
        fn read(src: &B::Buffer, dst: &mut [f32]) -> Result<(), Error>;
        fn matrix(source: MatrixSource) -> Result<B::Matrix, Error>;
        fn work_matrix(rows: usize, cols: usize, dtype: WorkType) -> Result<B::Matrix, Error>;
        fn set_matrix(dst: &mut B::Matrix, master: &B::Buffer);
        fn read_matrix(matrix: &B::Matrix, dst: &mut [f32]) -> Result<(), Error>;
        fn embed(table: &B::Matrix, ids: &[u32], y: &mut B::Buffer);
        fn gather_rows(x: &B::Buffer, rows: &[u32], y: &mut B::Buffer);
        fn scatter_add_rows(x: &B::Buffer, rows: &[u32], y: &mut B::Buffer);
        fn add_bias(bias: &B::Buffer, y: &mut B::Buffer);
        fn add(a: &B::Buffer, b: &B::Buffer, y: &mut B::Buffer);
        fn add_assign(x: &B::Buffer, y: &mut B::Buffer);
        fn scale(factor: f32, x: &mut B::Buffer);
        fn dropout(p: f32, key: u64, first: u64, x: &B::Buffer, y: &mut B::Buffer);
        fn copy(x: &B::Buffer, y: &mut B::Buffer);
        fn narrow(width: usize, x: &B::Buffer, y: &mut B::Buffer);
        fn widen(width: usize, x: &B::Buffer, y: &mut B::Buffer);
        fn zero(x: &mut B::Buffer);
        fn rms_norm(w: &B::Buffer, eps: f32, x: &B::Buffer, y: &mut B::Buffer);
        fn rms_norm_vjp_x(w: &B::Buffer, eps: f32, x: &B::Buffer, dy: &B::Buffer, dx: &mut B::Buffer);
        fn rope(
            heads: usize, head_dim: usize, cos: &B::Buffer, sin: &B::Buffer, x: &B::Buffer, inverse: bool,
            y: &mut B::Buffer
        );
        fn geglu(gate: &B::Buffer, up: &B::Buffer, y: &mut B::Buffer);
        fn geglu_vjp(
            gate: &B::Buffer, up: &B::Buffer, dy: &B::Buffer, dgate: &mut B::Buffer, dup: &mut B::Buffer
        );
        fn swiglu(gate: &B::Buffer, up: &B::Buffer, y: &mut B::Buffer);
        fn swiglu_vjp(
            gate: &B::Buffer, up: &B::Buffer, dy: &B::Buffer, dgate: &mut B::Buffer, dup: &mut B::Buffer
        );
        fn swiglu_vjp_in_place(dy: &B::Buffer, gate: &mut B::Buffer, up: &mut B::Buffer);
        fn attention(
            spec: &Attention, segments: &[usize], q: &B::Buffer, k: &B::Buffer, v: &B::Buffer, y: &mut B::Buffer,
            lse: &mut B::Buffer
        );
        fn attention_vjp(
            spec: &Attention, segments: &[usize], q: &B::Buffer, k: &B::Buffer, v: &B::Buffer, y: &B::Buffer,
            lse: &B::Buffer, dy: &B::Buffer, dq: &mut B::Buffer, dk: &mut B::Buffer, dv: &mut B::Buffer
        );
        fn cache_append(cache: &mut B::Cache, k: &B::Buffer, v: &B::Buffer) -> Result<(), Error>;
        fn cache_truncate(cache: &mut B::Cache, len: usize);
        fn attention_cached(spec: &Attention, q: &B::Buffer, cache: &B::Cache, y: &mut B::Buffer);
        fn cross_entropy(targets: &[u32], scale: f32, logits: &mut B::Buffer, losses: &mut B::Buffer);
        fn sum_squares(x: &B::Buffer) -> Result<f64, Error>;
        fn adamw(step: &AdamW, grad: &B::Buffer, param: &mut B::Buffer, m: &mut B::Buffer, v: &mut B::Buffer);
        fn sgd(step: &Sgd, grad: &B::Buffer, param: &mut B::Buffer, m: Option<&mut B::Buffer>);
        fn lion(step: &Lion, grad: &B::Buffer, param: &mut B::Buffer, m: &mut B::Buffer);
        fn codes(len: usize, signed: bool) -> Result<B::Codes, Error>;
        fn read_codes(src: &B::Codes, codes: &mut [u8], absmax: &mut [f32]) -> Result<(), Error>;
        fn write_codes(dst: &mut B::Codes, codes: &[u8], absmax: &[f32]);
        fn adamw8(step: &AdamW, grad: &B::Buffer, param: &mut B::Buffer, m: &mut B::Codes, v: &mut B::Codes);
    }
}
