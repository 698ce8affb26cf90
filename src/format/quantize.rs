//! Any checkpoint to a Hugging Face directory, its linear layers in bitsandbytes NF4 or all of it in one float type.
//!
//! Weights stream through in pieces of a few megabytes on all threads, so that memory stays small whatever the model.
//! The output is what transformers with bitsandbytes saves: same tensors, same config, same bytes.

use super::atomic::AtomicDir;
use super::bnb::{self, torch_name};
use super::hf_source::is_sidecar;
use super::pieces::{for_each_piece, narrow};
use super::plan::{Plan, Store, Weight};
use super::recipe::Recipe;
use super::safetensors::TensorFile;
use super::writer::Writer;
use super::{Source, atomic, plan};
use crate::error::{Error, ErrorCode, Result};
use pocketlora_kernels::quant::{BLOCK, NF4, double_quantize, dynamic_map, encode_blocks};
use serde_json::{Map, Value, json};
use std::fs::{self, File};
use std::io::{Seek, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

pub(crate) const MODEL: &str = "model.safetensors";
pub(crate) const CONFIG: &str = "config.json";
/// Version of what is written from the same source. Raise it whenever a conversion gives other weights, another config
/// or other texts than before, for GGUF files too: copies in people's caches are then made again.
#[cfg(feature = "hub")]
pub(crate) const CONVERSION: u32 = 4;
/// Key in the safetensors metadata by which an older output is known, and may be replaced.
const PRODUCER: &str = "producer";

/// What to do with an older output at the place of the new one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Existing {
    /// Refuse: a model is not replaced without a word.
    #[default]
    Keep,
    /// Replace it, when the new one is complete.
    Replace,
}

/// How far the work has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The weight being read.
    pub tensor: &'a str,
    /// Elements done so far.
    pub done: u64,
    /// Elements in all; those that must be looked at before the 16-bit type is known count twice.
    pub total: u64,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Weights in NF4.
    pub quantized: usize,
    /// Weights in a float type.
    pub dense: usize,
    /// Elements of all weights.
    pub elements: u64,
    /// Bytes of `model.safetensors`.
    pub bytes: u64,
    /// torch's name of the float type of dense weights, to which 4-bit ones are dequantized too.
    pub dtype: &'static str,
}

/// Counts elements and asks the caller whether to go on.
pub(super) struct Ticker<'a> {
    pub progress: &'a mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
    pub done: u64,
    pub total: u64,
}

impl Ticker<'_> {
    /// # Errors
    /// The caller stopped the work.
    pub fn advance(&mut self, tensor: &str, elements: u64) -> Result<()> {
        self.done += elements;
        match (self.progress)(Progress { tensor, done: self.done, total: self.total }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => {
                Err(Error::new(ErrorCode::Cancelled, format!("tensor `{tensor}`"), "stopped as asked; nothing is kept"))
            }
        }
    }
}

