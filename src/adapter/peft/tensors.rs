//! What an adapter's weights file holds: the method's tensors, and whole weights that stand in for the base's.

use super::CONFIG;
use super::config::Parsed;
use super::keys::{Key, Part, is_of_training, parse};
use crate::adapter::Kind;
use crate::adapter::tensor::{HostTensor, Tensors};
use crate::error::{Error, ErrorCode, Result};
use crate::format::safetensors::{Tensor, TensorFile};
use crate::format::widen;
use pocketlora_models::{Model, Role};
use safetensors::Dtype;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

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

impl WholeTensor {
    /// The weight's whole name.
    pub(in crate::adapter) fn name(&self) -> String {
        format!("{}.{}", self.module, self.kind)
    }
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

impl Rows {
    /// Refuses rows of the adapter in `dir` that have no place in an embedding `[V, C]`.
    pub(in crate::adapter) fn check(&self, dir: &Path, [vocabulary, width]: [usize; 2]) -> Result<()> {
        let refused = |message: String| {
            let place = format!("`{}`: new rows of `{}`", dir.display(), self.module);
            let message = format!("{message}; use the base that the adapter was trained on");
            Err(Error::new(ErrorCode::AdapterMismatch, place, message))
        };
        if let Some(id) = self.ids.iter().find(|id| **id as usize >= vocabulary) {
            return refused(format!("expected ids below the base's {vocabulary}, got `{id}`"));
        }
        match self.values.shape[1] {
            cols if cols == width => Ok(()),
            cols => refused(format!("expected rows of {width} values as in the base, got {cols}")),
        }
    }
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
    pub(super) fn tensors(&self, kind: Kind, adapted: &[String]) -> Vec<(String, Tensor)> {
        let whole = self.whole.iter().map(|w| (self.name_of(kind, w, adapted), w.tensor.clone()));
        let rows = self.rows.iter().map(|r| {
            let bytes: Vec<u8> = r.values.data.iter().flat_map(|v| v.to_le_bytes()).collect();
            let tensor = Tensor { dtype: Dtype::F32, shape: r.values.shape.to_vec(), bytes: bytes.into() };
            (Self::name_of_rows(kind, r), tensor)
        });
        whole.chain(rows).collect()
    }

    /// The name of `whole`, which is among these, in the file of an adapter of the method `kind`.
    pub(in crate::adapter) fn name_of(&self, kind: Kind, whole: &WholeTensor, adapted: &[String]) -> String {
        let copied = || self.whole.iter().any(|w| w.copy && w.module == whole.module);
        let below = match whole.copy {
            false if kind == Kind::LnTuning => "ln_tuning_layers.",
            false if adapted.contains(&whole.module) => "base_layer.",
            false if copied() => "original_module.",
            _ => "",
        };
        format!("{}.{below}{}", whole.module, whole.kind)
    }

    /// The name of `rows` in such a file.
    pub(in crate::adapter) fn name_of_rows(kind: Kind, rows: &Rows) -> String {
        let below = if kind == Kind::TrainableTokens { "" } else { "token_adapter." };
        format!("{}.{below}trainable_tokens_delta", rows.module)
    }

    /// Refuses a factor on the adapter in `dir`, for these have no strength.
    pub(in crate::adapter) fn check_factor(&self, dir: &Path, factor: f32) -> Result<()> {
        if factor == 1.0 || self.is_empty() {
            return Ok(());
        }
        let message = format!(
            "expected a scale of 1, got `{factor}`: the adapter brings weights in place of the base's, which have \
             no strength (`{}`); attach it without a scale",
            self.names().collect::<Vec<_>>().join("`, `")
        );
        Err(Error::new(ErrorCode::Config, format!("`{}`", dir.display()), message))
    }

    /// What the tied head of `model` becomes: PEFT loads a plain embedding into the base, where the head sees it. Of a
    /// trained copy it does not know, unless the adapter says so.
    pub(in crate::adapter) fn seen_by_head(&self, model: &dyn Model) -> Option<&WholeTensor> {
        let embedding = &model.params()[model.head_param().0 as usize];
        let own = self.whole.iter().any(|w| w.module == "lm_head");
        if embedding.role != Role::Embedding || own {
            return None;
        }
        self.whole.iter().find(|w| w.name() == embedding.name && (!w.copy || self.ties_copies))
    }

