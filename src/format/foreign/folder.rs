//! Folders that are no model of ours: what they are instead, or lack, and what to give.

use super::{Wanted, check_tensors};
use crate::error::{Error, ErrorCode};
use crate::format::place::{INDEX, SINGLE, is_part};
use crate::format::safetensors::TensorFile;
use std::fs;
use std::path::Path;

/// A file that says what kind of folder it lies in; names that begin with `*` are endings.
const MARKS: &[(&str, &str, &str)] = &[
    ("model_index.json", "a Diffusers pipeline, which makes pictures", TEXT_MODEL),
    ("openvino_model.xml", "an OpenVINO model", ORIGINAL),
    ("genai_config.json", "a model for ONNX Runtime GenAI", ORIGINAL),
    ("mlc-chat-config.json", "a model for MLC", ORIGINAL),
    ("params.json", "a model in its authors' own form", "use its Hugging Face form, which has a `config.json`"),
    ("consolidated.00.pth", "a model in its authors' own form", "use its Hugging Face form, which has a `config.json`"),
    ("saved_model.pb", "a TensorFlow model", ORIGINAL),
    ("*.h5", "TensorFlow weights", ORIGINAL),
    ("*.msgpack", "Flax weights", ORIGINAL),
    ("*.ot", "weights for Rust's `tch`", ORIGINAL),
    ("weights.npz", "weights for an old MLX", ORIGINAL),
    ("onnx", "an ONNX model", ORIGINAL),
    ("*.onnx", "an ONNX model", ORIGINAL),
    ("*.tflite", "a TFLite model", ORIGINAL),
    ("*.litertlm", "a LiteRT model", ORIGINAL),
    ("*.task", "a MediaPipe model", ORIGINAL),
    ("*.pte", "an ExecuTorch model", ORIGINAL),
    ("*.mnn", "an MNN model", ORIGINAL),
    ("*.engine", "a TensorRT-LLM engine", ORIGINAL),
    ("*.mlpackage", "a Core ML model", ORIGINAL),
    ("*.mlmodelc", "a Core ML model", ORIGINAL),
    ("*.nemo", "a NeMo model", ORIGINAL),
];

/// Marks that a language model may have as well, and that say something only where there is no `config.json`.
const WEAK_MARKS: &[(&str, &str, &str)] = &[
    ("modules.json", "a Sentence Transformers model, which makes embeddings", TEXT_MODEL),
    ("preprocessor_config.json", "a model for pictures or sound", TEXT_MODEL),
    ("*.ckpt", "a checkpoint of a training program", ORIGINAL),
];

const TEXT_MODEL: &str = "use a language model (`pocketlora pull --list` names some)";
const ORIGINAL: &str = "use the model's safetensors or GGUF files, which `pocketlora pull OWNER/REPO` fetches";

