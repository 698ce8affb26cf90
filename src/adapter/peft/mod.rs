//! PEFT adapter directories: `adapter_config.json` and `adapter_model.safetensors` (PEFT `save_and_load.py`).

mod config;
mod expanded;
mod foreign;
mod keys;
mod targets;
mod tensors;

pub(super) use config::{KeyUse, Keys, MERGE, Patterns, RETRAIN, Use, matches_any, regex};
pub(super) use keys::canonical_path;
pub(super) use tensors::Found;
pub use tensors::{Replacements, Rows, WholeTensor};

use super::beside;
use super::exchange::{fit, is_compressed, is_gguf_adapter, is_mlx_adapter, open_compressed, open_gguf, open_mlx};
use super::experts::{apart, is_fused};
use super::kinds::{Kind, Method};
use super::memory::Parts;
use super::tensor::{Stored, Tensors};
use crate::error::{Error, Result};
use crate::format::gguf::Family;
use crate::format::is_gguf;
use crate::format::safetensors::{Tensor, TensorFile};
use crate::format::{Entry, Staged, Writer, sweep, sync_dir};
use half::f16;
use keys::PREFIX;
use pocketlora_models::{Model, ParamSpec, Role};
use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use targets::Targets;
use tensors::BASE_MARK;

pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const WEIGHTS: &str = "adapter_model.safetensors";

/// Takes a tensor by its name, for a file.
pub(crate) type Put<'a> = dyn FnMut(&str, &[f32]) -> Result<()> + 'a;

/// A PEFT adapter directory in memory.
#[derive(Clone, Debug)]
pub struct AdapterFile {
    /// Where it came from.
    pub dir: PathBuf,
    /// What it does with a base, and its settings.
    pub method: Method,
    /// The base model's name or path, as a hint for people.
    pub base: Option<String>,
    /// A mark of the base by its embedding, in the metadata of the file with the tensors.
    pub base_mark: Option<String>,
    /// Its tensors.
    pub tensors: Tensors,
    /// What stands in for weights of the base.
    pub replaced: Replacements,
    /// Adapters of other methods that were trained together with it, and work beside it.
    pub beside: Vec<Self>,
    /// What the user should know though it stops nothing.
    pub warnings: Vec<String>,
    /// The class of the model that it was trained on, where its config says so.
    base_class: Option<String>,
    /// Which layers its config names; nothing is known of one that was made in memory.
    named: Option<Arc<Targets>>,
    /// In the file's order of rows, which is that of an architecture of llama.cpp; none is that of Hugging Face.
    pub(super) arch: Option<&'static Family>,
    /// What lay beside its tensors, if it was read from memory: `dir` is a mere name then.
    pub(super) in_memory: Option<Parts>,
}

impl AdapterFile {
    /// An adapter that was made in memory, for the folder `dir`.
    #[must_use]
    pub fn new(dir: PathBuf, method: Method, tensors: Tensors) -> Self {
        Self {
            dir,
            method,
            base: None,
            base_mark: None,
            tensors,
            replaced: Replacements::default(),
            beside: Vec::new(),
            warnings: Vec::new(),
            base_class: None,
            named: None,
            arch: None,
            in_memory: None,
        }
    }

    /// The same with `replaced` beside the tensors.
    #[must_use]
    pub fn with(self, replaced: Replacements) -> Self {
        Self { replaced, ..self }
    }

    /// Reads a PEFT directory, a GGUF file of llama.cpp, a directory of mlx-lm or a compressed file.
    ///
    /// # Errors
    /// A file is missing, broken or contradicts the other, or the adapter's method is none of [`Method`].
    pub fn open(dir: &Path) -> Result<Self> {
        if is_gguf(dir) {
            return open_gguf(dir);
        }
        if is_mlx_adapter(dir) {
            return open_mlx(dir);
        }
        if is_compressed(dir) {
            return open_compressed(dir);
        }
        foreign::check_files(dir)?;
        let path = dir.join(CONFIG);
        let json = crate::format::foreign::read_object(&path)?;
        let mut file = Self::read(dir, &json, TensorFile::open, Vec::new())?;
        file.beside = beside::open(dir)?;
        file.warnings.extend(beside::unlisted(dir));
        Ok(file)
    }

