//! What people give as an adapter that is none in PEFT's form: told by its files, with what to do.

use super::{CONFIG, WEIGHTS};
use crate::error::{Error, ErrorCode, Result};
use crate::format::foreign::{check_own, stopped_run};
use crate::format::safetensors::TensorFile;
use serde_json::{Map, Value};
use std::path::Path;

/// Refuses `dir` by what it is if it lacks the files of a PEFT adapter.
pub(super) fn check_files(dir: &Path) -> Result<()> {
    let refused = |what: &str, next: &str| Err(Error::unsupported(dir, what, next));
    if dir.is_file() {
        #[cfg(feature = "seal")]
        if crate::adapter::seal::is_sealed(dir) {
            let message = "expected the key of this sealed adapter, got none; open it with `Engine::unseal`";
            return Err(Error::new(ErrorCode::Key, format!("`{}`", dir.display()), message));
        }
        let file = TensorFile::open(dir).ok();
        file.as_ref().map_or(Ok(()), |file| check_own(file, "an adapter"))?;
        let folder = dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let alone = format!("give a folder with {CONFIG} and {WEIGHTS}");
        return match file {
            _ if folder.join(CONFIG).exists() => {
                refused("a single file as an adapter", &format!("give its folder: `-a '{}'`", folder.display()))
            }
            Some(_) => refused("a single file as an adapter", &alone),
            None => refused(
                "a file without weights as an adapter",
                &format!("{alone}; the text of a prompt is given by `-f`"),
            ),
        };
    }
    let has = |name: &str| dir.join(name).exists();
    if has(CONFIG) && has(WEIGHTS) {
        return Ok(());
    }
    if has("adapters.npz") {
        let next = "save it as `adapters.safetensors`, as newer versions of mlx-lm do";
        return refused("an adapter of an old mlx-lm (`adapters.npz`)", next);
    }
    if has("adapters.safetensors") && !has(CONFIG) {
        return refused(
            &format!("an adapter of mlx without {CONFIG}"),
            "fetch that file, too: it says how strong it is",
        );
    }
    if has("adapter_model.bin") {
        let next = format!(
            "pickles can run code: save it as safetensors where you trust it, by `python3 -c \"import torch, \
             safetensors.torch as s; s.save_file(torch.load('{0}/adapter_model.bin', weights_only=True), \
             '{0}/{WEIGHTS}')\"`",
            dir.display()
        );
        return refused("an adapter stored as a pickle (`adapter_model.bin`)", &next);
    }
    if has("pytorch_lora_weights.safetensors") {
        return refused("a LoRA of an image model", "use an adapter of a language model, in PEFT's format");
    }
    if has(WEIGHTS) && !has(CONFIG) {
        return refused(
            &format!("an adapter without {CONFIG}"),
            &format!("fetch that file, too: it says how strong {WEIGHTS} is"),
        );
    }
    if let Some(inside) = folder_inside(dir) {
        let message = format!("expected an adapter, got a folder of them; give one: `-a '{}'`", inside.display());
        return Err(Error::new(ErrorCode::Config, format!("`{}`", dir.display()), message));
    }
    if !has(CONFIG) && has("config.json") {
        let next = "give it as the model: `-m`";
        return Err(Error::new(
            ErrorCode::Config,
            format!("`{}`", dir.display()),
            format!("expected an adapter, got a model; {next}"),
        ));
    }
    Err(stopped_run(dir, "an adapter").unwrap_or_else(|| lacking(dir)))
}

/// What is said of the folder `dir`, which has not both files of an adapter and is nothing else that is known.
fn lacking(dir: &Path) -> Error {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    if names
        .iter()
        .any(|n| n.starts_with("adapter_model") && n.contains("-of-") || n.ends_with(".safetensors.index.json"))
    {
        let next = format!(
            "save it in one file, `{WEIGHTS}`: load the parts with `safetensors.torch.load_file`, put them into one dict and \
             write that with `save_file`"
        );
        return Error::unsupported(dir, "an adapter in several files with an index", next);
    }
    if names.iter().any(|n| n.to_lowercase().ends_with(".gguf")) {
        return Error::unsupported(dir, "a folder with GGUF files as an adapter", "give the file itself");
    }
    let (got, next) = match names.iter().any(|n| n == CONFIG) {
        true => (format!("no `{WEIGHTS}`"), "fetch that file, too, for instance by `pocketlora pull OWNER/REPO`"),
        false if names.is_empty() => (
            "an empty folder".to_owned(),
            "`pocketlora pull OWNER/REPO` fetches an adapter, `pocketlora train` makes one",
        ),
        false => ("neither".to_owned(), "give the folder that PEFT or `pocketlora train` wrote"),
    };
    let message = format!("expected an adapter's `{CONFIG}` and `{WEIGHTS}`, got {got}; {next}");
    Error::new(ErrorCode::Io, format!("`{}`", dir.display()), message)
}

/// The newest adapter in a folder of `dir`: trainers leave `checkpoint-100` and the like.
fn folder_inside(dir: &Path) -> Option<std::path::PathBuf> {
    let folders = std::fs::read_dir(dir).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let number = |path: &std::path::PathBuf| {
        let name = path.file_name()?.to_str()?;
        name.rsplit('-').next()?.parse::<u64>().ok()
    };
    folders.filter(|path| path.join(CONFIG).exists()).max_by_key(number)
}

/// Refuses a config of another program than PEFT.
pub(super) fn check_config(path: &Path, json: &Map<String, Value>) -> Result<()> {
    let has = |key: &str| json.contains_key(key);
    if has("peft_type") {
        return Ok(());
    }
    if has("lora_parameters") || has("fine_tune_type") {
        let next = "fetch its `adapters.safetensors`, too";
        return Err(Error::unsupported(path, "the config of an adapter of mlx beside another program's weights", next));
    }
    if has("architecture") && has("config") || has("adapter_fusion") {
        let next = "export it to PEFT's format";
        return Err(Error::unsupported(path, "an adapter of the library AdapterHub `adapters`", next));
    }
    Ok(())
}
