//! Files: safetensors with bitsandbytes NF4, GGUF, import and quantization.

pub mod gguf;
mod source;

pub use source::{Sidecars, Source, TensorMeta};
