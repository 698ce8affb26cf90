//! A device that runs [`Call`]s.
//!
//! A backend may record work instead of doing it: only what reads memory back ([`Memory::read`] and the like) has to wait
//! for it. A device that is lost meanwhile says so there. What a call touches may be dropped before its recorded work is done.

use crate::cpu::Table;
use crate::{Activation, AdamW, Arithmetic, Attention, Call, Error, Lion, Memory, Product, Sgd, doubles};

/// Memory, and a device that computes with it.
#[allow(missing_docs, clippy::missing_errors_doc, clippy::too_many_arguments, reason = "methods that go")]
pub trait Backend: Memory {
    /// Runs one call, or records it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where the call says that it may fail. What it writes is unspecified then, but for a cache.
    fn run(&self, call: Call<'_, Self>) -> Result<(), Error>;

    /// Runs `work` with this backend's threads, so that calls inside it need not wake them one by one.
    fn scope<R>(&self, work: impl FnOnce() -> R) -> R
    where
        Self: Sized;

    /// Threads that calls run on.
    fn threads(&self) -> usize;

    /// The CPU kernels that calls run on, or those calls that the device has no kernel for: [`crate::Counted`] counts what
    /// they take.
    fn table(&self) -> &'static Table;

    // Calls as methods: callers move to `run`, and these go when the last has.
    fn embed(&self, table: &Self::Matrix, ids: &[u32], y: &mut Self::Buffer) {
        self.run(Call::Embed { table, ids, y }).expect("cannot fail");
    }
    fn gather_rows(&self, x: &Self::Buffer, rows: &[u32], y: &mut Self::Buffer) {
        self.run(Call::GatherRows { x, rows, y }).expect("cannot fail");
    }
    fn scatter_add_rows(&self, x: &Self::Buffer, rows: &[u32], y: &mut Self::Buffer) {
        self.run(Call::ScatterAddRows { x, rows, y }).expect("cannot fail");
    }
    fn matmul(
        &self,
        arithmetic: Arithmetic,
        w: &Self::Matrix,
        x: &Self::Buffer,
        y: &mut Self::Buffer,
        accumulate: bool,
    ) {
        self.run(Call::Matmul { arithmetic, w, x, y, accumulate }).expect("cannot fail");
    }
    fn matmul_vjp_w(&self, tokens: usize, dy: &Self::Buffer, x: &Self::Buffer, dw: &mut Self::Buffer) {
        self.run(Call::MatmulVjpW { tokens, dy, x, dw }).expect("cannot fail");
    }
    fn add_bias(&self, bias: &Self::Buffer, y: &mut Self::Buffer) {
        self.run(Call::AddBias { bias, y }).expect("cannot fail");
    }
    fn add(&self, a: &Self::Buffer, b: &Self::Buffer, y: &mut Self::Buffer) {
        self.run(Call::Add { a, b, y }).expect("cannot fail");
    }
    fn add_assign(&self, x: &Self::Buffer, y: &mut Self::Buffer) {
        self.run(Call::AddAssign { x, y }).expect("cannot fail");
    }
    fn scale(&self, factor: f32, x: &mut Self::Buffer) {
        self.run(Call::Scale { factor, x }).expect("cannot fail");
    }
    fn dropout(&self, p: f32, key: u64, first: u64, x: &Self::Buffer, y: &mut Self::Buffer) {
        self.run(Call::Dropout { p, key, first, x, y }).expect("cannot fail");
    }
    fn copy(&self, x: &Self::Buffer, y: &mut Self::Buffer) {
        self.run(Call::Copy { x, y }).expect("cannot fail");
    }
    fn narrow(&self, width: usize, x: &Self::Buffer, y: &mut Self::Buffer) {
        self.run(Call::Narrow { width, x, y }).expect("cannot fail");
    }
    fn widen(&self, width: usize, x: &Self::Buffer, y: &mut Self::Buffer) {
        self.run(Call::Widen { width, x, y }).expect("cannot fail");
    }
    fn zero(&self, x: &mut Self::Buffer) {
        self.run(Call::Zero { x }).expect("cannot fail");
    }
    fn rope(
        &self,
        heads: usize,
        head_dim: usize,
        cos: &Self::Buffer,
        sin: &Self::Buffer,
        x: &Self::Buffer,
        inverse: bool,
        y: &mut Self::Buffer,
    ) {
        self.run(Call::Rope { heads, head_dim, cos, sin, x, inverse, y }).expect("cannot fail");
    }
    fn attention(
        &self,
        spec: &Attention,
        segments: &[usize],
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        y: &mut Self::Buffer,
        lse: &mut Self::Buffer,
    ) {
        self.run(Call::Attention { spec, segments, q, k, v, y, lse }).expect("cannot fail");
    }
    fn attention_vjp(
        &self,
        spec: &Attention,
        segments: &[usize],
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        y: &Self::Buffer,
        lse: &Self::Buffer,
        dy: &Self::Buffer,
        dq: &mut Self::Buffer,
        dk: &mut Self::Buffer,
        dv: &mut Self::Buffer,
    ) {
        self.run(Call::AttentionVjp { spec, segments, q, k, v, y, lse, dy, dq, dk, dv }).expect("cannot fail");
    }
    fn adamw(
        &self,
        step: &AdamW,
        grad: &Self::Buffer,
        param: &mut Self::Buffer,
        m: &mut Self::Buffer,
        v: &mut Self::Buffer,
    ) {
        self.run(Call::AdamW { step, grad, param, m, v }).expect("cannot fail");
    }
    fn sgd(&self, step: &Sgd, grad: &Self::Buffer, param: &mut Self::Buffer, m: Option<&mut Self::Buffer>) {
        self.run(Call::Sgd { step, grad, param, m }).expect("cannot fail");
    }
    fn lion(&self, step: &Lion, grad: &Self::Buffer, param: &mut Self::Buffer, m: &mut Self::Buffer) {
        self.run(Call::Lion { step, grad, param, m }).expect("cannot fail");
    }
    fn adamw8(
        &self,
        step: &AdamW,
        grad: &Self::Buffer,
        param: &mut Self::Buffer,
        m: &mut Self::Codes,
        v: &mut Self::Codes,
    ) {
        self.run(Call::AdamW8 { step, grad, param, m, v }).expect("cannot fail");
    }
    fn matmul_group(
        &self,
        arithmetic: Arithmetic,
        x: &Self::Buffer,
        products: &mut [Product<'_, Self>],
    ) -> Result<(), Error> {
        let mut products: Vec<Product<'_, Self>> = products
            .iter_mut()
            .map(|p| Product {
                w: p.w,
                low_rank: p
                    .low_rank
                    .iter()
                    .map(|l| crate::LowRank { a: l.a, b: l.b, scale: l.scale, rows: l.rows.clone() })
                    .collect(),
                y: p.y,
            })
            .collect();
        self.run(Call::MatmulGroup { arithmetic, x, products: &mut products })
    }
    fn matmul_vjp_x(
        &self,
        arithmetic: Arithmetic,
        w: &Self::Matrix,
        dy: &Self::Buffer,
        dx: &mut Self::Buffer,
        accumulate: bool,
    ) {
        self.matmul_vjp_x_sum(arithmetic, &[(w, dy)], dx, accumulate);
    }
    fn matmul_vjp_x_sum(
        &self,
        arithmetic: Arithmetic,
        terms: &[(&Self::Matrix, &Self::Buffer)],
        dx: &mut Self::Buffer,
        accumulate: bool,
    ) {
        self.run(Call::MatmulVjpX { arithmetic, terms, dx, accumulate }).expect("cannot fail");
    }
    fn rms_norm(&self, w: &Self::Buffer, eps: f32, x: &Self::Buffer, y: &mut Self::Buffer) {
        self.run(Call::RmsNorm { width: self.len(w), w: Some(w), plus_one: false, eps, x, y }).expect("cannot fail");
    }
    fn rms_norm_vjp_x(&self, w: &Self::Buffer, eps: f32, x: &Self::Buffer, dy: &Self::Buffer, dx: &mut Self::Buffer) {
        self.run(Call::RmsNormVjpX { width: self.len(w), w: Some(w), plus_one: false, eps, x, dy, dx })
            .expect("cannot fail");
    }
    fn geglu(&self, gate: &Self::Buffer, up: &Self::Buffer, y: &mut Self::Buffer) {
        self.run(Call::Gate { activation: Activation::GeluTanh, gate, up, y }).expect("cannot fail");
    }
    fn geglu_vjp(
        &self,
        gate: &Self::Buffer,
        up: &Self::Buffer,
        dy: &Self::Buffer,
        dgate: &mut Self::Buffer,
        dup: &mut Self::Buffer,
    ) {
        self.run(Call::GateVjp { activation: Activation::GeluTanh, gate, up, dy, dgate, dup }).expect("cannot fail");
    }
    fn swiglu(&self, gate: &Self::Buffer, up: &Self::Buffer, y: &mut Self::Buffer) {
        self.run(Call::Gate { activation: Activation::Silu, gate, up, y }).expect("cannot fail");
    }
    fn swiglu_vjp(
        &self,
        gate: &Self::Buffer,
        up: &Self::Buffer,
        dy: &Self::Buffer,
        dgate: &mut Self::Buffer,
        dup: &mut Self::Buffer,
    ) {
        self.run(Call::GateVjp { activation: Activation::Silu, gate, up, dy, dgate, dup }).expect("cannot fail");
    }
    fn swiglu_vjp_in_place(&self, dy: &Self::Buffer, gate: &mut Self::Buffer, up: &mut Self::Buffer) {
        self.run(Call::GateVjpInPlace { activation: Activation::Silu, dy, gate, up }).expect("cannot fail");
    }
    fn cache_append(
        &self,
        cache: &mut Self::Cache,
        k: &Self::Buffer,
        v: &Self::Buffer,
        rows: std::ops::Range<usize>,
    ) -> Result<(), Error> {
        self.run(Call::CacheAppend { cache, k, v, rows })
    }
    fn attention_cached(
        &self,
        spec: &Attention,
        q: &Self::Buffer,
        cache: &Self::Cache,
        y: &mut Self::Buffer,
        rows: std::ops::Range<usize>,
    ) {
        self.run(Call::AttentionCached { spec, q, cache, y, rows }).expect("cannot fail");
    }
    fn cross_entropy(&self, targets: &[u32], weights: &[f32], logits: &mut Self::Buffer, losses: &mut Self::Buffer) {
        self.run(Call::CrossEntropy { targets, weights, logits, losses }).expect("cannot fail");
    }
    fn linear_cross_entropy(
        &self,
        arithmetic: Arithmetic,
        w: &Self::Matrix,
        targets: &[u32],
        weights: &[f32],
        x: &Self::Buffer,
        losses: &mut Self::Buffer,
        dx: Option<&mut Self::Buffer>,
    ) -> Result<(), Error> {
        self.run(Call::LinearCrossEntropy { arithmetic, w, targets, weights, x, losses, dx })
    }
    fn sum_squares(&self, x: &Self::Buffer) -> Result<f64, Error> {
        let (mut y, mut host) = (self.buffer(2)?, [0.0; 2]);
        self.run(Call::SumSquares { x, at: 0, y: &mut y })?;
        self.read(&y, &mut host)?;
        Ok(doubles(&host)[0])
    }
}