    /// The adapter called `dir`, with the config `json`, whose tensors `open` finds under the name that they have there.
    ///
    /// # Errors
    /// As [`AdapterFile::open`].
    pub(super) fn read(
        dir: &Path,
        json: &Map<String, Value>,
        open: impl FnOnce(&Path) -> Result<TensorFile>,
        beside: Vec<Self>,
    ) -> Result<Self> {
        let path = dir.join(CONFIG);
        foreign::check_config(&path, json)?;
        if let Some(name) = expanded::named(json) {
            return expanded::read(name, dir, json, &open(&dir.join(WEIGHTS))?);
        }
        let mut parsed = config::parse(&path, json)?;
        let contents = tensors::read(&open(&dir.join(WEIGHTS))?, &mut parsed)?;
        if parsed.biases && !contents.replaced.whole.iter().any(|w| w.kind == "bias") {
            parsed.warnings.push("`bias` says that biases were trained, but the file has none".to_owned());
        }
        parsed.warnings.extend(contents.warnings);
        parsed.method.set_targets(match parsed.targets.suffixes() {
            Some(suffixes) => suffixes.to_vec(),
            None => contents.adapted,
        });
        let kind = parsed.method.kind();
        Ok(Self {
            dir: dir.to_owned(),
            method: parsed.method,
            base: parsed.base,
            base_mark: contents.base_mark,
            tensors: contents.tensors,
            replaced: contents.replaced,
            beside,
            warnings: parsed.warnings,
            base_class: parsed.base_class,
            named: (!kind.parts().is_empty()).then(|| Arc::new(parsed.targets)),
            arch: None,
            in_memory: None,
        })
    }

