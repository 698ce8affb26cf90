//! Where a model lies, from what people give: its folder, or any of its files.

use super::foreign;
use super::hf_source::SIDECARS;
use super::safetensors::TensorFile;
use crate::error::{Error, ErrorCode, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

pub(super) const CONFIG: &str = "config.json";
/// All weights in one file.
pub(super) const SINGLE: &str = "model.safetensors";
/// Which tensor lies in which of several files.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The model that `path` is part of: the folder, where a file is given that every model's folder has (its config, a
/// tokenizer's file, the weights under their usual names or one of their parts); else `path` as it is, such as a GGUF
/// file or weights under a name of their own.
#[must_use]
pub fn model_of(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let usual = [CONFIG, SINGLE, INDEX].contains(&&*name) || SIDECARS.contains(&&*name) || is_part(&name);
    if usual && path.is_file() { folder_of(path) } else { path.to_path_buf() }
}

/// The `config.json` of the model at `path`, a folder or a `.safetensors` file with it beside. Whatever is no model of ours
/// is refused by its name here, before more of it is looked at.
///
/// # Errors
/// Nothing is there, it is something else, the config cannot be read, or the weights are in a form that is not read.
pub(super) fn config_of(path: &Path) -> Result<Map<String, Value>> {
    if !path.exists() {
        return Err(nothing_at(path));
    }
    let dir = if path.is_dir() { path.to_path_buf() } else { folder_of(path) };
    if path.is_file() {
        // A file of another kind is known without its config.
        TensorFile::open(path)?;
    }
    let config = dir.join(CONFIG);
    if !config.exists() {
        return Err(if path.is_file() { foreign::lone_weights(path, &dir) } else { foreign::not_a_model(&dir) });
    }
    let json = foreign::read_object(&config)?;
    foreign::check_config(&config, &json)?;
    Ok(json)
}

/// The folder in which `path` lies.
pub(crate) fn folder_of(path: &Path) -> PathBuf {
    let parent = path.parent().unwrap_or(Path::new(""));
    if parent.as_os_str().is_empty() { PathBuf::from(".") } else { parent.to_path_buf() }
}

/// Whether `name` is one of several, as in `model-00001-of-00002.safetensors`.
pub(super) fn is_part(name: &str) -> bool {
    let parts = name.strip_suffix(".safetensors").and_then(|stem| stem.rsplit_once("-of-"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    parts.is_some_and(|(first, all)| digits(all) && first.rsplit_once('-').is_some_and(|(_, number)| digits(number)))
}

/// The error for a path that leads nowhere.
pub(super) fn nothing_at(path: &Path) -> Error {
    let message = "expected a model's folder or file, got a path where nothing is; check the path, or give the name of a model \
                   that `pocketlora pull --list` shows";
    Error::new(ErrorCode::Io, format!("`{}`", path.display()), message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_model_is_found_from_any_of_its_files() {
        let root = tempfile::tempdir().unwrap();
        let usual = [
            "config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "tokenizer.json",
            "generation_config.json",
        ];
        let others = ["mine.safetensors", "tiny-Q4_0.gguf", "model-a-of-b.safetensors"];
        for name in usual.iter().chain(&others) {
            fs::write(root.path().join(name), "").unwrap();
        }
        for name in usual {
            assert_eq!(model_of(&root.path().join(name)), root.path(), "{name}");
        }
        for name in others.iter().chain(&["no-such/config.json"]) {
            assert_eq!(model_of(&root.path().join(name)), root.path().join(name), "{name}");
        }
        assert_eq!(folder_of(Path::new("model.safetensors")), Path::new("."));
    }
}
