//! PEFT adapter directories: `adapter_config.json` and `adapter_model.safetensors` (PEFT `save_and_load.py`).

use crate::error::{Error, ErrorCode, Result};
use crate::format::safetensors::{TensorFile, float_type};
use crate::format::widen;
use crate::format::{Entry, Staged, Writer, sweep, sync_dir};
use crate::mmap;
use half::f16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before the base model's module paths.
const PREFIX: &str = "base_model.model.";
/// Bound on ranks: far beyond any use, and small enough that hostile files cannot ask for absurd work.
const MAX_RANK: usize = 1 << 16;
/// Initializations that changed the base weights, so that the adapter is wrong on the original base.
const BASE_CHANGING: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga"];
/// Switches for variants of LoRA whose forward pass differs.
const VARIANTS: &[&str] = &["use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out"];

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
fn halves(values: &[f32], name: &str) -> Result<Vec<f16>> {
    let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
    match halves.iter().position(|v| !v.is_finite()) {
        None => Ok(halves),
        Some(at) => {
            let message = format!("value {at} is `{}`, which f16 cannot hold; lower the learning rate", values[at]);
            Err(Error::new(ErrorCode::Diverged, format!("tensor `{name}`"), message))
        }
    }
}

/// The parts of `adapter_config.json` that matter to plain LoRA and rsLoRA.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank (`r`).
    pub rank: usize,
    /// `lora_alpha`.
    pub alpha: f64,
    /// The scale is `alpha / sqrt(r)` instead of `alpha / r`.
    pub rslora: bool,
    /// Dropout of the input in training.
    pub dropout: f64,
    /// Exceptions to the rank: regular expressions for the end of a module's path, as PEFT has them.
    pub rank_pattern: Vec<(String, f64)>,
    /// Exceptions to alpha.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
    /// The base model's name or path, as a hint for people.
    pub base: Option<String>,
}

impl LoraConfig {
    /// A plain LoRA of one rank and alpha, without dropout, exceptions or names.
    #[must_use]
    pub fn new(rank: usize, alpha: f64) -> Self {
        Self {
            rank,
            alpha,
            rslora: false,
            dropout: 0.0,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            targets: Vec::new(),
            base: None,
        }
    }

