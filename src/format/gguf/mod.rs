//! GGUF files of llama.cpp as checkpoints: names, row order, `config.json` and tokenizer as Hugging Face has them.
//!
//! Read from a map; versions 2 and 3, little-endian; architectures `llama` (with Mistral), `qwen2`, `qwen3`,
//! `qwen3moe`, `gemma3` and `lfm2`. The format is described in ggml's `docs/gguf.md`.

mod arch;
mod config;
mod container;
mod cursor;
mod dequant;
mod export;
mod few_bits;
mod grids;
mod known;
mod names;
mod rope;
mod sidecars;
mod split;
mod tied;
mod tokenizer;
mod value;
mod writer;

pub(crate) use arch::Arch;
pub use container::{Container, GgufTensor};
pub use dequant::GgmlType;
pub use export::{GgufTarget, export_model};
pub(crate) use names::{interleaved_row, to_gguf, to_hf};
pub(crate) use split::parts_of;
pub use value::{Array, Kind, Metadata, Value};
pub(crate) use writer::{GgufEntry, GgufWriter, Pairs};

use crate::error::Result;
use crate::format::{Sidecars, Source, TensorMeta};
use bytes::Bytes;
use serde_json::Map;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A language model in a GGUF file.
#[derive(Clone, Debug)]
pub struct Gguf {
    path: PathBuf,
    file: Container,
    config: Map<String, serde_json::Value>,
    weights: Vec<names::FoundWeight>,
    /// The weights' descriptions again, for [`Source::tensors`] hands out a slice.
    tensors: Vec<TensorMeta>,
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
        let hyper = config::Hyper::read(&file)?;
        let weights = names::weights(&file, &hyper)?;
        let config = hyper.to_json(&file.metadata)?;
        let tensors = weights.iter().map(|w| w.meta.clone()).collect();
        Ok(Self { path: path.to_owned(), file, config, weights, tensors })
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
        let weight = &self.weights[index];
        let tensor = &self.file.tensors[weight.tensor];
        let Some(head_dim) = weight.interleaved else {
            self.file.read_rows(tensor, rows.start + weight.first..rows.end + weight.first, out);
            if weight.plus_one {
                out.iter_mut().for_each(|x| *x -= 1.0);
            }
            return Ok(());
        };
        if tensor.shape.len() == 1 {
            // A bias is one row for the reader, but its elements are the rows that are permuted.
            let mut stored = vec![0.0; out.len()];
            self.file.read_rows(tensor, rows, &mut stored);
            for (row, y) in out.iter_mut().enumerate() {
                *y = stored[interleaved_row(row, head_dim)];
            }
            return Ok(());
        }
        let columns = tensor.columns();
        assert_eq!(out.len(), rows.len() * columns, "values for rows {rows:?} of `{}`", weight.meta.name);
        for (row, y) in rows.zip(out.chunks_exact_mut(columns)) {
            let row = interleaved_row(row, head_dim);
            self.file.read_rows(tensor, row..row + 1, y);
        }
        Ok(())
    }

    fn sidecars(&self) -> Result<Sidecars> {
        sidecars::build(&self.file.metadata)
    }

    fn files(&self) -> Vec<PathBuf> {
        parts_of(&self.path)
    }
}
