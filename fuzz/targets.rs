//! What is done with bytes from outside, one function for each kind of file: whatever they are, it must come to an end
//! with an error or without, never with a panic, nor with memory out of proportion.
//!
//! cargo-fuzz calls these, and so does the test `hostile` with the committed seeds and mutations of them.
#![allow(dead_code)] // a fuzz target uses one of them

use pocketlora::adapter::AdapterFile;
use pocketlora::chat::{ChatTemplate, Message};
use pocketlora::format::{Source, open_source};
use pocketlora::tokenizer::Tokenizer;
use pocketlora::{Engine, Options};
use serde_json::json;
use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Tensors that are read of a file, and rows of each: what is wrong shows in the first ones.
const TENSORS: usize = 64;
const ROWS: usize = 4;
/// Values of a row that are asked for: a row that a small file claims to have may not be larger.
const MOST_VALUES: usize = 1 << 22;

/// A folder that the thread's rounds share.
fn folder() -> PathBuf {
    thread_local! {
        static FOLDER: RefCell<Option<tempfile::TempDir>> = const { RefCell::new(None) };
    }
    FOLDER.with_borrow_mut(|dir| dir.get_or_insert_with(|| tempfile::tempdir().expect("a folder")).path().to_owned())
}

/// The folder `name` with nothing but `files` in it.
fn folder_of(name: &str, files: &[(&str, &[u8])]) -> PathBuf {
    let dir = folder().join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).expect("a folder");
    files.iter().for_each(|(file, bytes)| fs::write(dir.join(file), bytes).expect("room"));
    dir
}

/// A model of a layer, whose files the others are put beside.
struct Tiny {
    _dir: tempfile::TempDir,
    engine: Engine,
    config: Vec<u8>,
    weights: Vec<u8>,
}

fn tiny() -> &'static Tiny {
    static TINY: OnceLock<Tiny> = OnceLock::new();
    TINY.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a folder");
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR"));
        let seeds = if seeds.ends_with("fuzz") { seeds.join("seeds") } else { seeds.join("fuzz/seeds") };
        let read = |name: &str| fs::read(seeds.join(name)).expect(name);
        let (config, weights) = (read("config/tiny.json"), read("safetensors/nf4.safetensors"));
        let files = [
            ("config.json", &config),
            ("model.safetensors", &weights),
            ("tokenizer.json", &read("tokenizer/bpe.json")),
        ];
        files.iter().for_each(|(name, bytes)| fs::write(dir.path().join(name), bytes).expect("room"));
        let engine = Engine::open(dir.path(), &Options::new().threads(1)).expect("the seeds are a model");
        Tiny { _dir: dir, engine, config, weights }
    })
}

/// Reads the first rows of the first tensors.
fn read(source: &dyn Source) {
    for (index, meta) in source.tensors().iter().take(TENSORS).enumerate() {
        let (rows, cols) = match meta.shape[..] {
            [] => (1, 1),
            [values] => (1, values),
            [rows, ref rest @ ..] => (rows.min(ROWS), rest.iter().fold(1, |all: usize, n| all.saturating_mul(*n))),
        };
        if let Some(values) = rows.checked_mul(cols).filter(|values| *values <= MOST_VALUES) {
            let _ = source.read_rows(index, 0..rows, &mut vec![0.0; values]);
        }
        let _ = source.nf4(index);
    }
    let _ = source.sidecars();
}

/// Answers a token, if it opens.
fn answer(dir: &Path) {
    let Ok(engine) = Engine::open(dir, &Options::new().threads(1).context(64).ids_only(true)) else { return };
    let Ok(mut chat) = engine.chat() else { return };
    chat.max_tokens = 1;
    if let Ok(mut decoder) = chat.decoder(vec![1, 2, 3]) {
        let _ = decoder.next_token();
    }
}

/// A GGUF file: its header, tensors, tokenizer and template; and as an adapter.
pub fn gguf(data: &[u8]) {
    let path = folder_of("gguf", &[("model.gguf", data)]).join("model.gguf");
    if let Ok(source) = open_source(&path) {
        read(source.as_ref());
        let _ = pocketlora_models::build(source.config());
    }
    let _ = AdapterFile::open(&path);
}

