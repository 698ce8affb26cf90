//! Memory that host and device both see, cut from few allocations.
//!
//! Devices allow as few as 4096 allocations. Small ranges come out of chunks of 16 MiB, which makes that 64 GiB of
//! them; a large one is an allocation of its own. Chunks stay mapped for as long as they live.

#![allow(unsafe_code, reason = "calls into the Vulkan driver, and memory that it maps")]

use super::device::Device;
use super::device_error;
use crate::Error;
use ash::vk;
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a chunk that is shared.
const CHUNK: u64 = 16 << 20;

/// Where memory comes from.
pub(super) struct Heap {
    device: Arc<Device>,
    chunks: Mutex<Vec<Chunk>>,
}

/// One allocation with one buffer over all of it.
struct Chunk {
    device: Arc<Device>,
    buffer: vk::Buffer,
    memory: vk::DeviceMemory,
    address: *mut u8,
    size: u64,
    /// Free ranges: start and length. Neighbours are merged.
    free: BTreeMap<u64, u64>,
}

// SAFETY: `address` is memory of the driver that belongs to no thread; a chunk only hands out ranges of it, each once.
unsafe impl Send for Chunk {}

/// A range that is free again when this is dropped. Recorded work holds it by `Arc`.
pub(super) struct Span {
    heap: Arc<Heap>,
    pub buffer: vk::Buffer,
    pub offset: u64,
    /// Bytes, at least one.
    pub size: u64,
    address: NonNull<u8>,
    /// The recorder's epoch in which the device last reads this; the recorder alone uses these two, under its lock.
    pub read: AtomicU64,
    /// The epoch in which the device last writes this.
    pub written: AtomicU64,
}

// SAFETY: `address` is memory of the driver that belongs to no thread. Shared access never writes through it;
// `bytes_mut` and `Mapped` (`buffer.rs`), which do, are exclusive.
unsafe impl Send for Span {}
// SAFETY: as above.
unsafe impl Sync for Span {}

impl Heap {
    pub fn new(device: Arc<Device>) -> Arc<Self> {
        Arc::new(Self { device, chunks: Mutex::default() })
    }

    /// `bytes` of zeros.
    pub fn zeros(self: &Arc<Self>, bytes: usize) -> Result<Span, Error> {
        let refused = Error::OutOfMemory { bytes };
        let limits = &self.device.limits;
        // An empty range is no range to Vulkan.
        let Some(size) = (bytes.max(1) as u64).checked_next_multiple_of(limits.alignment) else { return Err(refused) };
        if size > limits.allocation {
            return Err(refused);
        }
        let (buffer, offset, address) = {
            let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
            match chunks.iter_mut().find_map(|chunk| chunk.take(size)) {
                Some(range) => range,
                None => {
                    let size_of_chunk = if size > CHUNK / 4 { size } else { CHUNK };
                    let mut chunk = Chunk::new(&self.device, size_of_chunk)?;
                    let range = chunk.take(size).ok_or(refused)?;
                    chunks.push(chunk);
                    range
                }
            }
        };
        let read = AtomicU64::new(0);
        let written = AtomicU64::new(0);
        let mut memory = Span { heap: Arc::clone(self), buffer, offset, size, address, read, written };
        memory.bytes_mut().fill(0);
        Ok(memory)
    }

    /// Bytes of all chunks.
    pub fn allocated(&self) -> u64 {
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|chunk| chunk.size).sum()
    }

    fn release(&self, buffer: vk::Buffer, offset: u64, size: u64) {
        let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = chunks.iter().position(|chunk| chunk.buffer == buffer) else { return };
        chunks[at].give(offset, size);
        // One empty chunk stays, for what comes next.
        let spare = |chunk: &Chunk| chunk.size == CHUNK && chunk.is_empty();
        if chunks[at].is_empty() && (chunks[at].size != CHUNK || chunks.iter().filter(|c| spare(c)).count() > 1) {
            chunks.swap_remove(at);
        }
    }
}

