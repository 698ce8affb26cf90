//! Weights. 4-bit ones are copied into the device's memory once, in one range with all their parts; the CPU backend
//! then reads them there, too. Other weights stay where they are, mapped, and are the CPU's.

#![allow(unsafe_code, reason = "slices of memory that the driver maps")]

use super::device::DeviceLimits;
use super::memory::{Heap, Span};
use crate::{Absmax, Cpu, Error, FloatType, MatrixData, MatrixSource, Memory as _, Nf4Source, cpu};
use bytes::Bytes;
use std::ops::Range;
use std::sync::Arc;

/// A weight on the device, or one that the CPU multiplies.
pub struct Matrix {
    pub(super) host: cpu::Matrix,
    pub(super) blocks: Option<Blocks>,
    /// Memory of a matrix that is its own master.
    pub(super) values: Option<Arc<Span>>,
}

/// A 4-bit weight as the shaders read it.
pub(super) struct Blocks {
    pub memory: Arc<Span>,
    /// Constants from `packed_at` on, as `shaders/shared/nf4.glsl` has them.
    pub places: [u32; 7],
}

impl Matrix {
    pub(super) fn new(cpu: &Cpu, heap: &Arc<Heap>, limits: &DeviceLimits, source: MatrixSource) -> Result<Self, Error> {
        // The parts fit the shape after this.
        let host = cpu.matrix(source.clone())?;
        let MatrixSource { rows, cols, data: MatrixData::Nf4(nf4) } = source else {
            return Ok(Self { host, blocks: None, values: None });
        };
        let layout = Layout::new(&nf4);
        // The shader counts elements in 32 bits.
        let len = rows.saturating_mul(cols);
        if len == 0 || u32::try_from(len).is_err() || layout.bytes() as u64 + limits.alignment > limits.range {
            return Ok(Self { host, blocks: None, values: None });
        }
        let (memory, copy) = layout.copy(heap, nf4)?;
        let host = cpu.matrix(MatrixSource { rows, cols, data: MatrixData::Nf4(copy) })?;
        Ok(Self { host, blocks: Some(Blocks { memory, places: layout.places }), values: None })
    }
}

/// Places of a weight's parts in its memory, in words of 32 bits.
struct Layout {
    nested_at: usize,
    scales_at: usize,
    packed_at: usize,
    words: usize,
    places: [u32; 7],
}

impl Layout {
    fn new(nf4: &Nf4Source) -> Self {
        let (map, nested, scales, nested_block, offset) = match &nf4.absmax {
            Absmax::Plain(scales) => (0, 0, scales.len(), 0, 0.0),
            // A nested block beyond 32 bits is longer than all scales, as is the longest that fits.
            Absmax::Double { codes, nested, nested_block, offset, .. } => {
                (256, nested.len(), codes.len(), u32::try_from(*nested_block).unwrap_or(u32::MAX), *offset)
            }
        };
        let nested_at = nf4.code.len() + map;
        let scales_at = nested_at + nested;
        // A cache line, so that a row's words lie in as few as possible.
        let packed_at = (scales_at + scales.div_ceil(4)).next_multiple_of(16);
        let words = packed_at + nf4.packed.len().div_ceil(4);
        let dtype = match nf4.dtype {
            FloatType::F32 => 0,
            FloatType::F16 => 1,
            FloatType::BF16 => 2,
        };
        // Casts are exact for what fits `DeviceLimits::range`, and nothing else is used.
        let [packed, scales, nested] = [packed_at, scales_at, nested_at].map(|at| at as u32);
        let places = [packed, scales, nested, nf4.block.trailing_zeros(), nested_block, dtype, offset.to_bits()];
        Self { nested_at, scales_at, packed_at, words, places }
    }

    fn bytes(&self) -> usize {
        4 * self.words
    }

    /// The parts in memory of the device, and the same weight with its large parts there.
    fn copy(&self, heap: &Arc<Heap>, nf4: Nf4Source) -> Result<(Arc<Span>, Nf4Source), Error> {
        let mut memory = heap.zeros(self.bytes())?;
        let bytes = memory.bytes_mut();
        write(bytes, 0, &nf4.code);
        let scales = match &nf4.absmax {
            Absmax::Plain(scales) => scales,
            Absmax::Double { codes, map, nested, .. } => {
                write(bytes, nf4.code.len(), &map[..]);
                write(bytes, self.nested_at, nested);
                codes
            }
        };
        let scales_at = 4 * self.scales_at..4 * self.scales_at + scales.len();
        let packed_at = 4 * self.packed_at..4 * self.packed_at + nf4.packed.len();
        bytes[scales_at.clone()].copy_from_slice(scales);
        bytes[packed_at.clone()].copy_from_slice(&nf4.packed);
        let memory = Arc::new(memory);
        let part = |range| Bytes::from_owner(Part { memory: Arc::clone(&memory), range });
        let absmax = match nf4.absmax {
            Absmax::Plain(_) => Absmax::Plain(part(scales_at)),
            Absmax::Double { map, nested, nested_block, offset, .. } => {
                Absmax::Double { codes: part(scales_at), map, nested, nested_block, offset }
            }
        };
        let copy = Nf4Source { packed: part(packed_at), absmax, ..nf4 };
        Ok((memory, copy))
    }
}

fn write(bytes: &mut [u8], word: usize, values: &[f32]) {
    // Shaders read words in the host's order, which is little-endian wherever there is Vulkan.
    for (bytes, value) in bytes[4 * word..].as_chunks_mut().0.iter_mut().zip(values) {
        *bytes = value.to_le_bytes();
    }
}

/// Bytes of a frozen weight.
struct Part {
    memory: Arc<Span>,
    range: Range<usize>,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the memory is mapped and initialized for at least this range; a weight is never written to again, by
        // the host or by the device.
        let all = unsafe { std::slice::from_raw_parts(self.memory.address().as_ptr(), self.memory.size as usize) };
        &all[self.range.clone()]
    }
}
