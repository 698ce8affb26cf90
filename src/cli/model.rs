//! From what people type as MODEL to a directory that can be mapped.

use super::{interrupt, progress, pull};
use crate::check_import;
use crate::error::{Error, ErrorCode, Result};
use crate::format::foreign::no_tokenizer;
use crate::format::{Checkpoint, Progress, Source, Target, is_gguf, model_of, open_source, quantize};
use crate::hub;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// The model that commands use where none is named.
pub(super) const DEFAULT: &str = "smollm2-135m";

/// The directory of a model given as directory, file or cached name, or the `.safetensors` file that is one. With
/// `quantize`, a model that is not in NF4 is quantized into the cache at first use.
pub(super) fn resolve(model: &str, quantize: bool) -> Result<PathBuf> {
    let path = model_of(&locate(model)?);
    if !is_gguf(&path) && (!quantize || Checkpoint::open(&path)?.is_four_bit()) {
        return Ok(path);
    }
    if !quantize {
        let message = "expected a Hugging Face directory with `--no-quantize`, got a GGUF file; convert it with \
                       `pocketlora quantize --to f16` first";
        return Err(Error::new(ErrorCode::Config, format!("`{}`", path.display()), message));
    }
    let out = cache_dir(&path)?;
    if !out.join("config.json").exists() {
        convert(&path, &out, Target::Nf4)?;
    }
    Ok(out)
}

/// A path as it is, or a cached model's; a name with a manifest is pulled at first use.
pub(super) fn locate(model: &str) -> Result<PathBuf> {
    let path = PathBuf::from(model);
    if path.exists() {
        return Ok(path);
    }
    if let Some(path) = hub::resolve(model) {
        return Ok(path);
    }
    if hub::manifests()?.iter().any(|m| m.name == model) {
        return pull::fetch(model);
    }
    if looks_like_a_path(model) {
        let message = "expected a model's folder or file, got a path where nothing is; check it, or give the name of a cached \
                       model, as `pocketlora pull --list` shows them";
        return Err(Error::new(ErrorCode::Io, format!("`{model}`"), message));
    }
    let message = "expected a directory, a `.gguf` file or the name of a cached model, got neither; `pocketlora pull \
                   --list` shows the names, `pocketlora pull OWNER/REPO` fetches from the model hub";
    Err(Error::new(ErrorCode::Config, format!("model `{model}`"), message))
}

/// Refuses a model's folder that has no tokenizer, before any work is done for it.
pub(super) fn check_text(model: &str) -> Result<()> {
    let dir = model_of(Path::new(model));
    let lacks = dir.join("config.json").is_file() && !dir.join("tokenizer.json").exists();
    if lacks { Err(no_tokenizer(&dir)) } else { Ok(()) }
}

/// Whether the model in the folder `dir` is an NF4 copy that was made at first use.
pub(super) fn is_copy(dir: &Path) -> bool {
    hub::Hub::from_env().is_ok_and(|hub| dir.starts_with(hub.home.join("quantized")))
}

/// Whether `model` can only have been meant as a path: names have at most one slash, between two words.
fn looks_like_a_path(model: &str) -> bool {
    let ends = [".gguf", ".safetensors", ".json", "/", "\\"];
    model.starts_with(['.', '/', '~', '\\'])
        || model.matches('/').count() > 1
        || ends.iter().any(|e| model.ends_with(e))
}

/// Where the NF4 form of `source` lies in the cache. The name changes when the source does.
fn cache_dir(source: &Path) -> Result<PathBuf> {
    let full = source.canonicalize().map_err(|e| Error::io("find", source, e))?;
    let file = if full.is_dir() { newest_weights(&full)? } else { full.clone() };
    let meta = file.metadata().map_err(|e| Error::io("read the size of", &file, e))?;
    let modified = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_nanos());
    let words = full.as_os_str().as_encoded_bytes().iter().map(|&b| u64::from(b));
    let hash = words.chain([meta.len(), modified as u64]).fold(0, crate::rng::mix);
    let stem = full.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(hub::Hub::from_env()?.home.join("quantized").join(format!("{stem}-nf4-{hash:016x}")))
}

fn newest_weights(dir: &Path) -> Result<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io("list", dir, e))? {
        let path = entry.map_err(|e| Error::io("list", dir, e))?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            files.push(path);
        }
    }
    files.sort_by_key(|p| p.metadata().and_then(|m| m.modified()).ok());
    files.pop().ok_or_else(|| Error::format(dir, "weights", "`.safetensors` files", "none"))
}

/// Quantizes or converts with a progress bar; Ctrl-C leaves nothing behind.
pub(super) fn convert(source: &Path, out: &Path, to: Target) -> Result<crate::format::Summary> {
    let path = model_of(source);
    let source: Box<dyn Source> = open_source(&path)?;
    check_import(source.as_ref(), &path)?;
    if let Some(parent) = out.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, e))?;
    }
    let bar = progress::count(0, "quantize");
    let summary = quantize(source.as_ref(), out, to, &mut |p: Progress<'_>| {
        bar.set_length(p.total);
        bar.set_position(p.done);
        bar.set_message(p.tensor.to_owned());
        if interrupt::asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    summary
}
