//! The CPU backend: [`Cpu`] implements [`Backend`] by calling one file per op.
//!
//! The ops that dominate time (`nf4`, `q8`, `dense`, `tile`, `attention`) have a text per instruction set, picked at run
//! time through [`Table`]; the loops of the others are written once and compiled for each (`light`).

mod adamw;
mod adamw8;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bf16;
mod buffer;
mod cache;
mod cross_entropy;
mod dense;
mod elementwise;
mod exp;
mod gated;
mod lanes;
mod light;
pub mod limits;
mod linear_cross_entropy;
mod loops;
#[cfg(target_arch = "x86_64")]
mod maker;
mod matmul;
mod matrix;
mod narrow;
#[cfg(target_arch = "aarch64")]
mod neon;
mod nf4;
mod q8;
mod rms_norm;
mod rope;
mod rows;
mod sgd;
mod shelf;
mod softmax;
mod split;
mod table;
mod team;
mod tile;
mod turns;

pub use adamw8::Codes;
pub use buffer::Buffer;
pub use cache::Cache;
pub use matrix::Matrix;
pub use table::{Isa, Table};

use crate::{AdamW, Arithmetic, Attention, Backend, CacheType, Error, Lion, MatrixSource, Product, Sgd, WorkType};
use gated::Gate;
use shelf::Shelf;
use team::Team;

/// The CPU: a team of threads and the kernels of one instruction set.
pub struct Cpu {
    table: &'static Table,
    team: Team,
    shelf: Shelf,
}

impl Cpu {
    /// The best kernels for this machine on `threads` threads, all cores if 0. [`Table::from_env`] tells
    /// whether `POCKETLORA_ISA` holds a name that this ignores.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self::with_table(threads, Table::best())
    }

    /// The kernels of `table` on `threads` threads, all cores if 0.
    #[must_use]
    pub fn with_table(threads: usize, table: &'static Table) -> Self {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let team = Team::new(if threads == 0 { cores() } else { threads });
        Self { table, team, shelf: Shelf::default() }
    }

    /// The instruction set of the kernels.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.table.isa()
    }

    /// Threads that ops run on, the caller's included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.team.active()
    }
}

/// Passes over the weights that [`Cpu::choose_threads`] times for each number of threads.
const TRIALS: usize = 8;
/// A further thread must save this share of the time: it costs power, and other apps want cores, too.
const WORTH: f64 = 0.04;

impl Cpu {
    /// Times products of one token with `weights` on more and more threads, and lets ops use as many as pay from then
    /// on. Results do not depend on it. Takes some milliseconds; does nothing on one thread.
    pub fn choose_threads(&self, weights: &[&Matrix]) {
        let inputs: Vec<_> = weights.iter().map(|w| vec![0.0; w.shape().1]).collect();
        let mut outputs: Vec<_> = weights.iter().map(|w| vec![0.0; w.shape().0]).collect();
        let mut best = (f64::INFINITY, 1);
        let all = self.team.threads();
        for threads in (1..=all).filter(|n| *n <= 4 || n.is_multiple_of(2) || *n == all) {
            self.team.set_active(threads);
            let mut fastest = f64::INFINITY;
            self.team.keep_awake(|| {
                for _ in 0..TRIALS {
                    let start = std::time::Instant::now();
                    for ((w, x), y) in weights.iter().zip(&inputs).zip(&mut outputs) {
                        matmul::forward(self, Arithmetic::Int8, w, x, y, false);
                    }
                    fastest = fastest.min(start.elapsed().as_secs_f64());
                }
            });
            if fastest < best.0 * (1.0 - WORTH) {
                best = (fastest, threads);
            }
        }
        self.team.set_active(best.1);
    }
}

pub(crate) use attention::{bytes as attention_bytes, vjp_scratch as attention_vjp_scratch};
pub(crate) use linear_cross_entropy::{BAND, bytes as linear_cross_entropy_bytes};
pub(crate) use matmul::{Scratch, bytes as matmul_bytes, scratch as matmul_scratch, vjp_w_scratch};

impl Backend for Cpu {
    type Buffer = Buffer;
    type Matrix = Matrix;
    type Cache = Cache;
    type Codes = Codes;

