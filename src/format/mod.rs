//! Files: safetensors with bitsandbytes NF4, GGUF, import and quantization.

pub mod atomic;
mod bnb;
pub mod gguf;
mod head;
mod hf;
mod hf_source;
mod pieces;
mod plan;
mod quantize;
pub mod safetensors;
mod source;
mod widen;
mod writer;

pub use atomic::{Staged, write_bytes, write_file};
pub(crate) use atomic::{sweep, sync_dir};
pub use head::int8_head;
pub use hf::Checkpoint;
pub use hf_source::HfSource;
pub use quantize::{Progress, Summary, Target, quantize};
pub use source::{Sidecars, Source, TensorMeta, open_source};
pub(crate) use widen::widen;
pub(crate) use writer::{Entry, Writer};