    /// The same with its rows in the order that `model` has, with what is for all experts of a layer as one put on each of
    /// them, and with what its config says how to draw.
    ///
    /// # Errors
    /// Its file names another architecture than the model's.
    pub fn fitted(&self, model: &dyn Model) -> Result<Cow<'_, Self>> {
        match self.arch {
            Some(arch) => fit(self, arch, model),
            None if self.modules().any(is_fused) => Ok(Cow::Owned(apart(self, model))),
            None if self.method.draws() => {
                let mut file = self.clone();
                for (name, tensor) in self.method.drawn(model).map_err(|e| e.at(format!("`{}`", self.dir.display())))? {
                    file.tensors.entry(name).or_insert(tensor);
                }
                Ok(Cow::Owned(file))
            }
            None => Ok(Cow::Borrowed(self)),
        }
    }

    /// Whether only a base tells in which order its rows are, see [`AdapterFile::fitted`].
    #[must_use]
    pub fn needs_base(&self) -> bool {
        self.arch.is_some()
    }

    /// Checks the config at `path`, whose weights may not be there yet.
    ///
    /// # Errors
    /// As [`AdapterFile::open`], as far as the config tells.
    #[cfg(feature = "hub")]
    pub(crate) fn check_config(path: &Path) -> Result<()> {
        let json = crate::format::foreign::read_object(path)?;
        foreign::check_config(path, &json)?;
        if expanded::named(&json).is_some() {
            return Ok(());
        }
        config::parse(path, &json).map(|_| ())
    }

    /// How many tokens it knows, if it brings an embedding or a head.
    #[must_use]
    pub fn vocabulary(&self) -> Option<usize> {
        let is_vocabulary = |w: &&WholeTensor| matches!(&*w.module, "model.embed_tokens" | "lm_head");
        self.replaced.whole.iter().find(is_vocabulary)?.tensor.shape.first().copied()
    }

    /// Paths of the modules that it has tensors for, in the order of their names.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().filter_map(|name| self.method.kind().module_of(name))
    }

    /// How many values it has, without those of adapters beside it.
    #[must_use]
    pub fn values(&self) -> usize {
        let standing_in = self.replaced.values_learned(self.method.kind());
        self.tensors.values().map(|t| t.data.len()).sum::<usize>() + standing_in
    }

    /// What is odd about it on `model`, though nothing that stops it from working.
    pub(crate) fn doubts(&self, model: &dyn Model) -> Result<Vec<String>> {
        let mut doubts = self.warnings.clone();
        doubts.extend(self.class_doubt(model));
        let unfilled = self.unfilled(model.params())?;
        if let Some(first) = unfilled.first() {
            let count = unfilled.len();
            doubts.push(format!(
                "`target_modules` names {count} layers for which the adapter has no tensors, such as `{first}`; they \
                 work as in the base"
            ));
        }
        Ok(doubts)
    }

    /// That its config names another class of models than that of `model`.
    pub(crate) fn class_doubt(&self, model: &dyn Model) -> Option<String> {
        let family = &model.config().model_type;
        let class = self.base_class.as_deref().filter(|class| !is_of_family(class, family))?;
        Some(format!("it was trained on a `{class}`, and this model is of the family `{family}`"))
    }

    /// A hash of the content of the base that it was trained on, where its file tells.
    #[must_use]
    pub fn base_hash(&self) -> Option<String> {
        super::mark::hash_in(self)
    }

    /// Linear layers of a model with `params` that the config names, but the file has nothing for: they stay as they are.
    fn unfilled<'p>(&self, params: &'p [ParamSpec]) -> Result<Vec<&'p str>> {
        let Some(named) = &self.named else { return Ok(Vec::new()) };
        let mut unfilled = Vec::new();
        for param in params.iter().filter(|p| matches!(p.role, Role::Linear)) {
            let module = param.module();
            if named.names([module; 2])? && !self.modules().any(|path| path == module) {
                unfilled.push(module);
            }
        }
        Ok(unfilled)
    }

    /// Whether there is an adapter in any of the forms that [`AdapterFile::open`] reads at `path`.
    #[must_use]
    pub fn is_at(path: &Path) -> bool {
        Self::exists(path) || is_gguf_adapter(path) || is_compressed(path)
    }

    /// Whether `dir` holds an adapter: the config is what appears last.
    #[must_use]
    pub fn exists(dir: &Path) -> bool {
        dir.join(CONFIG).exists()
    }

    /// Removes the adapter in `dir`, and the folder if nothing else is in it.
    pub(crate) fn remove(dir: &Path) -> Result<()> {
        beside::replace(dir, &[], |_, _| Ok(()))?;
        for path in [CONFIG, WEIGHTS].map(|name| dir.join(name)).into_iter().filter(|path| path.exists()) {
            std::fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
        }
        let _ = std::fs::remove_dir(dir);
        Ok(())
    }

    /// Where its weights lie in the folder `dir`.
    pub(crate) fn weights_in(dir: &Path) -> PathBuf {
        dir.join(WEIGHTS)
    }

    /// Takes away what killed writers have left half-written in `dir`.
    pub(crate) fn sweep(dir: &Path) {
        [CONFIG, WEIGHTS].iter().for_each(|name| sweep(&dir.join(name)));
    }

    /// Writes the directory's two files. Both are on the disk before either gets its name. A kill at any moment leaves the
    /// old adapter, the new one, or none where its config differs from the old one's: then the old config goes first, so
    /// that no adapter of two halves is ever there.
    ///
    /// # Errors
    /// A value is not finite in the type that the method's tensors are saved in, or the files cannot be written.
    pub fn save(&self) -> Result<()> {
        let kinds: Vec<Kind> = self.beside.iter().map(|other| other.method.kind()).collect();
        beside::replace(&self.dir, &kinds, |i, folder| {
            Self { dir: folder.to_owned(), ..self.beside[i].clone() }.save()
        })?;
        let shapes = self.tensors.iter().map(|(name, t)| (name.clone(), t.shape.clone())).collect();
        self.save_by(&self.dir, shapes, |put| self.tensors.iter().try_for_each(|(name, t)| put(name, &t.data)))
    }

    /// Writes it to the folder `dir` without rounding: in f16 if that holds all values as they are, else in f32.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn save_exact(&self, dir: &Path) -> Result<()> {
        let halves = self.tensors.values().all(|t| t.data.iter().all(|v| f16::from_f32(*v).to_f32() == *v));
        let stored = if halves && self.method.kind().stored() == Stored::F16 { Stored::F16 } else { Stored::F32 };
        let shapes = self.tensors.iter().map(|(name, t)| (name.clone(), t.shape.clone())).collect();
        crate::format::create_folder(dir)?;
        self.save_in(stored, dir, shapes, |put| self.tensors.iter().try_for_each(|(name, t)| put(name, &t.data)))
    }

    /// As [`AdapterFile::save`], to the folder `dir`, with tensors of `shapes` in place of its own, which `fill` hands over
    /// one at a time, in any order: no more than one of them is held as the file has it.
    ///
    /// # Errors
    /// As there, and those of `fill`.
    pub(crate) fn save_by(
        &self,
        dir: &Path,
        shapes: Vec<(String, Vec<usize>)>,
        fill: impl FnOnce(&mut Put<'_>) -> Result<()>,
    ) -> Result<()> {
        self.save_in(self.method.kind().stored(), dir, shapes, fill)
    }

    /// As [`AdapterFile::save_by`], in the type `stored`.
    ///
    /// # Errors
    /// As there.
    pub(in crate::adapter) fn save_in(
        &self,
        stored: Stored,
        dir: &Path,
        shapes: Vec<(String, Vec<usize>)>,
        fill: impl FnOnce(&mut Put<'_>) -> Result<()>,
    ) -> Result<()> {
        let (path, kind) = (dir.join(WEIGHTS), self.method.kind());
        let adapted = adapted(kind, &shapes);
        let kept = self.replaced.tensors(kind, &adapted);
        let weights = Staged::write(&path, |file| {
            let failed = |e| Error::io("write", &path, e);
            let dtype = match stored {
                Stored::F16 => Dtype::F16,
                Stored::F32 => Dtype::F32,
            };
            let is_places = |name: &str| {
                kind.places().is_some_and(|(part, _)| name.strip_suffix(part).is_some_and(|rest| rest.ends_with('.')))
            };
            let entry = |(name, shape): (String, Vec<usize>)| {
                let dtype = if is_places(&name) { Dtype::I32 } else { dtype };
                Entry { name: written(kind, &name), dtype, shape }
            };
            let kept_entry = |(name, tensor): &(String, Tensor)| Entry {
                name: format!("{PREFIX}{name}"),
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
            };
            let entries = shapes.into_iter().map(entry).chain(kept.iter().map(kept_entry)).collect();
            let metadata = match &self.base_mark {
                Some(mark) => json!({ "format": "pt", BASE_MARK: mark }),
                None => json!({ "format": "pt" }),
            };
            let mut writer = Writer::new(BufWriter::new(file), metadata, entries, Vec::new());
            fill(&mut |name, values| {
                let bytes = match is_places(name) {
                    true => values.iter().flat_map(|place| (*place as i32).to_le_bytes()).collect(),
                    false => stored.bytes(values, name)?,
                };
                writer.write(&written(kind, name), 0, &bytes).map_err(failed)
            })?;
            for (name, tensor) in &kept {
                writer.write(&format!("{PREFIX}{name}"), 0, &tensor.bytes).map_err(failed)?;
            }
            writer.finish().map(|_| ()).map_err(failed)
        })?;
        let config = config::json(&self.method, self.base.as_deref(), &self.replaced, &adapted);
        let mut text = serde_json::to_vec_pretty(&config).expect("a JSON value serializes");
        text.push(b'\n');
        Self::commit(dir, weights, &text)
    }

    /// Writes the adapter in the folder `from` to the folder `to` as [`AdapterFile::save`] would, without holding it.
    ///
    /// # Errors
    /// A file of `from` is missing or no safetensors file, or the files cannot be written.
    pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
        let kinds = beside::kinds(from)?;
        beside::replace(to, &kinds, |i, folder| Self::copy(&beside::folder(from, kinds[i]), folder))?;
        let (source, path, config) = (from.join(WEIGHTS), to.join(WEIGHTS), from.join(CONFIG));
        TensorFile::open(&source)?;
        let text = std::fs::read(&config).map_err(|e| Error::io("read", &config, e))?;
        let weights = Staged::write(&path, |file| {
            let mut source = std::fs::File::open(&source).map_err(|e| Error::io("read", &source, e))?;
            std::io::copy(&mut source, file).map_err(|e| Error::io("write", &path, e))?;
            Ok(())
        })?;
        Self::commit(to, weights, &text)
    }

    /// Gives `weights` and a config of `text` their names, in an order of which a kill at any moment spoils nothing.
    fn commit(dir: &Path, weights: Staged, text: &[u8]) -> Result<()> {
        let path = dir.join(CONFIG);
        if std::fs::read(&path).is_ok_and(|old| old == text) {
            return weights.commit();
        }
        let config = Staged::write(&path, |file| file.write_all(text).map_err(|e| Error::io("write", &path, e)))?;
        if path.exists() {
            std::fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
            sync_dir(dir)?;
        }
        weights.commit()?;
        config.commit()
    }
}

/// Paths of the modules that tensors of `shapes` adapt, in their order.
fn adapted(kind: Kind, shapes: &[(String, Vec<usize>)]) -> Vec<String> {
    shapes.iter().filter_map(|(name, _)| kind.module_of(name).map(str::to_owned)).collect()
}

/// The name of a tensor in the file: what belongs to no module has no prefix.
fn written(kind: Kind, name: &str) -> String {
    if kind.shared().contains(&name) { name.to_owned() } else { format!("{PREFIX}{name}") }
}

/// Whether a class such as `Qwen2ForCausalLM` is one of `family`, such as `qwen2`.
fn is_of_family(class: &str, family: &str) -> bool {
    let plain = |text: &str| text.replace(['_', '-'], "").to_ascii_lowercase();
    let class = plain(class);
    let end = ["for", "model", "lmhead"].iter().filter_map(|word| class.find(word)).min();
    class[..end.unwrap_or(class.len())].trim_start_matches("fast") == plain(family)
}

/// A whole number as such: PEFT takes ranks for sizes.
pub(super) fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value < 1e15 { json!(value as u64) } else { json!(value) }
}
