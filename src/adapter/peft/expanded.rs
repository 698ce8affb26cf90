//! Methods whose file is a recipe for a LoRA's A and B: they are read as the LoRA that they come to, so that all that is done with
//! one is done with them. What is trained further is that LoRA, with A and B of its own.
//!
//! - VB-LoRA (Li et al. 2024): A and B are cut in vectors, each a mix of the `topk` vectors of a bank `[h, b]` that all layers share
//!   with the largest of its logits, by their softmax; or of the ones that the file names with their shares, the last one being
//!   what is left of 1. `A` `[r, in / b]` of them, `B` `[out / b, r]`, whose vectors are pieces of columns.
//! - TinyLoRA (Morris et al. 2026): `W + B (sum_i v_i P_i) A` with fixed A, B and `P` `[u, r, r]`; `v` `[u]` is one for each group of
//!   layers in the order of PEFT's modules.

use super::config::{Keys, MERGE, Use, parse};
use super::keys::{PREFIX, canonical_path};
use super::tensors::host_tensor;
use super::{AdapterFile, CONFIG, Replacements, WEIGHTS};
use crate::adapter::Kind;
use crate::adapter::method::layer_of;
use crate::adapter::tensor::{HostTensor, Tensors};
use crate::error::{Error, Result};
use crate::format::safetensors::{Tensor, TensorFile};
use Use::{Default as OnlyDefault, Honoured, NoEffect};
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

const SAVE: &str = "save it with PEFT with `save_projection=True`";
/// The keys of PEFT's configs of both (0.21).
const KEYS: &[super::KeyUse] = &[
    ("bias", Honoured, ""),
    ("exclude_modules", Honoured, ""),
    ("fan_in_fan_out", OnlyDefault, MERGE),
    ("init_logits_std", NoEffect, ""), // how it began, as the next ones
    ("init_v_bound", NoEffect, ""),
    ("init_vector_bank_bound", NoEffect, ""),
    ("init_weights", NoEffect, ""),
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("num_vectors", NoEffect, ""), // as the bank says
    ("projection_seed", NoEffect, ""),
    ("r", Honoured, ""),
    ("save_only_topk_weights", NoEffect, ""), // as the file says
    ("save_projection", Honoured, ""),
    ("target_modules", Honoured, ""),
    ("tinylora_dropout", NoEffect, ""), // of training
    ("topk", Honoured, ""),
    ("u", NoEffect, ""), // as P says
    ("vblora_dropout", NoEffect, ""),
    ("vector_length", NoEffect, ""), // as the bank says
    ("weight_tying", Honoured, ""),
];
/// A layer's modules as families register them that TinyLoRA's order is known of.
const ORDER: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Which of them a config is of, as people call it.
pub(super) fn named(json: &Map<String, Value>) -> Option<&'static str> {
    match json.get("peft_type")?.as_str()? {
        "VBLORA" => Some("VB-LoRA"),
        "TINYLORA" => Some("TinyLoRA"),
        _ => None,
    }
}

/// A file's tensors, by module and by what they are there.
struct Read<'a> {
    path: &'a Path,
    shared: BTreeMap<String, HostTensor>,
    modules: BTreeMap<String, BTreeMap<String, HostTensor>>,
}

impl Read<'_> {
    fn part(&self, module: &str, part: &str, dimensions: usize) -> Result<&HostTensor> {
        let item = || format!("module `{module}`");
        let found = self.modules[module].get(part);
        let tensor = found.ok_or_else(|| Error::format(self.path, item(), format!("`{part}`"), "none"))?;
        if tensor.shape.len() == dimensions {
            return Ok(tensor);
        }
        let got = format!("`{part}` of shape `{:?}`", tensor.shape);
        Err(Error::format(self.path, item(), format!("{dimensions} dimensions"), got))
    }

    fn wrong(&self, module: &str, expected: &str, shape: &[usize]) -> Error {
        Error::format(self.path, format!("module `{module}`"), expected, format!("`{shape:?}`"))
    }
}

