//! What a chat does beside answering: thoughts told apart, texts at which it stops, and a file in which it goes on.

use crate::common::{check_all, golden, quiet, tiny_chat_model};
use pocketlora::{Chat, Engine, ErrorCode, Finish, Listener, LogitFilter, Options, Precision, Result, Sampling};
use serde_json::json;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Has the model say these bytes, which are its tokens from 3 on, and then end its turn.
struct Says(Vec<u32>, usize);

impl Says {
    fn text(text: &str) -> Box<dyn LogitFilter> {
        let alphabet = |byte: u8| u32::from(byte) + 3;
        Box::new(Says(text.bytes().map(alphabet).chain([2]).collect(), 0))
    }
}

impl LogitFilter for Says {
    fn begin(&mut self, _: &[u32]) {
        self.1 = 0;
    }

    fn apply(&mut self, logits: &mut [f32], _: &[u32]) -> Result<()> {
        logits.fill(f32::NEG_INFINITY);
        logits[self.0[self.1.min(self.0.len() - 1)] as usize] = 0.0;
        Ok(())
    }

    fn accept(&mut self, _: u32) {
        self.1 += 1;
    }
}

/// Hears thoughts and text apart.
#[derive(Default)]
struct Ears([String; 2]);

impl Listener for Ears {
    fn on_thought(&mut self, piece: &str) -> ControlFlow<()> {
        self.0[0] += piece;
        ControlFlow::Continue(())
    }

    fn on_text(&mut self, piece: &str) -> ControlFlow<()> {
        self.0[1] += piece;
        ControlFlow::Continue(())
    }
}

/// A template as thinking models have: it shows the thoughts of the last turn alone, and begins them where it is told.
const THINKS: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}<think>\n\
                      {{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}\
                      {% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not \
                      enable_thinking %}<think>\n\n</think>\n\n{% elif enable_thinking is defined %}<think>\n{% endif %}\
                      {% endif %}";

fn thinking_model(dir: &Path) -> PathBuf {
    let model = tiny_chat_model(dir);
    let config = json!({"eos_token": "<|im_end|>", "chat_template": THINKS});
    fs::write(model.join("tokenizer_config.json"), config.to_string()).unwrap();
    model
}

fn open(dir: &Path) -> Engine {
    Engine::open(dir, &Options::new().threads(2)).unwrap()
}

#[test]
fn thoughts_are_told_apart_and_left_out_of_later_turns() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&thinking_model(dir.path()));
    assert!(engine.text().unwrap().template.knows_thinking());
    for (thinking, says, thoughts, said) in [
        (None, "<think>\nhm\n</think>\n\nyes", "hm\n", "yes"),
        (Some(true), "hm\n</think>\n\nyes", "hm\n", "yes"),
        (Some(false), "yes", "", "yes"),
    ] {
        let mut chat = engine.chat().unwrap();
        (chat.thinking, chat.filters) = (thinking, vec![Says::text(says)]);
        let mut ears = Ears::default();
        let answer = chat.ask("so?", &mut ears).unwrap();
        assert_eq!((&*answer.thoughts, &*answer.text), (thoughts, said), "{thinking:?}");
        assert_eq!(ears.0, [thoughts, said], "{thinking:?}");
        assert_eq!(answer.generated.finish, Finish::Stop);
        let turn = &chat.messages()[1];
        assert_eq!(turn.content.as_deref(), Some("yes"));
        assert_eq!(turn.extra.get("reasoning_content").is_some(), !thoughts.is_empty());
        let mut turns = chat.messages().to_vec();
        turns.push(pocketlora::Message::new("user", "sure?"));
        let prompt = engine.text().unwrap().tokenizer.decode(&chat.prompt_of(&turns).unwrap()).unwrap();
        assert!(prompt.contains("yes") && !prompt.contains("hm"), "{prompt}");
    }
    // Cut in its thoughts, there is no answer to go on from.
    let mut chat = engine.chat().unwrap();
    (chat.thinking, chat.filters, chat.max_tokens) = (Some(true), vec![Says::text("hm hm hm")], 4);
    let answer = chat.ask("so?", &mut quiet).unwrap();
    assert_eq!((&*answer.thoughts, &*answer.text, chat.messages().len()), ("hm h", "", 0));
    assert!(!open(&tiny_chat_model(dir.path())).text().unwrap().template.knows_thinking());
}

