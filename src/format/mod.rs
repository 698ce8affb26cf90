//! Files: safetensors with bitsandbytes NF4, GGUF, import and quantization.

mod bnb;
mod hf;
pub mod safetensors;
mod source;
mod widen;

pub use hf::Checkpoint;
pub use source::{Sidecars, Source, TensorMeta};
pub(crate) use widen::widen;
