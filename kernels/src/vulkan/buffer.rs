//! Buffers, which the host sees as the CPU backend's own.

#![allow(unsafe_code, reason = "slices of memory that the driver maps")]

use super::memory::{Heap, Span};
use crate::{Error, cpu};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// An f32 array that host and device share.
pub struct Buffer {
    pub(super) memory: Arc<Span>,
    /// The same memory for operations on the host. Only to be touched after [`super::Vulkan::host`] waited for the
    /// device.
    pub(super) host: cpu::Buffer,
    pub(super) len: usize,
}

impl Buffer {
    pub(super) fn zeros(heap: &Arc<Heap>, len: usize) -> Result<Self, Error> {
        let memory = Arc::new(heap.zeros(len.saturating_mul(size_of::<f32>()))?);
        let host = cpu::Buffer::lent(Box::new(Mapped { memory: Arc::clone(&memory), len }));
        Ok(Self { memory, host, len })
    }
}

/// The host's view; there is one of each buffer.
struct Mapped {
    memory: Arc<Span>,
    len: usize,
}

impl Deref for Mapped {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: the memory was made for this many f32, is mapped, aligned and initialized (with zeros). Only this
        // view writes on the host's side, and borrowing tells apart its readers and writers; on the device's side
        // `Vulkan::host` has waited for all that writes.
        unsafe { std::slice::from_raw_parts(self.memory.address().cast().as_ptr(), self.len) }
    }
}

impl DerefMut for Mapped {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above; here `Vulkan::host` has waited for all that reads, too.
        unsafe { std::slice::from_raw_parts_mut(self.memory.address().cast().as_ptr(), self.len) }
    }
}
