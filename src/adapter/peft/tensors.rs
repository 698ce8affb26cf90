//! What an adapter's weights file holds: pairs of LoRA matrices, and whole weights that stand in for the base's.

use super::config::{Parsed, Patterns};
use super::keys::{Key, Part, parse};
use super::{CONFIG, LoraConfig};
use crate::error::{Error, ErrorCode, Result};
use crate::format::safetensors::{Tensor, TensorFile};
use crate::format::widen;
use half::f16;
use safetensors::Dtype;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// A small matrix on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// Rows and columns.
    pub shape: [usize; 2],
    /// Row-major values.
    pub data: Vec<f32>,
}

impl HostTensor {
    /// The values as an adapter's file holds them; `name` is for the error.
    ///
    /// # Errors
    /// A value is not finite in f16.
    pub fn rounded(mut self, name: &str) -> Result<Self> {
        let halves = halves(&self.data, name)?;
        self.data.iter_mut().zip(halves).for_each(|(v, half)| *v = half.to_f32());
        Ok(self)
    }
}

/// `values` in f16; `name` is for the error.
pub(super) fn halves(values: &[f32], name: &str) -> Result<Vec<f16>> {
    let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
    match halves.iter().position(|v| !v.is_finite()) {
        None => Ok(halves),
        Some(at) => {
            let message = format!("value {at} is `{}`, which f16 cannot hold; lower the learning rate", values[at]);
            Err(Error::new(ErrorCode::Diverged, format!("tensor `{name}`"), message))
        }
    }
}

/// LoRA matrices of one linear layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraModule {
    /// Path of the layer in the base model, such as `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// `[r, in]`.
    pub a: HostTensor,
    /// `[out, r]`.
    pub b: HostTensor,
    /// Factor on `B A`.
    pub scale: f32,
}

impl LoraModule {
    /// A module with the scale that `config` gives it.
    pub fn new(path: String, a: HostTensor, b: HostTensor, config: &LoraConfig) -> Self {
        Self { path, a, b, scale: config.scale(config.rank, config.alpha) }
    }

    /// Checks that the matrices fit a layer of shape `(out, in)`.
    ///
    /// # Errors
    /// They belong to another base.
    pub fn check_shape(&self, dir: &Path, (out, input): (usize, usize)) -> Result<()> {
        let got = (self.b.shape[0], self.a.shape[1]);
        if got == (out, input) {
            return Ok(());
        }
        let message = format!(
            "expected matrices for a layer `[{out}, {input}]`, got `[{}, {}]`; use the base that the adapter was \
             trained on",
            got.0, got.1
        );
        let place = format!("`{}`: module `{}`", dir.display(), self.path);
        Err(Error::new(ErrorCode::AdapterMismatch, place, message))
    }
}

/// A weight that stands in for one of the base while the adapter is attached. Its bytes lie in the mapped file.
#[derive(Clone, Debug)]
pub struct WholeTensor {
    /// Path of the module that holds it.
    pub module: String,
    /// Its name there, `weight` or `bias`.
    pub kind: &'static str,
    /// It belongs to a copy of the module (`modules_to_save`), so that a tied head keeps the base's.
    pub copy: bool,
    /// The values.
    pub tensor: Tensor,
}

/// Rows that stand in for single ones of an embedding.
#[derive(Clone, Debug)]
pub struct Rows {
    /// Path of the embedding's module.
    pub module: String,
    /// Which rows.
    pub ids: Vec<u32>,
    /// Their values.
    pub values: HostTensor,
}

/// What stands in for weights of the base while an adapter is attached.
#[derive(Clone, Debug, Default)]
pub struct Replacements {
    /// Whole weights.
    pub whole: Vec<WholeTensor>,
    /// Rows of embeddings.
    pub rows: Vec<Rows>,
    /// A tied head follows a copy of the embedding.
    pub ties_copies: bool,
}

impl Replacements {
    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.whole.is_empty() && self.rows.is_empty()
    }

    /// The tensors under the names that PEFT looks for, in a file that adapts the modules `adapted`.
    pub(super) fn tensors(&self, adapted: &[String]) -> Vec<(String, Tensor)> {
        let copied = |module: &str| self.whole.iter().any(|w| w.copy && w.module == module);
        let whole = self.whole.iter().map(|w| {
            let below = match w.copy {
                false if adapted.contains(&w.module) => "base_layer.",
                false if copied(&w.module) => "original_module.",
                _ => "",
            };
            (format!("{}.{below}{}", w.module, w.kind), w.tensor.clone())
        });
        let rows = self.rows.iter().map(|r| {
            let bytes: Vec<u8> = r.values.data.iter().flat_map(|v| v.to_le_bytes()).collect();
            let tensor = Tensor { dtype: Dtype::F32, shape: r.values.shape.to_vec(), bytes: bytes.into() };
            (format!("{}.token_adapter.trainable_tokens_delta", r.module), tensor)
        });
        whole.chain(rows).collect()
    }

    /// Their names, as people know them.
    pub fn names(&self) -> impl Iterator<Item = String> {
        let whole = self.whole.iter().map(|w| format!("{}.{}", w.module, w.kind));
        whole.chain(self.rows.iter().map(|r| format!("{} rows of {}", r.ids.len(), r.module)))
    }
}

