//! llama.cpp's adapters: a GGUF file with `BASE_TENSOR.lora_a` `[r, in]` and `.lora_b` `[out, r]` for each layer, and one
//! `adapter.lora.alpha` for all; the scale is `alpha / r`, and 1 where alpha is 0.

use super::{Plain, bad_pair, lora_of, most_frequent};
use crate::adapter::{AdapterFile, HostTensor, Tensors};
use crate::error::{Error, ErrorCode, Result};
use crate::format::gguf::{Container, Family, GgmlType, GgufEntry, GgufWriter, Pairs, interleaved_row};
use crate::format::{is_gguf, write_file};
use crate::mmap;
use pocketlora_models::Model;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::BufWriter;
use std::path::Path;

const TYPE: &str = "general.type";
const ARCH: &str = "general.architecture";
const KIND: &str = "adapter.type";
const ALPHA: &str = "adapter.lora.alpha";
const INVOCATION: &str = "adapter.alora.invocation_tokens";
const BASE: &str = "general.base_model.0.name";
/// Our own: the mark of the base.
const MARK: &str = "pocketlora.base";

/// Whether the file at `path` is an adapter in GGUF form.
pub(in crate::adapter) fn is_adapter(path: &Path) -> bool {
    let adapter = |file: Container| matches!(file.metadata.string(TYPE), Ok(Some("adapter")));
    is_gguf(path) && mmap::map(path).and_then(|bytes| Container::parse(bytes, path)).is_ok_and(adapter)
}

/// Reads the adapter at `path`.
///
/// # Errors
/// The file is broken, no LoRA, of an unknown architecture, or has tensors that are none of a LoRA's.
pub(in crate::adapter) fn open(path: &Path) -> Result<AdapterFile> {
    let file = Container::parse(mmap::map(path)?, path)?;
    let meta = &file.metadata;
    let text = |key: &str| meta.string(key).and_then(|value| meta.required(key, value));
    if text(TYPE)? != "adapter" {
        let what = "a model in GGUF form as an adapter";
        return Err(Error::unsupported(path, what, "give it as the model: `-m`"));
    }
    if text(KIND)? != "lora" {
        return Err(meta.fail(KIND, "`lora`", text(KIND)?));
    }
    if meta.get(INVOCATION).is_some() {
        let next = "use it with llama.cpp";
        return Err(Error::unsupported(path, "an adapter that works behind its invocation only", next));
    }
    let arch = text(ARCH)?;
    let arch = Family::named(arch).filter(|arch| !arch.folded).ok_or_else(|| {
        let next = format!("use the PEFT adapter that it was made from; known are `{}`", Family::names());
        Error::unsupported(path, format!("an adapter of the architecture `{arch}` in GGUF"), next)
    })?;
    let alpha = meta.float(ALPHA)?.unwrap_or(0.0);
    let mut halves: BTreeMap<String, [Option<HostTensor>; 2]> = BTreeMap::new();
    let mut warnings = Vec::new();
    for tensor in &file.tensors {
        let item = || format!("tensor `{}`", tensor.name);
        let Some((name, part)) = tensor.name.rsplit_once(".lora_") else {
            if tensor.name.ends_with("_norm.weight") {
                warnings.push(format!("`{}` is left out, as llama.cpp leaves it out", tensor.name));
                continue;
            }
            let expected = "a name that ends in `.lora_a` or `.lora_b`";
            return Err(Error::format(path, item(), expected, "another one"));
        };
        let which = match part {
            "a" => 0,
            "b" => 1,
            other => return Err(Error::format(path, item(), "`.lora_a` or `.lora_b`", format!("`.lora_{other}`"))),
        };
        let embedding = name.starts_with("token_embd.");
        let Some(module) = arch.module_of(name).filter(|_| !embedding) else {
            let what = format!("{}, which is on no linear layer that is known here,", item());
            return Err(Error::unsupported(path, what, "use the PEFT adapter that it was made from"));
        };
        if tensor.shape.len() != 2 {
            return Err(Error::format(path, item(), "two dimensions", format!("`{:?}`", tensor.shape)));
        }
        let mut data = vec![0.0; tensor.shape.iter().product()];
        file.read_rows(tensor, 0..tensor.shape[0], &mut data);
        if let Some(at) = data.iter().position(|v| !v.is_finite()) {
            return Err(Error::format(path, format!("{} value {at}", item()), "a finite number", data[at]));
        }
        halves.entry(module).or_default()[which] = Some(HostTensor { shape: tensor.shape.clone(), data });
    }
    let (mut modules, mut tensors) = (Vec::new(), Tensors::new());
    for (module, pair) in halves {
        let (a, b) = match pair {
            [Some(a), Some(b)] if a.shape[0] == b.shape[1] => (a, b),
            [Some(a), Some(b)] => return Err(bad_pair(path, &module, format!("{:?} and {:?}", a.shape, b.shape))),
            _ => return Err(bad_pair(path, &module, "one".to_owned())),
        };
        let rank = a.shape[0];
        modules.push((module.clone(), rank, if alpha == 0.0 { rank as f64 } else { alpha }));
        tensors.insert(format!("{module}.lora_A.weight"), a);
        tensors.insert(format!("{module}.lora_B.weight"), b);
    }
    let mut adapter = lora_of(path, &modules, tensors)?;
    adapter.warnings = warnings;
    adapter.base = meta.string(BASE)?.map(str::to_owned);
    adapter.base_mark = meta.string(MARK)?.map(str::to_owned);
    adapter.arch = Some(arch);
    Ok(adapter)
}

