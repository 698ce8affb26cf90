//! Files: safetensors with bitsandbytes NF4, GGUF, import and quantization.

pub mod atomic;
mod bnb;
pub(crate) mod foreign;
pub mod gguf;
mod head;
mod hf;
mod hf_source;
mod packed;
mod pieces;
mod place;
mod plan;
mod quantize;
mod recipe;
pub mod safetensors;
mod source;
mod widen;
mod writer;

pub(crate) use atomic::AtomicDir;
pub use atomic::{Staged, write_bytes, write_file};
pub(crate) use atomic::{create_folder, sweep, sync_dir};
pub(crate) use bnb::weight_of;
pub use head::int8_head;
pub use hf::Checkpoint;
pub use hf_source::HfSource;
pub(crate) use hf_source::sidecar_names;
pub use place::model_of;
#[cfg(feature = "cli")]
pub(crate) use place::{folder_of, is_of_parts};
pub(crate) use quantize::convert;
pub use quantize::{Existing, Progress, Summary, quantize};
pub use recipe::{Recipe, Target};
pub(crate) use source::is_gguf;
pub use source::{LeftOut, Sidecars, Source, TensorMeta, open_source};
pub(crate) use widen::widen;
pub(crate) use writer::{Entry, Writer};

/// For the copies in the model cache.
#[cfg(feature = "hub")]
mod for_cache {
    pub(crate) use super::head::head_origin;
    pub(crate) use super::plan::nf4_bytes;
    pub(crate) use super::quantize::{CONFIG, CONVERSION, MODEL, write_sidecars};
}
#[cfg(feature = "hub")]
pub(crate) use for_cache::*;
