//! What a device holds: buffers, weights, caches, codes. Everything here moves or makes memory and computes nothing.

use crate::{CacheType, Error, MatrixSource, WorkType};

/// Memory of a device. Buffers and matrices belong to the device; the caller never sees where they lie.
///
/// Fresh buffers are zeros. A device may still be at work on what was asked of it before: [`Memory::read`] and the other
/// reading methods wait for that. What is dropped meanwhile stays alive for as long as recorded work needs it.
pub trait Memory: Send + Sync + 'static {
    /// An f32 array on the device.
    type Buffer: Send + Sync;
    /// A weight matrix `[O, K]` on the device, or mapped by it.
    type Matrix: Send + Sync;
    /// Keys and values of one layer.
    type Cache: Send + Sync;
    /// An array in 8 bits: a code for each element, an absmax for each [`crate::MOMENT_BLOCK`] of them.
    type Codes: Send + Sync;

    /// A buffer of `len` zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn buffer(&self, len: usize) -> Result<Self::Buffer, Error>;
    /// Number of f32 in `buffer`.
    fn len(&self, buffer: &Self::Buffer) -> usize;
    /// A buffer of `len` zeros to cut others from, where the device can do that.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn region(&self, len: usize) -> Result<Self::Buffer, Error> {
        self.buffer(len)
    }
    /// Length that [`Memory::cut`] can give `buffer` at most.
    fn capacity(&self, buffer: &Self::Buffer) -> usize {
        self.len(buffer)
    }
    /// A buffer of `len` values from the beginning of `buffer`'s memory, and one of what is left of it, if anything is. The
    /// buffer comes back where its device cannot give it that length. What the parts hold is unspecified.
    #[expect(clippy::type_complexity, reason = "a name for it would hide what comes back")]
    fn cut(&self, buffer: Self::Buffer, len: usize) -> Result<(Self::Buffer, Option<Self::Buffer>), Self::Buffer> {
        if self.len(&buffer) == len { Ok((buffer, None)) } else { Err(buffer) }
    }
    /// Undoes [`Memory::cut`]; both come back if `second` does not lie right behind `first`.
    fn join(&self, first: Self::Buffer, second: Self::Buffer) -> Result<Self::Buffer, (Self::Buffer, Self::Buffer)> {
        Err((first, second))
    }
    /// A number that orders buffers as they lie in memory.
    fn address(&self, buffer: &Self::Buffer) -> usize {
        let _ = buffer;
        0
    }
    /// Copies host values in; lengths are equal.
    fn write(&self, dst: &mut Self::Buffer, src: &[f32]);
    /// Waits for the work recorded so far and copies `src` out; lengths are equal.
    ///
    /// # Errors
    /// [`Error::Device`] if the device was lost.
    fn read(&self, src: &Self::Buffer, dst: &mut [f32]) -> Result<(), Error>;

    /// Takes a frozen weight as a file holds it: mapped where the device can, copied where it cannot.
    ///
    /// # Errors
    /// [`Error::Matrix`] if its parts do not fit its shape, [`Error::OutOfMemory`].
    fn matrix(&self, source: MatrixSource) -> Result<Self::Matrix, Error>;
    /// A small matrix `[rows, cols]` of zeros that [`Memory::set_matrix`] fills.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn work_matrix(&self, rows: usize, cols: usize, dtype: WorkType) -> Result<Self::Matrix, Error>;
    /// Rounds `master` (`rows * cols` values) into a matrix made by [`Memory::work_matrix`].
    fn set_matrix(&self, dst: &mut Self::Matrix, master: &Self::Buffer);
    /// Lends the values of a matrix made as [`WorkType::F32`]: products see at once what `work` does to them. The buffer
    /// must be the same one when `work` returns; this panics if another was put in its place.
    fn with_values(&self, matrix: &mut Self::Matrix, work: &mut dyn FnMut(&mut Self::Buffer));
    /// Waits for the work recorded so far and copies the values of a matrix made as [`WorkType::F32`] out.
    ///
    /// # Errors
    /// As [`Memory::read`].
    fn read_matrix(&self, matrix: &Self::Matrix, dst: &mut [f32]) -> Result<(), Error>;
    /// `(O, K)` of a matrix.
    fn shape(&self, matrix: &Self::Matrix) -> (usize, usize);

    /// An empty cache of `kv_heads` rows of `head_dim` a token for keys and as many for values; it grows as needed. With a
    /// `window` it may drop tokens that no later query sees, for a query sees so many last tokens, its own included.
    fn cache(&self, kv_heads: usize, head_dim: usize, dtype: CacheType, window: Option<usize>) -> Self::Cache;
    /// Tokens appended, those that were dropped included.
    fn cache_len(&self, cache: &Self::Cache) -> usize;
    /// Keeps the first `len` tokens, or none where the next query would miss some that were dropped; returns how many.
    fn cache_rewind(&self, cache: &mut Self::Cache, len: usize) -> usize;

    /// `len` zeros in 8 bits, coded with the signed dynamic map or the unsigned one (Dettmers et al. 2021).
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn codes(&self, len: usize, signed: bool) -> Result<Self::Codes, Error>;
    /// Number of elements.
    fn codes_len(&self, codes: &Self::Codes) -> usize;
    /// Copies codes and absmax out; lengths are equal.
    ///
    /// # Errors
    /// As [`Memory::read`].
    fn read_codes(&self, src: &Self::Codes, codes: &mut [u8], absmax: &mut [f32]) -> Result<(), Error>;
    /// Copies codes and absmax in; lengths are equal.
    fn write_codes(&self, dst: &mut Self::Codes, codes: &[u8], absmax: &[f32]);
}

/// A memory whose parts can be used as those of `N`: of a device that shares memory with the host, or of a backend in
/// front of another. [`crate::Call::lend`] hands calls on by it.
pub trait Lends<N: Memory>: Memory {
    /// The same buffer, to be read.
    fn lend_buffer(buffer: &Self::Buffer) -> &N::Buffer;
    /// The same buffer, to be written.
    fn lend_buffer_mut(buffer: &mut Self::Buffer) -> &mut N::Buffer;
    /// The same weight.
    fn lend_matrix(matrix: &Self::Matrix) -> &N::Matrix;
    /// The same cache, to be read.
    fn lend_cache(cache: &Self::Cache) -> &N::Cache;
    /// The same cache, to be written.
    fn lend_cache_mut(cache: &mut Self::Cache) -> &mut N::Cache;
    /// The same codes, to be written.
    fn lend_codes_mut(codes: &mut Self::Codes) -> &mut N::Codes;
}