    /// Their names, as people know them.
    pub fn names(&self) -> impl Iterator<Item = String> {
        let whole = self.whole.iter().map(WholeTensor::name);
        whole.chain(self.rows.iter().map(|r| format!("{} rows of {}", r.ids.len(), r.module)))
    }
}

/// All that is in the file.
pub(super) struct Contents {
    pub tensors: Tensors,
    /// Paths of the adapted modules.
    pub adapted: Vec<String>,
    pub replaced: Replacements,
    /// The file's free metadata about the base.
    pub base_mark: Option<String>,
    /// What of the config has no effect.
    pub warnings: Vec<String>,
}

/// A module for which the file has tensors of the method: what the method checks.
#[derive(Debug)]
pub(in crate::adapter) struct Found {
    /// Path of the module in the base model.
    pub path: String,
    /// The path as the training program had it.
    pub written: String,
    /// Shapes of its parts, in the method's order.
    pub shapes: Vec<Vec<usize>>,
}

impl Found {
    /// Both paths: a pattern may match either.
    pub fn names(&self) -> [&str; 2] {
        [&self.path, &self.written]
    }
}

/// Where the mark of the base's weights lies in the metadata.
pub(super) const BASE_MARK: &str = "pocketlora.base";

/// Reads the weights in `file` as `parsed` describes them.
///
/// # Errors
/// The file is broken, contradicts its config, or holds what is not supported.
pub(super) fn read(file: &TensorFile, parsed: &mut Parsed) -> Result<Contents> {
    let path = file.path();
    let kind = parsed.method.kind();
    let mut own: BTreeMap<String, (String, Vec<Option<HostTensor>>)> = BTreeMap::new();
    let mut tensors = Tensors::new();
    let mut whole: BTreeMap<(String, &'static str, bool), Tensor> = BTreeMap::new();
    let mut rows = BTreeMap::new();
    let mut adapters = BTreeSet::new();
    for (name, tensor) in file.tensors().filter(|(name, _)| !is_of_training(name)) {
        let Key { mut module, mut written, part, depth, adapter } = parse(path, name, kind)?;
        if matches!(part, Part::Own(_)) {
            if let Some(weight) = parsed.targets.weight_of_experts(&module, depth) {
                (module, written) = (format!("{module}.{weight}"), format!("{written}.{weight}"));
            } else if depth > 0 {
                let what = format!("tensor `{name}`, one of several adapters on one module,");
                let next =
                    "merge the adapter into its base with PEFT's `merge_and_unload`, and use the result as the model";
                return Err(Error::unsupported(path, what, next));
            }
        }
        adapters.extend(adapter);
        let again = match part {
            Part::Own(part) => {
                let dimensions = kind.dimensions().get(part).copied();
                let value = match kind.places() {
                    Some((places, _)) if places == kind.parts()[part] => whole_numbers(path, name, tensor, dimensions)?,
                    _ => host_tensor(path, name, tensor, dimensions)?,
                };
                let (_, parts) = own.entry(module).or_insert((written, vec![None; kind.parts().len()]));
                parts[part].replace(value).is_some()
            }
            Part::Shared(name) => {
                let value = host_tensor(path, name, tensor, kind.shared_dimensions())?;
                tensors.insert(name.to_owned(), value).is_some()
            }
            Part::InPlace(kind) => {
                let copy = is_saved(&parsed.modules_to_save, [&module, &written]);
                if !copy {
                    check_place(path, name, kind, parsed, [&module, &written])?;
                }
                whole.insert((module, kind, copy), tensor.clone()).is_some()
            }
            Part::Copy(kind) => whole.insert((module, kind, true), tensor.clone()).is_some(),
            Part::Rows => rows.insert(module, host_tensor(path, name, tensor, Some(2))?).is_some(),
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
    let missing = kind.shared().iter().find(|name| !tensors.contains_key(**name));
    if let Some(missing) = missing.filter(|_| !parsed.method.draws()) {
        return Err(Error::format(path, format!("tensor `{missing}`"), "it to be there", "none"));
    }
    if own.is_empty() && tensors.is_empty() && whole.is_empty() && rows.is_empty() {
        return Err(Error::format(path, "tensors", format!("those of a {}", kind.name()), "none"));
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
    let mut found = Vec::with_capacity(own.len());
    for (module, (written, parts)) in own {
        let names = kind.parts().iter().zip(&parts);
        let there: Vec<&'static str> = names.filter(|(_, value)| value.is_some()).map(|(name, _)| *name).collect();
        parsed.method.note_parts(&module, &there);
        let expected = parsed.method.parts(&module);
        let mut shapes = Vec::with_capacity(expected.len());
        let item = || format!("module `{module}`");
        let mut there: BTreeMap<&str, HostTensor> =
            kind.parts().iter().zip(parts).filter_map(|(part, value)| Some((*part, value?))).collect();
        for part in expected {
            let value = there.remove(part).ok_or_else(|| Error::format(path, item(), format!("`{part}`"), "none"))?;
            shapes.push(value.shape.clone());
            tensors.insert(format!("{module}.{part}"), value);
        }
        if let Some(part) = there.into_keys().next() {
            let expected = format!("no tensor but `{}` there, by {CONFIG}", expected.join("` and `"));
            return Err(Error::format(path, item(), expected, format!("`{part}`")));
        }
        found.push(Found { path: module, written, shapes });
    }
    let warnings = parsed.method.check(path, &found)?;
    for module in &found {
        if !parsed.targets.names(module.names())? {
            let message = format!(
                "its tensors are in the file, but the keys of {CONFIG} that choose layers (`target_modules` and those \
                 beside it) leave it out; correct them, or save the adapter again with PEFT"
            );
            let place = format!("`{}`: module `{}`", path.display(), module.written);
            return Err(Error::new(ErrorCode::Format, place, message));
        }
    }
    let adapted = found.into_iter().map(|module| module.path).collect();
    let rows = rows_of(path, &parsed.rows, rows)?;
    let replaced = Replacements { whole, rows, ties_copies: parsed.ties_copies };
    Ok(Contents { tensors, adapted, replaced, base_mark: file.metadata().get(BASE_MARK).cloned(), warnings })
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

/// Whole numbers of 4 or 8 bytes as f32, which must hold them exactly.
fn whole_numbers(path: &Path, name: &str, tensor: &Tensor, dimensions: Option<usize>) -> Result<HostTensor> {
    let numbers: Vec<i64> = match tensor.dtype {
        Dtype::I32 => tensor.bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect(),
        Dtype::I64 => tensor.bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
        _ => return Err(Error::format(path, format!("tensor `{name}`"), "I32 or I64", tensor.describe())),
    };
    if let Some(dimensions) = dimensions.filter(|n| *n != tensor.shape.len()) {
        let got = format!("`{:?}`", tensor.shape);
        return Err(Error::format(path, format!("tensor `{name}`"), format!("{dimensions} dimensions"), got));
    }
    if let Some(other) = numbers.iter().find(|n| !(0..1 << f32::MANTISSA_DIGITS).contains(*n)) {
        let next = "use it with PEFT, or merge it there";
        return Err(Error::unsupported(path, format!("tensor `{name}` with the place `{other}`"), next));
    }
    Ok(HostTensor { shape: tensor.shape.clone(), data: numbers.into_iter().map(|n| n as f32).collect() })
}

/// Widens a float tensor to f32 and refuses values that would poison every result.
pub(super) fn host_tensor(path: &Path, name: &str, tensor: &Tensor, dimensions: Option<usize>) -> Result<HostTensor> {
    let item = || format!("tensor `{name}`");
    if let Some(dimensions) = dimensions.filter(|n| tensor.shape.len() != *n) {
        let expected = if dimensions == 1 { "one dimension" } else { "two dimensions" };
        return Err(Error::format(path, item(), expected, format!("`{:?}`", tensor.shape)));
    }
    let float =
        tensor.float_type().ok_or_else(|| Error::format(path, item(), "F32, F16 or BF16", tensor.describe()))?;
    let mut data = vec![0.0; tensor.shape.iter().product()];
    widen(float, &tensor.bytes, &mut data);
    if let Some(at) = data.iter().position(|v| !v.is_finite()) {
        return Err(Error::format(path, format!("{} value {at}", item()), "a finite number", data[at]));
    }
    Ok(HostTensor { shape: tensor.shape.clone(), data })
}