/// All that is in the file.
pub(super) struct Contents {
    pub modules: Vec<LoraModule>,
    pub replaced: Replacements,
    /// The file's free metadata about the base.
    pub base_mark: Option<String>,
    /// What of the config has no effect.
    pub warnings: Vec<String>,
}

/// Where the mark of the base's weights lies in the metadata.
pub(super) const BASE_MARK: &str = "pocketlora.base";

/// Reads the weights at `path` as `parsed` describes them.
///
/// # Errors
/// The file is broken, contradicts its config, or holds what is not supported.
pub(super) fn read(path: &Path, parsed: &Parsed) -> Result<Contents> {
    let file = TensorFile::open(path)?;
    let mut halves: BTreeMap<String, (String, [Option<HostTensor>; 2])> = BTreeMap::new();
    let mut whole: BTreeMap<(String, &'static str, bool), Tensor> = BTreeMap::new();
    let mut rows = BTreeMap::new();
    let mut adapters = BTreeSet::new();
    for (name, tensor) in file.tensors() {
        let Key { module, written, part, adapter } = parse(path, name)?;
        adapters.extend(adapter);
        let again = match part {
            Part::A | Part::B => {
                let value = host_tensor(path, name, tensor)?;
                let (_, pair) = halves.entry(module).or_insert((written, [None, None]));
                pair[usize::from(part == Part::B)].replace(value).is_some()
            }
            Part::InPlace(kind) => {
                let copy = is_saved(&parsed.modules_to_save, [&module, &written]);
                if !copy {
                    check_place(path, name, kind, parsed, [&module, &written])?;
                }
                whole.insert((module, kind, copy), tensor.clone()).is_some()
            }
            Part::Copy(kind) => whole.insert((module, kind, true), tensor.clone()).is_some(),
            Part::Rows => rows.insert(module, host_tensor(path, name, tensor)?).is_some(),
        };
        if again {
            let message = "is there twice once wrappers' names are left out; save the adapter again with PEFT";
            return Err(Error::new(ErrorCode::Format, format!("`{}`: tensor `{name}`", path.display()), message));
        }
    }
    if adapters.len() > 1 {
        let names = adapters.into_iter().collect::<Vec<_>>().join("` and `");
        let next = "save each of them to a folder of its own with PEFT's `save_pretrained`";
        return Err(Error::unsupported(path, format!("a file with the adapters `{names}`"), next));
    }
    if halves.is_empty() && whole.is_empty() && rows.is_empty() {
        return Err(Error::format(path, "tensors", "LoRA matrices", "none"));
    }
    let whole: Vec<_> =
        whole.into_iter().map(|((module, kind, copy), tensor)| WholeTensor { module, kind, copy, tensor }).collect();
    for name in &parsed.modules_to_save {
        let found = whole.iter().any(|w| w.copy && is_saved(std::slice::from_ref(name), [&w.module; 2]));
        if !found && !parsed.ties_copies {
            let item = format!("module `{name}` of `modules_to_save`");
            return Err(Error::format(path, item, "its weights in the file", "none"));
        }
    }
    let config = &parsed.config;
    let (ranks, alphas) = (Patterns::new(path, &config.rank_pattern)?, Patterns::new(path, &config.alpha_pattern)?);
    let names: Vec<[&str; 2]> =
        halves.iter().map(|(module, (written, _))| [module.as_str(), written.as_str()]).collect();
    let mut warnings = Vec::new();
    for (key, patterns) in [("rank_pattern", &ranks), ("alpha_pattern", &alphas)] {
        let idle = patterns.idle(&names)?;
        warnings.extend(idle.iter().map(|pattern| format!("`{pattern}` in `{key}` matches no adapted layer")));
    }
    let join = |(module, (written, pair)): (String, (String, [Option<HostTensor>; 2]))| {
        let names = [module.as_str(), written.as_str()];
        if !parsed.targets.names(names)? {
            let message = format!(
                "its LoRA matrices are in the file, but the keys of {CONFIG} that choose layers (`target_modules` and \
                 those beside it) leave it out; correct them, or save the adapter again with PEFT"
            );
            let place = format!("`{}`: module `{written}`", path.display());
            return Err(Error::new(ErrorCode::Format, place, message));
        }
        let rank = ranks.value_for(names)?.map_or(config.rank, |r| r as usize);
        let scale = config.scale(rank, alphas.value_for(names)?.unwrap_or(config.alpha));
        let [a, b] = self::pair(path, rank, &module, pair)?;
        Ok(LoraModule { path: module, a, b, scale })
    };
    let modules = halves.into_iter().map(join).collect::<Result<_>>()?;
    let rows = rows_of(path, &parsed.rows, rows)?;
    let replaced = Replacements { whole, rows, ties_copies: parsed.ties_copies };
    Ok(Contents { modules, replaced, base_mark: file.metadata().get(BASE_MARK).cloned(), warnings })
}

/// Refuses a whole tensor of a module that the config says nothing of: PEFT loads the embedding, the head and norms as
/// they are named, but a layer's weight or bias only where it has put them.
fn check_place(path: &Path, name: &str, kind: &str, parsed: &Parsed, names: [&str; 2]) -> Result<()> {
    let below = |part: &str| name.split('.').any(|segment| segment == part);
    let (layer, below_base) = (names[0].ends_with("_proj"), below("base_layer"));
    let (what, key) = match kind {
        "weight" if layer => ("weight", "`modules_to_save`"),
        "bias" if !parsed.biases => ("bias", "`bias` or `modules_to_save`"),
        _ => return Ok(()),
    };
    if below("original_module") || below_base && parsed.targets.names(names)? {
        return Ok(());
    }
    let message = format!(
        "it would replace the base's {what} of `{}`, which {key} of {CONFIG} does not ask for; correct that key, or take \
         the tensor out of the file",
        names[0]
    );
    Err(Error::new(ErrorCode::Format, format!("`{}`: tensor `{name}`", path.display()), message))
}

/// Whether a module, given by the names it has, or one that it is part of ends like one of `saved`, as PEFT compares.
fn is_saved(saved: &[String], names: [&str; 2]) -> bool {
    let parents = |name: &'_ str| -> Vec<String> {
        let ends = name.match_indices('.').map(|(at, _)| at).chain([name.len()]);
        ends.map(|end| name[..end].to_owned()).collect()
    };
    names.iter().any(|name| parents(name).iter().any(|part| saved.iter().any(|end| part.ends_with(end.as_str()))))
}