/// Names of what lies in `dir`, sorted.
fn listing(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Whether one of `names` is `mark`, or ends so.
fn has(names: &[String], mark: &str) -> bool {
    match mark.strip_prefix('*') {
        Some(ending) => names.iter().any(|name| name.ends_with(ending)),
        None => names.iter().any(|name| name == mark),
    }
}

/// The error for a model's folder `dir` without weights that can be read.
pub(crate) fn no_weights(dir: &Path) -> Error {
    let names = listing(dir);
    let place = format!("`{}`", dir.display());
    let say = |code, got: &str, next: &str| {
        let message = format!("expected the model's weights in `{SINGLE}` or `{INDEX}`, got {got}; {next}");
        Error::new(code, place.clone(), message)
    };
    if names.iter().any(|name| is_part(name)) {
        let next = format!("fetch `{INDEX}` from where the parts came from");
        return say(ErrorCode::Format, "parts of weights without an index", &next);
    }
    // Other programs' quantizations have other names for the file, too.
    let weights: Vec<&String> =
        names.iter().filter(|n| n.ends_with(".safetensors") && !n.starts_with("adapter_model")).collect();
    for name in &weights {
        if let Ok(file) = TensorFile::open(&dir.join(name))
            && let Err(error) = check_tensors(file.path(), &file.tensors().collect::<Vec<_>>(), Wanted::ToRun)
        {
            return error;
        }
    }
    if let Some(name) = weights.first().copied().or(names.iter().find(|n| n.to_lowercase().ends_with(".gguf"))) {
        let next = format!("if that is the model, give the file: `{}`", dir.join(name).display());
        return say(ErrorCode::Config, &format!("`{name}`"), &next);
    }
    if let Some((_, what, next)) = MARKS.iter().find(|(mark, ..)| has(&names, mark)) {
        return say(ErrorCode::Unsupported, what, next);
    }
    let pickled = |n: &&String| [".bin", ".bin.index.json", ".pt", ".pth", ".ckpt"].iter().any(|e| n.ends_with(e));
    if let Some(name) = names.iter().find(pickled) {
        let next = format!(
            "pickles can run code: save them as safetensors where you trust them, by `python3 -c \"from transformers import \
             AutoModelForCausalLM as M; M.from_pretrained('{0}').save_pretrained('{0}')\"`",
            dir.display()
        );
        return say(ErrorCode::Unsupported, &format!("pickled weights (`{name}`)"), &next);
    }
    say(ErrorCode::Io, "neither", "fetch the weights, too, for instance by `pocketlora pull OWNER/REPO`")
}

/// The error for the weights in the file at `path`, which has no `config.json` beside it in `dir`.
pub(crate) fn lone_weights(path: &Path, dir: &Path) -> Error {
    adapter_as_model(dir).unwrap_or_else(|| {
        let message = "expected the model's `config.json` and tokenizer files beside the weights, got none; put them into the \
                       same folder";
        Error::new(ErrorCode::Format, format!("`{}`", path.display()), message)
    })
}

/// The error for the model's folder `dir`, which has no `tokenizer.json`.
pub(crate) fn no_tokenizer(dir: &Path) -> Error {
    let place = format!("`{}`", dir.join("tokenizer.json").display());
    let others =
        ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.json", "vocab.txt"];
    if let Some(other) = others.into_iter().find(|name| dir.join(name).exists()) {
        let message = format!(
            "expected the model's tokenizer in this form, got `{other}`; make the file of it: `python3 -c \"from transformers \
             import AutoTokenizer as T; T.from_pretrained('{0}').save_pretrained('{0}')\"`",
            dir.display()
        );
        return Error::new(ErrorCode::Unsupported, place, message);
    }
    let message = "expected the model's tokenizer, got none; take the file from where the model came from (only `eval --ids` \
                   works without)";
    Error::new(ErrorCode::Io, place, message)
}

/// The error for the GGUF file at `path`, which has no tokenizer in it.
#[cfg(feature = "cli")]
pub(crate) fn no_tokenizer_inside(path: &Path) -> Error {
    let message = "expected a tokenizer in the file's metadata, got none; use a GGUF file of the model that has one (only \
                   `eval --ids` works without)";
    Error::new(ErrorCode::Format, format!("`{}`", path.display()), message)
}

/// The error for the folder `dir`, which has no `config.json`.
pub(crate) fn not_a_model(dir: &Path) -> Error {
    if let Some(error) = adapter_as_model(dir).or_else(|| super::stopped_run(dir, "a model or an adapter")) {
        return error;
    }
    let place = format!("`{}`", dir.display());
    let names = listing(dir);
    let expected = "a model's folder with `config.json`, `tokenizer.json` and safetensors files";
    let say = |code, got: &str, next: &str| {
        Error::new(code, place.clone(), format!("expected {expected}, got {got}; {next}"))
    };
    let shown = |name: &str| format!("`{}`", dir.join(name).display());
    let ggufs: Vec<String> = names.iter().filter(|n| n.to_lowercase().ends_with(".gguf")).map(|n| shown(n)).collect();
    if !ggufs.is_empty() {
        let next = format!("give the file: {}", ggufs[..ggufs.len().min(5)].join(" or "));
        return say(ErrorCode::Config, "a folder of GGUF files", &next);
    }
    if let Some((_, what, next)) = MARKS.iter().chain(WEAK_MARKS).find(|(mark, ..)| has(&names, mark)) {
        return say(ErrorCode::Unsupported, what, next);
    }
    // One level down: snapshots of the hub's cache, checkpoints of a run, a folder that was unpacked into a folder.
    let mut below = names.clone();
    below.extend(listing(&dir.join("snapshots")).into_iter().map(|name| format!("snapshots/{name}")));
    let holding = |file: &str| -> Vec<String> {
        below.iter().filter(|name| dir.join(name).join(file).is_file()).map(|name| shown(name)).take(5).collect()
    };
    let (models, adapters) = (holding("config.json"), holding("adapter_config.json"));
    if !models.is_empty() {
        return say(ErrorCode::Config, "a folder of folders", &format!("give the one in it: {}", models.join(" or ")));
    }
    if !adapters.is_empty() {
        let next = format!("give a model with `-m`, and with `-a` one of {}", adapters.join(", "));
        return say(ErrorCode::Config, "a folder of adapters", &next);
    }
    if names.is_empty() {
        return say(ErrorCode::Config, "an empty folder", "`pocketlora pull OWNER/REPO` fetches a model");
    }
    let weights = names.iter().any(|n| n.ends_with(".safetensors") || n.ends_with(".bin") || n.ends_with(".pth"));
    if weights {
        let next = "put the model's `config.json` and tokenizer files beside the weights";
        return say(ErrorCode::Format, "weights without `config.json`", next);
    }
    say(ErrorCode::Config, "none of them", "give a model's folder, a `.gguf` file or the name of a cached model")
}

/// The error for a model's folder `dir` that is an adapter's; `None` where it is none, or has a model in it as well.
fn adapter_as_model(dir: &Path) -> Option<Error> {
    let config = dir.join("adapter_config.json");
    if !config.is_file() || dir.join("config.json").is_file() {
        return None;
    }
    let json = super::read_object(&config).unwrap_or_default();
    let base = json.get("base_model_name_or_path").and_then(serde_json::Value::as_str).filter(|b| !b.is_empty());
    let base = base.map_or_else(|| "BASE".to_owned(), |b| quoted(&b.chars().take(200).collect::<String>()));
    let message = format!(
        "expected a model, got an adapter; give the model that it belongs to, and the adapter beside it: `-m {base} -a {}`",
        quoted(&dir.display().to_string())
    );
    Some(Error::new(ErrorCode::Config, format!("`{}`", dir.display()), message))
}

/// `text` as a shell takes it for one word.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+=:@,\\~".contains(c);
    if text.chars().all(plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_told_by_what_lies_in_them() {
        let root = tempfile::tempdir().unwrap();
        let mut cases: Vec<(Vec<&str>, &str)> =
            MARKS.iter().chain(WEAK_MARKS).map(|(mark, what, _)| (vec![*mark], *what)).collect();
        cases.extend([
            (vec![], "an empty folder"),
            (vec!["tiny-Q8_0.gguf"], "tiny-Q8_0.gguf`"),
            (vec!["checkpoint-5/config.json"], "checkpoint-5`"),
            (vec!["run/adapter_config.json"], "with `-a` one of"),
            (vec!["snapshots/0a1b/config.json", "refs/main"], "snapshots/0a1b`"),
            (vec!["model.safetensors"], "weights without `config.json`"),
            (vec!["pytorch_model.bin"], "weights without `config.json`"),
            (vec!["notes.txt"], "none of them"),
            (vec!["adapter_config.json"], "-m BASE -a"),
        ]);
        for (i, (files, word)) in cases.iter().enumerate() {
            let dir = root.path().join(i.to_string());
            fs::create_dir(&dir).unwrap();
            for file in files {
                let path = dir.join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, "{}").unwrap();
            }
            let error = not_a_model(&dir).to_string();
            assert!(error.contains(word), "{files:?}: no `{word}` in {error}");
        }
    }

    #[test]
    fn a_tokenizer_in_another_form_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let none = no_tokenizer(dir.path());
        assert!(none.code() == ErrorCode::Io && none.to_string().contains("eval --ids"), "{none}");
        fs::write(dir.path().join("tokenizer.model"), "").unwrap();
        let other = no_tokenizer(dir.path());
        assert!(other.code() == ErrorCode::Unsupported && other.to_string().contains("`tokenizer.model`"), "{other}");
    }

    #[test]
    fn an_adapter_in_a_model_s_place_is_named_with_its_base() {
        let root = tempfile::tempdir().unwrap();
        let adapter = root.path().join("my adapter");
        fs::create_dir(&adapter).unwrap();
        fs::write(adapter.join("adapter_config.json"), r#"{"base_model_name_or_path": "owner/tiny"}"#).unwrap();
        let error = not_a_model(&adapter).to_string();
        assert!(error.contains("-m owner/tiny -a '") && error.contains("my adapter'`"), "{error}");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
