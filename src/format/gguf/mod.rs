//! GGUF files of llama.cpp as checkpoints: names, row order, `config.json` and tokenizer as Hugging Face has them.
//!
//! Read from a map; versions 2 and 3, little-endian; the architectures are in `families/`. The format is described in ggml's
//! `docs/gguf.md`. The metadata make a `config.json`, this makes a model, and each of its parameters is looked for in the file.

mod config;
mod container;
mod cursor;
mod dequant;
mod export;
mod families;
mod few_bits;
mod grids;
mod keys;
mod known;
mod order;
mod places;
mod rope;
mod sidecars;
mod split;
mod tied;
mod tokenizer;
mod value;
mod weights;
mod writer;

pub use container::{Container, GgufTensor};
pub use dequant::GgmlType;
pub use export::{GgufTarget, export_model};
pub(crate) use families::Family;
pub(crate) use order::interleaved_row;
pub(crate) use split::parts_of;
pub use value::{Array, Kind, Metadata, Value};
pub(crate) use writer::{GgufEntry, GgufWriter, Pairs};

use crate::error::{Error, Result};
use crate::format::{LeftOut, Sidecars, Source, TensorMeta};
use bytes::Bytes;
use serde_json::Map;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// llama.cpp's name for the kind of model.
const ARCH: &str = "general.architecture";

/// A language model in a GGUF file.
#[derive(Clone, Debug)]
pub struct Gguf {
    path: PathBuf,
    file: Container,
    config: Map<String, serde_json::Value>,
    weights: Vec<weights::Weight>,
    /// The weights' descriptions again, for [`Source::tensors`] hands out a slice.
    tensors: Vec<TensorMeta>,
    left_out: Vec<LeftOut>,
}

impl Gguf {
    /// Maps the file at `path`, with those that its name says belong to it, and checks headers, hyperparameters and tensor
    /// shapes. No weight is read.
    ///
    /// # Errors
    /// A file cannot be mapped, breaks the format, or holds something that is not supported.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of(split::open(path)?, path)
    }

    /// As [`Gguf::open`], for bytes that are in memory already; `path` is for messages.
    ///
    /// # Errors
    /// The bytes break the format, or hold something that is not supported.
    pub fn from_bytes(bytes: Bytes, path: &Path) -> Result<Self> {
        let file = Container::parse(bytes, path)?;
        split::check_whole(&file)?;
        Self::of(file, path)
    }

    fn of(file: Container, path: &Path) -> Result<Self> {
        let meta = &file.metadata;
        config::refuse_other_kinds(meta)?;
        let arch = meta.required(ARCH, meta.string(ARCH)?)?;
        let family = Family::named(arch).ok_or_else(|| {
            let next = format!("use a model of one of `{}`, as `pocketlora pull --list` has some", Family::names());
            Error::unsupported(meta.path(), format_args!("architecture `{arch}` in GGUF"), next)
        })?;
        let draft = config::Draft::read(keys::Keys { file: &file, arch }, family)?;
        let model = pocketlora_models::build(&draft.json).map_err(|e| {
            let what = format_args!("`{}` = `{}`, as the metadata have it,", e.key, e.got);
            if e.unsupported {
                let next = format!("expected {}; use the model's safetensors files", e.expected);
                return Error::unsupported(meta.path(), what, next);
            }
            Error::format(
                meta.path(),
                format_args!("metadata, as `{}`", e.key),
                &e.expected,
                format_args!("`{}`", e.got),
            )
        })?;
        let (weights, left_out) = weights::find(&draft, family, model.as_ref())?;
        let config = draft.json;
        let tensors = weights.iter().map(|w| w.meta.clone()).collect();
        Ok(Self { path: path.to_owned(), file, config, weights, tensors, left_out })
    }

    /// Whether the file has a tokenizer.
    #[must_use]
    pub fn has_tokenizer(&self) -> bool {
        !matches!(self.file.metadata.string(tokenizer::MODEL), Ok(None | Some("none" | "no_vocab")))
    }

    /// Whether the file has a chat template.
    #[cfg(feature = "cli")]
    pub(crate) fn has_template(&self) -> bool {
        matches!(self.file.metadata.string(sidecars::TEMPLATE), Ok(Some(_)))
    }

    /// The file behind the model: metadata and tensors under their own names.
    #[must_use]
    pub fn container(&self) -> &Container {
        &self.file
    }
}

impl Source for Gguf {
    fn config(&self) -> &Map<String, serde_json::Value> {
        &self.config
    }

    fn tensors(&self) -> &[TensorMeta] {
        &self.tensors
    }

    fn read_rows(&self, index: usize, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.weights[index].read(&self.file, rows, out);
        Ok(())
    }

    fn by_rows(&self, index: usize) -> bool {
        self.weights[index].by_rows
    }

    fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }

    fn sidecars(&self) -> Result<Sidecars> {
        sidecars::build(&self.file.metadata)
    }

    fn files(&self) -> Vec<PathBuf> {
        parts_of(&self.path)
    }
}