    /// Factor on `B A`, for a layer whose rank and alpha are given.
    fn scale(rslora: bool, rank: usize, alpha: f64) -> f32 {
        let divisor = if rslora { (rank as f64).sqrt() } else { rank as f64 };
        (alpha / divisor) as f32
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
        Self { path, a, b, scale: LoraConfig::scale(config.rslora, config.rank, config.alpha) }
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

/// A PEFT adapter directory in memory.
#[derive(Clone, Debug)]
pub struct AdapterFile {
    /// Where it came from.
    pub dir: PathBuf,
    /// Its settings.
    pub config: LoraConfig,
    /// Its matrices, by module.
    pub modules: Vec<LoraModule>,
}

impl AdapterFile {
    /// Reads a PEFT directory.
    ///
    /// # Errors
    /// A file is missing, broken or contradicts the other, or the adapter's method is not LoRA or rsLoRA.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let text = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        let json: Map<String, Value> = serde_json::from_slice(&text)
            .map_err(|e| Error::format(&path, "file", "a JSON object", "something else").caused_by(e))?;
        let mut config = parse_config(&path, &json)?;
        let modules = read_modules(&dir.join(WEIGHTS), &config)?;
        if !lists_suffixes(&json) {
            config.targets = modules.iter().map(|m| m.path.clone()).collect();
        }
        Ok(Self { dir: dir.to_owned(), config, modules })
    }

    /// Whether `dir` holds an adapter: the config is what appears last.
    #[must_use]
    pub fn exists(dir: &Path) -> bool {
        dir.join(CONFIG).exists()
    }

    /// Takes away what killed writers have left half-written in `dir`.
    pub(crate) fn sweep(dir: &Path) {
        [CONFIG, WEIGHTS].iter().for_each(|name| sweep(&dir.join(name)));
    }

    /// Writes the directory's two files, the matrices in f16. Both are on the disk before either gets its name. A kill at
    /// any moment leaves the old adapter, the new one, or none where its config differs from the old one's: then the old
    /// config goes first, so that no adapter of two halves is ever there.
    ///
    /// # Errors
    /// A value is not finite in f16, or the files cannot be written.
    pub fn save(&self) -> Result<()> {
        let name = |m: &LoraModule, part: &str| format!("{}.{part}.weight", m.path);
        let pair = |m| [(name(m, "lora_A"), &m.a), (name(m, "lora_B"), &m.b)];
        let tensors = || self.modules.iter().flat_map(pair);
        let shapes = tensors().map(|(name, t)| (name, t.shape)).collect();
        Self::save_by(&self.dir, &self.config, shapes, |put| tensors().try_for_each(|(name, t)| put(&name, &t.data)))
    }

    /// As [`AdapterFile::save`], with tensors of `shapes` (module path, `.lora_A.weight` or `.lora_B.weight`) that `fill`
    /// hands over one at a time, in any order: no more than one of them is held in f16.
    ///
    /// # Errors
    /// As there, and those of `fill`.
    pub(crate) fn save_by(
        dir: &Path,
        config: &LoraConfig,
        shapes: Vec<(String, [usize; 2])>,
        fill: impl FnOnce(&mut dyn FnMut(&str, &[f32]) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let path = dir.join(WEIGHTS);
        let weights = Staged::write(&path, |file| {
            let failed = |e| Error::io("write", &path, e);
            let entry = |(name, shape): (String, [usize; 2])| Entry {
                name: format!("{PREFIX}{name}"),
                dtype: Dtype::F16,
                shape: shape.to_vec(),
            };
            let entries = shapes.into_iter().map(entry).collect();
            let mut writer = Writer::new(BufWriter::new(file), json!({ "format": "pt" }), entries, Vec::new());
            fill(&mut |name, values| {
                let raw: Vec<u8> = halves(values, name)?.iter().flat_map(|v| v.to_le_bytes()).collect();
                writer.write(&format!("{PREFIX}{name}"), 0, &raw).map_err(failed)
            })?;
            writer.finish().map(|_| ()).map_err(failed)
        })?;
        let mut text = serde_json::to_vec_pretty(&config_json(config)).expect("a JSON value serializes");
        text.push(b'\n');
        Self::commit(dir, weights, &text)
    }

    /// Writes the adapter in the folder `from` to the folder `to` as [`AdapterFile::save`] would, without holding it.
    ///
    /// # Errors
    /// A file of `from` is missing or no safetensors file, or the files cannot be written.
    pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
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

/// `adapter_config.json`, keys sorted as PEFT writes them.
fn config_json(c: &LoraConfig) -> Value {
    let object = |patterns: &[(String, f64)]| -> Value {
        patterns.iter().map(|(key, v)| (key.clone(), number(*v))).collect::<Map<_, _>>().into()
    };
    json!({
        "alpha_pattern": object(&c.alpha_pattern),
        "auto_mapping": null,
        "base_model_name_or_path": c.base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": c.alpha,
        "lora_dropout": c.dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": c.rank,
        "rank_pattern": object(&c.rank_pattern),
        "revision": null,
        "target_modules": c.targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": c.rslora,
    })
}

/// A whole number as such: PEFT takes ranks for sizes.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value < 1e15 { json!(value as u64) } else { json!(value) }
}

/// The value of the first pattern that matches `module`: PEFT reads keys as regular expressions for the end of a path.
fn pattern_for(path: &Path, patterns: &[(String, f64)], module: &str) -> Result<Option<f64>> {
    for (key, value) in patterns {
        let regex = fancy_regex::Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"))
            .map_err(|e| Error::format(path, format!("pattern `{key}`"), "a regular expression", &e))?;
        if regex.is_match(module).unwrap_or(false) {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

fn parse_config(path: &Path, json: &Map<String, Value>) -> Result<LoraConfig> {
    let get = |key: &str| json.get(key).filter(|v| !v.is_null());
    let wrong = |key: &str, expected: &str| {
        let got = get(key).map_or_else(|| "nothing".to_owned(), |v| format!("`{v}`"));
        Error::format(path, format!("key `{key}`"), expected, got)
    };
    let next = "export it as plain LoRA, or merge it into its base";
    match get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        Some(other) => return Err(Error::unsupported(path, format!("adapter method `{other}`"), next)),
        None => return Err(wrong("peft_type", "the name of an adapter method")),
    }
    for key in VARIANTS {
        if get(key).is_some_and(|v| v.as_bool() != Some(false)) {
            return Err(Error::unsupported(path, format!("`{key}`"), next));
        }
    }
    if get("bias").is_some_and(|v| v.as_str() != Some("none")) {
        return Err(Error::unsupported(path, "a `bias` other than `none`", next));
    }
    for key in ["modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"] {
        if get(key).is_some_and(|v| v.as_array().is_none_or(|a| !a.is_empty())) {
            return Err(Error::unsupported(path, format!("`{key}`"), next));
        }
    }
    if let Some(init) = get("init_lora_weights").and_then(Value::as_str)
        && BASE_CHANGING.iter().any(|b| init.starts_with(b))
    {
        let what = format!("`init_lora_weights: {init}`, which also changed the base weights,");
        return Err(Error::unsupported(path, what, "save it with PEFT's conversion to plain LoRA"));
    }
    let rank = get("r").and_then(Value::as_u64).and_then(|r| usize::try_from(r).ok());
    let rank = rank.filter(|r| (1..=MAX_RANK).contains(r)).ok_or_else(|| wrong("r", "a rank from 1 to 65536"))?;
    let finite = |key: &str, default: Option<f64>| match get(key) {
        None => default.ok_or_else(|| wrong(key, "a number")),
        Some(v) => v.as_f64().filter(|n| n.is_finite()).ok_or_else(|| wrong(key, "a finite number")),
    };
    let patterns = |key: &str| -> Result<Vec<(String, f64)>> {
        let Some(value) = get(key) else { return Ok(Vec::new()) };
        let map = value.as_object().ok_or_else(|| wrong(key, "an object of numbers"))?;
        let number = |v: &Value| v.as_f64().filter(|n| n.is_finite() && *n > 0.0);
        map.iter()
            .map(|(k, v)| Ok((k.clone(), number(v).ok_or_else(|| wrong(key, "an object of positive numbers"))?)))
            .collect()
    };
    let targets = match get("target_modules") {
        Some(Value::Array(list)) => list.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect(),
        Some(Value::String(one)) => vec![one.clone()],
        _ => Vec::new(),
    };
    Ok(LoraConfig {
        rank,
        alpha: finite("lora_alpha", None)?,
        rslora: get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
        dropout: finite("lora_dropout", Some(0.0))?,
        rank_pattern: patterns("rank_pattern")?,
        alpha_pattern: patterns("alpha_pattern")?,
        targets,
        base: get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned),
    })
}

/// Whether a list of suffixes says all about which modules are adapted. Where an expression or an exception has a part in
/// it, full paths say the same.
fn lists_suffixes(json: &Map<String, Value>) -> bool {
    let given = |key: &str| json.get(key).is_some_and(|v| !v.is_null() && v.as_array().is_none_or(|a| !a.is_empty()));
    json.get("target_modules").is_some_and(Value::is_array)
        && !["layers_to_transform", "layers_pattern", "exclude_modules"].into_iter().any(given)
}

fn read_modules(path: &Path, config: &LoraConfig) -> Result<Vec<LoraModule>> {
    let bytes = mmap::map(path)?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| Error::format(path, "header", "a complete safetensors file", &e).caused_by(e))?;
    let mut halves: BTreeMap<String, [Option<HostTensor>; 2]> = BTreeMap::new();
    for (name, view) in file.tensors() {
        let stem = name.strip_prefix(PREFIX).unwrap_or(&name);
        let (module, half) = match (stem.strip_suffix(".lora_A.weight"), stem.strip_suffix(".lora_B.weight")) {
            (Some(module), _) => (module, 0),
            (_, Some(module)) => (module, 1),
            _ => {
                let next = "export the adapter as plain LoRA on linear layers";
                return Err(Error::unsupported(path, format!("tensor `{name}`"), next));
            }
        };
        halves.entry(module.to_owned()).or_default()[half] = Some(host_tensor(path, &name, &view)?);
    }
    if halves.is_empty() {
        return Err(Error::format(path, "tensors", "LoRA matrices", "none"));
    }
    halves.into_iter().map(|(module, [a, b])| pair(path, config, module, a, b)).collect()
}

/// Joins the two halves of a module and checks them against the config.
fn pair(
    path: &Path,
    config: &LoraConfig,
    module: String,
    a: Option<HostTensor>,
    b: Option<HostTensor>,
) -> Result<LoraModule> {
    let missing = |half| Error::format(path, format!("module `{module}`"), format!("`{half}.weight`"), "none");
    let a = a.ok_or_else(|| missing("lora_A"))?;
    let b = b.ok_or_else(|| missing("lora_B"))?;
    let rank = pattern_for(path, &config.rank_pattern, &module)?.map_or(config.rank, |r| r as usize);
    if a.shape[0] != rank || b.shape[1] != rank {
        let got = format!("A `{:?}` and B `{:?}`", a.shape, b.shape);
        return Err(Error::format(path, format!("module `{module}`"), format!("rank {rank} from {CONFIG}"), got));
    }
    let alpha = pattern_for(path, &config.alpha_pattern, &module)?.unwrap_or(config.alpha);
    Ok(LoraModule { path: module, a, b, scale: LoraConfig::scale(config.rslora, rank, alpha) })
}

/// Widens a float matrix to f32 and refuses values that would poison every result.
fn host_tensor(path: &Path, name: &str, view: &TensorView<'_>) -> Result<HostTensor> {
    let item = || format!("tensor `{name}`");
    let &[rows, cols] = view.shape() else {
        return Err(Error::format(path, item(), "two dimensions", format!("`{:?}`", view.shape())));
    };
    let float = float_type(view.dtype())
        .ok_or_else(|| Error::format(path, item(), "F32, F16 or BF16", format!("{:?}", view.dtype())))?;
    let mut data = vec![0.0; rows * cols];
    widen(float, view.data(), &mut data);
    if let Some(at) = data.iter().position(|v| !v.is_finite()) {
        return Err(Error::format(path, format!("{} value {at}", item()), "a finite number", data[at]));
    }
    Ok(HostTensor { shape: [rows, cols], data })
}
