//! Memory of the CPU backend.

use crate::Error;
use bytes::{Buf, Bytes, BytesMut};
use std::fmt;
use std::ops::{Deref, DerefMut};

/// Bytes of a cache line, to which what vectors read is aligned: one that crosses a line loads at half speed.
pub(crate) const LINE: usize = 64;

/// An f32 array on the heap, or one that another device shares.
pub struct Buffer(Values);

enum Values {
    Own(Vec<f32>),
    /// A part of a region, of which `len` values are seen: whole cache lines, so that neighbours share none.
    Part {
        bytes: BytesMut,
        len: usize,
    },
    #[cfg(feature = "vulkan")]
    Lent(Box<dyn DerefMut<Target = [f32]> + Send + Sync>),
}

impl Buffer {
    pub(crate) fn zeros(len: usize) -> Result<Self, Error> {
        let mut values = reserve(len)?;
        values.resize(len, 0.0);
        Ok(Self(Values::Own(values)))
    }

    /// Zeros to cut other buffers from.
    pub(crate) fn region(len: usize) -> Result<Self, Error> {
        let size = len.saturating_mul(size_of::<f32>()).saturating_add(LINE - 1) / LINE * LINE;
        Ok(Self(Values::Part { bytes: lines(size)?, len }))
    }

    /// Length that [`Buffer::cut`] can give at most.
    pub(crate) fn capacity(&self) -> usize {
        match &self.0 {
            Values::Part { bytes, .. } => bytes.len() / size_of::<f32>(),
            _ => self.len(),
        }
    }

    /// See [`crate::Memory::cut`].
    pub(crate) fn cut(self, len: usize) -> Result<(Self, Option<Self>), Self> {
        match self.0 {
            Values::Part { mut bytes, .. } if len * size_of::<f32>() <= bytes.len() => {
                let rest = bytes.split_off((len * size_of::<f32>()).next_multiple_of(LINE));
                let rest_len = rest.len() / size_of::<f32>();
                let rest = (rest_len > 0).then(|| Self(Values::Part { bytes: rest, len: rest_len }));
                Ok((Self(Values::Part { bytes, len }), rest))
            }
            Values::Own(values) if values.len() == len => Ok((Self(Values::Own(values)), None)),
            other => Err(Self(other)),
        }
    }

    /// See [`crate::Memory::join`].
    pub(crate) fn join(self, second: Self) -> Result<Self, (Self, Self)> {
        match (self.0, second.0) {
            // Regions are never neighbours, for each is followed by what its alignment left over.
            (Values::Part { bytes: mut a, .. }, Values::Part { bytes: b, .. })
                if a.as_ptr_range().end == b.as_ptr() && !a.is_empty() =>
            {
                a.unsplit(b);
                let len = a.len() / size_of::<f32>();
                Ok(Self(Values::Part { bytes: a, len }))
            }
            (a, b) => Err((Self(a), Self(b))),
        }
    }

    /// Memory of a device that leaves operations to this backend.
    #[cfg(feature = "vulkan")]
    pub(crate) fn lent(values: Box<dyn DerefMut<Target = [f32]> + Send + Sync>) -> Self {
        Self(Values::Lent(values))
    }
}

impl Default for Buffer {
    fn default() -> Self {
        Self(Values::Own(Vec::new()))
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.0 {
            Values::Own(values) => values,
            Values::Part { bytes, len } => &bytemuck::cast_slice(bytes)[..*len],
            #[cfg(feature = "vulkan")]
            Values::Lent(values) => values,
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.0 {
            Values::Own(values) => values,
            Values::Part { bytes, len } => &mut bytemuck::cast_slice_mut(bytes)[..*len],
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

/// Zeros from the beginning of a cache line on.
pub(crate) fn lines(size: usize) -> Result<BytesMut, Error> {
    let mut memory = reserve(size.saturating_add(LINE))?;
    memory.resize(size + LINE, 0u8);
    let mut bytes = BytesMut::from(Bytes::from(memory));
    bytes.advance(bytes.as_ptr().align_offset(LINE).min(LINE));
    bytes.truncate(size);
    Ok(bytes)
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