/// Some tokenizers have as special tokens what stands around thoughts and calls of tools, and no text shows those.
#[test]
fn marks_that_are_special_tokens_are_seen() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_chat_model(dir.path());
    let path = model.join("tokenizer.json");
    let mut tokenizer: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (id, name) in (259..).zip(["<think>", "</think>", "<|tool_call_start|>", "<|other|>"]) {
        tokenizer["model"]["vocab"][name] = id.into();
        let mut added = tokenizer["added_tokens"][0].clone();
        (added["id"], added["content"]) = (id.into(), name.into());
        tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    }
    fs::write(&path, tokenizer.to_string()).unwrap();
    let byte = |byte: u8| u32::from(byte) + 3;
    let ids = vec![259, byte(b'h'), byte(b'm'), 260, 261, byte(b'f'), 262, byte(b'('), 2];
    let mut chat = open(&model).chat().unwrap();
    chat.filters = vec![Box::new(Says(ids, 0))];
    let answer = chat.ask("so?", &mut quiet).unwrap();
    assert_eq!((&*answer.thoughts, &*answer.text), ("hm", "<|tool_call_start|>f("));
}

#[test]
fn an_answer_ends_before_a_stop_text() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&tiny_chat_model(dir.path()));
    let mut chat = engine.chat().unwrap();
    (chat.stop, chat.filters) = (vec!["\nUser:".to_owned()], vec![Says::text("yes\nUse it\nUser: more")]);
    let mut heard = String::new();
    let answer = chat.ask("so?", &mut |piece: &str| {
        heard += piece;
        ControlFlow::Continue(())
    });
    let answer = answer.unwrap();
    assert_eq!((&*answer.text, &*heard), ("yes\nUse it", "yes\nUse it"));
    assert_eq!(answer.generated.finish, Finish::Stop);
    let said = chat.complete("text", &mut quiet).unwrap();
    assert_eq!(said.text, "yes\nUse it", "also where no template is");
}

/// Some tokens after those that it was given before.
fn go_on(chat: &mut Chat, ids: &mut Vec<u32>, more: &[u32], tokens: usize) {
    ids.extend(more);
    chat.max_tokens = tokens;
    let mut decoder = chat.decoder(ids.clone()).unwrap();
    while let Some(id) = decoder.next_token().unwrap() {
        ids.push(id);
    }
}

