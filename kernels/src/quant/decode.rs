//! The definition of decoding, element by element: `round(code[nibble] * absmax[block])`.

use crate::{Absmax, FloatType, Nf4Source};
use half::{bf16, f16};

impl Nf4Source {
    /// Decodes the `out.len()` elements from number `start` on of the flattened weight, each rounded to the weight's
    /// dtype as bitsandbytes does. For conversion and as a reference: the matmul kernels decode in bulk instead.
    ///
    /// # Panics
    /// The weight has fewer elements, or scales that do not belong to its packed codes.
    pub fn decode(&self, start: usize, out: &mut [f32]) {
        let mut at = start;
        let mut out = out;
        while !out.is_empty() {
            // Up to the end of the block that `at` lies in: the scale is the same.
            let len = (self.block - at % self.block).min(out.len());
            let (now, later) = out.split_at_mut(len);
            self.decode_block(at, now);
            out = later;
            at += len;
        }
    }

    fn decode_block(&self, start: usize, out: &mut [f32]) {
        let absmax = self.absmax.get(start / self.block);
        let values = self.code.map(|code| match self.dtype {
            FloatType::F32 => code * absmax,
            FloatType::F16 => f16::from_f32(code * absmax).to_f32(),
            FloatType::BF16 => bf16::from_f32(code * absmax).to_f32(),
        });
        for (i, out) in (start..).zip(out) {
            let byte = self.packed[i / 2];
            let nibble = if i % 2 == 0 { byte >> 4 } else { byte & 15 };
            *out = values[usize::from(nibble)];
        }
    }
}

impl Absmax {
    /// The scale of block number `block`.
    ///
    /// # Panics
    /// There are fewer blocks.
    #[must_use]
    pub fn get(&self, block: usize) -> f32 {
        match self {
            Self::Plain(bytes) => f32::from_le_bytes(bytes.as_chunks().0[block]),
            Self::Double { codes, map, nested, nested_block, offset } => {
                map[usize::from(codes[block])] * nested[block / nested_block] + offset
            }
        }
    }
}
