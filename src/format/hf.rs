//! A Hugging Face model directory, mapped: `config.json` beside one safetensors file or several with an index.

use super::bnb::{self, Weight};
use super::safetensors::{self, Tensor, TensorFile};
use super::widen;
use crate::error::{Error, ErrorCode, Result};
use pocketlora_kernels::{MatrixData, MatrixSource};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Component, Path, PathBuf};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A checkpoint whose weights stay in the mapped files.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Map<String, Value>,
    files: Vec<TensorFile>,
    /// Tensor name to index into `files`.
    owners: BTreeMap<String, usize>,
}

impl Checkpoint {
    /// Maps the model at `path`: a directory, or a `.safetensors` file with `config.json` beside it.
    ///
    /// # Errors
    /// A file is missing, unreadable or malformed, or the index contradicts the files.
    pub fn open(path: &Path) -> Result<Self> {
        let (dir, single) = if path.is_dir() {
            (path.to_path_buf(), path.join(SINGLE))
        } else {
            (path.parent().unwrap_or(Path::new("")).to_path_buf(), path.to_path_buf())
        };
        let config = read_json_map(&dir.join("config.json"))?;
        if single.exists() {
            let file = TensorFile::open(&single)?;
            let owners = file.tensors().map(|(name, _)| (name.to_owned(), 0)).collect();
            return Ok(Self { dir, config, files: vec![file], owners });
        }
        let index = dir.join(INDEX);
        if path.is_dir() && index.exists() {
            let (files, owners) = open_shards(&dir, &index)?;
            return Ok(Self { dir, config, files, owners });
        }
        if dir.join("pytorch_model.bin").exists() || dir.join("pytorch_model.bin.index.json").exists() {
            return Err(Error::unsupported(&dir, "a pickled checkpoint", "save it as safetensors with transformers"));
        }
        Err(Error::format(&dir, "weights", format!("`{SINGLE}` or `{INDEX}`"), "neither"))
    }

