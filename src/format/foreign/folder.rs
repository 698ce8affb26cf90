//! Folders that are no model: what they are instead, and what to give.

use crate::error::{Error, ErrorCode};
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
    ("modules.json", "a Sentence Transformers model, which makes embeddings", TEXT_MODEL),
    ("preprocessor_config.json", "a model for pictures or sound", TEXT_MODEL),
    ("*.onnx", "an ONNX model", ORIGINAL),
    ("*.tflite", "a TFLite model", ORIGINAL),
    ("*.mlpackage", "a Core ML model", ORIGINAL),
    ("*.mlmodelc", "a Core ML model", ORIGINAL),
    ("*.nemo", "a NeMo model", ORIGINAL),
    ("*.ckpt", "a checkpoint of a training program", ORIGINAL),
];

const TEXT_MODEL: &str = "use a language model (`pocketlora pull --list` names some)";
const ORIGINAL: &str = "use the model's safetensors or GGUF files, which `pocketlora pull OWNER/REPO` fetches";

/// The error for the folder `dir`, which has no `config.json`.
pub(crate) fn not_a_model(dir: &Path) -> Error {
    if let Some(error) = adapter_as_model(dir) {
        return error;
    }
    let place = format!("`{}`", dir.display());
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let is = |mark: &str| match mark.strip_prefix('*') {
        Some(ending) => names.iter().any(|name| name.ends_with(ending)),
        None => names.iter().any(|name| name == mark),
    };
    let expected = "a model's folder with `config.json`, `tokenizer.json` and safetensors files";
    let say = |code, got: &str, next: &str| {
        Error::new(code, place.clone(), format!("expected {expected}, got {got}; {next}"))
    };
    if let Some((_, what, next)) = MARKS.iter().find(|(mark, ..)| is(mark)) {
        return say(ErrorCode::Unsupported, what, next);
    }
    let shown = |name: &str| format!("`{}`", dir.join(name).display());
    let ggufs: Vec<String> = names.iter().filter(|n| n.to_lowercase().ends_with(".gguf")).map(|n| shown(n)).collect();
    if !ggufs.is_empty() {
        let next = format!("give the file: {}", ggufs[..ggufs.len().min(5)].join(" or "));
        return say(ErrorCode::Config, "a folder of GGUF files", &next);
    }
    // One level down: snapshots of the hub's cache, checkpoints of a run, a folder that was unpacked into a folder.
    let below = names.iter().flat_map(|name| {
        let mut deeper: Vec<String> = vec![name.clone()];
        if name == "snapshots" {
            let snapshots = fs::read_dir(dir.join(name)).into_iter().flatten().flatten();
            deeper.extend(snapshots.map(|e| format!("{name}/{}", e.file_name().to_string_lossy())));
        }
        deeper
    });
    let holds = |name: &String| ["config.json", "adapter_config.json"].iter().any(|f| dir.join(name).join(f).is_file());
    let inner: Vec<String> = below.filter(holds).map(|name| shown(&name)).collect();
    if !inner.is_empty() {
        let next = format!("give the folder in it: {}", inner[..inner.len().min(5)].join(" or "));
        return say(ErrorCode::Config, "a folder of folders", &next);
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
        let mut cases: Vec<(Vec<&str>, &str)> = MARKS.iter().map(|(mark, what, _)| (vec![*mark], *what)).collect();
        cases.extend([
            (vec![], "an empty folder"),
            (vec!["tiny-Q8_0.gguf"], "tiny-Q8_0.gguf`"),
            (vec!["checkpoint-5/config.json"], "checkpoint-5`"),
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