/// Reads the adapter called `dir`, with the config `json` and the tensors of `file`, as the one of them that is called `name`.
///
/// # Errors
/// It asks for what is not done here, or its tensors contradict it or each other.
pub(super) fn read(name: &str, dir: &Path, json: &Map<String, Value>, file: &TensorFile) -> Result<AdapterFile> {
    let config = dir.join(CONFIG);
    let keys = Keys::new(&config, json, KEYS)?;
    if keys.get("save_projection").is_some() && !keys.flag("save_projection")? {
        return Err(Error::unsupported(&config, format!("{name} without its matrices"), SAVE));
    }
    if keys.text("bias")?.is_some_and(|bias| bias != "none") || !keys.list("modules_to_save")?.is_empty() {
        let what = format!("{name} beside whole weights (`bias`, `modules_to_save`)");
        return Err(Error::unsupported(&config, what, MERGE));
    }
    let (path, rank) = (dir.join(WEIGHTS), keys.whole("r", 1, if name == "TinyLoRA" { 2 } else { 4 })?);
    let read = tensors(&path, file)?;
    let pairs = match name {
        "TinyLoRA" => tiny(&read, rank, keys.number("weight_tying", Some(0.0))?)?,
        _ => from_bank(&read, rank, keys.whole("topk", 1, 2)?)?,
    };
    let mut lora = json!({"peft_type": "LORA", "r": rank, "lora_alpha": rank}).as_object().cloned().unwrap_or_default();
    let same = ["base_model_name_or_path", "task_type", "auto_mapping", "target_modules", "exclude_modules"];
    for key in same.into_iter().chain(["layers_pattern", "layers_to_transform"]) {
        json.get(key).map(|value| lora.insert(key.to_owned(), value.clone()));
    }
    let mut parsed = parse(&config, &lora)?;
    parsed.method.set_targets(match parsed.targets.suffixes() {
        Some(suffixes) => suffixes.to_vec(),
        None => pairs.keys().cloned().collect(),
    });
    parsed.warnings.push(format!(
        "{name} is used as the LoRA of rank {rank} that it comes to; what is trained further is that LoRA"
    ));
    let (mut all, parts) = (Tensors::new(), Kind::Lora.parts());
    for (module, [own_a, own_b]) in pairs {
        all.insert(format!("{module}.{}", parts[0]), own_a);
        all.insert(format!("{module}.{}", parts[1]), own_b);
    }
    let file = AdapterFile::new(dir.to_owned(), parsed.method, all).with(Replacements::default());
    let (base, base_class) = (parsed.base, parsed.base_class);
    Ok(AdapterFile { base, base_class, warnings: parsed.warnings, ..file })
}

/// All tensors of the file, whole numbers among them.
fn tensors<'a>(path: &'a Path, file: &TensorFile) -> Result<Read<'a>> {
    let mut read = Read { path, shared: BTreeMap::new(), modules: BTreeMap::new() };
    for (name, tensor) in file.tensors() {
        let value = match numbers(tensor) {
            Some(data) => HostTensor { shape: tensor.shape.clone(), data },
            None => host_tensor(path, name, tensor, None)?,
        };
        let below = name.strip_prefix(PREFIX);
        match below.and_then(|below| below.rsplit_once('.')) {
            Some((module, part)) => {
                read.modules.entry(canonical_path(module)).or_default().insert(part.to_owned(), value);
            }
            None => {
                read.shared.insert(name.to_owned(), value);
            }
        }
    }
    match read.modules.is_empty() {
        true => Err(Error::format(path, "tensors", "those of adapted modules", "none")),
        false => Ok(read),
    }
}

/// Places in a bank, in whichever type of whole numbers they are.
fn numbers(tensor: &Tensor) -> Option<Vec<f32>> {
    let bytes = &tensor.bytes[..];
    Some(match tensor.dtype {
        Dtype::U8 => bytes.iter().map(|b| f32::from(*b)).collect(),
        Dtype::I16 => bytes.as_chunks().0.iter().map(|b| f32::from(i16::from_le_bytes(*b))).collect(),
        Dtype::I32 => bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b) as f32).collect(),
        Dtype::I64 => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f32).collect(),
        _ => return None,
    })
}

type Pairs = BTreeMap<String, [HostTensor; 2]>;

