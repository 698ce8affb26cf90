//! From what people type as MODEL to a directory that can be mapped.

use super::args::megabytes;
use super::{interrupt, names, progress, pull, shell};
use crate::adapter::{self, AUTO};
use crate::chat::ChatTemplate;
use crate::check_import;
use crate::error::{Error, ErrorCode, Result};
use crate::format::foreign::{Wanted, no_tokenizer, no_tokenizer_inside};
use crate::format::gguf::Gguf;
use crate::format::{
    Checkpoint, Existing, Progress, Recipe, Source, Summary, folder_of, is_gguf, model_of, open_source, quantize,
};
use crate::hub::{self, Copy, Hub, Kind, Making};
use indicatif::ProgressBar;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The model that commands use where none is named.
pub(super) const DEFAULT: &str = "smollm2-135m";

/// Copies in use, so that no other program removes them while this one runs.
static IN_USE: Mutex<Vec<Copy>> = Mutex::new(Vec::new());

/// A model that was found.
#[derive(Debug)]
pub(super) struct Model {
    /// A directory or a file.
    pub path: PathBuf,
    /// What others find it by: its repository on the hub, or the path that was given.
    pub name: String,
}

/// The directory of a model given as directory, file or cached name, or the `.safetensors` file that is one. With
/// `quantize`, a model that is not in NF4 is quantized into the cache at first use.
pub(super) fn resolve(model: &str, quantize: bool) -> Result<Model> {
    let Model { path, name } = locate(model)?;
    if !is_gguf(&path) && (!quantize || Checkpoint::open_for(&path, Wanted::Source)?.is_four_bit()) {
        return Ok(Model { path, name });
    }
    if !quantize {
        let source = shell::quoted_value(model);
        let message = format!(
            "expected a Hugging Face directory with `--no-quantize`, got a GGUF file; convert it with `pocketlora quantize \
             {source} --to f16 -o FOLDER` first, and use that folder"
        );
        return Err(Error::new(ErrorCode::Config, format!("`{}`", path.display()), message));
    }
    let copy = copy_of(&path, &name)?;
    let path = copy.dir.clone();
    IN_USE.lock().unwrap_or_else(|broken| broken.into_inner()).push(copy);
    Ok(Model { path, name })
}

/// A path as it is, or a cached model's; a name with a manifest is pulled at first use.
pub(super) fn locate(model: &str) -> Result<Model> {
    let found = find(model)?;
    let adapter = found.path.join("adapter_config.json");
    // A folder is told by its content; here the name is what people know.
    if names::existing(model).is_none() && adapter.is_file() && !found.path.join("config.json").exists() {
        let message = format!(
            "expected a model, got an adapter; give it with `-a {}`, and the model that it was trained on with `-m`",
            shell::quoted_value(model)
        );
        return Err(Error::new(ErrorCode::Config, format!("`{model}`"), message));
    }
    Ok(found)
}

