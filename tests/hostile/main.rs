//! Models and disks that mean harm, or look as if they did: every one must end in a typed error that names its place.

#[path = "../common/mod.rs"]
mod common;
#[cfg(all(unix, feature = "cli"))]
mod full_disk;
mod fuzz;
mod models;
mod sidecars;
mod values;

use common::{check_all, quiet, tiny_chat_model};
use pocketlora::chat::Message;
use pocketlora::{Chat, Engine, Error, ErrorCode, Options};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};

struct Fixture {
    dir: tempfile::TempDir,
    model: PathBuf,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_chat_model(dir.path());
    // The goldens may be read-only; these copies are there to be changed.
    for entry in fs::read_dir(&model).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
    }
    Fixture { dir, model }
}

impl Fixture {
    fn json(&self, file: &str) -> Map<String, Value> {
        serde_json::from_slice(&fs::read(self.model.join(file)).unwrap()).unwrap()
    }

    fn write(&self, file: &str, content: impl AsRef<[u8]>) {
        fs::write(self.model.join(file), content).unwrap();
    }

    /// Writes `file` with `key` set to `value`, or without it.
    fn with(&self, file: &str, original: &Map<String, Value>, key: &str, value: Option<&Value>) {
        let mut changed = original.clone();
        match value {
            Some(value) => drop(changed.insert(key.to_owned(), value.clone())),
            None => drop(changed.shift_remove(key)),
        }
        self.write(file, Value::Object(changed).to_string());
    }

    /// Opens the model and lets it answer.
    fn answer(&self) -> Result<String, Error> {
        answer(&mut chat(&self.model)?, &[Message::new("user", "hello")])
    }
}

fn open(dir: &Path) -> Result<Engine, Error> {
    Engine::open(dir, &Options::new().threads(1))
}

/// A chat of answers of two tokens.
fn chat(dir: &Path) -> Result<Chat, Error> {
    let mut chat = open(dir)?.chat()?;
    chat.max_tokens = 2;
    Ok(chat)
}

fn answer(chat: &mut Chat, messages: &[Message]) -> Result<String, Error> {
    chat.reply(messages, &mut quiet).map(|answer| answer.text)
}

/// Checks that `result` is an error of kind `code` whose text has all of `words`, and is not too long to read.
fn refused<T>(what: &str, result: Result<T, Error>, code: ErrorCode, words: &[&str]) -> Result<(), String> {
    let what = &what[..what.len().min(100)];
    let Err(error) = result else { return Err(format!("{what}: accepted")) };
    let text = error.to_string();
    if error.code() != code {
        return Err(format!("{what}: {:?} instead of {code:?}: {text}", error.code()));
    }
    match words.iter().find(|w| !text.contains(**w)) {
        Some(word) => Err(format!("{what}: no `{word}` in: {text}")),
        None if text.len() > 2000 => Err(format!("{what}: {} bytes of message", text.len())),
        None => Ok(()),
    }
}

/// Peak address space of this process, where the system tells.
fn peak_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmPeak:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kb| kb << 10)
}

#[test]
fn a_config_that_lacks_or_distorts_a_size_is_refused() {
    let f = fixture();
    f.answer().unwrap();
    let original = f.json("config.json");
    let sizes = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ];
    let values = [
        None,
        Some(json!("128")),
        Some(json!(-1)),
        Some(json!(0)),
        Some(json!(1)),
        Some(json!(3)),
        Some(json!(1.5)),
        Some(json!(4096)),
        Some(json!(1 << 24)),
        Some(json!(u64::MAX)),
        Some(json!(1e300)),
        Some(json!([4])),
        Some(json!({"a": "x".repeat(5000)})),
        Some(json!(true)),
    ];
    let cases = sizes.iter().flat_map(|key| values.iter().map(move |value| (*key, value)));
    check_all(cases, |(key, value)| {
        f.with("config.json", &original, key, value.as_ref());
        // Either the value itself is impossible, or the weights contradict it.
        refused(
            &format!("{key} = {value:?}"),
            f.answer(),
            ErrorCode::Format,
            &["expected", "got", "tiny-chat", "config"],
        )
    });
    if let Some(peak) = peak_bytes() {
        assert!(peak < 6 << 30, "{peak} bytes were asked for: a size was believed before the weights were looked at");
    }
}

