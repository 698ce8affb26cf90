//! Reading safetensors over a map: header checked once, tensors as slices of the map.
//!
//! The layout is eight bytes of header length, a JSON header, then the data
//! (<https://huggingface.co/docs/safetensors/index>). The `safetensors` crate checks that offsets are contiguous and
//! fit shape and dtype; this module checks them against the file's length and names file and tensor in errors.

use super::foreign;
use crate::error::{Error, ErrorCode, Result};
use crate::mmap;
use bytes::Bytes;
use pocketlora_kernels::FloatType;
pub use safetensors::Dtype;
use safetensors::tensor::Metadata;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// The most header bytes that the reference implementation reads.
const MAX_HEADER: u64 = 100_000_000;

/// One tensor of a file; its bytes keep the map alive.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Element type.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Little-endian elements, possibly unaligned; as many as dtype and shape say.
    pub bytes: Bytes,
}

impl Tensor {
    /// The dtype if it is one of the floats that weights are computed with.
    #[must_use]
    pub fn float_type(&self) -> Option<FloatType> {
        float_type(self.dtype)
    }

    /// Dtype and shape for messages, such as `U8[2048, 1]`.
    #[must_use]
    pub fn describe(&self) -> String {
        format!("`{:?}{:?}`", self.dtype, self.shape)
    }
}

/// A mapped safetensors file.
#[derive(Clone, Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Bytes,
    tensors: BTreeMap<String, Tensor>,
    metadata: HashMap<String, String>,
}

/// Whether `bytes` begin as no safetensors file does, but as people's notes do: with letters where the header's length stands.
fn looks_like_text(bytes: &[u8]) -> bool {
    let start = &bytes[..bytes.len().min(1024)];
    let text = match std::str::from_utf8(start) {
        Ok(text) => text,
        // The middle of a letter.
        Err(e) if e.error_len().is_none() => std::str::from_utf8(&start[..e.valid_up_to()]).unwrap_or_default(),
        Err(_) => return false,
    };
    !text.is_empty() && text.chars().all(|c| !c.is_control() || c.is_whitespace())
}

impl TensorFile {
    /// Maps the file at `path` and checks its header.
    ///
    /// # Errors
    /// The file cannot be mapped, or its header is damaged or contradicts its length.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(path, mmap::map(path)?)
    }

    /// Reads `bytes` as a safetensors file; `path` is for messages.
    ///
    /// # Errors
    /// The header is damaged or contradicts the number of bytes.
    pub fn parse(path: &Path, bytes: Bytes) -> Result<Self> {
        foreign::check(path, &bytes, "safetensors")?;
        if bytes.starts_with(b"GGUF") {
            let message = "expected safetensors, got GGUF; give the file the ending `.gguf`";
            return Err(Error::new(ErrorCode::Format, format!("`{}`", path.display()), message));
        }
        if looks_like_text(&bytes) {
            let message =
                "expected safetensors, got a text; give a model's or an adapter's folder, or one of its files";
            return Err(Error::new(ErrorCode::Format, format!("`{}`", path.display()), message));
        }
        let header_len = match bytes.first_chunk::<8>() {
            Some(n) => u64::from_le_bytes(*n),
            None => return Err(Error::format(path, "header", "8 bytes or more", format!("`{}`", bytes.len()))),
        };
        let available = bytes.len() - 8;
        let header_len = usize::try_from(header_len.min(MAX_HEADER + 1)).unwrap_or(usize::MAX);
        if header_len > available || header_len as u64 > MAX_HEADER {
            let limit = (available as u64).min(MAX_HEADER);
            let got = "a larger number: the file is cut, or is no safetensors file";
            return Err(Error::format(path, "header length", format!("at most `{limit}`"), got));
        }
        let header: Metadata = serde_json::from_slice(&bytes[8..8 + header_len])
            .map_err(|e| Error::format(path, "header", "a valid JSON header", e.to_string()).caused_by(e))?;

        // Compared without a sum: hostile offsets may come close to `usize::MAX`.
        let data = bytes.slice(8 + header_len..);
        if header.data_len() != data.len() {
            let expected = format!("`{}` bytes of tensor data", header.data_len());
            let cut = if data.len() < header.data_len() { ": the file is cut" } else { "" };
            return Err(Error::format(path, "length", expected, format!("`{}`{cut}", data.len())));
        }
        let tensors = header
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                // In range: offsets are contiguous from 0 and the last one is the data's length.
                let bytes = data.slice(info.data_offsets.0..info.data_offsets.1);
                (name, Tensor { dtype: info.dtype, shape: info.shape.clone(), bytes })
            })
            .collect();
        let metadata = header.metadata().clone().unwrap_or_default();
        Ok(Self { path: path.to_path_buf(), map: bytes, tensors, metadata })
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// The file has none of that name.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| missing(&self.path, name))
    }

    /// The tensor called `name`, if there is one.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Gives the tensor `name` another one.
    pub(super) fn rename(&mut self, name: &str, new: String) {
        if let Some(tensor) = self.tensors.remove(name) {
            self.tensors.insert(new, tensor);
        }
    }

    /// Puts the parts `names` of equal length, one for each number of the first dimension, in the place of the tensor
    /// `name`; returns whether it has so many.
    pub(super) fn divide(&mut self, name: &str, names: &[String]) -> bool {
        let whole = self.tensors.get(name).filter(|t| t.shape.len() > 1 && t.shape[0] == names.len());
        let Some(whole) = whole.filter(|t| !names.is_empty() && t.bytes.len().is_multiple_of(names.len())).cloned()
        else {
            return false;
        };
        self.tensors.remove(name);
        let size = whole.bytes.len() / names.len();
        for (i, name) in names.iter().enumerate() {
            let bytes = whole.bytes.slice(i * size..(i + 1) * size);
            self.tensors.insert(name.clone(), Tensor { dtype: whole.dtype, shape: whole.shape[1..].to_vec(), bytes });
        }
        true
    }

    /// All tensors by name, sorted.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The header's free `__metadata__`.
    #[must_use]
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// Where the file lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of address space that the map takes (clean pages, which the OS can drop).
    #[must_use]
    pub fn mapped_bytes(&self) -> usize {
        self.map.len()
    }

    /// Brings its pages in, for what will read all of it.
    pub(crate) fn bring_in(&self) {
        mmap::bring_in(&self.map);
    }
}

/// The error for a tensor that a file or a checkpoint lacks.
pub(crate) fn missing(path: &Path, name: &str) -> Error {
    Error::new(ErrorCode::Format, format!("`{}`: tensor `{name}`", path.display()), missing_message(name))
}

fn missing_message(name: &str) -> String {
    let why = match name {
        "lm_head.weight" => {
            "config.json says that the head is not the embedding; where it is, set `tie_word_embeddings` to true, else \
             the weights are not complete"
        }
        _ if name.ends_with(".bias") => "config.json asks for biases that the weights do not have",
        _ => "the weights are not complete, or config.json is another model's",
    };
    format!("expected a tensor of that name, got none; {why}")
}

/// The float type that weights of a dtype are computed with, if it is one.
pub(crate) fn float_type(dtype: Dtype) -> Option<FloatType> {
    match dtype {
        Dtype::F32 => Some(FloatType::F32),
        Dtype::F16 => Some(FloatType::F16),
        Dtype::BF16 => Some(FloatType::BF16),
        _ => None,
    }
}