/// As [`locate`], whatever it is: adapters are pulled under names like models.
pub(super) fn find(model: &str) -> Result<Model> {
    if let Some(path) = names::existing(model) {
        if hub::resolve(model).is_some() {
            eprintln!("note: `{model}` is taken as the path of that name here, not as the model in the cache");
        }
        let path = model_of(&path);
        return Ok(Model { name: path.to_string_lossy().into_owned(), path });
    }
    let hub = Hub::from_env()?;
    // Adapters name their base by its repository, for others to find it; here a manifest may have another name for it.
    let by_repository = || -> Result<Option<PathBuf>> {
        let mut names: Vec<String> = hub::manifests()?.into_iter().map(|manifest| manifest.name).collect();
        // One file of it, or of another revision than the usual.
        names.extend(hub.list_cached().unwrap_or_default().into_iter().map(|cached| cached.name));
        Ok(names.iter().filter(|name| hub.base_name(name) == model).find_map(|name| hub.resolve(name)))
    };
    let path = match hub.resolve(model).map_or_else(by_repository, |path| Ok(Some(path)))? {
        Some(path) => path,
        None if hub::manifests()?.iter().any(|m| m.name == model) => pull::fetch(model)?,
        None if model.contains("://") => return Err(address(model)),
        None if hub::is_repository(model) && (model.contains([':', '@']) || !looks_like_a_path(model)) => {
            let quoted = shell::quoted_value(model);
            let message = format!(
                "expected a directory, a `.gguf` file or the name of a cached model, got neither; `pocketlora list` shows the names, and \
                 `pocketlora pull {quoted}` fetches it if it is on the model hub"
            );
            return Err(Error::new(ErrorCode::Config, format!("model `{model}`"), message));
        }
        None if looks_like_a_path(model) => {
            let message = "expected a model's folder or file, got a path where nothing is; check it, or give the name of a \
                           cached model, as `pocketlora list` shows them";
            return Err(Error::new(ErrorCode::Io, format!("`{model}`"), message));
        }
        None => {
            let message = "expected a directory, a `.gguf` file or the name of a cached model, got neither; \
                           `pocketlora list` shows the names, `pocketlora pull OWNER/REPO` fetches from the model hub";
            return Err(Error::new(ErrorCode::Config, format!("model `{model}`"), message));
        }
    };
    hub.touch(model);
    Ok(Model { path, name: hub.base_name(model) })
}

/// The model `model` if it is on this machine, without a word and without fetching it: for what is asked before work.
fn present(model: &str) -> Option<PathBuf> {
    names::existing(model).map(|path| model_of(&path)).or_else(|| hub::resolve(model))
}

/// Refuses a model that has no tokenizer, before any work is done for it.
pub(super) fn check_text(model: &str) -> Result<()> {
    let Some(path) = present(model) else { return Ok(()) };
    if is_gguf(&path) {
        let has = Gguf::open(&path)?.has_tokenizer();
        return if has { Ok(()) } else { Err(no_tokenizer_inside(&path)) };
    }
    let dir = if path.is_dir() { path } else { folder_of(&path) };
    let lacks = dir.join("config.json").is_file() && !dir.join("tokenizer.json").exists();
    if lacks { Err(no_tokenizer(&dir)) } else { Ok(()) }
}

/// Whether the model was made to chat: it has a chat template. One that is not on this machine yet is fetched.
pub(super) fn has_template(model: &str) -> bool {
    let Some(path) = present(model).or_else(|| locate(model).ok().map(|model| model.path)) else { return false };
    if is_gguf(&path) {
        return Gguf::open(&path).is_ok_and(|file| file.has_template());
    }
    let dir = if path.is_dir() { path } else { folder_of(&path) };
    ChatTemplate::find(&dir).is_ok_and(|found| found.is_some())
}

/// Refuses names of layers that the model does not have, before any work is done for it.
pub(super) fn check_targets(model: &str, method: adapter::Kind, targets: &[String]) -> Result<()> {
    let Some(path) = present(model).filter(|_| targets.iter().any(|target| target != "all" && target != AUTO)) else {
        return Ok(());
    };
    // What is wrong with the model is said where it is opened.
    let Ok(source) = open_source(&path) else { return Ok(()) };
    let Ok(built) = pocketlora_models::build(source.config()) else { return Ok(()) };
    method.check_targets(built.as_ref(), targets)
}

/// Whether the model in the folder `dir` is an NF4 copy that was made at first use.
pub(super) fn is_copy(dir: &Path) -> bool {
    Hub::from_env().is_ok_and(|hub| dir.starts_with(hub.home.join("quantized")))
}

/// The error for the address of a web page in the place of a name.
pub(super) fn address(model: &str) -> Error {
    let mut parts =
        model.split("://").nth(1).unwrap_or_default().split(['/', '?', '#']).skip(1).filter(|p| !p.is_empty());
    let repository = match (parts.next(), parts.next()) {
        (Some(owner), Some(name)) => shell::quoted_value(format!("{owner}/{name}")),
        _ => "OWNER/REPO".to_owned(),
    };
    let message = format!(
        "expected the name of a model, got the address of a page; `pocketlora pull {repository}` fetches one of the model \
         hub, and `-m {repository}` is it then"
    );
    Error::new(ErrorCode::Config, format!("model `{model}`"), message)
}