#[test]
fn a_config_with_impossible_settings_is_refused() {
    let f = fixture();
    let original = f.json("config.json");
    let rope = |kind: &str, more: Value| {
        let mut rope = json!({"rope_theta": 1e4, "rope_type": kind});
        rope.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        Some(rope)
    };
    let cases: Vec<(&str, Option<Value>, &str)> = vec![
        ("model_type", None, "model_type"),
        ("model_type", Some(json!(7)), "model_type"),
        ("model_type", Some(json!("bloom")), "`llama`"),
        ("head_dim", Some(json!(33)), "head_dim"),
        ("head_dim", Some(json!(64)), "[256, 128]"),
        ("head_dim", Some(json!(1 << 20)), "head_dim"),
        ("head_dim", Some(json!(-32)), "head_dim"),
        ("num_key_value_heads", Some(json!(3)), "a divisor of 4"),
        ("hidden_act", Some(json!("gelu")), "silu"),
        ("hidden_act", Some(json!(1)), "hidden_act"),
        ("rms_norm_eps", Some(json!("1e-5")), "rms_norm_eps"),
        ("rms_norm_eps", Some(json!(-1e-5)), "rms_norm_eps"),
        ("rms_norm_eps", Some(json!(1e30)), "rms_norm_eps"),
        ("rms_norm_eps", Some(json!("NaN")), "rms_norm_eps"),
        ("tie_word_embeddings", Some(json!("yes")), "tie_word_embeddings"),
        ("tie_word_embeddings", Some(json!(false)), "lm_head.weight"),
        ("attention_bias", Some(json!(true)), "q_proj.bias"),
        ("attention_bias", Some(json!(0)), "attention_bias"),
        ("mlp_bias", Some(json!(true)), "gate_proj.bias"),
        ("max_position_embeddings", Some(json!(0)), "max_position_embeddings"),
        ("max_position_embeddings", Some(json!(-5)), "max_position_embeddings"),
        ("max_position_embeddings", Some(json!(u64::MAX)), "max_position_embeddings"),
        ("sliding_window", Some(json!("all")), "sliding_window"),
        ("sliding_window", Some(json!(0)), "sliding_window"),
        ("max_window_layers", Some(json!("all")), "max_window_layers"),
        ("max_window_layers", Some(json!(-1)), "max_window_layers"),
        ("rope_parameters", Some(json!([1])), "rope_parameters"),
        ("rope_parameters", rope("longest", json!({"factor": 4})), "rope_type"),
        ("rope_parameters", rope("longrope", json!({"factor": 4})), "short_factor"),
        ("rope_parameters", rope("linear", json!({})), "factor"),
        ("rope_parameters", rope("linear", json!({"factor": 0})), "factor"),
        ("rope_parameters", rope("linear", json!({"factor": 1e-300})), "factor"),
        ("rope_parameters", rope("linear", json!({"factor": "2"})), "factor"),
        (
            "rope_parameters",
            rope("llama3", json!({"factor": 8, "low_freq_factor": 4, "high_freq_factor": 1})),
            "high_freq",
        ),
        ("rope_parameters", rope("llama3", json!({"factor": 8, "low_freq_factor": 1})), "high_freq_factor"),
        ("rope_parameters", rope("default", json!({"rope_theta": 0})), "rope_theta"),
        ("rope_parameters", rope("default", json!({"rope_theta": -1e4})), "rope_theta"),
        ("rope_parameters", rope("default", json!({"rope_theta": 1e300})), "rope_theta"),
        ("rope_parameters", rope("default", json!({"rope_theta": "10000"})), "rope_theta"),
    ];
    check_all(cases, |(key, value, word)| {
        f.with("config.json", &original, key, value.as_ref());
        // A sound value that asks for another model than those that run.
        let code = match (*key, value.as_ref().and_then(Value::as_str), *word) {
            ("model_type" | "hidden_act" | "architectures", Some(_), _) | (.., "rope_type") => ErrorCode::Unsupported,
            _ => ErrorCode::Format,
        };
        refused(&format!("{key} = {value:?}"), f.answer(), code, &["tiny-chat", word])
    });
    // Heads that do not divide the width matter where no head_dim is given.
    let mut config = original.clone();
    config.shift_remove("head_dim");
    config.insert("num_attention_heads".into(), 6.into());
    f.write("config.json", Value::Object(config).to_string());
    refused("6 heads", f.answer(), ErrorCode::Format, &["config.json", "a multiple of 6 heads", "`128`"]).unwrap();
    // A context of any length costs nothing until it is used.
    f.with("config.json", &original, "max_position_embeddings", Some(&json!(1 << 24)));
    f.answer().unwrap();
    f.with("config.json", &original, "eos_token_id", Some(&json!([2, 4_000_000_000u32])));
    f.answer().unwrap();
}

#[test]
fn a_config_that_is_not_json_is_refused() {
    let f = fixture();
    let good = fs::read(f.model.join("config.json")).unwrap();
    let end = good.iter().rposition(|&b| b == b'}').unwrap();
    let text = String::from_utf8(good.clone()).unwrap();
    let mut cases: Vec<(String, Vec<u8>)> =
        (0..=end).step_by(7).chain([end]).map(|n| (format!("cut to {n} bytes"), good[..n].to_vec())).collect();
    cases.extend([
        ("an array".to_owned(), b"[]".to_vec()),
        ("null".to_owned(), b"null".to_vec()),
        (
            "not UTF-8".to_owned(),
            text.replace("silu", "si\u{0}lu")
                .replace('\u{0}', "")
                .into_bytes()
                .into_iter()
                .map(|b| if b == b's' { 0xff } else { b })
                .collect(),
        ),
        ("UTF-16".to_owned(), text.encode_utf16().flat_map(u16::to_le_bytes).collect()),
        ("NaN".to_owned(), text.replace("1e-05", "NaN").into_bytes()),
        ("Infinity".to_owned(), text.replace("1e-05", "Infinity").into_bytes()),
        ("1e999".to_owned(), text.replace("1e-05", "1e999").into_bytes()),
        ("deep arrays".to_owned(), text.replace("1e-05", &"[".repeat(1 << 20)).into_bytes()),
        ("deep objects".to_owned(), text.replace("1e-05", &"{\"a\":".repeat(1 << 20)).into_bytes()),
        ("two objects".to_owned(), [&good[..], b"{}"].concat()),
    ]);
    check_all(cases, |(what, bytes)| {
        f.write("config.json", bytes);
        refused(what, f.answer(), ErrorCode::Format, &["config.json", "expected", "got"])
    });
    fs::remove_file(f.model.join("config.json")).unwrap();
    refused("no config", f.answer(), ErrorCode::Format, &["weights without `config.json`"]).unwrap();
    fs::create_dir(f.model.join("config.json")).unwrap();
    refused("a folder", f.answer(), ErrorCode::Io, &["config.json"]).unwrap();
}