fn from_bank(read: &Read<'_>, rank: usize, topk: usize) -> Result<Pairs> {
    let name = "base_model.vblora_vector_bank";
    let bank = read.shared.get(name).filter(|bank| bank.shape.len() == 2 && bank.shape[1] > 0);
    let bank = bank.ok_or_else(|| Error::format(read.path, format!("tensor `{name}`"), "a matrix", "none"))?;
    let [count, length] = [bank.shape[0], bank.shape[1]];
    let one = |module: &String| {
        // Vectors of the part, `[n, m]` of them.
        let vectors = |part: &str, of_rank: usize| -> Result<(usize, Vec<Vec<f32>>)> {
            let logits = read.modules[module].get(part);
            let whole = if logits.is_some() { part.to_owned() } else { format!("{part}_topk_indices") };
            let chosen = read.part(module, &whole, 3)?;
            let (shape, width) = (&chosen.shape, chosen.shape[2]);
            let expected = format!("`{whole}` of rank {rank}, with {topk} to choose of {count} vectors");
            if shape[of_rank] != rank || topk > count || width != if logits.is_some() { count } else { topk } {
                return Err(read.wrong(module, &expected, shape));
            }
            let shares: Vec<Vec<(usize, f32)>> = if logits.is_some() {
                chosen.data.chunks(width).map(|logits| largest(logits, topk)).collect()
            } else {
                let weights = read.part(module, &format!("{part}_topk_weights"), 3)?;
                if weights.shape != [shape[0], shape[1], topk - 1] {
                    return Err(read.wrong(module, "one share less than vectors", &weights.shape));
                }
                let share = |(at, chosen): (usize, &[f32])| -> Vec<(usize, f32)> {
                    let own = &weights.data[at * (topk - 1)..][..topk - 1];
                    let rest = 1.0 - own.iter().sum::<f32>();
                    chosen.iter().map(|i| *i as usize).zip(own.iter().copied().chain([rest])).collect()
                };
                chosen.data.chunks(width).enumerate().map(share).collect()
            };
            if let Some(beyond) = shares.iter().flatten().map(|(at, _)| *at).find(|at| *at >= count) {
                return Err(read.wrong(module, &format!("places below {count}"), &[beyond]));
            }
            let mix = |shares: &Vec<(usize, f32)>| -> Vec<f32> {
                let value = |x: usize| shares.iter().map(|(at, share)| share * bank.data[at * length + x]).sum();
                (0..length).map(value).collect()
            };
            Ok((shape[1 - of_rank], shares.iter().map(mix).collect()))
        };
        let (tiles, a) = vectors("vblora_logits_A", 0)?;
        let a = HostTensor { shape: vec![rank, tiles * length], data: a.concat() };
        let (tiles, pieces) = vectors("vblora_logits_B", 1)?;
        let value = |at: usize| pieces[at / rank / length * rank + at % rank][at / rank % length];
        let b = HostTensor { shape: vec![tiles * length, rank], data: (0..tiles * length * rank).map(value).collect() };
        Ok((module.clone(), [a, b]))
    };
    read.modules.keys().map(one).collect()
}

/// The places of the `topk` largest of `logits`, with their softmax.
fn largest(logits: &[f32], topk: usize) -> Vec<(usize, f32)> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    let chosen = &order[..topk];
    let above = |at: &usize| (logits[*at] - logits[chosen[0]]).exp();
    let sum: f32 = chosen.iter().map(above).sum();
    chosen.iter().map(|at| (*at, above(at) / sum)).collect()
}

fn tiny(read: &Read<'_>, rank: usize, tying: f64) -> Result<Pairs> {
    let mut modules = Vec::with_capacity(read.modules.len());
    for module in read.modules.keys() {
        let last = module.rsplit('.').next().unwrap_or_default();
        match (layer_of(module), ORDER.iter().position(|name| *name == last)) {
            (Some(layer), Some(at)) => modules.push(((layer, at), module)),
            _ => return Err(Error::unsupported(read.path, format!("TinyLoRA on `{module}`"), MERGE)),
        }
    }
    modules.sort();
    let groups = (modules.len() as f64 * (1.0 - tying)).round_ties_even().clamp(1.0, modules.len() as f64) as usize;
    let of_group = (modules.len() / groups).max(1);
    let one = |(i, (_, module)): (usize, ((usize, usize), &String))| {
        let name = format!("base_model.tinylora_v.{}", (i / of_group).min(groups - 1));
        let v = read.shared.get(&name);
        let v = v.ok_or_else(|| Error::format(read.path, format!("tensor `{name}`"), "it to be there", "none"))?;
        let a = read.part(module, "tinylora_A", 2)?;
        let (b, p) = (read.part(module, "tinylora_B", 2)?, read.part(module, "tinylora_P", 3)?);
        for (shape, fits) in [
            (&a.shape, a.shape[0] == rank),
            (&b.shape, b.shape[1] == rank),
            (&p.shape, p.shape == [v.data.len(), rank, rank]),
        ] {
            if !fits {
                return Err(read.wrong(module, &format!("matrices of rank {rank}, one for each of v"), shape));
            }
        }
        let sum = |at: usize| -> f32 { v.data.iter().enumerate().map(|(i, v)| v * p.data[i * rank * rank + at]).sum() };
        let mixed: Vec<f32> = (0..rank * rank).map(sum).collect();
        let input = a.shape[1];
        let value = |at: usize| -> f32 {
            let (k, x) = (at / input, at % input);
            (0..rank).map(|l| mixed[k * rank + l] * a.data[l * input + x]).sum()
        };
        let a = HostTensor { shape: a.shape.clone(), data: (0..rank * input).map(value).collect() };
        Ok((module.clone(), [a, b.clone()]))
    };
    modules.into_iter().enumerate().map(one).collect()
}
