//! The backend: calls are recorded where there is a shader for them; all others run on the CPU after a wait for what they
//! touch.

use super::Vulkan;
use super::buffer::Buffer;
use super::matrix::Matrix;
use crate::cpu::{self, Table};
use crate::{Access, Backend, CacheType, Call, Cpu, Error, Lends, MatrixSource, Memory, WorkType};
use std::sync::Arc;

impl Backend for Vulkan {
    fn run(&self, call: Call<'_, Self>) -> Result<(), Error> {
        match call {
            Call::Add { a, b, y } if self.sees(&[a, b, y]) => self.record_add(a, Some(b), y),
            Call::AddAssign { x, y } if self.sees(&[x, y]) => self.record_add(x, None, y),
            // The shader has one row of factors, for all rows.
            Call::RmsNorm { width, w: Some(w), plus_one: false, eps, x, y }
                if w.len == width && self.sees(&[w, x, y]) =>
            {
                self.record_rms_norm(w, eps, x, y);
            }
            // The shader computes in f32, which is as exact as any arithmetic asks for.
            Call::Matmul { w, x, y, accumulate, .. } if self.multiplies(w, x, y) => {
                self.record_nf4_matvec(w, x, y, accumulate);
            }
            Call::MatmulGroup { arithmetic, x, products } if products.iter().any(|p| self.multiplies(p.w, x, p.y)) => {
                for product in products {
                    self.product(arithmetic, x, product)?;
                }
            }
            Call::Zero { x } => self.recorder.zero(&x.memory),
            other => self.on_host(other)?,
        }
        Ok(())
    }

    fn threads(&self) -> usize {
        Backend::threads(&self.cpu)
    }

    fn table(&self) -> &'static Table {
        self.cpu.table()
    }
}

impl Vulkan {
    /// Runs a call on the CPU, in the memory that both share.
    pub(super) fn on_host(&self, call: Call<'_, Self>) -> Result<(), Error> {
        self.recorder.settle(|see| call.buffers(&mut |buffer, access| see(&buffer.memory, access)));
        call.lend(|call: Call<'_, Cpu>| self.cpu.run(call))
    }

    /// Waits until the CPU may use `buffer` so in place.
    fn host(&self, buffer: &Buffer, access: Access) {
        self.recorder.settle(|see| see(&buffer.memory, access));
    }
}

impl Lends<Cpu> for Vulkan {
    fn lend_buffer(buffer: &Buffer) -> &cpu::Buffer {
        &buffer.host
    }

    fn lend_buffer_mut(buffer: &mut Buffer) -> &mut cpu::Buffer {
        &mut buffer.host
    }

    fn lend_matrix(matrix: &Matrix) -> &cpu::Matrix {
        &matrix.host
    }

    fn lend_cache(cache: &cpu::Cache) -> &cpu::Cache {
        cache
    }

    fn lend_cache_mut(cache: &mut cpu::Cache) -> &mut cpu::Cache {
        cache
    }

    fn lend_codes_mut(codes: &mut cpu::Codes) -> &mut cpu::Codes {
        codes
    }
}

impl Memory for Vulkan {
    type Buffer = Buffer;
    type Matrix = Matrix;
    type Cache = cpu::Cache;
    type Codes = cpu::Codes;

    fn buffer(&self, len: usize) -> Result<Buffer, Error> {
        Buffer::zeros(&self.heap, len)
    }

    fn len(&self, buffer: &Buffer) -> usize {
        buffer.len
    }

    fn write(&self, dst: &mut Buffer, src: &[f32]) {
        self.host(dst, Access::Write);
        self.cpu.write(&mut dst.host, src);
    }

    fn read(&self, src: &Buffer, dst: &mut [f32]) -> Result<(), Error> {
        self.host(src, Access::Read);
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
        self.host(master, Access::Read);
        self.cpu.set_matrix(&mut dst.host, &master.host);
    }

    fn with_values(&self, matrix: &mut Matrix, work: &mut dyn FnMut(&mut Buffer)) {
        let memory = matrix.values.clone().expect("only a work matrix in f32 is its own master");
        let host = matrix.host.values_mut();
        let len = host.len();
        let mut buffer = Buffer { memory: Arc::clone(&memory), host: std::mem::take(host), len };
        work(&mut buffer);
        // A longer one would have shaders write beyond the matrix.
        assert!(Arc::ptr_eq(&buffer.memory, &memory), "another buffer was put in a matrix's place");
        // Products read it on the host.
        self.host(&buffer, Access::Read);
        *matrix.host.values_mut() = buffer.host;
    }

    fn read_matrix(&self, matrix: &Matrix, dst: &mut [f32]) -> Result<(), Error> {
        self.recorder.check()?;
        self.cpu.read_matrix(&matrix.host, dst)
    }

    fn shape(&self, matrix: &Matrix) -> (usize, usize) {
        self.cpu.shape(&matrix.host)
    }

    fn cache(&self, kv_heads: usize, head_dim: usize, dtype: CacheType, window: Option<usize>) -> cpu::Cache {
        self.cpu.cache(kv_heads, head_dim, dtype, window)
    }

    fn cache_len(&self, cache: &cpu::Cache) -> usize {
        self.cpu.cache_len(cache)
    }

    fn cache_rewind(&self, cache: &mut cpu::Cache, len: usize) -> usize {
        self.cpu.cache_rewind(cache, len)
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
}