/// Whether `model` can only have been meant as a path: names have at most one slash, between two words.
fn looks_like_a_path(model: &str) -> bool {
    let ends = [".gguf", ".safetensors", ".json", "/", "\\"];
    model.starts_with(['.', '/', '~', '\\'])
        || model.matches('/').count() > 1
        || ends.iter().any(|e| model.ends_with(e))
}

/// The NF4 copy of the model at `path` in the cache; says what is done for it.
fn copy_of(path: &Path, name: &str) -> Result<Copy> {
    let hub = Hub::from_env()?;
    let (mut bar, mut waiting): (Option<ProgressBar>, bool) = (None, false);
    let copy = hub.quantized(path, name, &mut |event| {
        match event {
            Making::Waiting if !waiting => {
                waiting = true;
                eprintln!("another program quantizes this model; waiting for it");
            }
            Making::Progress(p) => show(bar.get_or_insert_with(|| progress::count(0, "quantize")), p),
            Making::Removed { name, bytes } => {
                eprintln!("removed the copy of {name} ({}), for the cache is at its limit", megabytes(bytes));
            }
            Making::OverLimit { bytes, limit } => eprintln!(
                "warning: the cache holds {} with this model, over its limit of {}; what is left was pulled or is in use, \
                 `pocketlora list` shows it",
                megabytes(bytes),
                megabytes(limit)
            ),
            _ => {}
        }
        go_on()
    });
    bar.inspect(ProgressBar::finish_and_clear);
    let copy = copy?;
    if copy.new {
        offer(&hub, path);
    }
    Ok(copy)
}

/// Says that there are older copies of the model at `path`, which nothing uses any more.
fn offer(hub: &Hub, path: &Path) {
    let (Ok(items), Ok(full)) = (hub.contents(), path.canonicalize()) else { return };
    let old = items.iter().filter(|i| i.kind == Kind::Quantized && i.stale.is_some());
    let bytes: u64 = old.filter(|i| i.source.as_ref() == Some(&full)).map(|i| i.bytes).sum();
    if bytes > 0 {
        eprintln!(
            "the copy that was made of this model before is out of date; `pocketlora remove --stale` frees its {}",
            megabytes(bytes)
        );
    }
}

/// Shows how far work has come.
pub(super) fn show(bar: &ProgressBar, p: Progress<'_>) {
    bar.set_length(p.total);
    bar.set_position(p.done);
    bar.set_message(p.tensor.to_owned());
}

/// Whether the work may go on, as callers of the library are asked.
pub(super) fn go_on() -> ControlFlow<()> {
    if interrupt::asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

/// Quantizes or converts with a progress bar; Ctrl-C leaves nothing behind.
pub(super) fn convert(source: &Path, out: &Path, recipe: Recipe, existing: Existing) -> Result<Summary> {
    let path = model_of(source);
    let source: Box<dyn Source> = open_source(&path)?;
    check_import(source.as_ref(), &path)?;
    source.left_out().iter().for_each(|part| eprintln!("note: {}", part.described()));
    with_bar("quantize", out, |progress| quantize(source.as_ref(), out, recipe, existing, progress))
}

/// Makes the model `out` with a progress bar that is called `label`; Ctrl-C stops the work.
pub(super) fn with_bar(
    label: &str,
    out: &Path,
    work: impl FnOnce(&mut dyn FnMut(Progress<'_>) -> ControlFlow<()>) -> Result<Summary>,
) -> Result<Summary> {
    if let Some(parent) = out.parent().filter(|p| !p.as_os_str().is_empty()) {
        crate::format::create_folder(parent)?;
    }
    let bar = progress::count(0, label);
    let summary = work(&mut |p| {
        show(&bar, p);
        go_on()
    });
    bar.finish_and_clear();
    summary
}
