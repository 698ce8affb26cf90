//! A Hugging Face model directory, mapped: `config.json` beside one safetensors file or several with an index.

use super::bnb::{self, FourBit};
use super::foreign::Wanted;
use super::safetensors::{Tensor, TensorFile, missing};
use super::source::LeftOut;
use super::{foreign, place, widen};
use crate::error::{Error, ErrorCode, Result};
use bytes::Bytes;
use pocketlora_kernels::{MatrixData, MatrixSource};
use pocketlora_models::{Stack, Wrapped, full_name, parts_of, text_config, wrapped};
use safetensors::Dtype;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Names of embeddings, the usual one first.
const EMBEDDINGS: [&str; 3] = ["model.embed_tokens.weight", "backbone.embeddings.weight", "transformer.wte.weight"];
const HEAD: &str = "lm_head.weight";
/// The weights in their authors' own form, beside those of Hugging Face.
const SECOND_FORM: &str = "consolidated.safetensors";
/// Upper bound on the parts of one tensor.
const MAX_PARTS: usize = 4096;

/// A checkpoint whose weights stay in the mapped files.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Map<String, Value>,
    files: Vec<TensorFile>,
    /// Tensor name to index into `files`.
    owners: BTreeMap<String, usize>,
    /// Parts that text does not go through.
    left_out: Vec<LeftOut>,
}

