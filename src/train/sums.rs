//! Sums that passes leave on the device, so that a step waits for it once.

use crate::error::Result;
use pocketlora_kernels::{Backend, Call, doubles};

/// Numbers in f64 that the device adds up, zero at first.
pub struct Sums<B: Backend>(B::Buffer);

impl<B: Backend> Sums<B> {
    /// So many numbers.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(backend: &B, count: usize) -> Result<Self> {
        Ok(Self(backend.buffer(2 * count)?))
    }

    /// Adds the sum of `x` to number `at`.
    pub(super) fn add(&mut self, backend: &B, at: usize, x: &B::Buffer) -> Result<()> {
        Ok(backend.run(Call::Sum { x, at, y: &mut self.0 })?)
    }

    /// Adds the sum of squares of `x` to number `at`.
    pub(super) fn add_squares(&mut self, backend: &B, at: usize, x: &B::Buffer) -> Result<()> {
        Ok(backend.run(Call::SumSquares { x, at, y: &mut self.0 })?)
    }

    /// Waits for the device and reads the numbers.
    ///
    /// # Errors
    /// Device lost.
    pub fn read(&self, backend: &B) -> Result<Vec<f64>> {
        let mut values = vec![0.0; backend.len(&self.0)];
        backend.read(&self.0, &mut values)?;
        Ok(doubles(&values))
    }
}