/// Writes `source` as a Hugging Face directory at `out`, which appears when it is complete. `progress` is called every
/// few million elements and stops the work by returning `Break`.
///
/// # Errors
/// `out` is the source, holds something, unless it is an older output that `existing` gives away, a weight is malformed
/// or not finite, or 4-bit already and to be so again, the disk refuses, or the caller stops. Nothing is left behind then,
/// and what was there stays.
pub fn quantize(
    source: &dyn Source,
    out: &Path,
    recipe: impl Into<Recipe>,
    existing: Existing,
    progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Result<Summary> {
    let recipe = recipe.into();
    let refused = |e| of_source(e, source);
    plan::refuse_four_bit(source, &recipe).map_err(refused)?;
    convert(source, out, &recipe, existing, progress)
}

/// As [`quantize`], but weights of the source that are in NF4 already stay as they are.
///
/// # Errors
/// As there, but for those.
pub(crate) fn convert(
    source: &dyn Source,
    out: &Path,
    recipe: &Recipe,
    existing: Existing,
    progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Result<Summary> {
    check_apart(source, out)?;
    check_vacant(out, existing)?;
    let dir = AtomicDir::create(out, if existing == Existing::Replace { is_ours } else { |_| false })?;
    let mut ticker = Ticker { progress, done: 0, total: 0 };
    let named = |e: Error| if e.code() == ErrorCode::Format { of_source(e, source) } else { e };
    let plan = Plan::new(source, recipe, &mut ticker).map_err(named)?;

    let path = out.join(MODEL);
    let file = File::create_new(dir.path().join(MODEL)).map_err(|e| Error::io("create", &path, e))?;
    let bytes = write_weights(source, &plan, &path, file, &mut ticker).map_err(named)?;
    let mut config = serde_json::to_string_pretty(&config(source.config(), &plan)).unwrap_or_default();
    config.push('\n');
    atomic::write_file(&dir.path().join(CONFIG), |file| {
        file.write_all(config.as_bytes()).map_err(|e| Error::io("write", &out.join(CONFIG), e))
    })?;
    write_sidecars(source, dir.path())?;
    dir.commit()?;

    let quantized = plan.weights.iter().filter(|w| w.is_four_bit()).count();
    let elements = plan.weights.iter().map(Weight::elements).sum();
    let dense = plan.weights.len() - quantized;
    Ok(Summary { quantized, dense, elements, bytes, dtype: torch_name(plan.float) })
}

/// `e`, which is about a weight of `source`, with where that lies.
fn of_source(e: Error, source: &dyn Source) -> Error {
    let mut files = source.files();
    files.retain(|file| !file.ends_with(CONFIG));
    let place = match &files[..] {
        [] => return e,
        [one] => one.clone(),
        [first, ..] => super::place::folder_of(first),
    };
    let shown = format!("`{}`", place.display());
    if e.to_string().contains(&shown) { e } else { e.at(shown) }
}

/// Writes what travels with the weights of `source` into the folder `dir`.
///
/// # Errors
/// The source's are broken, or the disk refuses.
pub(crate) fn write_sidecars(source: &dyn Source, dir: &Path) -> Result<()> {
    for (name, content) in source.sidecars()?.files {
        let path = dir.join(name);
        let folder = path.parent().unwrap_or(dir);
        crate::format::create_folder(folder)?;
        fs::write(&path, content).map_err(|e| Error::io("write", &path, e))?;
    }
    Ok(())
}

/// Refuses an output that would take away what it is made from, or mix with it.
fn check_apart(source: &dyn Source, out: &Path) -> Result<()> {
    let place = real(out);
    let refused = |what: &str| {
        let message = format!("expected a folder apart from the source, got {what}; write to a folder beside it");
        Err(Error::new(ErrorCode::Config, format!("`{}`", out.display()), message))
    };
    for file in source.files() {
        if real(&file).starts_with(&place) {
            return refused(&format!("one that holds `{}`", file.display()));
        }
        let folder = file.parent().filter(|_| file.ends_with(CONFIG)).map(real);
        match folder {
            Some(folder) if folder.starts_with(&place) => return refused("the source itself or what it lies in"),
            Some(folder) if place.starts_with(&folder) => return refused("a folder inside the source"),
            _ => {}
        }
    }
    Ok(())
}

/// `path` with all links followed, as far as it exists.
fn real(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for existing in absolute.ancestors() {
        if let Ok(found) = existing.canonicalize() {
            return absolute.strip_prefix(existing).map_or(found.clone(), |rest| found.join(rest));
        }
    }
    absolute
}

/// Refuses a place where something is that may not be replaced.
fn check_vacant(out: &Path, existing: Existing) -> Result<()> {
    let refused = |message: String| Err(Error::new(ErrorCode::Config, format!("`{}`", out.display()), message));
    let vacant = !out.exists() || fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
    if vacant || existing == Existing::Replace && is_ours(out) {
        Ok(())
    } else if is_ours(out) {
        refused("holds a model already; name another folder or replace it with `Existing::Replace`".to_owned())
    } else if !out.is_dir() {
        refused("expected a folder to write to, got a file; name another one".to_owned())
    } else {
        let what = foreign(out, "").map_or_else(|| "a model".to_owned(), |name| format!("`{name}`"));
        refused(format!(
            "holds {what} that this program did not write there, and that it will not take away; name another folder"
        ))
    }
}

/// Whether `dir` holds an output of [`quantize`] and nothing else, so that replacing it loses nothing.
fn is_ours(dir: &Path) -> bool {
    dir.is_dir()
        && foreign(dir, "").is_none()
        && TensorFile::open(&dir.join(MODEL)).is_ok_and(|file| file.metadata().contains_key(PRODUCER))
}

/// The name of something in `dir`, or in a folder in it, that [`quantize`] does not write; `prefix` is the folder's own
/// name with a slash, and empty outside.
fn foreign(dir: &Path, prefix: &str) -> Option<String> {
    let unknown = |entry: fs::DirEntry| {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && prefix.is_empty() => foreign(&entry.path(), &format!("{name}/")),
            Ok(kind) if !kind.is_dir() && (name == MODEL || name == CONFIG || is_sidecar(&name)) => None,
            _ => Some(name),
        }
    };
    fs::read_dir(dir).into_iter().flatten().flatten().find_map(unknown)
}

/// Writes the safetensors file that `plan` describes to `sink`; `path` is for messages. Returns its length.
fn write_weights(
    source: &dyn Source,
    plan: &Plan,
    path: &Path,
    sink: impl Write + Seek,
    ticker: &mut Ticker<'_>,
) -> Result<u64> {
    let refused = |e| Error::io("write", path, e);
    let metadata = json!({"format": "pt", PRODUCER: concat!("pocketlora ", env!("CARGO_PKG_VERSION"))});
    let mut writer = Writer::new(sink, metadata, plan.entries(), plan.quant_states());
    let mut states = Vec::new();
    for weight in &plan.weights {
        match &weight.store {
            &Store::Float(float) => {
                let mut at = 0;
                let convert = |start, values: &[f32]| narrow(float, values, weight, start);
                for_each_piece(source, weight, convert, ticker, |bytes| {
                    writer.write(&weight.name, at, &bytes).map_err(refused)?;
                    at += bytes.len() as u64;
                    Ok(())
                })?;
            }
            Store::Nf4 => {
                let absmax = write_packed(source, weight, path, &mut writer, ticker)?;
                let state = write_scales(weight, plan, &absmax, &mut writer).map_err(refused)?;
                states.push((weight.companion(".quant_state.bitsandbytes__nf4"), state));
            }
            Store::Kept(tensors) => {
                for (ending, tensor) in tensors {
                    writer.write(&weight.companion(ending), 0, &tensor.bytes).map_err(refused)?;
                }
                ticker.advance(&weight.name, weight.elements())?;
            }
        }
    }
    // Last because their length depends on how many digits the offset has.
    for (name, state) in states {
        writer.append(name, state.as_bytes()).map_err(refused)?;
    }
    writer.finish().map_err(refused)
}

/// Encodes and writes the nibbles of `weight`; returns its block scales.
fn write_packed<W: Write + Seek>(
    source: &dyn Source,
    weight: &Weight,
    path: &Path,
    writer: &mut Writer<W>,
    ticker: &mut Ticker<'_>,
) -> Result<Vec<f32>> {
    let encode = |start: u64, values: &[f32]| {
        let (mut packed, mut absmax) = (vec![0; values.len().div_ceil(2)], vec![0.0; values.len().div_ceil(BLOCK)]);
        match encode_blocks(values, &mut packed, &mut absmax) {
            Ok(()) => Ok((packed, absmax)),
            Err(e) => Err(weight.bad_value(start + e.index as u64, e.value, "a finite weight")),
        }
    };
    let (mut at, mut scales) = (0, Vec::new());
    for_each_piece(source, weight, encode, ticker, |(packed, absmax)| {
        writer.write(&weight.name, at, &packed).map_err(|e| Error::io("write", path, e))?;
        at += packed.len() as u64;
        scales.extend(absmax);
        Ok(())
    })?;
    Ok(scales)
}

/// Double-quantizes `absmax` and writes the companions of `weight`; returns the quant_state to append.
fn write_scales<W: Write + Seek>(
    weight: &Weight,
    plan: &Plan,
    absmax: &[f32],
    writer: &mut Writer<W>,
) -> std::io::Result<String> {
    let double = double_quantize(absmax);
    writer.write(&weight.companion(".absmax"), 0, &double.codes)?;
    let floats = [(".nested_absmax", &double.nested[..]), (".nested_quant_map", &dynamic_map()), (".quant_map", &NF4)];
    for (ending, values) in floats {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.write(&weight.companion(ending), 0, &bytes)?;
    }
    Ok(bnb::quant_state(weight.rows, weight.cols, plan.float, double.offset))
}

/// The source's config with the new types, keys sorted as transformers sorts them.
fn config(source: &Map<String, Value>, plan: &Plan) -> Value {
    let mut config = source.clone();
    config.shift_remove("quantization_config");
    // transformers 5 reads the first, older ones the second.
    for key in ["dtype", "torch_dtype"] {
        config.insert(key.to_owned(), torch_name(plan.float).into());
    }
    if plan.weights.iter().any(Weight::is_four_bit) {
        // Where a list is there, transformers asks of nothing else whether a layer is 4-bit: the head is in it, too.
        let skipped = match &plan.skipped[..] {
            [] => Value::Null,
            modules => std::iter::once("lm_head").chain(modules.iter().map(String::as_str)).collect(),
        };
        let quantization = json!({
            "_load_in_4bit": true,
            "_load_in_8bit": false,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": true,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": skipped,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "quant_method": "bitsandbytes",
        });
        config.insert("quantization_config".to_owned(), quantization);
    }
    config.sort_keys();
    Value::Object(config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{HfSource, Target};
    use std::io::{self, Cursor, SeekFrom};

    /// A disk that is full after some bytes.
    struct Full(Cursor<Vec<u8>>, u64);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.0.position() + bytes.len() as u64 > self.1 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.0.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Seek for Full {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.0.seek(to)
        }
    }

    #[test]
    fn a_full_disk_is_an_error_wherever_it_strikes() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles/tiny-mistral");
        let source = HfSource::open(&model).unwrap();
        let write = |room| {
            let mut go_on = |_: Progress<'_>| ControlFlow::Continue(());
            let mut ticker = Ticker { progress: &mut go_on, done: 0, total: 0 };
            let plan = Plan::new(&source, &Target::Nf4.into(), &mut ticker).unwrap();
            write_weights(&source, &plan, Path::new("x"), Full(Cursor::default(), room), &mut ticker)
        };
        let whole = write(u64::MAX).unwrap();
        for room in (0..whole).step_by(4999).chain([whole - 1]) {
            let error = write(room).expect_err(&format!("a disk of {room} bytes"));
            assert_eq!(error.code(), ErrorCode::Io);
        }
        assert_eq!(write(whole).unwrap(), whole);
    }
}
