//! mlx-lm's adapters: a folder with `adapters.safetensors` of `MODULE.lora_a` `[in, r]` and `.lora_b` `[r, out]`, both
//! transposed beside PEFT's, and `adapter_config.json` with one rank and one scale for all layers. It counts the decoder
//! layers that are adapted from the last one, and makes terms of zeros where the file has none.

use super::{Plain, bad_pair, lora_of, most_frequent};
use crate::adapter::peft::canonical_path;
use crate::adapter::{AdapterFile, HostTensor, Method, Tensors};
use crate::error::{Error, ErrorCode, Result};
use crate::format::atomic::AtomicDir;
use crate::format::foreign::read_object;
use crate::format::safetensors::{Dtype, TensorFile};
use crate::format::{Entry, Writer, widen};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::Path;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapters.safetensors";
/// Our own key in the metadata: the mark of the base.
const MARK: &str = "pocketlora.base";

/// Whether `dir` is an adapter of mlx-lm.
pub(in crate::adapter) fn is_adapter(dir: &Path) -> bool {
    dir.join(WEIGHTS).is_file() && dir.join(CONFIG).is_file() && !dir.join("adapter_model.safetensors").exists()
}

/// Reads the adapter in the folder `dir`.
///
/// # Errors
/// A file is broken, or the adapter is no plain LoRA.
pub(in crate::adapter) fn open(dir: &Path) -> Result<AdapterFile> {
    let (config_path, path) = (dir.join(CONFIG), dir.join(WEIGHTS));
    let config = read_object(&config_path)?;
    let next = "fuse it into its base with `mlx_lm.fuse`, and use the result as the model";
    match config.get("fine_tune_type").map_or(Some("lora"), Value::as_str) {
        Some("lora") => {}
        other => {
            let what = format!("an adapter of mlx with `fine_tune_type: {}`", other.unwrap_or("not a text"));
            return Err(Error::unsupported(&config_path, what, next));
        }
    }
    let bad = |key: &str, expected: &str, got: Option<&Value>| {
        let got = got.map_or_else(|| "nothing".to_owned(), |v| format!("`{v}`"));
        Error::format(&config_path, format!("key `{key}`"), expected, got)
    };
    let parameters = config.get("lora_parameters");
    let object = parameters.and_then(Value::as_object);
    let object = object.ok_or_else(|| bad("lora_parameters", "an object with `rank` and `scale`", parameters))?;
    let scale = object.get("scale").and_then(Value::as_f64).filter(|scale| scale.is_finite());
    let scale = scale.ok_or_else(|| bad("lora_parameters.scale", "a finite number", object.get("scale")))?;
    let dropout = object.get("dropout").map_or(Some(0.0), Value::as_f64).filter(|p| (0.0..1.0).contains(p));
    let dropout =
        dropout.ok_or_else(|| bad("lora_parameters.dropout", "a share from 0 to below 1", object.get("dropout")))?;

    let file = TensorFile::open(&path)?;
    let mut halves: BTreeMap<String, [Option<HostTensor>; 2]> = BTreeMap::new();
    for (name, tensor) in file.tensors() {
        let item = || format!("tensor `{name}`");
        let (module, which) = match name.rsplit_once('.') {
            Some((module, "lora_a")) => (module, 0),
            Some((module, "lora_b")) => (module, 1),
            _ => return Err(Error::unsupported(&path, format!("{}, which is no part of a LoRA,", item()), next)),
        };
        let float = tensor.float_type();
        let (Some(float), &[rows, cols]) = (float, &tensor.shape[..]) else {
            let what = format!("{} of {}", item(), tensor.describe());
            return Err(Error::unsupported(&path, what, "LoRA on linear layers has matrices of F32, F16 or BF16"));
        };
        let mut stored = vec![0.0; rows * cols];
        widen(float, &tensor.bytes, &mut stored);
        if let Some(at) = stored.iter().position(|v| !v.is_finite()) {
            return Err(Error::format(&path, format!("{} value {at}", item()), "a finite number", stored[at]));
        }
        let half = HostTensor { shape: vec![cols, rows], data: transposed(&stored, rows, cols) };
        if halves.entry(canonical_path(module)).or_default()[which].replace(half).is_some() {
            return Err(Error::format(&path, item(), "one of that name", "two once wrappers' names are left out"));
        }
    }
    let (mut modules, mut tensors) = (Vec::new(), Tensors::new());
    for (module, pair) in halves {
        let (a, b) = match pair {
            [Some(a), Some(b)] if a.shape[0] == b.shape[1] => (a, b),
            [Some(a), Some(b)] => return Err(bad_pair(&path, &module, format!("{:?} and {:?}", a.shape, b.shape))),
            _ => return Err(bad_pair(&path, &module, "one".to_owned())),
        };
        modules.push((module.clone(), a.shape[0], scale * a.shape[0] as f64));
        tensors.insert(format!("{module}.lora_A.weight"), a);
        tensors.insert(format!("{module}.lora_B.weight"), b);
    }
    let mut adapter = lora_of(dir, &modules, tensors)?;
    if let Method::Lora(lora) = &mut adapter.method {
        lora.dropout = dropout;
    }
    adapter.base = config.get("model").and_then(Value::as_str).map(str::to_owned);
    adapter.base_mark = file.metadata().get(MARK).cloned();
    Ok(adapter)
}

