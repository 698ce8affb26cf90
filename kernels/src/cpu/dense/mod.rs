//! Weights in f16, bf16 or f32, read in place from bytes of any alignment.

pub(crate) mod portable;
