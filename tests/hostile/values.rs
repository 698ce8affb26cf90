//! Numbers that are none, prompts that do not fit, and ids that mean nothing.

use super::common::quiet;
use super::{Fixture, check_all, fixture, open, refused};
use pocketlora::Error;
use pocketlora::ErrorCode::{ContextFull, Data, Diverged, Format};
use pocketlora::format::{Existing, Progress, Target, quantize};
use pocketlora::train::{Observer, StepReport, TrainConfig};
use serde_json::Value;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

#[cfg(feature = "cli")]
const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n";

/// The bytes of `tensor` in the safetensors file at `path`, to be changed by `change`.
fn change_tensor(path: &Path, tensor: &str, change: impl FnOnce(&mut [u8])) {
    let mut bytes = fs::read(path).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..data]).unwrap();
    let at = |i: usize| data + header[tensor]["data_offsets"][i].as_u64().unwrap() as usize;
    change(&mut bytes[at(0)..at(1)]);
    fs::write(path, bytes).unwrap();
}

struct Silent;

impl Observer for Silent {
    fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

fn train(f: &Fixture) -> Result<(), Error> {
    let engine = open(&f.model)?;
    let data = engine.dataset(&super::common::tiny_chats(f.dir.path(), 3), 1024)?;
    let out = f.dir.path().join("adapter");
    let run = engine.trainer(TrainConfig::default(), data, None, None, &out)?.run(&mut Silent).map(|_| ());
    assert!(!out.join("adapter_model.safetensors").exists() || run.is_ok(), "an adapter of a failed run");
    run
}

#[test]
fn weights_that_are_not_numbers_are_noticed() {
    let f = fixture();
    let path = f.model.join("model.safetensors");
    let good = fs::read(&path).unwrap();
    // As bf16.
    let values = [("NaN", 0x7fc0u16), ("infinity", 0x7f80), ("minus infinity", 0xff80)];
    let tensors = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
    ];
    let cases = tensors.iter().flat_map(|t| values.iter().map(move |v| (*t, *v)));
    check_all(cases, |(tensor, (what, bits))| {
        fs::write(&path, &good).unwrap();
        change_tensor(&path, tensor, |bytes| bytes[..2].copy_from_slice(&bits.to_le_bytes()));
        let what = format!("{what} in {tensor}");
        refused(&what, f.answer(), Diverged, &["logits", "expected", "got", "weights"])?;
        let engine = open(&f.model).map_err(|e| e.to_string())?;
        let score = pocketlora::eval::score_text(&engine, &[5, 6, 7], 512, &mut |_| true);
        refused(&what, score, Diverged, &["loss", "expected", "weights"])?;
        refused(&what, train(&f), Diverged, &["step 1", "expected", "got"])?;
        let source = pocketlora::format::open_source(&f.model).unwrap();
        let (out, mut go_on) = (f.dir.path().join("nf4"), |_: Progress<'_>| ControlFlow::Continue(()));
        let made = quantize(source.as_ref(), &out, Target::Nf4, Existing::Keep, &mut go_on);
        refused(&what, made, Format, &["model.safetensors", tensor, "another copy"])
    });
}

#[test]
fn block_scales_that_are_not_numbers_are_noticed() {
    let mut f = fixture();
    let nf4 = f.dir.path().join("tiny-chat-nf4");
    super::common::convert(&f.model, &nf4, Target::Nf4);
    f.model = nf4;
    let path = f.model.join("model.safetensors");
    let good = fs::read(&path).unwrap();
    let q = "model.layers.0.self_attn.q_proj.weight";
    let cases = [(".nested_absmax", f32::NAN), (".nested_absmax", f32::INFINITY), (".quant_map", f32::NAN)];
    check_all(cases, |(ending, value)| {
        fs::write(&path, &good).unwrap();
        change_tensor(&path, &format!("{q}{ending}"), |bytes| bytes[..4].copy_from_slice(&value.to_le_bytes()));
        refused(ending, f.answer(), Format, &["model.safetensors", q, "finite", "again"])
    });
    fs::write(&path, &good).unwrap();
    f.answer().unwrap();
}

#[test]
fn prompts_that_do_not_fit_are_refused_and_the_chat_lives_on() {
    let f = fixture();
    let mut chat = open(&f.model).unwrap().chat().unwrap();
    chat.max_tokens = 1;
    let mut generate = |ids: &[u32]| chat.generate(ids.to_vec(), &mut quiet);
    let cases = [
        ("longer than the context", vec![5; 300], ContextFull, "256"),
        ("as long as the context", vec![5; 256], ContextFull, "256"),
        ("empty", vec![], Data, "at least one"),
        ("beyond the vocabulary", vec![5, 6, 512], Data, "`512`"),
        ("far beyond", vec![u32::MAX], Data, "4294967295"),
    ];
    let first = generate(&[5, 6]).unwrap().text;
    for (what, ids, code, word) in cases {
        refused(what, generate(&ids), code, &["expected", "got", word]).unwrap();
        assert_eq!(generate(&[5, 6]).unwrap().text, first, "after: {what}");
    }
    assert!(generate(&[5; 255]).is_ok());
    let mut complete = |text: &str| chat.complete(text, &mut quiet);
    refused("empty text", complete(""), Data, &["prompt", "got none"]).unwrap();
    refused("long text", complete(&"a".repeat(10_000)), ContextFull, &["prompt", "`10001`", "256", "shorten"]).unwrap();
}

#[cfg(feature = "cli")]
#[test]
fn eval_refuses_ids_and_texts_that_cannot_be_scored() {
    let f = fixture();
    let [ids, text, out] = ["ids.json", "text.txt", "logits.safetensors"].map(|n| f.dir.path().join(n));
    let eval = |args: &[&std::ffi::OsStr]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_pocketlora"));
        command.args(["eval", "--no-quantize", "-m"]).arg(&f.model).args(args);
        let done = command.env("POCKETLORA_HOME", f.dir.path()).output().unwrap();
        (done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned())
    };
    let cases = [
        ("[[99999]]", "array 0"),
        ("[[1, 99999]]", "`99999`"),
        ("[[1, 2], [3, 512]]", "`512`"),
        ("[1, 2]", "array of arrays"),
        ("7", "array of arrays"),
        ("{\"ids\": []}", "array of arrays"),
        ("[[-1, 2]]", "array of arrays"),
        ("[[1.5, 2]]", "array of arrays"),
        ("[[1e400]]", "array of arrays"),
        ("[[4294967296]]", "array of arrays"),
        ("[[\"1\"]]", "array of arrays"),
        ("[[1, 2]", "array of arrays"),
        ("", "array of arrays"),
        ("[]", "at least one array"),
        ("[[]]", "array 0"),
        ("[[1, 2], []]", "array 1"),
    ];
    let check = |content: &str, words: &[&str], (code, stderr): (Option<i32>, String)| {
        if code != Some(1) || stderr.contains("panicked") {
            return Err(format!("`{content}`: exit code {code:?}: {stderr}"));
        }
        match words.iter().find(|w| !stderr.contains(**w)) {
            Some(word) => Err(format!("`{content}`: no `{word}` in {stderr}")),
            None => Ok(()),
        }
    };
    check_all(cases, |(content, word)| {
        fs::write(&ids, content).unwrap();
        let words = ["ids.json", "expected", "got", word];
        check(content, &words, eval(&["--ids".as_ref(), ids.as_ref()]))?;
        check(content, &words, eval(&["--ids".as_ref(), ids.as_ref(), "--save-logits".as_ref(), out.as_ref()]))?;
        if out.exists() { Err(format!("`{content}`: a file of logits")) } else { Ok(()) }
    });
    fs::write(&ids, format!("[{:?}]", vec![5; 300])).unwrap();
    check("too long", &["ids.json", "array 0", "256", "`300`"], eval(&["--ids".as_ref(), ids.as_ref()])).unwrap();
    fs::write(&ids, "[[5]]").unwrap();
    check("one id has no next", &["ids.json", "at least two"], eval(&["--ids".as_ref(), ids.as_ref()])).unwrap();
    for (content, word) in [
        (&b""[..], "at least two"),
        (b"a", "at least two"),
        (b"\xff\xfe", "UTF-8"),
        (b"a\xff", "UTF-8"),
        (POINTER, "git lfs pull"),
    ] {
        fs::write(&text, content).unwrap();
        check("text", &["text.txt", word], eval(&["--text".as_ref(), text.as_ref()])).unwrap();
    }
}