/// `[cols, rows]` of `values` `[rows, cols]`.
fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|col| (0..rows).map(move |row| values[row * cols + col])).collect()
}

/// Writes `plain` to the folder `out`.
pub(super) fn write(plain: &Plain<'_>, out: &Path) -> Result<()> {
    let layers = plain.layers();
    let rank = layers.iter().map(|layer| layer.rank).max().unwrap_or(1);
    let scales: Vec<f32> = layers.iter().map(|layer| layer.factor).collect();
    let scale = most_frequent(&scales).filter(|scale| *scale != 0.0).unwrap_or(1.0);
    // Where a layer lies in the decoder, and what it is called there.
    let place = |module: &str| -> Option<(usize, String)> {
        let (layer, rest) = module.strip_prefix("model.layers.")?.split_once('.')?;
        Some((layer.parse().ok()?, rest.to_owned()))
    };
    let places = layers.iter().map(|layer| place(layer.module));
    let keys: BTreeSet<String> =
        layers.iter().zip(places.clone()).map(|(l, p)| p.map_or(l.module.to_owned(), |p| p.1)).collect();
    let first = places.flatten().map(|(layer, _)| layer).min();
    let all = plain.model.config().layers;
    let Method::Lora(lora) = &plain.file.method else { unreachable!("a plain adapter is LoRA") };
    let config = json!({
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": lora.dropout, "keys": keys, "rank": rank, "scale": scale},
        "model": plain.file.base,
        // Without adapted layers none is asked for; mlx takes 0 for all of them, and the file has nothing for those.
        "num_layers": first.map_or(0, |first| all - first),
    });

    let vacant = !out.exists() || fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
    if !vacant {
        let message = "expected a new or an empty folder, got one that holds something; name another one";
        return Err(Error::new(ErrorCode::Config, format!("`{}`", out.display()), message));
    }
    let folder = AtomicDir::create(out, |_| false)?;
    let path = folder.path().join(WEIGHTS);
    let failed = |e| Error::io("write", &path, e);
    let sink = BufWriter::new(File::create_new(&path).map_err(failed)?);
    let entry = |name: String, shape: [usize; 2]| Entry { name, dtype: Dtype::F32, shape: shape.to_vec() };
    let entries = layers.iter().flat_map(|layer| {
        let (input, out) = (layer.a.shape[1], layer.b.shape[0]);
        [
            entry(format!("{}.lora_a", layer.module), [input, rank]),
            entry(format!("{}.lora_b", layer.module), [rank, out]),
        ]
    });
    let metadata = match &plain.file.base_mark {
        Some(mark) => json!({ "format": "mlx", MARK: mark }),
        None => json!({ "format": "mlx" }),
    };
    let mut writer = Writer::new(sink, metadata, entries.collect(), Vec::new());
    for layer in &layers {
        let (input, out) = (layer.a.shape[1], layer.b.shape[0]);
        // A smaller rank is a larger one with zeros.
        let mut a = vec![0.0; input * rank];
        for (row, values) in layer.a.data.chunks_exact(input).enumerate() {
            values.iter().enumerate().for_each(|(col, v)| a[col * rank + row] = *v);
        }
        let mut b = vec![0.0; rank * out];
        let ratio = if layer.factor == scale { 1.0 } else { layer.factor / scale };
        for (row, values) in layer.b.data.chunks_exact(layer.rank).enumerate() {
            values.iter().enumerate().for_each(|(col, v)| b[col * out + row] = *v * ratio);
        }
        for (part, values) in [("lora_a", a), ("lora_b", b)] {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            writer.write(&format!("{}.{part}", layer.module), 0, &bytes).map_err(failed)?;
        }
    }
    writer.finish().map_err(failed)?;
    let mut text = serde_json::to_vec_pretty(&config).expect("a JSON value serializes");
    text.push(b'\n');
    let path = folder.path().join(CONFIG);
    fs::write(&path, text).map_err(|e| Error::io("write", &path, e))?;
    folder.commit()
}