impl Chunk {
    fn new(device: &Arc<Device>, size: u64) -> Result<Self, Error> {
        let refused = |result| match result {
            vk::Result::ERROR_OUT_OF_DEVICE_MEMORY
            | vk::Result::ERROR_OUT_OF_HOST_MEMORY
            | vk::Result::ERROR_TOO_MANY_OBJECTS
            | vk::Result::ERROR_MEMORY_MAP_FAILED => Error::OutOfMemory { bytes: size as usize },
            other => device_error("vulkan memory")(other),
        };
        let mut chunk = Self {
            device: Arc::clone(device),
            buffer: vk::Buffer::null(),
            memory: vk::DeviceMemory::null(),
            address: std::ptr::null_mut(),
            size,
            free: BTreeMap::from([(0, size)]),
        };
        let usage = vk::BufferUsageFlags::STORAGE_BUFFER | vk::BufferUsageFlags::TRANSFER_DST;
        let info = vk::BufferCreateInfo::default().size(size).usage(usage).sharing_mode(vk::SharingMode::EXCLUSIVE);
        // SAFETY: the device is alive; whatever step fails, `Drop` takes back those before it. The memory is of a type
        // that the buffer allows, as large as it asks for, host-visible and mapped once.
        unsafe {
            chunk.buffer = device.raw.create_buffer(&info, None).map_err(refused)?;
            let needs = device.raw.get_buffer_memory_requirements(chunk.buffer);
            let allowed = |i: &&u32| needs.memory_type_bits >> **i & 1 == 1;
            let Some(memory_type) = device.limits.memory_types.iter().find(allowed) else {
                return Err(Error::Device("vulkan memory: no coherent type for storage buffers".to_owned()));
            };
            let info = vk::MemoryAllocateInfo::default().allocation_size(needs.size).memory_type_index(*memory_type);
            chunk.memory = device.raw.allocate_memory(&info, None).map_err(refused)?;
            device.raw.bind_buffer_memory(chunk.buffer, chunk.memory, 0).map_err(refused)?;
            let flags = vk::MemoryMapFlags::empty();
            chunk.address = device.raw.map_memory(chunk.memory, 0, vk::WHOLE_SIZE, flags).map_err(refused)?.cast();
        }
        Ok(chunk)
    }

    fn is_empty(&self) -> bool {
        self.free.get(&0) == Some(&self.size)
    }

    /// The first free range of `size` bytes, a multiple of the alignment.
    fn take(&mut self, size: u64) -> Option<(vk::Buffer, u64, NonNull<u8>)> {
        let (&offset, &len) = self.free.iter().find(|(_, len)| **len >= size)?;
        // SAFETY: the offset lies within the mapped chunk.
        let address = NonNull::new(unsafe { self.address.add(offset as usize) })?;
        self.free.remove(&offset);
        if len > size {
            self.free.insert(offset + size, len - size);
        }
        Some((self.buffer, offset, address))
    }

    fn give(&mut self, offset: u64, size: u64) {
        let (mut start, mut end) = (offset, offset + size);
        if let Some(len) = self.free.remove(&end) {
            end += len;
        }
        if let Some((&before, &len)) = self.free.range(..offset).next_back()
            && before + len == offset
        {
            start = before;
        }
        self.free.insert(start, end - start);
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: no range is handed out any more, and those that work used were held until it was done. Null handles
        // of a chunk that was not finished are ignored; freeing unmaps.
        unsafe {
            self.device.raw.destroy_buffer(self.buffer, None);
            self.device.raw.free_memory(self.memory, None);
        }
    }
}

impl Span {
    /// The first byte, aligned to a cache line.
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// All bytes, before they are shared with anybody.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the range is mapped and ours alone: whoever had it before is done, and the device gets to know it
        // only through an `Arc`, of which there is none as long as it can be borrowed so.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.size as usize) }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        self.heap.release(self.buffer, self.offset, self.size);
    }
}