    /// The model's `config.json`.
    #[must_use]
    pub fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// The directory with `config.json` and the tokenizer files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Names of all tensors, sorted, with the companions of 4-bit weights.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.owners.keys().map(String::as_str)
    }

    /// Names of the weights, sorted, without the companions of 4-bit weights.
    pub fn weights(&self) -> impl Iterator<Item = &str> {
        self.names().filter(|name| !bnb::is_companion(name))
    }

    /// Whether there is a tensor called `name`.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.owners.contains_key(name)
    }

    /// Bytes of address space that the maps take (clean pages, which the OS can drop).
    #[must_use]
    pub fn mapped_bytes(&self) -> usize {
        self.files.iter().map(TensorFile::mapped_bytes).sum()
    }

    /// Brings the weights' pages in, before anything reads here and there.
    pub(crate) fn bring_in(&self) {
        self.files.iter().for_each(TensorFile::bring_in);
    }

    /// A number that changes when the config, the list of tensors or the start of any of them does: enough to tell
    /// models apart without reading all of one.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        let config = Value::Object(self.config.clone()).to_string();
        let hash_bytes = |hash, bytes: &[u8]| bytes.iter().fold(hash, |h, &b| crate::rng::mix(h, u64::from(b)));
        self.names().fold(hash_bytes(0, config.as_bytes()), |hash, name| {
            let bytes = self.find(name).map_or(&[][..], |t| &t.bytes);
            let hash = crate::rng::mix(hash_bytes(hash, name.as_bytes()), bytes.len() as u64);
            hash_bytes(hash, &bytes[..bytes.len().min(64)])
        })
    }

    /// The tensor called `name` as it lies in its file.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.find(name).ok_or_else(|| safetensors::missing(&self.dir, name))
    }

    /// The weight called `name`, 4-bit if bitsandbytes' companions lie beside it, as dense floats otherwise.
    ///
    /// # Errors
    /// The weight is missing, not a matrix of a known type, or contradicts its companions.
    pub fn matrix(&self, name: &str) -> Result<MatrixSource> {
        let tensor = self.tensor(name)?;
        if self.is_quantized(name) {
            let weight = Weight { path: self.path_of(name), name, find: &|key| self.find(key) };
            return weight.read(tensor);
        }
        match tensor.shape[..] {
            [rows, cols] if rows > 0 && cols > 0 => {
                let data = MatrixData::Dense(self.float_type(name, tensor)?, tensor.bytes.clone());
                Ok(MatrixSource { rows, cols, data })
            }
            _ => Err(self.bad(name, "a matrix of at least 1 by 1", tensor.describe())),
        }
    }

    /// The vector called `name` (a norm's weight, a bias), widened to f32.
    ///
    /// # Errors
    /// The tensor is missing or not a vector of floats.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.tensor(name)?;
        if tensor.shape.len() != 1 || self.is_quantized(name) {
            return Err(self.bad(name, "a vector of floats", tensor.describe()));
        }
        let float = self.float_type(name, tensor)?;
        let mut out = vec![0.0; tensor.shape[0]];
        widen(float, &tensor.bytes, &mut out);
        Ok(out)
    }

    /// Whether bitsandbytes' companions lie beside the weight called `name`.
    #[must_use]
    pub fn is_quantized(&self, name: &str) -> bool {
        Weight { path: &self.dir, name, find: &|key| self.find(key) }.is_quantized()
    }

    /// The float type of `tensor`, or why its elements cannot be used.
    pub(super) fn float_type(&self, name: &str, tensor: &Tensor) -> Result<pocketlora_kernels::FloatType> {
        if let Some(float) = tensor.float_type() {
            return Ok(float);
        }
        if self.contains(&format!("{}.SCB", name.trim_end_matches(".weight"))) {
            let what = format!("the int8 weight `{name}` of bitsandbytes");
            return Err(Error::unsupported(self.path_of(name), what, "use the 16-bit or the 4-bit checkpoint"));
        }
        Err(self.bad(name, "elements of type `F32`, `F16` or `BF16`", tensor.describe()))
    }

    pub(super) fn bad(&self, name: &str, expected: &str, got: impl std::fmt::Display) -> Error {
        Error::format(self.path_of(name), format_args!("tensor `{name}`"), expected, got)
    }

    fn find(&self, name: &str) -> Option<&Tensor> {
        self.files[*self.owners.get(name)?].find(name)
    }

    pub(super) fn path_of(&self, name: &str) -> &Path {
        self.owners.get(name).map_or(&self.dir, |&i| self.files[i].path())
    }
}

/// The shards that the index at `index` names, and which tensor lies in which.
fn open_shards(dir: &Path, index: &Path) -> Result<(Vec<TensorFile>, BTreeMap<String, usize>)> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = read_file(index)?;
    let Index { weight_map } = serde_json::from_slice(&text)
        .map_err(|e| Error::format(index, "JSON", "an object with `weight_map`", e.to_string()).caused_by(e))?;

    let mut files: Vec<TensorFile> = Vec::new();
    let mut opened: HashMap<&str, usize> = HashMap::new();
    let mut owners = BTreeMap::new();
    for (name, file) in &weight_map {
        let shard = match opened.get(file.as_str()) {
            Some(&shard) => shard,
            None => {
                // Only plain names: an index must not reach outside its own directory.
                let mut parts = Path::new(file).components();
                if !matches!((parts.next(), parts.next()), (Some(Component::Normal(p)), None) if p == file.as_str()) {
                    let item = format!("`weight_map` of `{name}`");
                    return Err(Error::format(index, item, "a file name without folders", format!("`{file}`")));
                }
                files.push(TensorFile::open(&dir.join(file))?);
                opened.insert(file, files.len() - 1);
                files.len() - 1
            }
        };
        files[shard].get(name)?;
        owners.insert(name.clone(), shard);
    }
    Ok((files, owners))
}

/// Reads the small file at `path`.
pub(super) fn read_file(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| Error::io("read", path, e))
}

fn read_json_map(path: &Path) -> Result<Map<String, Value>> {
    serde_json::from_slice(&read_file(path)?).map_err(|e| {
        Error::new(ErrorCode::Format, format!("`{}`", path.display()), format!("expected a JSON object, got {e}"))
            .caused_by(e)
    })
}
