//! Memory of the CPU backend.

use crate::Error;
use std::fmt;
use std::ops::{Deref, DerefMut};

/// An f32 array on the heap, or one that another device shares.
pub struct Buffer(Values);

enum Values {
    Own(Vec<f32>),
    #[cfg(feature = "vulkan")]
    Lent(Box<dyn DerefMut<Target = [f32]> + Send + Sync>),
}

impl Buffer {
    pub(crate) fn zeros(len: usize) -> Result<Self, Error> {
        let mut values = reserve(len)?;
        values.resize(len, 0.0);
        Ok(Self(Values::Own(values)))
    }

    /// Memory of a device that leaves operations to this backend.
    #[cfg(feature = "vulkan")]
    pub(crate) fn lent(values: Box<dyn DerefMut<Target = [f32]> + Send + Sync>) -> Self {
        Self(Values::Lent(values))
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.0 {
            Values::Own(values) => values,
            #[cfg(feature = "vulkan")]
            Values::Lent(values) => values,
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.0 {
            Values::Own(values) => values,
            #[cfg(feature = "vulkan")]
            Values::Lent(values) => values,
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Buffer").field(&&**self).finish()
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
