//! The operations: recorded where there is a shader, else on the CPU after a wait for what they touch.

use super::Vulkan;
use super::buffer::Buffer;
use super::matrix::Matrix;
use crate::{AdamW, Arithmetic, Attention, Backend, CacheType, Error, Lion, MatrixSource, Sgd, WorkType, cpu};

impl Backend for Vulkan {
    type Buffer = Buffer;
    type Matrix = Matrix;
    type Cache = cpu::Cache;
    type Codes = cpu::Codes;

    fn scope<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.cpu.scope(work)
    }

    fn threads(&self) -> usize {
        Backend::threads(&self.cpu)
    }

    fn buffer(&self, len: usize) -> Result<Buffer, Error> {
        Buffer::zeros(&self.heap, len)
    }

    fn len(&self, buffer: &Buffer) -> usize {
        buffer.len
    }

    fn write(&self, dst: &mut Buffer, src: &[f32]) {
        self.host(&[], &[dst]);
        self.cpu.write(&mut dst.host, src);
    }

    fn read(&self, src: &Buffer, dst: &mut [f32]) -> Result<(), Error> {
        self.host(&[src], &[]);
        self.recorder.check()?;
        self.cpu.read(&src.host, dst)
    }

    fn matrix(&self, source: MatrixSource) -> Result<Matrix, Error> {
        Matrix::new(&self.cpu, &self.heap, &self.device.limits, source)
    }

    fn work_matrix(&self, rows: usize, cols: usize, dtype: WorkType) -> Result<Matrix, Error> {
        if dtype == WorkType::F16 {
            return Ok(Matrix { host: self.cpu.work_matrix(rows, cols, dtype)?, blocks: None, values: None });
        }
        // In memory of the device, so that its operations can read and write it as a buffer.
        let Buffer { memory, host, .. } = self.buffer(rows.saturating_mul(cols))?;
        Ok(Matrix { host: cpu::Matrix::of(rows, cols, host), blocks: None, values: Some(memory) })
    }

    fn set_matrix(&self, dst: &mut Matrix, master: &Buffer) {
        self.host(&[master], &[]);
        self.cpu.set_matrix(&mut dst.host, &master.host);
    }

    fn with_values(&self, matrix: &mut Matrix, work: &mut dyn FnMut(&mut Buffer)) {
        let memory = matrix.values.clone().expect("only a work matrix in f32 is its own master");
        let host = matrix.host.values_mut();
        let len = host.len();
        let mut buffer = Buffer { memory, host: std::mem::take(host), len };
        work(&mut buffer);
        // Products read it on the host.
        self.host(&[&buffer], &[]);
        *matrix.host.values_mut() = buffer.host;
    }

    fn read_matrix(&self, matrix: &Matrix, dst: &mut [f32]) -> Result<(), Error> {
        self.recorder.check()?;
        self.cpu.read_matrix(&matrix.host, dst)
    }

    fn shape(&self, matrix: &Matrix) -> (usize, usize) {
        self.cpu.shape(&matrix.host)
    }

    fn embed(&self, table: &Matrix, ids: &[u32], y: &mut Buffer) {
        self.host(&[], &[y]);
        self.cpu.embed(&table.host, ids, &mut y.host);
    }

    fn gather_rows(&self, x: &Buffer, rows: &[u32], y: &mut Buffer) {
        self.host(&[x], &[y]);
        self.cpu.gather_rows(&x.host, rows, &mut y.host);
    }

    fn scatter_add_rows(&self, x: &Buffer, rows: &[u32], y: &mut Buffer) {
        self.host(&[x], &[y]);
        self.cpu.scatter_add_rows(&x.host, rows, &mut y.host);
    }

    /// The shader computes in f32, which is as exact as any arithmetic asks for.
    fn matmul(&self, arithmetic: Arithmetic, w: &Matrix, x: &Buffer, y: &mut Buffer, accumulate: bool) {
        if !self.record_nf4_matvec(w, x, y, accumulate) {
            self.host(&[x], &[y]);
            self.cpu.matmul(arithmetic, &w.host, &x.host, &mut y.host, accumulate);
        }
    }

    fn matmul_vjp_x(&self, arithmetic: Arithmetic, w: &Matrix, dy: &Buffer, dx: &mut Buffer, accumulate: bool) {
        self.host(&[dy], &[dx]);
        self.cpu.matmul_vjp_x(arithmetic, &w.host, &dy.host, &mut dx.host, accumulate);
    }

    fn matmul_vjp_w(&self, tokens: usize, dy: &Buffer, x: &Buffer, dw: &mut Buffer) {
        self.host(&[dy, x], &[dw]);
        self.cpu.matmul_vjp_w(tokens, &dy.host, &x.host, &mut dw.host);
    }

    fn add_bias(&self, bias: &Buffer, y: &mut Buffer) {
        self.host(&[bias], &[y]);
        self.cpu.add_bias(&bias.host, &mut y.host);
    }

    fn add(&self, a: &Buffer, b: &Buffer, y: &mut Buffer) {
        if !self.record_add(a, Some(b), y) {
            self.host(&[a, b], &[y]);
            self.cpu.add(&a.host, &b.host, &mut y.host);
        }
    }

    fn add_assign(&self, x: &Buffer, y: &mut Buffer) {
        if !self.record_add(x, None, y) {
            self.host(&[x], &[y]);
            self.cpu.add_assign(&x.host, &mut y.host);
        }
    }

    fn scale(&self, factor: f32, x: &mut Buffer) {
        self.host(&[], &[x]);
        self.cpu.scale(factor, &mut x.host);
    }

    fn dropout(&self, p: f32, key: u64, first: u64, x: &Buffer, y: &mut Buffer) {
        self.host(&[x], &[y]);
        self.cpu.dropout(p, key, first, &x.host, &mut y.host);
    }

    fn copy(&self, x: &Buffer, y: &mut Buffer) {
        self.host(&[x], &[y]);
        self.cpu.copy(&x.host, &mut y.host);
    }

    fn narrow(&self, width: usize, x: &Buffer, y: &mut Buffer) {
        self.host(&[x], &[y]);
        self.cpu.narrow(width, &x.host, &mut y.host);
    }

    fn widen(&self, width: usize, x: &Buffer, y: &mut Buffer) {
        self.host(&[x], &[y]);
        self.cpu.widen(width, &x.host, &mut y.host);
    }

    fn zero(&self, x: &mut Buffer) {
        self.recorder.zero(&x.memory);
    }

    fn rms_norm(&self, w: &Buffer, eps: f32, x: &Buffer, y: &mut Buffer) {
        if !self.record_rms_norm(w, eps, x, y) {
            self.host(&[w, x], &[y]);
            self.cpu.rms_norm(&w.host, eps, &x.host, &mut y.host);
        }
    }

    fn rms_norm_vjp_x(&self, w: &Buffer, eps: f32, x: &Buffer, dy: &Buffer, dx: &mut Buffer) {
        self.host(&[w, x, dy], &[dx]);
        self.cpu.rms_norm_vjp_x(&w.host, eps, &x.host, &dy.host, &mut dx.host);
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
        self.host(&[cos, sin, x], &[y]);
        self.cpu.rope(heads, head_dim, &cos.host, &sin.host, &x.host, inverse, &mut y.host);
    }

    fn geglu(&self, gate: &Buffer, up: &Buffer, y: &mut Buffer) {
        self.host(&[gate, up], &[y]);
        self.cpu.geglu(&gate.host, &up.host, &mut y.host);
    }

    fn geglu_vjp(&self, gate: &Buffer, up: &Buffer, dy: &Buffer, dgate: &mut Buffer, dup: &mut Buffer) {
        self.host(&[gate, up, dy], &[dgate, dup]);
        self.cpu.geglu_vjp(&gate.host, &up.host, &dy.host, &mut dgate.host, &mut dup.host);
    }

    fn swiglu(&self, gate: &Buffer, up: &Buffer, y: &mut Buffer) {
        self.host(&[gate, up], &[y]);
        self.cpu.swiglu(&gate.host, &up.host, &mut y.host);
    }

    fn swiglu_vjp(&self, gate: &Buffer, up: &Buffer, dy: &Buffer, dgate: &mut Buffer, dup: &mut Buffer) {
        self.host(&[gate, up, dy], &[dgate, dup]);
        self.cpu.swiglu_vjp(&gate.host, &up.host, &dy.host, &mut dgate.host, &mut dup.host);
    }

    fn swiglu_vjp_in_place(&self, dy: &Buffer, gate: &mut Buffer, up: &mut Buffer) {
        self.host(&[dy], &[gate, up]);
        self.cpu.swiglu_vjp_in_place(&dy.host, &mut gate.host, &mut up.host);
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
        self.host(&[q, k, v], &[y, lse]);
        self.cpu.attention(spec, segments, &q.host, &k.host, &v.host, &mut y.host, &mut lse.host);
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
        self.host(&[q, k, v, y, lse, dy], &[dq, dk, dv]);
        let [q, k, v, y, lse, dy] = [q, k, v, y, lse, dy].map(|buffer| &buffer.host);
        let [dq, dk, dv] = [dq, dk, dv].map(|buffer| &mut buffer.host);
        self.cpu.attention_vjp(spec, segments, q, k, v, y, lse, dy, dq, dk, dv);
    }

    fn cache(&self, kv_heads: usize, head_dim: usize, dtype: CacheType) -> cpu::Cache {
        self.cpu.cache(kv_heads, head_dim, dtype)
    }

    fn cache_len(&self, cache: &cpu::Cache) -> usize {
        self.cpu.cache_len(cache)
    }

    fn cache_append(&self, cache: &mut cpu::Cache, k: &Buffer, v: &Buffer) -> Result<(), Error> {
        self.host(&[k, v], &[]);
        self.cpu.cache_append(cache, &k.host, &v.host)
    }

    fn cache_truncate(&self, cache: &mut cpu::Cache, len: usize) {
        self.cpu.cache_truncate(cache, len);
    }

    fn attention_cached(&self, spec: &Attention, q: &Buffer, cache: &cpu::Cache, y: &mut Buffer) {
        self.host(&[q], &[y]);
        self.cpu.attention_cached(spec, &q.host, cache, &mut y.host);
    }

    fn cross_entropy(&self, targets: &[u32], scale: f32, logits: &mut Buffer, losses: &mut Buffer) {
        self.host(&[], &[logits, losses]);
        self.cpu.cross_entropy(targets, scale, &mut logits.host, &mut losses.host);
    }

    fn sum_squares(&self, x: &Buffer) -> Result<f64, Error> {
        self.host(&[x], &[]);
        self.recorder.check()?;
        self.cpu.sum_squares(&x.host)
    }

    fn adamw(&self, step: &AdamW, grad: &Buffer, param: &mut Buffer, m: &mut Buffer, v: &mut Buffer) {
        self.host(&[grad], &[param, m, v]);
        self.cpu.adamw(step, &grad.host, &mut param.host, &mut m.host, &mut v.host);
    }

    fn sgd(&self, step: &Sgd, grad: &Buffer, param: &mut Buffer, m: Option<&mut Buffer>) {
        match m {
            None => {
                self.host(&[grad], &[param]);
                self.cpu.sgd(step, &grad.host, &mut param.host, None);
            }
            Some(m) => {
                self.host(&[grad], &[param, m]);
                self.cpu.sgd(step, &grad.host, &mut param.host, Some(&mut m.host));
            }
        }
    }

    fn lion(&self, step: &Lion, grad: &Buffer, param: &mut Buffer, m: &mut Buffer) {
        self.host(&[grad], &[param, m]);
        self.cpu.lion(step, &grad.host, &mut param.host, &mut m.host);
    }

    fn codes(&self, len: usize, signed: bool) -> Result<cpu::Codes, Error> {
        self.cpu.codes(len, signed)
    }

    fn codes_len(&self, codes: &cpu::Codes) -> usize {
        self.cpu.codes_len(codes)
    }

    fn read_codes(&self, src: &cpu::Codes, codes: &mut [u8], absmax: &mut [f32]) -> Result<(), Error> {
        self.cpu.read_codes(src, codes, absmax)
    }

    fn write_codes(&self, dst: &mut cpu::Codes, codes: &[u8], absmax: &[f32]) {
        self.cpu.write_codes(dst, codes, absmax);
    }

    fn adamw8(&self, step: &AdamW, grad: &Buffer, param: &mut Buffer, m: &mut cpu::Codes, v: &mut cpu::Codes) {
        self.host(&[grad], &[param]);
        self.cpu.adamw8(step, &grad.host, &mut param.host, m, v);
    }
}