/// A chat that goes on from a file ends in the same bytes, of keys, values and recurrent states, as one without a break.
#[test]
fn a_resumed_chat_is_the_uninterrupted_one_bit_for_bit() {
    let lora = golden("adapters/lora");
    let cases: Vec<(PathBuf, Option<&Path>, Options)> = [
        ("tiny-llama", None, Options::new()),
        ("tiny-llama", Some(&*lora), Options::new().precision(Precision::Exact)),
        ("tiny-mistral", None, Options::new().int8_cache(true)),
        ("tiny-mistral-bnb4", None, Options::new().precision(Precision::Bf16)),
        ("families/mamba2", None, Options::new()),
        ("families/lfm2", None, Options::new()),
        ("families/qwen3_5_text", None, Options::new().precision(Precision::Exact)),
        ("families/gemma3_text", None, Options::new()),
    ]
    .into_iter()
    .map(|(model, adapter, options)| (golden(model), adapter, options))
    .collect();
    let dir = tempfile::tempdir().unwrap();
    check_all(cases, |(model, adapter, options)| {
        let new = || {
            let engine = Engine::open(model, &options.clone().threads(2).ids_only(true)).unwrap();
            if let Some(dir) = adapter {
                engine.attach(dir, 0.5).unwrap();
            }
            let mut chat = engine.chat().unwrap();
            chat.sampling = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
            chat
        };
        let file = |name: &str| dir.path().join(name);
        let first: Vec<u32> = (0..90).map(|i| (i * 37 + 11) % 90).collect();
        let second: Vec<u32> = (0..7).map(|i| (i * 5 + 3) % 90).collect();
        let (mut whole, mut ids) = (new(), Vec::new());
        go_on(&mut whole, &mut ids, &first, 9);
        whole.save_state(&file("half")).unwrap();
        let mut resumed = new();
        resumed.load_state(&file("half")).unwrap();
        resumed.save_state(&file("again")).unwrap();
        let read = |name: &str| fs::read(file(name)).unwrap();
        if read("half") != read("again") {
            return Err(format!("{}: what was loaded is saved otherwise", model.display()));
        }
        let mut ids_resumed = ids.clone();
        go_on(&mut whole, &mut ids, &second, 30);
        go_on(&mut resumed, &mut ids_resumed, &second, 30);
        if ids != ids_resumed {
            return Err(format!("{}: other tokens: {ids:?} {ids_resumed:?}", model.display()));
        }
        whole.save_state(&file("whole")).unwrap();
        resumed.save_state(&file("resumed")).unwrap();
        if read("whole") != read("resumed") {
            return Err(format!("{}: other states", model.display()));
        }
        Ok(())
    });
}

#[test]
fn a_kept_chat_belongs_to_its_model_and_adapters() {
    let dir = tempfile::tempdir().unwrap();
    let (model, file) = (tiny_chat_model(dir.path()), dir.path().join("state"));
    let engine = open(&model);
    let mut chat = engine.chat().unwrap();
    (chat.max_tokens, chat.filters) = (8, vec![Says::text("yes")]);
    chat.ask("so?", &mut quiet).unwrap();
    chat.save_state(&file).unwrap();
    let mut back = engine.chat().unwrap();
    back.load_state(&file).unwrap();
    assert_eq!(back.messages(), chat.messages());

    let lora = golden("adapters/lora");
    let refused = |engine: &Engine, file: &Path, code: ErrorCode, word: &str| {
        let mut chat = engine.chat().unwrap();
        let error = chat.load_state(file).unwrap_err();
        assert!(error.code() == code && error.to_string().contains(word), "{error}");
        assert!(chat.messages().is_empty(), "nothing changes");
    };
    let id = engine.attach(&lora, 1.0).unwrap();
    refused(&engine, &file, ErrorCode::Config, "adapters");
    engine.detach(id).unwrap();
    let exact = Engine::open(&model, &Options::new().threads(1).precision(Precision::Exact)).unwrap();
    refused(&exact, &file, ErrorCode::Config, "numbers");
    refused(&open(&golden("tiny-mistral")), &file, ErrorCode::Config, "base");
    refused(&engine, &model.join("model.safetensors"), ErrorCode::Format, "`--state`");
    refused(&engine, &dir.path().join("nothing"), ErrorCode::Io, "nothing");

    // Every flipped byte is found, wherever it is; and every end.
    let good = fs::read(&file).unwrap();
    let damaged = dir.path().join("damaged");
    for at in (0..good.len()).step_by(good.len() / 97) {
        let mut bytes = good.clone();
        bytes[at] ^= 0x15;
        fs::write(&damaged, &bytes).unwrap();
        let mut chat = engine.chat().unwrap();
        assert!(chat.load_state(&damaged).is_err() && chat.messages().is_empty(), "byte {at}");
        fs::write(&damaged, &good[..at]).unwrap();
        assert!(chat.load_state(&damaged).is_err(), "cut to {at}");
    }
}