/// `file`, whose rows are in the order of the architecture `arch`, in the order of `model`.
///
/// # Errors
/// The model is of another family.
pub(in crate::adapter) fn fit<'a>(
    file: &'a AdapterFile,
    arch: &Family,
    model: &dyn Model,
) -> Result<Cow<'a, AdapterFile>> {
    let family = model.config().model_type.as_str();
    let kinds: Vec<&str> = arch.model_types().collect();
    if !kinds.contains(&family) {
        let message = format!(
            "expected a base of the family `{}`, got a `{family}`; use the base that the adapter was trained on",
            kinds.join("` or `")
        );
        return Err(Error::new(ErrorCode::AdapterMismatch, format!("`{}`", file.dir.display()), message));
    }
    let mut fitted = file.clone();
    fitted.arch = None;
    for (name, tensor) in fitted.tensors.iter_mut().filter(|(name, _)| name.ends_with(".lora_B.weight")) {
        if let Some(head) = head_of(name, arch, model, tensor.shape[0]) {
            permute(tensor, |row| interleaved_row(row, head));
        }
    }
    Ok(Cow::Owned(fitted))
}

/// The size of the heads in whose rows `arch` has an order of its own, of the tensor `name` with `rows`.
fn head_of(name: &str, arch: &Family, model: &dyn Model, rows: usize) -> Option<usize> {
    let config = model.config();
    let heads = match name {
        _ if !arch.interleaved => return None,
        name if name.contains(".q_proj.") => config.heads,
        name if name.contains(".k_proj.") => config.kv_heads,
        _ => return None,
    };
    Some(config.head_dim).filter(|head| head * heads == rows)
}

/// Makes row number `source(row)` row number `row`.
fn permute(tensor: &mut HostTensor, source: impl Fn(usize) -> usize) {
    let cols = tensor.shape[1];
    let rows = 0..tensor.shape[0];
    tensor.data = rows.flat_map(|row| &tensor.data[source(row) * cols..][..cols]).copied().collect();
}

/// Writes `plain` to `out`.
pub(super) fn write(plain: &Plain<'_>, out: &Path) -> Result<()> {
    let family = plain.model.config().model_type.as_str();
    let arch = Family::of_model(family).filter(|arch| !arch.folded).ok_or_else(|| {
        let next = format!("merge it into its base instead; adapters are written for `{}`", Family::names());
        Error::unsupported(&plain.file.dir, format!("to write an adapter of the family `{family}` as GGUF"), next)
    })?;
    let layers = plain.layers();
    let alphas: Vec<f32> = layers.iter().map(|layer| layer.factor * layer.rank as f32).collect();
    // An alpha of zero would mean a scale of one; where all terms are off, their B says so.
    let alpha = most_frequent(&alphas).filter(|alpha| *alpha != 0.0).unwrap_or(1.0);
    let mut pairs = Pairs::default();
    pairs.text(TYPE, "adapter");
    pairs.text(ARCH, arch.name);
    pairs.text(KIND, "lora");
    pairs.f32(ALPHA, alpha);
    pairs.u32("general.file_type", 0);
    if let Some(base) = &plain.file.base {
        pairs.u32("general.base_model.count", 1);
        pairs.text(BASE, base);
    }
    if let Some(mark) = &plain.file.base_mark {
        pairs.text(MARK, mark);
    }
    let (mut entries, mut values) = (Vec::new(), Vec::new());
    for (layer, own) in layers.iter().zip(alphas) {
        let name = arch.tensor_of(&format!("{}.weight", layer.module)).ok_or_else(|| {
            let what = format!("to write the module `{}`, which llama.cpp has not, as GGUF", layer.module);
            Error::unsupported(&plain.file.dir, what, "merge it into its base instead")
        })?;
        let mut b = layer.b.clone();
        if own != alpha {
            let ratio = own / alpha;
            b.data.iter_mut().for_each(|v| *v *= ratio);
        }
        if let Some(head) = head_of(&format!("{}.", layer.module), arch, plain.model, b.shape[0]) {
            let mut source = vec![0; b.shape[0]];
            (0..b.shape[0]).for_each(|row| source[interleaved_row(row, head)] = row);
            permute(&mut b, |row| source[row]);
        }
        for (part, tensor) in [("lora_a", layer.a.clone()), ("lora_b", b)] {
            let shape = tensor.shape.clone();
            entries.push(GgufEntry { name: format!("{name}.{part}"), shape, dtype: GgmlType::F32 });
            values.push(tensor);
        }
    }
    write_file(out, |file| {
        let failed = |e| Error::io("write", out, e);
        let mut writer = GgufWriter::begin(BufWriter::new(file), &pairs, &entries).map_err(failed)?;
        for tensor in &values {
            let bytes: Vec<u8> = tensor.data.iter().flat_map(|v| v.to_le_bytes()).collect();
            writer.write(&bytes).map_err(failed)?;
        }
        writer.finish().map_err(failed)
    })
}