    fn scope<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.team.keep_awake(work)
    }

    fn threads(&self) -> usize {
        self.team.threads()
    }

    fn buffer(&self, len: usize) -> Result<Buffer, Error> {
        Buffer::zeros(len)
    }

    fn len(&self, buffer: &Buffer) -> usize {
        buffer.len()
    }

    fn region(&self, len: usize) -> Result<Buffer, Error> {
        Buffer::region(len)
    }

    fn capacity(&self, buffer: &Buffer) -> usize {
        buffer.capacity()
    }

    fn cut(&self, buffer: Buffer, len: usize) -> Result<(Buffer, Option<Buffer>), Buffer> {
        buffer.cut(len)
    }

    fn join(&self, first: Buffer, second: Buffer) -> Result<Buffer, (Buffer, Buffer)> {
        first.join(second)
    }

    fn address(&self, buffer: &Buffer) -> usize {
        buffer.as_ptr().addr()
    }

    fn write(&self, dst: &mut Buffer, src: &[f32]) {
        dst.copy_from_slice(src);
    }

    fn read(&self, src: &Buffer, dst: &mut [f32]) -> Result<(), Error> {
        dst.copy_from_slice(src);
        Ok(())
    }

    fn matrix(&self, source: MatrixSource) -> Result<Matrix, Error> {
        Matrix::new(source)
    }

    fn work_matrix(&self, rows: usize, cols: usize, dtype: WorkType) -> Result<Matrix, Error> {
        Matrix::zeros(rows, cols, dtype)
    }

    fn set_matrix(&self, dst: &mut Matrix, master: &Buffer) {
        dst.set(master);
    }

    fn with_values(&self, matrix: &mut Matrix, work: &mut dyn FnMut(&mut Buffer)) {
        work(matrix.values_mut());
    }

    fn read_matrix(&self, matrix: &Matrix, dst: &mut [f32]) -> Result<(), Error> {
        dst.copy_from_slice(matrix.values());
        Ok(())
    }

    fn shape(&self, matrix: &Matrix) -> (usize, usize) {
        matrix.shape()
    }

    fn embed(&self, table: &Matrix, ids: &[u32], y: &mut Buffer) {
        rows::embed(self, table, ids, y);
    }

    fn gather_rows(&self, x: &Buffer, rows: &[u32], y: &mut Buffer) {
        rows::gather(&self.team, x, rows, y);
    }

    fn scatter_add_rows(&self, x: &Buffer, rows: &[u32], y: &mut Buffer) {
        rows::scatter_add(x, rows, y);
    }

    fn matmul(&self, arithmetic: Arithmetic, w: &Matrix, x: &Buffer, y: &mut Buffer, accumulate: bool) {
        matmul::forward(self, arithmetic, w, x, y, accumulate);
    }

    fn matmul_group(
        &self,
        arithmetic: Arithmetic,
        x: &Buffer,
        products: &mut [Product<'_, Self>],
    ) -> Result<(), Error> {
        matmul::group(self, arithmetic, x, products)
    }

    fn matmul_vjp_x(&self, arithmetic: Arithmetic, w: &Matrix, dy: &Buffer, dx: &mut Buffer, accumulate: bool) {
        matmul::vjp_x(self, arithmetic, &[(w, dy)], dx, accumulate);
    }

    fn matmul_vjp_x_sum(
        &self,
        arithmetic: Arithmetic,
        terms: &[(&Matrix, &Buffer)],
        dx: &mut Buffer,
        accumulate: bool,
    ) {
        let terms: Vec<(&Matrix, &[f32])> = terms.iter().map(|(w, dy)| (*w, &dy[..])).collect();
        matmul::vjp_x(self, arithmetic, &terms, dx, accumulate);
    }

    fn matmul_vjp_w(&self, tokens: usize, dy: &Buffer, x: &Buffer, dw: &mut Buffer) {
        matmul::vjp_w(self, tokens, dy, x, dw);
    }

    fn add_bias(&self, bias: &Buffer, y: &mut Buffer) {
        elementwise::add_bias(&self.team, bias, y);
    }

    fn add(&self, a: &Buffer, b: &Buffer, y: &mut Buffer) {
        elementwise::add(&self.team, a, b, y);
    }

    fn add_assign(&self, x: &Buffer, y: &mut Buffer) {
        elementwise::add_assign(&self.team, x, y);
    }

    fn scale(&self, factor: f32, x: &mut Buffer) {
        elementwise::scale(&self.team, factor, x);
    }

    fn dropout(&self, p: f32, key: u64, first: u64, x: &Buffer, y: &mut Buffer) {
        elementwise::dropout(&self.team, p, key, first, x, y);
    }

    fn copy(&self, x: &Buffer, y: &mut Buffer) {
        elementwise::copy(&self.team, x, y);
    }

    fn narrow(&self, width: usize, x: &Buffer, y: &mut Buffer) {
        narrow::pack(&self.team, width, x, y);
    }

    fn widen(&self, width: usize, x: &Buffer, y: &mut Buffer) {
        narrow::unpack(&self.team, width, x, y);
    }

    fn zero(&self, x: &mut Buffer) {
        elementwise::zero(&self.team, x);
    }

    fn rms_norm(&self, w: &Buffer, eps: f32, x: &Buffer, y: &mut Buffer) {
        rms_norm::forward(self, w, eps, x, y);
    }

    fn rms_norm_vjp_x(&self, w: &Buffer, eps: f32, x: &Buffer, dy: &Buffer, dx: &mut Buffer) {
        rms_norm::vjp_x(self, w, eps, x, dy, dx);
    }

    fn rope(
        &self,
        heads: usize,
        head_dim: usize,
        cos: &Buffer,
        sin: &Buffer,
        x: &Buffer,
        inverse: bool,
        y: &mut Buffer,
    ) {
        rope::forward(self, heads, head_dim, cos, sin, x, inverse, y);
    }

    fn geglu(&self, gate: &Buffer, up: &Buffer, y: &mut Buffer) {
        gated::forward(self, Gate::Gelu, gate, up, y);
    }

    fn geglu_vjp(&self, gate: &Buffer, up: &Buffer, dy: &Buffer, dgate: &mut Buffer, dup: &mut Buffer) {
        gated::vjp(self, Gate::Gelu, gate, up, dy, dgate, dup);
    }

    fn swiglu(&self, gate: &Buffer, up: &Buffer, y: &mut Buffer) {
        gated::forward(self, Gate::Silu, gate, up, y);
    }

    fn swiglu_vjp(&self, gate: &Buffer, up: &Buffer, dy: &Buffer, dgate: &mut Buffer, dup: &mut Buffer) {
        gated::vjp(self, Gate::Silu, gate, up, dy, dgate, dup);
    }

    fn swiglu_vjp_in_place(&self, dy: &Buffer, gate: &mut Buffer, up: &mut Buffer) {
        gated::vjp_in_place(self, dy, gate, up);
    }

    fn attention(
        &self,
        spec: &Attention,
        segments: &[usize],
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        y: &mut Buffer,
        lse: &mut Buffer,
    ) {
        attention::forward(self, spec, segments, q, k, v, y, lse);
    }

    fn attention_vjp(
        &self,
        spec: &Attention,
        segments: &[usize],
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        y: &Buffer,
        lse: &Buffer,
        dy: &Buffer,
        dq: &mut Buffer,
        dk: &mut Buffer,
        dv: &mut Buffer,
    ) {
        attention::vjp(self, spec, segments, q, k, v, y, lse, dy, dq, dk, dv);
    }

    fn cache(&self, kv_heads: usize, head_dim: usize, dtype: CacheType) -> Cache {
        Cache::new(kv_heads, head_dim, dtype, None)
    }

    fn cache_len(&self, cache: &Cache) -> usize {
        cache.len()
    }

    fn cache_append(&self, cache: &mut Cache, k: &Buffer, v: &Buffer) -> Result<(), Error> {
        cache.append(self.table.light(), k, v)
    }

    fn cache_truncate(&self, cache: &mut Cache, len: usize) {
        assert_eq!(cache.rewind(len), len);
    }

    fn attention_cached(&self, spec: &Attention, q: &Buffer, cache: &Cache, y: &mut Buffer) {
        attention::forward_cached(self, spec, q, cache, y);
    }

    fn cross_entropy(&self, targets: &[u32], scale: f32, logits: &mut Buffer, losses: &mut Buffer) {
        cross_entropy::forward_vjp(self, targets, scale, logits, losses);
    }

    fn linear_cross_entropy(
        &self,
        arithmetic: Arithmetic,
        w: &Matrix,
        targets: &[u32],
        scale: f32,
        x: &Buffer,
        losses: &mut Buffer,
        dx: Option<&mut Buffer>,
    ) -> Result<(), Error> {
        linear_cross_entropy::run(self, arithmetic, w, targets, scale, x, losses, dx.map(|dx| &mut **dx))
    }

    fn linear_cross_entropy_bytes(&self, rows: usize, width: usize, vocab: usize) -> usize {
        linear_cross_entropy::bytes(rows, width, vocab)
    }

    fn sum_squares(&self, x: &Buffer) -> Result<f64, Error> {
        Ok(adamw::sum_squares(&self.team, x))
    }

    fn adamw(&self, step: &AdamW, grad: &Buffer, param: &mut Buffer, m: &mut Buffer, v: &mut Buffer) {
        adamw::step(self, step, grad, param, m, v);
    }

    fn sgd(&self, step: &Sgd, grad: &Buffer, param: &mut Buffer, m: Option<&mut Buffer>) {
        sgd::sgd(self, step, grad, param, m.map(|m| &mut **m));
    }

    fn lion(&self, step: &Lion, grad: &Buffer, param: &mut Buffer, m: &mut Buffer) {
        sgd::lion(self, step, grad, param, m);
    }

    fn codes(&self, len: usize, signed: bool) -> Result<Codes, Error> {
        Codes::zeros(len, signed)
    }

    fn codes_len(&self, codes: &Codes) -> usize {
        codes.codes.len()
    }

    fn read_codes(&self, src: &Codes, codes: &mut [u8], absmax: &mut [f32]) -> Result<(), Error> {
        codes.copy_from_slice(&src.codes);
        absmax.copy_from_slice(&src.absmax);
        Ok(())
    }

    fn write_codes(&self, dst: &mut Codes, codes: &[u8], absmax: &[f32]) {
        dst.codes.copy_from_slice(codes);
        dst.absmax.copy_from_slice(absmax);
    }

    fn adamw8(&self, step: &AdamW, grad: &Buffer, param: &mut Buffer, m: &mut Codes, v: &mut Codes) {
        adamw8::step(self, step, grad, param, m, v);
    }
}