/// Weights in safetensors beside the config of a tiny model: dense, or with bitsandbytes' quant state.
pub fn safetensors(data: &[u8]) {
    let dir = folder_of("safetensors", &[("config.json", &tiny().config), ("model.safetensors", data)]);
    if let Ok(source) = open_source(&dir) {
        read(source.as_ref());
    }
    answer(&dir);
}

/// An adapter's folder: two bytes with the length of the config, the config, the weights.
pub fn adapter(data: &[u8]) {
    let Some((length, rest)) = data.split_first_chunk::<2>() else { return };
    let (config, weights) = rest.split_at(rest.len().min(u16::from_le_bytes(*length).into()));
    let files = [("adapter_config.json", config), ("adapter_model.safetensors", weights)];
    let dir = folder_of("adapter", &files);
    let engine = &tiny().engine;
    if let Ok(id) = engine.attach(&dir, 1.0) {
        let _ = engine.chat().and_then(|mut chat| chat.decoder(vec![1, 2, 3])?.next_token());
        engine.detach(id).expect("it was attached");
    }
}

/// An adapter in few bits: what stands between its first eight bytes and the checksum at its end.
pub fn compressed(data: &[u8]) {
    let mut bytes = [b"PLSIGNS1", data].concat();
    let sum = pocketlora::internals::add_to_checksum(0, &bytes);
    bytes.extend(sum.to_le_bytes());
    let path = folder_of("compressed", &[("a.signs", &bytes)]).join("a.signs");
    let engine = &tiny().engine;
    if let Ok(id) = engine.attach(&path, 1.0) {
        let _ = engine.chat().and_then(|mut chat| chat.decoder(vec![1, 2, 3])?.next_token());
        engine.detach(id).expect("it was attached");
    }
}

/// A tokenizer, and what it makes of texts.
pub fn tokenizer(data: &[u8]) {
    let dir = folder_of("tokenizer", &[("config.json", &tiny().config), ("tokenizer.json", data)]);
    let Ok(mut tokenizer) = Tokenizer::open(&dir) else { return };
    for text in ["", "hello world", "a<|im_end|>\n ü 你 \u{1f600}\u{0}  \t9,000.5"] {
        let Ok(ids) = tokenizer.encode(text, true) else { continue };
        let _ = tokenizer.decode(&ids);
        let mut stream = tokenizer.stream();
        ids.iter().take(64).for_each(|id| drop(stream.push(*id)));
    }
    let _ = ChatTemplate::open(&dir, &mut tokenizer);
}

/// A chat template and what it makes of conversations.
pub fn template(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let special = vec![("eos_token".to_owned(), "</s>".to_owned()), ("bos_token".to_owned(), "<s>".to_owned())];
    let Ok(template) = ChatTemplate::new(text.to_owned(), special, "template".to_owned()) else { return };
    let messages =
        [("system", "be brief"), ("user", "hello <|im_end|>"), ("assistant", "<think>\nhm</think>yes"), ("user", "2?")]
            .map(|(role, text)| Message::new(role, text));
    let tools = json!([{"name": "weather", "parameters": {"type": "object"}}]);
    for thinking in [None, Some(true)] {
        let _ = template.render_thinking(&messages, Some(&tools), true, thinking);
        let _ = template.render_thinking(&messages[1..2], None, false, thinking);
    }
    let _ = template.knows_thinking();
}

/// The config of a model, of whatever family, with the weights of a tiny one beside it.
pub fn config(data: &[u8]) {
    if let Ok(json) = serde_json::from_slice(data)
        && let Ok(model) = pocketlora_models::build(&json)
    {
        let _ = (model.params().len(), model.states().len(), model.ropes().len());
    }
    let dir = folder_of("config", &[("config.json", data), ("model.safetensors", &tiny().weights)]);
    answer(&dir);
}

/// Training data, one JSON record a line.
pub fn jsonl(data: &[u8]) {
    let path = folder_of("jsonl", &[("data.jsonl", data)]).join("data.jsonl");
    let _ = tiny().engine.dataset(&path, 64);
}
