//! The CPU backend's memory: [`Memory`] for [`Cpu`].

use super::{Buffer, Cache, Codes, Cpu, Matrix};
use crate::{CacheType, Error, MatrixSource, Memory, WorkType};

impl Memory for Cpu {
    type Buffer = Buffer;
    type Matrix = Matrix;
    type Cache = Cache;
    type Codes = Codes;

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
        let values = matrix.values_mut();
        let (len, address) = (values.len(), values.as_ptr());
        work(values);
        assert!(values.len() == len && values.as_ptr() == address, "another buffer was put in a matrix's place");
    }

    fn read_matrix(&self, matrix: &Matrix, dst: &mut [f32]) -> Result<(), Error> {
        dst.copy_from_slice(matrix.values());
        Ok(())
    }

    fn shape(&self, matrix: &Matrix) -> (usize, usize) {
        matrix.shape()
    }

    fn cache(&self, kv_heads: usize, head_dim: usize, dtype: CacheType, window: Option<usize>) -> Cache {
        Cache::new(kv_heads, head_dim, dtype, window)
    }

    fn cache_len(&self, cache: &Cache) -> usize {
        cache.len()
    }

    fn cache_rewind(&self, cache: &mut Cache, len: usize) -> usize {
        cache.rewind(len)
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
}
