//! What several test programs share.
#![allow(dead_code)] // each program uses a part of it

use pocketlora::format::{Existing, Target, open_source, quantize};
use pocketlora::{Answer, Engine, Options, Precision};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::{self, Write as _};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Whether `POCKETLORA_REQUIRE` (a comma-separated list) forbids to skip `what`.
pub fn required(what: &str) -> bool {
    env::var("POCKETLORA_REQUIRE").is_ok_and(|list| list.split(',').any(|item| item.trim() == what))
}

/// Says that a test was skipped. Not `eprintln!`, which the test harness swallows when a test passes.
pub fn skip(why: &str) {
    let _ = writeln!(io::stderr(), "SKIPPED: {why}");
}

/// The SmolLM2 GGUF of the oracles (sha256 b179c952...): from `POCKETLORA_TEST_GGUF`, else pulled into the model cache
/// as `pocketlora pull` does. Where it cannot be fetched the caller skips.
///
/// # Panics
/// It is required and cannot be had.
pub fn real_gguf() -> Option<PathBuf> {
    if let Some(path) = env::var_os("POCKETLORA_TEST_GGUF").map(PathBuf::from) {
        assert!(path.is_file(), "POCKETLORA_TEST_GGUF names no file");
        return Some(path);
    }
    match pulled() {
        Ok(path) => Some(path),
        Err(why) => {
            assert!(!required("model"), "POCKETLORA_REQUIRE has `model`, but it cannot be fetched: {why}");
            skip(&format!("this test needs the SmolLM2 GGUF: {why}"));
            None
        }
    }
}

#[cfg(feature = "hub")]
fn pulled() -> Result<PathBuf, String> {
    static PULLED: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let pull = || pocketlora::hub::pull("smollm2-135m", &mut |_| ControlFlow::Continue(())).map_err(|e| e.to_string());
    PULLED.get_or_init(pull).clone()
}

#[cfg(not(feature = "hub"))]
fn pulled() -> Result<PathBuf, String> {
    Err("built without the feature `hub`".to_owned())
}

/// Path of a golden.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles").join(name)
}

/// A tensor of a golden file, integers converted to f32.
#[derive(Clone)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

/// All tensors of a safetensors file.
pub fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let widen = |dtype, raw: &[u8]| -> Vec<f32> {
        match dtype {
            Dtype::F32 => raw.chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect(),
            Dtype::F16 => raw.chunks(2).map(|c| half::f16::from_le_bytes(c.try_into().unwrap()).to_f32()).collect(),
            Dtype::BF16 => raw.chunks(2).map(|c| half::bf16::from_le_bytes(c.try_into().unwrap()).to_f32()).collect(),
            Dtype::F64 => raw.chunks(8).map(|c| f64::from_le_bytes(c.try_into().unwrap()) as f32).collect(),
            Dtype::U8 => raw.iter().map(|b| f32::from(*b)).collect(),
            Dtype::I32 => raw.chunks(4).map(|c| i32::from_le_bytes(c.try_into().unwrap()) as f32).collect(),
            Dtype::I64 => raw.chunks(8).map(|c| i64::from_le_bytes(c.try_into().unwrap()) as f32).collect(),
            other => panic!("unexpected {other:?}"),
        }
    };
    let tensor = |v: &safetensors::tensor::TensorView<'_>| Tensor {
        shape: v.shape().to_vec(),
        data: widen(v.dtype(), v.data()),
    };
    file.tensors().iter().map(|(name, view)| (name.clone(), tensor(view))).collect()
}

/// Ids of a golden tensor.
pub fn ids(tensor: &Tensor) -> Vec<u32> {
    tensor.data.iter().map(|&v| v as u32).collect()
}

/// Opens a model in f32 arithmetic on `threads` threads.
pub fn open_exact(dir: &Path, threads: usize) -> Engine {
    Engine::open(dir, &Options::new().threads(threads).precision(Precision::Exact)).unwrap()
}

/// Converts a model into `out`.
pub fn convert(source: &Path, out: &Path, to: Target) {
    quantize(open_source(source).unwrap().as_ref(), out, to, Existing::Keep, &mut |_| ControlFlow::Continue(()))
        .unwrap();
}

