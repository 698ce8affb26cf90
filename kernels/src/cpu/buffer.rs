//! Memory of the CPU backend.

use crate::Error;
use std::ops::{Deref, DerefMut};

/// An f32 array on the heap.
#[derive(Debug)]
pub struct Buffer(Vec<f32>);

impl Buffer {
    pub(crate) fn zeros(len: usize) -> Result<Self, Error> {
        let mut values = reserve(len)?;
        values.resize(len, 0.0);
        Ok(Self(values))
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

/// An empty vector with room for `len`, or the error that an app can act on instead of the abort of `Vec`.
pub(crate) fn reserve<T>(len: usize) -> Result<Vec<T>, Error> {
    let mut values = Vec::new();
    grow(&mut values, len)?;
    Ok(values)
}

/// Makes room for exactly `more` further elements.
pub(crate) fn grow<T>(values: &mut Vec<T>, more: usize) -> Result<(), Error> {
    values.try_reserve_exact(more).map_err(|_| Error::OutOfMemory { bytes: more.saturating_mul(size_of::<T>()) })
}
