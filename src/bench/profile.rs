//! Where a training step's time goes: a backend that passes every call on and measures it.
//!
//! On a device that only records work the times are those of recording.

use super::{Engines, OnMeasure, Options, learn};
use crate::base::Base;
use crate::error::Result;
use crate::format::Checkpoint;
use crate::train::{Material, Trainer};
use pocketlora_kernels::cpu::{Cpu, Table};
use pocketlora_kernels::{Backend, CacheType, Call, Error, Lends, MatrixSource, Memory, WorkType};
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
    /// Its name in [`Call`], or in [`Memory`] if it moves data.
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

/// Profiles training steps of the model that `engines` open, the first not counted.
pub(super) fn measure(
    engines: &Engines<'_>,
    threads: usize,
    options: &Options,
    progress: &mut OnMeasure<'_>,
) -> Result<Profile> {
    let checkpoint = Checkpoint::open(engines.dir)?;
    let backend = Profiled::new(Cpu::with_table(threads, Table::from_env()?));
    let base = Arc::new(Base::load(backend, &checkpoint)?);
    let run = learn::Run::new(&base, options)?;
    let (config, data, out) = (run.config, run.data, run.out.path());
    let fingerprint = checkpoint.fingerprint();
    let mut trainer = Trainer::new(Arc::clone(&base), fingerprint, None, config, Material::of(data), None, out)?;
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

/// Parts of the other's memory, as they are.
impl<B: Backend> Lends<B> for Profiled<B> {
    fn lend_buffer(buffer: &B::Buffer) -> &B::Buffer {
        buffer
    }

    fn lend_buffer_mut(buffer: &mut B::Buffer) -> &mut B::Buffer {
        buffer
    }

    fn lend_matrix(matrix: &B::Matrix) -> &B::Matrix {
        matrix
    }

    fn lend_cache(cache: &B::Cache) -> &B::Cache {
        cache
    }

    fn lend_cache_mut(cache: &mut B::Cache) -> &mut B::Cache {
        cache
    }

    fn lend_codes_mut(codes: &mut B::Codes) -> &mut B::Codes {
        codes
    }
}

impl<B: Backend> Backend for Profiled<B> {
    fn run(&self, call: Call<'_, Self>) -> Result<(), Error> {
        let (name, shape) = (call.name(), call.shape(self));
        call.lend(|call: Call<'_, B>| self.timed(name, shape, || self.inner.run(call)))
    }

    fn threads(&self) -> usize {
        self.inner.threads()
    }

    fn table(&self) -> &'static Table {
        self.inner.table()
    }
}

/// Methods of [`Memory`] that are passed on, those with a star also timed.
macro_rules! pass_on {
    ($(fn $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)?;)* * $(fn $timed:ident($($t:ident: $u:ty),*) $(-> $o:ty)?;)*) => {
        $(fn $name(&self, $($arg: $type),*) $(-> $out)? {
            self.inner.$name($($arg),*)
        })*
        $(fn $timed(&self, $($t: $u),*) $(-> $o)? {
            self.timed(stringify!($timed), None, || self.inner.$timed($($t),*))
        })*
    };
}

impl<B: Backend> Memory for Profiled<B> {
    type Buffer = B::Buffer;
    type Matrix = B::Matrix;
    type Cache = B::Cache;
    type Codes = B::Codes;

    pass_on! {
        fn len(buffer: &B::Buffer) -> usize;
        fn capacity(buffer: &B::Buffer) -> usize;
        fn cut(buffer: B::Buffer, len: usize) -> Result<(B::Buffer, Option<B::Buffer>), B::Buffer>;
        fn join(first: B::Buffer, second: B::Buffer) -> Result<B::Buffer, (B::Buffer, B::Buffer)>;
        fn address(buffer: &B::Buffer) -> usize;
        fn with_values(matrix: &mut B::Matrix, work: &mut dyn FnMut(&mut B::Buffer));
        fn shape(matrix: &B::Matrix) -> (usize, usize);
        fn cache(kv_heads: usize, head_dim: usize, dtype: CacheType, window: Option<usize>) -> B::Cache;
        fn cache_len(cache: &B::Cache) -> usize;
        fn cache_rewind(cache: &mut B::Cache, len: usize) -> usize;
        fn codes_len(codes: &B::Codes) -> usize;
        *
        fn buffer(len: usize) -> Result<B::Buffer, Error>;
        fn region(len: usize) -> Result<B::Buffer, Error>;
        fn write(dst: &mut B::Buffer, src: &[f32]);
        fn read(src: &B::Buffer, dst: &mut [f32]) -> Result<(), Error>;
        fn matrix(source: MatrixSource) -> Result<B::Matrix, Error>;
        fn work_matrix(rows: usize, cols: usize, dtype: WorkType) -> Result<B::Matrix, Error>;
        fn set_matrix(dst: &mut B::Matrix, master: &B::Buffer);
        fn read_matrix(matrix: &B::Matrix, dst: &mut [f32]) -> Result<(), Error>;
        fn codes(len: usize, signed: bool) -> Result<B::Codes, Error>;
        fn read_codes(src: &B::Codes, codes: &mut [u8], absmax: &mut [f32]) -> Result<(), Error>;
        fn write_codes(dst: &mut B::Codes, codes: &[u8], absmax: &[f32]);
    }
}
