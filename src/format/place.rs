//! Where a model lies, from what people give: its folder, or any of its files.

use super::foreign;
use super::gguf::parts_of;
use super::hf_source::SIDECARS;
use super::safetensors::TensorFile;
use crate::error::{Error, ErrorCode, Result};
use serde_json::{Map, Value};
use std::fs;
use std::path::{Path, PathBuf};

pub(super) const CONFIG: &str = "config.json";
/// All weights in one file.
pub(super) const SINGLE: &str = "model.safetensors";
/// Which tensor lies in which of several files.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The model that `path` is part of: the folder, where a file is given that every model's folder has (its config, a
/// tokenizer's file, the weights under their usual names or one of their parts); else `path` as it is, such as a GGUF
/// file, weights under a name of their own, or one of several weights that the folder has.
#[must_use]
pub fn model_of(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let dir = folder_of(path);
    let usual = match &*name {
        SINGLE => !dir.join(INDEX).exists(),
        INDEX => !dir.join(SINGLE).exists(),
        // A part of other weights than the folder's is no name for the folder.
        name if is_part(name) => !dir.join(SINGLE).exists() && names_part(&dir, name),
        name => name == CONFIG || SIDECARS.contains(&name),
    };
    if usual && path.is_file() {
        return dir;
    }
    // Any part of a GGUF model in several files stands for the first one.
    parts_of(path).into_iter().next().unwrap_or_else(|| path.to_path_buf())
}

/// Whether the index in `dir`, if there is one, names the part called `name`.
fn names_part(dir: &Path, name: &str) -> bool {
    fs::read(dir.join(INDEX)).map_or(true, |index| {
        let quoted = format!("\"{name}\"");
        index.windows(quoted.len()).any(|bytes| bytes == quoted.as_bytes())
    })
}

/// Whether `path` is an index or a part, which stand for all parts.
pub(crate) fn is_of_parts(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name == INDEX || is_part(&name)
}

/// Which weights are meant by the folder or file at `path`.
pub(super) enum Weights {
    /// All in this file.
    Single(PathBuf),
    /// In the parts that this index names.
    Parts(PathBuf),
}

/// The weights of the model at `path`, whose folder is `dir`: of a file, those that it is or belongs to.
///
/// # Errors
/// There are none, there are two of which neither was given, or the part that was given is none of the index's.
pub(super) fn weights_of(path: &Path, dir: &Path) -> Result<Weights> {
    let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
    if path.is_file() && is_of_parts(path) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !index.exists() {
            return Err(foreign::no_weights(dir));
        }
        if name != INDEX && !names_part(dir, &name) {
            let message = format!(
                "expected one of the parts that `{INDEX}` names, got another one; give the folder for the model of the \
                 index, or fetch the index that this part belongs to"
            );
            return Err(Error::new(ErrorCode::Config, format!("`{}`", path.display()), message));
        }
        return Ok(Weights::Parts(index));
    }
    if path.is_file() {
        return Ok(Weights::Single(path.to_path_buf()));
    }
    match (single.exists(), index.exists()) {
        // An index may name the one file, too.
        (true, true) if names_part(dir, SINGLE) => Ok(Weights::Single(single)),
        (true, true) => {
            let message = format!(
                "expected one model, got `{SINGLE}` and the parts of `{INDEX}`; give the one that is meant, `{}` or `{}`, or \
                 take the other away",
                single.display(),
                index.display()
            );
            Err(Error::new(ErrorCode::Config, format!("`{}`", dir.display()), message))
        }
        (true, false) => Ok(Weights::Single(single)),
        (false, true) => Ok(Weights::Parts(index)),
        (false, false) => Err(foreign::no_weights(dir)),
    }
}

/// The `config.json` of the model at `path`, a folder or a `.safetensors` file with it beside. Whatever is no model of ours
/// is refused by its name here, before more of it is looked at.
///
/// # Errors
/// Nothing is there, it is something else, the config cannot be read, or the weights are in a form that is not read.
pub(super) fn config_of(path: &Path, wanted: foreign::Wanted) -> Result<Map<String, Value>> {
    if !path.exists() {
        return Err(nothing_at(path));
    }
    let dir = if path.is_dir() { path.to_path_buf() } else { folder_of(path) };
    if path.is_file() && path.file_name().is_none_or(|name| name != INDEX) {
        // A file of another kind is known without its config.
        foreign::check_own(&TensorFile::open(path)?, "a model")?;
    }
    let config = dir.join(CONFIG);
    if !config.exists() {
        return Err(if path.is_file() { foreign::lone_weights(path, &dir) } else { foreign::not_a_model(&dir) });
    }
    let json = foreign::read_object(&config)?;
    foreign::check_config(&config, &json, wanted)?;
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

    #[test]
    fn a_model_is_found_from_any_of_its_files() {
        let root = tempfile::tempdir().unwrap();
        let usual = ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"];
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
        let part = "model-00001-of-00002.safetensors";
        fs::write(root.path().join(part), "").unwrap();
        fs::write(root.path().join(INDEX), format!(r#"{{"weight_map": {{"a": "{part}"}}}}"#)).unwrap();
        // Two models: each file is its own.
        for name in [SINGLE, INDEX, part] {
            assert_eq!(model_of(&root.path().join(name)), root.path().join(name), "{name}");
        }
        fs::remove_file(root.path().join(SINGLE)).unwrap();
        for name in [INDEX, part] {
            assert_eq!(model_of(&root.path().join(name)), root.path(), "{name}");
        }
        assert_eq!(folder_of(Path::new("model.safetensors")), Path::new("."));
    }
}
