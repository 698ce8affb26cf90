//! What `quantize` and the loader ask of a checkpoint, whatever file it lies in.

use super::HfSource;
use super::gguf::Gguf;
use super::safetensors::Tensor;
use crate::error::Result;
use std::fs::File;
use std::io::Read as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One weight of a checkpoint under its Hugging Face name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMeta {
    /// Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Row-major shape, `[out, in]` for a linear layer.
    pub shape: Vec<usize>,
    /// Element type as the file names it, such as `BF16` or `Q4_K`.
    pub dtype: String,
}

impl TensorMeta {
    /// Whether it is in bitsandbytes' 4 bits.
    #[must_use]
    pub fn is_four_bit(&self) -> bool {
        matches!(self.dtype.as_str(), "NF4" | "FP4")
    }
}

/// What lies in a model's files and is not read: a part of a model for more than text that a text does not go through, such as a
/// tower for pictures, or a file that has the weights once more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// Its name.
    pub part: String,
    /// How many tensors it has.
    pub tensors: usize,
    /// The bytes that they take in the files.
    pub bytes: u64,
}

impl LeftOut {
    /// In words.
    #[cfg(feature = "cli")]
    pub(crate) fn described(&self) -> String {
        let why = if self.part.ends_with(".safetensors") {
            "the weights are read from other files"
        } else {
            "text does not use it"
        };
        let megabytes = self.bytes as f64 / 1e6;
        format!("left out, for {why}: {} ({} tensors, {megabytes:.1} MB)", self.part, self.tensors)
    }

    /// Counts a further tensor.
    pub(super) fn add(&mut self, bytes: u64) {
        self.tensors += 1;
        self.bytes += bytes;
    }
}

/// The small text files that travel with a model, ready to be written beside its weights.
#[derive(Clone, Debug, Default)]
pub struct Sidecars {
    /// File name and content: `tokenizer.json`, `tokenizer_config.json`, `generation_config.json`, a chat template.
    pub files: Vec<(String, Vec<u8>)>,
}

/// A checkpoint whose weights can be read as f32, a few rows at a time.
pub trait Source: Send + Sync {
    /// The model's Hugging Face `config.json`.
    fn config(&self) -> &serde_json::Map<String, serde_json::Value>;
    /// All weights, in the order in which reading them is cheapest.
    fn tensors(&self) -> &[TensorMeta];
    /// Dequantizes `rows` of tensor number `index` (the leading dimension; a vector is one row) into `out`.
    ///
    /// # Errors
    /// The file's bytes contradict its header.
    fn read_rows(&self, index: usize, rows: Range<usize>, out: &mut [f32]) -> Result<()>;
    /// Tensor number `index` as bitsandbytes' NF4 has it, if that is how it lies in its file: endings of the names of its
    /// tensors, and these; else none.
    fn nf4(&self, _index: usize) -> Vec<(&'static str, Tensor)> {
        Vec::new()
    }
    /// Whether tensor number `index` has rows where other files of its family have columns, as what was packed in few bits
    /// does.
    fn by_rows(&self, _index: usize) -> bool {
        false
    }
    /// Tokenizer and chat template.
    ///
    /// # Errors
    /// The file has a tokenizer that cannot be expressed.
    fn sidecars(&self) -> Result<Sidecars>;
    /// Parts of the files that a text does not go through: they are not among the weights.
    fn left_out(&self) -> &[LeftOut] {
        &[]
    }
    /// The files that it reads from, which no output may take away.
    fn files(&self) -> Vec<PathBuf> {
        Vec::new()
    }
}

/// Opens a GGUF file, a Hugging Face directory or one of its files, or a `.safetensors` file with its `config.json`
/// beside it.
///
/// # Errors
/// It is none of these, or broken.
pub fn open_source(path: &Path) -> Result<Box<dyn Source>> {
    if is_gguf(path) { Ok(Box::new(Gguf::open(path)?)) } else { Ok(Box::new(HfSource::open(path)?)) }
}

/// Whether the file at `path` is GGUF by its name or by its content.
pub(crate) fn is_gguf(path: &Path) -> bool {
    let named = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    let begins = || -> std::io::Result<bool> {
        let mut magic = [0; 4];
        File::open(path)?.read_exact(&mut magic)?;
        Ok(&magic == b"GGUF")
    };
    path.is_file() && (named || begins().unwrap_or(false))
}
