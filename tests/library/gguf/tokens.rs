//! The rebuilt tokenizer: loaded by the `tokenizers` crate, it gives the ids of the model's own.

use super::writer::{EXTRA, MERGES, Writer, all, byte_alphabet, small_llama};
use crate::common::real_gguf;
use bytes::Bytes;
use pocketlora::format::gguf::Gguf;
use pocketlora::format::{Sidecars, Source};
use serde_json::{Value, json};
use std::path::Path;
use tokenizers::Tokenizer;

pub fn sidecars(w: &Writer) -> Sidecars {
    Gguf::from_bytes(Bytes::from(w.build()), Path::new("small.gguf")).unwrap().sidecars().unwrap()
}

fn file<'a>(sidecars: &'a Sidecars, name: &str) -> &'a [u8] {
    &sidecars.files.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name}")).1
}

pub fn json_file(sidecars: &Sidecars, name: &str) -> Value {
    serde_json::from_slice(file(sidecars, name)).unwrap()
}

pub fn load(sidecars: &Sidecars) -> Tokenizer {
    Tokenizer::from_bytes(file(sidecars, "tokenizer.json")).unwrap()
}

pub fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, true).unwrap().get_ids().to_vec()
}

/// The id of a token of the small vocabulary.
fn id(token: &str) -> u32 {
    let mut tokens = byte_alphabet();
    tokens.extend(MERGES.iter().map(|m| m.replace(' ', "")));
    tokens.extend(EXTRA.iter().map(|&t| t.to_owned()));
    tokens.iter().position(|t| t == token).unwrap_or_else(|| panic!("no token {token}")) as u32
}

#[test]
fn each_pre_tokenizer_splits_as_its_models_do() {
    // Where the four differ: runs of digits, capital contractions, line ends after punctuation, words that no merge
    // makes, composed characters. Expected tokens follow from the published regular expressions.
    let ones: &[&str] = &["1", "2", "3", "4"];
    let hello: &[&str] = &["Ġ", "h", "e", "l", "l", "o"];
    let decomposed: &[&str] = &["e", "Ì", "ģ"];
    let cases: &[(&str, &str, &[&str])] = &[
        ("gpt-2", "1234", &["1234"]),
        ("smollm", "1234", ones),
        ("llama-bpe", "1234", &["123", "4"]),
        ("qwen2", "1234", ones),
        ("gpt-2", "'S", &["'", "S"]),
        ("smollm", "'S", &["'", "S"]),
        ("llama-bpe", "'S", &["'S"]),
        ("qwen2", "'S", &["'S"]),
        ("gpt-2", "!\n", &["!", "Ċ"]),
        ("smollm", "!\n", &["!", "Ċ"]),
        ("llama-bpe", "!\n", &["!Ċ"]),
        ("qwen2", "!\n", &["!Ċ"]),
        ("gpt-2", " hello", hello),
        ("smollm", " hello", hello),
        ("llama-bpe", " hello", &["Ġhello"]),
        ("qwen2", " hello", hello),
        ("gpt-2", "e\u{301}", decomposed),
        ("smollm", "e\u{301}", decomposed),
        ("llama-bpe", "e\u{301}", decomposed),
        ("qwen2", "e\u{301}", &["Ã", "©"]),
        // Names of the same split.
        ("smaug-bpe", "1234", &["123", "4"]),
        ("smaug-bpe", " hello", &["Ġhello"]),
        ("llama-v3", " hello", &["Ġhello"]),
        ("tekken", "1234", ones),
        ("tekken", " hello", &["Ġhello"]),
        ("deepseek-coder", "'S", &["'", "S"]),
        ("default", "1234", &["123", "4"]),
    ];
    let marks = ["<|im_start|>", "hi", "<|im_end|>", "Ċ", "[WORD]", "<|endoftext|>"];
    let text = "<|im_start|>hi<|im_end|>\n[WORD]<|endoftext|>";
    let tokens = |list: &[&str]| list.iter().map(|t| id(t)).collect::<Vec<_>>();
    let check = |pre: &str, text: &str, want: &[&str]| {
        let mut w = small_llama();
        w.string("tokenizer.ggml.pre", pre).bool("tokenizer.ggml.add_bos_token", false);
        let tokenizer = load(&sidecars(&w));
        let got = ids(&tokenizer, text);
        if got != tokens(want) {
            return Err(format!(
                "expected {want:?}, got {:?}",
                got.iter().map(|&i| tokenizer.id_to_token(i)).collect::<Vec<_>>()
            ));
        }
        let back = tokenizer.decode(&got, false).unwrap();
        if pre != "qwen2" && back != text { Err(format!("decoded to {back:?}")) } else { Ok(()) }
    };
    all(cases.iter().map(|(pre, text, want)| ((pre, text), check(pre, text, want))));
    all(["gpt-2", "smollm", "llama-bpe", "qwen2"].map(|pre| (pre, check(pre, text, &marks))));
}

#[test]
fn marks_are_special_and_words_are_not() {
    let tokenizer = load(&sidecars(&small_llama()));
    let text = [id("<|im_start|>"), id("hi"), id("[WORD]")];
    assert_eq!(tokenizer.decode(&text, true).unwrap(), "hi[WORD]");
}

