//! A Hugging Face directory as a [`Source`]: dense weights widened, 4-bit weights dequantized.

use super::foreign::Wanted;
use super::hf::read_file;
use super::packed::{self, Packed};
use super::safetensors::Tensor;
use super::{Checkpoint, LeftOut, Sidecars, Source, TensorMeta, widen};
use crate::error::{Error, Result};
use bytes::Bytes;
use pocketlora_kernels::quant::NF4;
use pocketlora_kernels::{FloatType, MatrixData, Nf4Source};
use serde_json::{Map, Value};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Files beside the weights that belong to a model. What is made from a model depends on all of them, so whoever reads
/// another one adds it here.
pub(super) const SIDECARS: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// The folder in which transformers keeps a model's further templates, `NAME.jinja` each.
const TEMPLATES: &str = "additional_chat_templates";

/// Whether a model's folder has a file called `name` (relative, with `/`) beside its weights and config.
pub(super) fn is_sidecar(name: &str) -> bool {
    let template = |file: &str| file.ends_with(".jinja") && !file.contains(['/', '\\']);
    SIDECARS.contains(&name) || name.strip_prefix(TEMPLATES).and_then(|n| n.strip_prefix('/')).is_some_and(template)
}

/// Names of the files in `dir` that belong to a model beside its weights and config, in a fixed order.
///
/// # Errors
/// The folder of templates cannot be listed.
pub(crate) fn sidecar_names(dir: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> =
        SIDECARS.iter().filter(|name| dir.join(name).is_file()).map(|n| (*n).to_owned()).collect();
    let folder = dir.join(TEMPLATES);
    if folder.is_dir() {
        let mut templates = Vec::new();
        for entry in fs::read_dir(&folder).map_err(|e| Error::io("list", &folder, e))? {
            let file = entry.map_err(|e| Error::io("list", &folder, e))?.file_name();
            templates.extend(file.to_str().map(|file| format!("{TEMPLATES}/{file}")).filter(|name| is_sidecar(name)));
        }
        templates.sort();
        names.extend(templates);
    }
    Ok(names)
}

/// A checkpoint whose weights have all been checked once, so that reading rows cannot meet a malformed one.
#[derive(Debug)]
pub struct HfSource {
    checkpoint: Checkpoint,
    tensors: Vec<TensorMeta>,
    data: Vec<Data>,
}

#[derive(Debug)]
enum Data {
    Dense(FloatType, Bytes),
    FourBit(Nf4Source),
    Packed(Packed),
}

impl HfSource {
    /// Opens the directory or `.safetensors` file at `path`, as [`Checkpoint::open`] does; also one in the 4 or 8 bits of
    /// GPTQ, AWQ, mlx or LLM.int8(), in FP8 or MXFP4.
    ///
    /// # Errors
    /// A file is missing or malformed, or a weight is neither of these nor F32, F16 or BF16.
    pub fn open(path: &Path) -> Result<Self> {
        Self::new(Checkpoint::open_for(path, Wanted::Source)?)
    }

    /// Reads the weights of `checkpoint`.
    ///
    /// # Errors
    /// A weight is malformed, or neither 4-bit nor F32, F16 or BF16.
    pub fn new(mut checkpoint: Checkpoint) -> Result<Self> {
        let mut all = Vec::new();
        let packed::Found { weights, used } = packed::find(&checkpoint, checkpoint.config())?;
        for (name, packed) in weights {
            let (shape, dtype) = (vec![packed.rows, packed.cols], packed.name.clone());
            all.push((packed.address(), TensorMeta { name, shape, dtype }, Data::Packed(packed)));
        }
        for name in checkpoint.weights().filter(|name| !used.contains(*name)) {
            let tensor = checkpoint.tensor(name)?;
            let (stored, shape, dtype) = if checkpoint.is_quantized(name) {
                let matrix = checkpoint.matrix(name)?;
                let MatrixData::Nf4(data) = matrix.data else { unreachable!("a quantized matrix is read as one") };
                let dtype = if data.code == NF4 { "NF4" } else { "FP4" };
                (Data::FourBit(data), vec![matrix.rows, matrix.cols], dtype.to_owned())
            } else {
                let float = checkpoint.float_type(name, tensor)?;
                (Data::Dense(float, tensor.bytes.clone()), tensor.shape.clone(), format!("{:?}", tensor.dtype))
            };
            let address = tensor.bytes.as_ptr().addr();
            all.push((address, TensorMeta { name: name.to_owned(), shape, dtype }, stored));
        }
        // In the order of the bytes in the files, which is how disks and the OS's read-ahead like it.
        all.sort_by_key(|(address, ..)| *address);
        if !used.is_empty() {
            checkpoint.forget_packing();
        }
        let (tensors, data) = all.into_iter().map(|(_, meta, stored)| (meta, stored)).unzip();
        Ok(Self { checkpoint, tensors, data })
    }
}

impl Source for HfSource {
    fn config(&self) -> &Map<String, Value> {
        self.checkpoint.config()
    }

    fn tensors(&self) -> &[TensorMeta] {
        &self.tensors
    }

    fn read_rows(&self, index: usize, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let shape = &self.tensors[index].shape;
        let cols: usize = if shape.len() < 2 { shape.iter().product() } else { shape[1..].iter().product() };
        assert_eq!(out.len(), rows.len() * cols, "elements of {rows:?} of `{}`", self.tensors[index].name);
        match &self.data[index] {
            Data::Dense(float, bytes) => {
                let size = cols * float.size();
                widen(*float, &bytes[rows.start * size..rows.end * size], out);
            }
            Data::FourBit(data) => data.decode(rows.start * cols, out),
            Data::Packed(packed) => packed.decode(rows, out),
        }
        Ok(())
    }

    fn nf4(&self, index: usize) -> Vec<(&'static str, Tensor)> {
        match &self.data[index] {
            Data::FourBit(data) if data.code == NF4 => self.checkpoint.parts(&self.tensors[index].name),
            _ => Vec::new(),
        }
    }

    fn by_rows(&self, index: usize) -> bool {
        !matches!(self.data[index], Data::Dense(..))
    }

    fn sidecars(&self) -> Result<Sidecars> {
        let dir = self.checkpoint.dir();
        let read = |name: String| read_file(&dir.join(&name)).map(|content| (name, content));
        Ok(Sidecars { files: sidecar_names(dir)?.into_iter().map(read).collect::<Result<_>>()? })
    }

    fn left_out(&self) -> &[LeftOut] {
        self.checkpoint.left_out()
    }

    fn files(&self) -> Vec<PathBuf> {
        let mut files = self.checkpoint.paths();
        files.push(self.checkpoint.dir().join("config.json"));
        files
    }
}