impl Checkpoint {
    /// Maps the model at `path`: a directory, one of its files, or a `.safetensors` file with `config.json` beside it.
    ///
    /// # Errors
    /// A file is missing, unreadable, malformed or of a form that is not read, or the index contradicts the files.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_for(path, Wanted::ToRun)
    }

    /// As [`Checkpoint::open`], also for a model that only [`HfSource`](super::HfSource) can read.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn open_for(path: &Path, wanted: Wanted) -> Result<Self> {
        let path = &place::model_of(path);
        let config = place::config_of(path, wanted)?;
        let dir = if path.is_dir() { path.clone() } else { place::folder_of(path) };
        let weights = place::weights_of(path, &dir)?;
        let mut checkpoint = Self::of(&dir, config, &weights, &|path| path.exists(), &TensorFile::open, wanted)?;
        if path.is_dir() {
            checkpoint.leave_out_second_form();
        }
        Ok(checkpoint)
    }

    /// Opens the model whose small files lie in the folder `dir`, and whose weights are `weights`, by the names of their
    /// files: what an app has in a package of its own.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub(crate) fn open_given(dir: &Path, weights: &HashMap<String, Bytes>) -> Result<Self> {
        let config = place::config_of(dir, Wanted::ToRun)?;
        let there = |path: &Path| path.file_name().and_then(|name| weights.get(name.to_str()?));
        let named = match (weights.contains_key(place::SINGLE), dir.join(place::INDEX)) {
            (true, _) => place::Weights::Single(dir.join(place::SINGLE)),
            (false, index) if index.exists() => place::Weights::Parts(index),
            (false, _) => return Err(foreign::no_weights(dir)),
        };
        let open = |path: &Path| match there(path) {
            Some(bytes) => TensorFile::parse(path, bytes.clone()),
            None => TensorFile::open(path),
        };
        Self::of(dir, config, &named, &|path| there(path).is_some(), &open, Wanted::ToRun)
    }

    fn of(
        dir: &Path,
        config: Map<String, Value>,
        weights: &place::Weights,
        exists: &dyn Fn(&Path) -> bool,
        open: &dyn Fn(&Path) -> Result<TensorFile>,
        wanted: Wanted,
    ) -> Result<Self> {
        let dir = dir.to_owned();
        let (files, owners) = match weights {
            place::Weights::Single(single) => {
                let file = open(single)?;
                let owners = file.tensors().map(|(name, _)| (name.to_owned(), 0)).collect();
                (vec![file], owners)
            }
            place::Weights::Parts(index) => open_shards(&dir, index, exists, open)?,
        };
        for file in &files {
            foreign::check_tensors(file.path(), &file.tensors().collect::<Vec<_>>(), wanted)?;
        }
        let mut checkpoint = Self { dir, config, files, owners, left_out: Vec::new() };
        if let Some(config) = text_config(&checkpoint.config) {
            checkpoint.config = config;
            checkpoint.unwrap_text();
        } else {
            checkpoint.leave_out_guesses();
        }
        let missing = |name: &String| Some((name.clone(), full_name(&checkpoint.config, name)?));
        let renamed: Vec<_> = checkpoint.owners.keys().filter_map(missing).collect();
        renamed.into_iter().for_each(|(name, new)| checkpoint.rename(&name, new));
        checkpoint.divide_stacks();
        checkpoint.settle_head();
        Ok(checkpoint)
    }

    /// Gives the weights of the text model in a model for more than text the names that they have in a text model by
    /// itself, and leaves out the other parts.
    fn unwrap_text(&mut self) {
        let names: Vec<String> = self.owners.keys().cloned().collect();
        for name in names {
            match wrapped(&name) {
                Wrapped::Text(new) if new != name && !self.contains(&new) => self.rename(&name, new),
                Wrapped::Text(_) => {}
                Wrapped::Part(part) => self.leave_out(&name, part),
            }
        }
    }

    /// Leaves out the layers that guess several tokens at once, which models for text alone may have, too (Qwen3-Next).
    fn leave_out_guesses(&mut self) {
        let names: Vec<String> = self.names().filter(|name| name.starts_with("mtp.")).map(str::to_owned).collect();
        names.iter().for_each(|name| self.leave_out(name, "mtp"));
    }

    /// Some authors ship the same weights once more, in their own form. They are looked at by size alone.
    fn leave_out_second_form(&mut self) {
        let path = self.dir.join(SECOND_FORM);
        if let Ok(meta) = path.metadata()
            && meta.is_file()
        {
            let tensors = TensorFile::open(&path).map_or(0, |file| file.tensors().count());
            self.left_out.push(LeftOut { part: SECOND_FORM.to_owned(), tensors, bytes: meta.len() });
        }
    }

    fn leave_out(&mut self, name: &str, part: &str) {
        let bytes = self.find(name).map_or(0, |tensor| tensor.bytes.len() as u64);
        self.owners.remove(name);
        match self.left_out.iter_mut().find(|left_out| left_out.part == part) {
            Some(left_out) => left_out.add(bytes),
            None => self.left_out.push(LeftOut { part: part.to_owned(), tensors: 1, bytes }),
        }
    }

    /// Puts single matrices and vectors in the place of the tensors that hold all of a layer's, where the family has
    /// those: they lie there one after the other.
    fn divide_stacks(&mut self) {
        let stack = |name: &String| Some((name.clone(), parts_of(&self.config, name)?));
        let stacks: Vec<_> = self.owners.keys().filter_map(stack).collect();
        for (name, (before, after)) in stacks {
            let owner = self.owners[&name];
            let parts = self.find(&name).and_then(|tensor| tensor.shape.first().copied()).unwrap_or_default();
            // More have no model, and their names would fill the memory.
            let names: Vec<String> = (0..parts.min(MAX_PARTS)).map(|i| format!("{before}{i}.{after}")).collect();
            if names.iter().all(|name| !self.owners.contains_key(name)) && self.files[owner].divide(&name, &names) {
                self.owners.remove(&name);
                self.owners.extend(names.into_iter().map(|name| (name, owner)));
            }
        }
    }

    fn rename(&mut self, name: &str, new: String) {
        let Some(owner) = self.owners.remove(name) else { return };
        self.files[owner].rename(name, new.clone());
        self.owners.insert(new, owner);
    }

    /// The parts of the files that text does not go through, which are not read.
    #[must_use]
    pub fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }

    /// Lets the weights decide whether the head is the embedding, as transformers 5 does: where the config ties them and
    /// there is a head that differs, the config is wrong. An equal one is a copy and is left out; one without an embedding
    /// is the embedding.
    fn settle_head(&mut self) {
        const KEY: &str = "tie_word_embeddings";
        if self.config.get(KEY) != Some(&Value::Bool(true)) || !self.contains(HEAD) {
            return;
        }
        let Some(embedding) = EMBEDDINGS.into_iter().find(|name| self.contains(name)) else {
            let names: Vec<String> = self.names().filter(|n| bnb::weight_of(n) == HEAD).map(str::to_owned).collect();
            for name in names {
                self.rename(&name, name.replacen(HEAD, EMBEDDINGS[0], 1));
            }
            return;
        };
        // With what belongs to them, in case they are in 4 bits.
        let parts = |weight: &str| -> Vec<(String, &Tensor)> {
            let names = self.names().filter(|name| bnb::weight_of(name) == weight);
            names.filter_map(|name| Some((name[weight.len()..].to_owned(), self.find(name)?))).collect()
        };
        let same = |a: &Tensor, b: &Tensor| (a.dtype, &a.shape, &a.bytes) == (b.dtype, &b.shape, &b.bytes);
        let (head, embedding) = (parts(HEAD), parts(embedding));
        let copy = head.len() == embedding.len()
            && head.iter().zip(&embedding).all(|((a, head), (b, embedding))| a == b && same(head, embedding));
        if copy {
            self.owners.retain(|name, _| bnb::weight_of(name) != HEAD);
        } else {
            self.config.insert(KEY.to_owned(), Value::Bool(false));
        }
    }

    /// Takes from the config what it says of how weights were packed.
    pub(super) fn forget_packing(&mut self) {
        ["quantization", "quantization_config"].iter().for_each(|key| _ = self.config.shift_remove(*key));
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

    /// The files that hold the weights.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.files.iter().map(|file| file.path().to_owned()).collect()
    }

    /// Names of all tensors, sorted, with the companions of 4-bit weights.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.owners.keys().map(String::as_str)
    }

    /// Names of the weights, sorted, without the companions of 4-bit weights and without buffers that are computed again
    /// from the config.
    pub fn weights(&self) -> impl Iterator<Item = &str> {
        self.names().filter(|name| !bnb::is_companion(name) && !foreign::is_harmless(name))
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
        self.find(name).ok_or_else(|| missing(&self.dir, name))
    }

    /// The weight called `name`, 4-bit if bitsandbytes' companions lie beside it, as dense floats otherwise.
    ///
    /// # Errors
    /// The weight is missing, not a matrix of a known type, or contradicts its companions.
    pub fn matrix(&self, name: &str) -> Result<MatrixSource> {
        let tensor = self.tensor(name)?;
        if self.is_quantized(name) {
            let weight = FourBit { path: self.path_of(name), name, find: &|key| self.find(key) };
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

    /// The matrix called `name`, which is stored as columns unless it is in 4 bits, as rows: a copy in memory.
    ///
    /// # Errors
    /// As [`Checkpoint::matrix`].
    pub fn transposed(&self, name: &str) -> Result<MatrixSource> {
        let MatrixSource { rows, cols, data } = self.matrix(name)?;
        let MatrixData::Dense(float, bytes) = data else { return Ok(MatrixSource { rows, cols, data }) };
        let mut all = Vec::with_capacity(bytes.len());
        for col in 0..cols {
            let element = |row: usize| &bytes[(row * cols + col) * float.size()..][..float.size()];
            (0..rows).for_each(|row| all.extend_from_slice(element(row)));
        }
        Ok(MatrixSource { rows: cols, cols: rows, data: MatrixData::Dense(float, all.into()) })
    }

    /// `rows` rows of one of the matrices that are stored as the one tensor `name`, which is to have the shape that `stack`
    /// says.
    ///
    /// # Errors
    /// The tensor is missing, not of floats, or of another shape.
    pub fn of_stack(&self, name: &str, stack: &Stack, rows: usize) -> Result<MatrixSource> {
        let tensor = self.tensor(name)?;
        if tensor.shape != stack.shape || self.is_quantized(name) {
            let expected = format!("floats of shape `{:?}` from config.json", stack.shape);
            return Err(self.bad(name, &expected, tensor.describe()));
        }
        let (float, [_, of, cols]) = (self.float_type(name, tensor)?, stack.shape);
        let row = cols * float.size();
        let start = (stack.index * of + stack.first) * row;
        let bytes = tensor.bytes.slice(start..start + rows * row);
        Ok(MatrixSource { rows, cols, data: MatrixData::Dense(float, bytes) })
    }

    /// The small tensor called `name` (a norm's weight, a bias, the taps of a convolution), which is to have so many
    /// dimensions: its shape, and its values widened to f32.
    ///
    /// # Errors
    /// The tensor is missing, not of floats, or of another number of dimensions.
    pub fn vector(&self, name: &str, dimensions: usize) -> Result<(&[usize], Vec<f32>)> {
        let tensor = self.tensor(name)?;
        if tensor.shape.len() != dimensions || self.is_quantized(name) {
            let expected = match dimensions {
                1 => "a vector of floats".to_owned(),
                more => format!("floats in {more} dimensions"),
            };
            return Err(self.bad(name, &expected, tensor.describe()));
        }
        let float = self.float_type(name, tensor)?;
        let mut out = vec![0.0; tensor.shape.iter().product()];
        widen(float, &tensor.bytes, &mut out);
        Ok((&tensor.shape, out))
    }

    /// Whether any weight is in bitsandbytes' 4 bits, whatever the config says.
    #[must_use]
    pub fn is_four_bit(&self) -> bool {
        self.names().any(bnb::is_companion)
    }

    /// Whether bitsandbytes' companions lie beside the weight called `name`.
    #[must_use]
    pub fn is_quantized(&self, name: &str) -> bool {
        FourBit { path: &self.dir, name, find: &|key| self.find(key) }.is_quantized()
    }

    /// The weight called `name` and its companions, by the endings of their names.
    pub(super) fn parts(&self, name: &str) -> Vec<(&'static str, Tensor)> {
        let endings = std::iter::once("").chain(bnb::COMPANIONS);
        endings.filter_map(|ending| Some((ending, self.find(&format!("{name}{ending}"))?.clone()))).collect()
    }

    /// The float type of `tensor`, or why its elements cannot be used.
    pub(super) fn float_type(&self, name: &str, tensor: &Tensor) -> Result<pocketlora_kernels::FloatType> {
        if let Some(float) = tensor.float_type() {
            return Ok(float);
        }
        if tensor.dtype == Dtype::F64 {
            let next = format!(
                "convert the model to f32 or f16, for instance by `python3 -c \"from transformers import \
                 AutoModelForCausalLM as M; M.from_pretrained('{0}').float().save_pretrained('{0}')\"`",
                self.dir.display()
            );
            return Err(Error::unsupported(self.path_of(name), format_args!("tensor `{name}` of type `F64`"), next));
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
fn open_shards(
    dir: &Path,
    index: &Path,
    exists: &dyn Fn(&Path) -> bool,
    open: &dyn Fn(&Path) -> Result<TensorFile>,
) -> Result<(Vec<TensorFile>, BTreeMap<String, usize>)> {
    let json = foreign::read_object(index)?;
    let malformed = || Error::format(index, "JSON", "an object with `weight_map`, file names by tensor", "another one");
    let map = json.get("weight_map").and_then(Value::as_object).ok_or_else(malformed)?;
    let (mut paths, mut numbers, mut owners) = (Vec::new(), HashMap::new(), BTreeMap::new());
    for (name, file) in map {
        let file = file.as_str().ok_or_else(malformed)?;
        // Only plain names: an index must not reach outside its own directory.
        let mut parts = Path::new(file).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(p)), None) if p == file) {
            let item = format!("`weight_map` of `{name}`");
            return Err(Error::format(index, item, "a file name without folders", format!("`{file}`")));
        }
        let shard = *numbers.entry(file).or_insert_with(|| {
            paths.push(dir.join(file));
            paths.len() - 1
        });
        owners.insert(name.clone(), shard);
    }
    let missing: Vec<String> =
        paths.iter().filter(|p| !exists(p)).filter_map(|p| Some(format!("`{}`", p.file_name()?.display()))).collect();
    if !missing.is_empty() {
        let shown = missing[..missing.len().min(20)].join(", ");
        let message = format!(
            "expected the {} files that `{}` names, got all but {shown}; fetch those, too, for instance by `pocketlora pull \
             OWNER/REPO`",
            paths.len(),
            place::INDEX
        );
        return Err(Error::new(ErrorCode::Io, format!("`{}`", dir.display()), message));
    }
    let files = paths.iter().map(|path| open(path)).collect::<Result<Vec<_>>>()?;
    for (name, &shard) in &owners {
        files[shard].get(name)?;
    }
    // What the index forgot is part of the model all the same.
    for (shard, file) in files.iter().enumerate() {
        for (name, _) in file.tensors() {
            owners.entry(name.to_owned()).or_insert(shard);
        }
    }
    Ok((files, owners))
}

/// Reads the small file at `path`.
pub(super) fn read_file(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| Error::io("read", path, e))
}