#[test]
fn bos_and_eos_are_added_where_the_file_asks() {
    let (bos, hi, eos) = (id("<|im_start|>"), id("hi"), id("<|im_end|>"));
    let with = |pre: &str, bos: Option<bool>, eos: bool| {
        let mut w = small_llama();
        w.string("tokenizer.ggml.pre", pre).bool("tokenizer.ggml.add_eos_token", eos);
        if let Some(bos) = bos {
            w.bool("tokenizer.ggml.add_bos_token", bos);
        }
        ids(&load(&sidecars(&w)), "hi")
    };
    assert_eq!(with("smollm", None, false), [hi]);
    assert_eq!(with("smollm", Some(false), false), [hi]);
    assert_eq!(with("smollm", Some(true), false), [bos, hi]);
    assert_eq!(with("qwen2", Some(true), true), [bos, hi, eos]);
    // Files of Llama 3 from before mid-2025 lack the switch; its own tokenizer and llama.cpp add BOS.
    assert_eq!(with("llama-bpe", None, false), [bos, hi]);
    assert_eq!(with("llama-bpe", Some(false), false), [hi]);
}

#[test]
fn the_configs_say_what_the_file_says() {
    let (bos, eos) = (id("<|im_start|>"), id("<|im_end|>"));
    let mut w = small_llama();
    w.u32("tokenizer.ggml.padding_token_id", eos);
    let files = sidecars(&w);
    let want = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>", "model_max_length": 64, "clean_up_tokenization_spaces": false,
        "chat_template": "{{ messages }}",
    });
    assert_eq!(json_file(&files, "tokenizer_config.json"), want);
    let want = json!({"bos_token_id": bos, "pad_token_id": eos, "eos_token_id": [eos, id("<|endoftext|>")]});
    assert_eq!(json_file(&files, "generation_config.json"), want);
    // An end of turn under its own key, one mark only.
    w.u32("tokenizer.ggml.eot_token_id", id("[WORD]"));
    let ends = &json_file(&sidecars(&w), "generation_config.json")["eos_token_id"];
    assert_eq!(*ends, json!([eos, id("[WORD]"), id("<|endoftext|>")]));
}

#[test]
fn named_templates_and_sampling_are_kept() {
    let mut w = small_llama();
    w.string("tokenizer.chat_template.tool_use", "{{ tools }}").f32("general.sampling.temp", 0.5);
    w.u32("general.sampling.top_k", 20);
    let files = sidecars(&w);
    let want =
        json!([{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ tools }}"}]);
    assert_eq!(json_file(&files, "tokenizer_config.json")["chat_template"], want);
    let generation = json_file(&files, "generation_config.json");
    assert_eq!((&generation["temperature"], &generation["top_k"]), (&json!(0.5), &json!(20)));
}

/// Converters give such marks the type of words, or of ordinary tokens.
#[test]
fn the_end_of_a_turn_is_a_mark_whatever_its_type() {
    let mut w = small_llama();
    let count = byte_alphabet().len() + MERGES.len() + EXTRA.len();
    w.i32s("tokenizer.ggml.token_type", &vec![1; count]);
    let files = sidecars(&w);
    let tokenizer = load(&files);
    let got = ids(&tokenizer, "hi<|im_end|>");
    assert_eq!(got, [id("hi"), id("<|im_end|>")]);
    assert_eq!(tokenizer.decode(&got, true).unwrap(), "hi");
}

#[test]
fn a_file_without_tokenizer_has_no_sidecars() {
    let mut w = small_llama();
    w.pairs.retain(|(key, _, _)| !key.starts_with("tokenizer."));
    assert!(sidecars(&w).files.is_empty());
}

/// 16 prompts, a conversation and 3137 tokens of prose, from llama.cpp's and the model's own tokenizer.
#[test]
fn the_real_tokenizer_gives_the_oracles_ids() {
    let Some(path) = real_gguf() else { return };
    let files = Gguf::open(&path).unwrap().sidecars().unwrap();
    let tokenizer = load(&files);
    let oracle: Value = serde_json::from_str(include_str!("../../data/oracles/smollm2_f32.json")).unwrap();
    let prompts = oracle["prompts"].as_array().unwrap();
    assert_eq!(prompts.len(), 8);
    let turns = prompts.iter().flat_map(|p| [&p["raw"], &p["chat"]]).chain([&oracle["multi_turn"]]);
    all(turns.map(|case| {
        let text = case["text"].as_str().unwrap();
        let got = ids(&tokenizer, text);
        (text, if json!(got) == case["ids"] { Ok(()) } else { Err(format!("{got:?}")) })
    }));
    let prose: Vec<u32> = serde_json::from_str(include_str!("../../data/oracles/smollm2_ppl_ids.json")).unwrap();
    assert_eq!(prose.len(), 3137);
    assert_eq!(ids(&tokenizer, include_str!("../../data/oracles/ppl_text.txt")), prose);
    assert_eq!(json_file(&files, "generation_config.json")["eos_token_id"][0], 2);
    assert!(json_file(&files, "tokenizer_config.json")["chat_template"].as_str().unwrap().contains("<|im_start|>"));
}
