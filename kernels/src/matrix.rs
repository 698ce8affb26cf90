//! Frozen weights as files hold them.

use bytes::Bytes;
use std::sync::Arc;

/// 16- and 32-bit float types of checkpoints, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloatType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
}

impl FloatType {
    /// Bytes of one element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

/// A weight `[rows, cols]`, row-major, whose bytes are shared with their owner (a file map, usually).
#[derive(Clone, Debug)]
pub struct MatrixSource {
    /// Output features (`O`), or vocabulary entries of an embedding.
    pub rows: usize,
    /// Input features (`K`).
    pub cols: usize,
    /// The elements.
    pub data: MatrixData,
}

/// How the elements of a [`MatrixSource`] are stored.
#[derive(Clone, Debug)]
pub enum MatrixData {
    /// Little-endian floats, possibly unaligned.
    Dense(FloatType, Bytes),
    /// bitsandbytes 4-bit blocks.
    Nf4(Nf4Source),
    /// Signed bytes times a scale for each row: a faster copy of a 16-bit matrix, made by [`crate::quant::encode_int8`].
    Int8 {
        /// `[rows, cols]` of -127 to 127, with `cols` a multiple of 64; of every 64 the 32 even elements come first.
        codes: Bytes,
        /// One little-endian f32 a row, possibly unaligned.
        scales: Bytes,
    },
}

/// bitsandbytes' 4-bit format (QLoRA, Dettmers et al. 2023; bitsandbytes `quantize_4bit`).
#[derive(Clone, Debug)]
pub struct Nf4Source {
    /// Two elements a byte over the flattened matrix; the even one is the high nibble.
    pub packed: Bytes,
    /// Elements per block: a power of two from 32 to 4096; blocks run over row ends.
    pub block: usize,
    /// The 16 values of the codebook as the file holds them (NF4, or FP4 which decodes the same way).
    pub code: [f32; 16],
    /// Scale of each block.
    pub absmax: Absmax,
    /// Type to which bitsandbytes rounds the product of code and absmax.
    pub dtype: FloatType,
}

/// Block scales of a [`Nf4Source`].
#[derive(Clone, Debug)]
pub enum Absmax {
    /// One little-endian f32 a block, possibly unaligned.
    Plain(Bytes),
    /// Double quantization: `map[codes[i]] * nested[i / nested_block] + offset`.
    Double {
        /// One code a block.
        codes: Bytes,
        /// The 8-bit dynamic map stored with the weight.
        map: Arc<[f32; 256]>,
        /// Scale of each nested block.
        nested: Arc<[f32]>,
        /// Block scales per nested block, 256 in practice.
        nested_block: usize,
        /// Mean of the block scales, taken off before they were quantized.
        offset: f32,
    },
}