/// Joins the ids of the config with the rows of the file.
fn rows_of(path: &Path, ids: &[(String, Vec<u32>)], mut rows: BTreeMap<String, HostTensor>) -> Result<Vec<Rows>> {
    let mut joined = Vec::new();
    for (name, ids) in ids.iter().filter(|(_, ids)| !ids.is_empty()) {
        let item = || format!("new rows of `{name}`");
        let module = rows.keys().find(|module| module.ends_with(name.as_str())).cloned();
        let Some((module, values)) = module.and_then(|module| rows.remove_entry(&module)) else {
            return Err(Error::format(path, item(), "`trainable_tokens_delta`", "none"));
        };
        if values.shape[0] != ids.len() {
            let expected = format!("{} rows for `trainable_token_indices`", ids.len());
            return Err(Error::format(path, item(), expected, values.shape[0]));
        }
        joined.push(Rows { module, ids: ids.clone(), values });
    }
    match rows.into_keys().next() {
        None => Ok(joined),
        Some(module) => {
            let item = format!("new rows of `{module}`");
            Err(Error::format(path, item, format!("their ids in `trainable_token_indices` of {CONFIG}"), "none"))
        }
    }
}

/// Both halves of a module, of the rank that the config gives it.
fn pair(path: &Path, rank: usize, module: &str, pair: [Option<HostTensor>; 2]) -> Result<[HostTensor; 2]> {
    let missing = |half| Error::format(path, format!("module `{module}`"), format!("`{half}.weight`"), "none");
    let [a, b] = pair;
    let a = a.ok_or_else(|| missing("lora_A"))?;
    let b = b.ok_or_else(|| missing("lora_B"))?;
    if a.shape[0] != rank || b.shape[1] != rank {
        let got = format!("A `{:?}` and B `{:?}`", a.shape, b.shape);
        return Err(Error::format(path, format!("module `{module}`"), format!("rank {rank} from {CONFIG}"), got));
    }
    Ok([a, b])
}

/// Widens a float matrix to f32 and refuses values that would poison every result.
fn host_tensor(path: &Path, name: &str, tensor: &Tensor) -> Result<HostTensor> {
    let item = || format!("tensor `{name}`");
    let [rows, cols] = tensor.shape[..] else {
        return Err(Error::format(path, item(), "two dimensions", format!("`{:?}`", tensor.shape)));
    };
    let float =
        tensor.float_type().ok_or_else(|| Error::format(path, item(), "F32, F16 or BF16", tensor.describe()))?;
    let mut data = vec![0.0; rows * cols];
    widen(float, &tensor.bytes, &mut data);
    if let Some(at) = data.iter().position(|v| !v.is_finite()) {
        return Err(Error::format(path, format!("{} value {at}", item()), "a finite number", data[at]));
    }
    Ok(HostTensor { shape: [rows, cols], data })
}