/// Logits of all tokens of a text, row after row.
pub fn logits(engine: &Engine, ids: &[u32]) -> Vec<f32> {
    let mut all = Vec::new();
    pocketlora::eval::logits_of(engine, ids, &mut |_| true, &mut |_, row| {
        all.extend_from_slice(row);
        Ok(())
    })
    .unwrap();
    all
}

/// The greedy continuation of a text by at most `max_tokens` tokens.
pub fn complete(engine: &Engine, text: &str, max_tokens: usize) -> Answer {
    let mut chat = engine.chat().unwrap();
    chat.max_tokens = max_tokens;
    chat.complete(text, &mut quiet).unwrap()
}

/// Listens to nothing.
pub fn quiet(_: &str) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The largest absolute difference, with its index.
pub fn max_diff(actual: &[f32], expected: &[f32]) -> (f32, usize) {
    assert_eq!(actual.len(), expected.len());
    let diffs = actual.iter().zip(expected).map(|(a, e)| if a.is_finite() { (a - e).abs() } else { f32::INFINITY });
    diffs.zip(0..).fold((0.0, 0), |worst, d| if d.0 > worst.0 { d } else { worst })
}

/// Runs all of a table of cases and reports every failure, not just the first.
pub fn check_all<T>(cases: impl IntoIterator<Item = T>, check: impl Fn(&T) -> Result<(), String>) {
    let failures: Vec<String> = cases.into_iter().filter_map(|case| check(&case).err()).collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// Text of the tiny models' chat template.
const TINY_TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                             {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// The tiny Llama with a tokenizer of single bytes and two chat markers, in a folder of its own.
pub fn tiny_chat_model(dir: &Path) -> PathBuf {
    let out = dir.join("tiny-chat");
    fs::create_dir_all(&out).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden("tiny-llama").join(file), out.join(file)).unwrap();
    }
    // GPT-2's byte alphabet: printable bytes stand for themselves, the others for characters from U+0100 on.
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut vocab =
        serde_json::Map::from_iter([("<|im_start|>".to_owned(), 1.into()), ("<|im_end|>".to_owned(), 2.into())]);
    let mut next = 0x100;
    for byte in 0..256u32 {
        let c = if printable(byte) {
            byte
        } else {
            next += 1;
            next - 1
        };
        vocab.insert(char::from_u32(c).unwrap().to_string(), (byte + 3).into());
    }
    let special = |id: u32, content: &str| {
        serde_json::json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
                           "rstrip": false, "normalized": false})
    };
    let byte_level =
        serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(1, "<|im_start|>"), special(2, "<|im_end|>")],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false},
    });
    let config = serde_json::json!({"eos_token": "<|im_end|>", "chat_template": TINY_TEMPLATE});
    fs::write(out.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(out.join("tokenizer_config.json"), config.to_string()).unwrap();
    out
}

/// A data file of short conversations.
pub fn tiny_chats(dir: &Path, lines: usize) -> PathBuf {
    let path = dir.join("chats.jsonl");
    let line = |i: usize| {
        let messages = serde_json::json!([
            {"role": "user", "content": format!("what is number {i}?")},
            {"role": "assistant", "content": format!("it is {}", i * 7 % 10)},
        ]);
        format!("{}\n", serde_json::json!({ "messages": messages }))
    };
    fs::write(&path, (0..lines).map(line).collect::<String>()).unwrap();
    path
}

/// The same model in NF4, and `lines` conversations to train it on.
pub fn tiny_training(dir: &Path, lines: usize) -> (PathBuf, PathBuf) {
    let (plain, model) = (tiny_chat_model(dir), dir.join("nf4"));
    convert(&plain, &model, Target::Nf4);
    (model, tiny_chats(dir, lines))
}

/// The values of a buffer.
pub fn values_of(cpu: &pocketlora_kernels::Cpu, buffer: &pocketlora_kernels::cpu::Buffer) -> Vec<f32> {
    use pocketlora_kernels::Memory as _;
    let mut values = vec![0.0; cpu.len(buffer)];
    cpu.read(buffer, &mut values).unwrap();
    values
}
