//! Files: safetensors with bitsandbytes NF4, GGUF, import and quantization.

mod source;

pub use source::{Sidecars, Source, TensorMeta};
