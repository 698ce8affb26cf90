//! The real model against goldens made with PyTorch and bitsandbytes: ids, logits, continuations, perplexity.

mod common;

use common::{convert, golden, logits, open_exact, real_gguf};
use pocketlora::eval::score_text;
use pocketlora::format::Target;
use pocketlora::generate::Sampling;
use pocketlora::{Options, Precision, Session};
use serde_json::Value;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

fn json(name: &str) -> Value {
    serde_json::from_slice(&fs::read(golden(name)).unwrap()).unwrap()
}

fn ids_of(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// Both forms of the eight prompts.
fn prompts(oracle: &Value) -> Vec<(String, Value)> {
    let forms = |p: &Value| {
        let name = p["name"].as_str().unwrap().to_owned();
        ["raw", "chat"].map(|form| (format!("{name} {form}"), p[form].clone()))
    };
    oracle["prompts"].as_array().unwrap().iter().flat_map(forms).collect()
}

fn model(to: Target) -> Option<(tempfile::TempDir, Session)> {
    let gguf = real_gguf()?;
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    convert(&gguf, &out, to);
    let session = open_exact(&out, 0);
    Some((dir, session))
}

/// Compares ids and the last logits; returns the names of the prompts whose greedy continuation differs.
fn compare(session: &mut Session, oracle: &Value, bound: f32) -> Vec<String> {
    let mut differing = Vec::new();
    for (name, prompt) in prompts(oracle) {
        let ids = ids_of(&prompt["ids"]);
        let text = prompt["text"].as_str().unwrap();
        assert_eq!(session.tokenizer().unwrap().encode(text, true).unwrap(), ids, "{name}: ids");

        let all = logits(session, &ids);
        let last = &all[all.len() - session.base().model.config().vocab_size..];
        for (id, expected) in ids_of(&prompt["top50_ids"]).iter().zip(prompt["top50_logits"].as_array().unwrap()) {
            let (actual, expected) = (last[*id as usize], expected.as_f64().unwrap() as f32);
            let off = (actual - expected).abs();
            assert!(off <= bound, "{name}: token {id}: {actual} instead of {expected}, bound {bound}");
        }
        let mut greedy = ids_of(&prompt["greedy48_ids"]);
        greedy.pop_if(|last| *last == 2); // the reference keeps the token that ends the answer
        let mut quiet = |_: &str| ControlFlow::Continue(());
        let (_, made) = session.generate(&ids, 48, &Sampling::default(), &mut quiet).unwrap();
        if made.ids != greedy {
            differing.push(name);
        }
    }
    differing
}

#[test]
fn f32_weights_give_the_reference_logits_and_continuations() {
    let Some((_dir, mut session)) = model(Target::F32) else { return };
    let differing = compare(&mut session, &json("smollm2_f32.json"), 2e-3);
    for form in ["raw", "chat"] {
        let count = differing.iter().filter(|name| name.ends_with(form)).count();
        assert!(count <= 1, "greedy continuations differ for {differing:?}; one prompt of eight may");
    }
}

#[test]
fn a_conversation_renders_as_the_reference_renders_it() {
    let Some((_dir, session)) = model(Target::Nf4) else { return };
    let oracle = &json("smollm2_f32.json")["multi_turn"];
    let messages: Vec<pocketlora::chat::Message> = serde_json::from_value(oracle["messages"].clone()).unwrap();
    let text = session.template().unwrap().render(&messages, None, true).unwrap().text;
    assert_eq!(text, oracle["text"].as_str().unwrap());
    assert_eq!(session.tokenizer().unwrap().encode(&text, false).unwrap(), ids_of(&oracle["ids"]));
}

#[test]
fn nf4_weights_reach_the_perplexity_of_bitsandbytes() {
    let Some((_dir, session)) = model(Target::Nf4) else { return };
    let text = fs::read_to_string(golden("ppl_text.txt")).unwrap();
    let ids = session.tokenizer().unwrap().encode(&text, true).unwrap();
    assert_eq!(ids, ids_of(&json("smollm2_ppl_ids.json")));
    let oracle = &json("smollm2_nf4.json")["perplexity"];
    for (key, window) in [("full_window", ids.len()), ("windows_512_no_overlap", 512)] {
        let score = score_text(&session, &ids, window, &mut |_| true).unwrap();
        assert_eq!(score.tokens as u64, oracle[key]["scored"].as_u64().unwrap());
        let expected = oracle[key]["ppl"].as_f64().unwrap();
        let off = score.perplexity() / expected - 1.0;
        assert!(
            off.abs() <= 0.005,
            "{key}: perplexity {} instead of {expected} ({:+.2} %)",
            score.perplexity(),
            off * 100.0
        );
    }
}

/// What 8-bit products, an 8-bit head and an 8-bit cache may cost, together and one after the other.
#[test]
fn arithmetic_in_8_bits_costs_little_perplexity() {
    /// Three of the six windows: costs are as large in all of them.
    const TOKENS: usize = 3 * 512;
    let Some((dir, exact)) = model(Target::Nf4) else { return };
    let ids = &ids_of(&json("smollm2_ppl_ids.json"))[..TOKENS];
    let perplexity = |session: &Session| score_text(session, ids, 512, &mut |_| true).unwrap().perplexity();
    let base = perplexity(&exact);
    let cache = dir.path().join("cache");
    let fast = Options { cache_dir: Some(cache.clone()), ..Options::default() };
    let settings = [
        ("bf16", 1.005, Options { precision: Precision::Bf16, ..Options::default() }),
        ("8-bit products", 1.015, Options::default()),
        ("with the head in 8 bits", 1.02, fast.clone()),
        ("with the cache in 8 bits", 1.025, Options { int8_cache: true, ..fast }),
    ];
    for (name, bound, options) in settings {
        let cost = perplexity(&Session::open(exact.dir(), &options).unwrap()) / base;
        assert!(cost < bound && cost > 0.99, "{name}: perplexity times {cost}, bound {bound}");
    }
    assert_eq!(fs::read_dir(cache).unwrap().count(), 1, "one copy of the head");
}

/// Streaming pieces join to what decoding all ids at once gives.
#[test]
fn streamed_text_is_the_whole_text() {
    let Some((_dir, session)) = model(Target::Nf4) else { return };
    let tokenizer = session.tokenizer().unwrap();
    for (name, prompt) in prompts(&json("smollm2_f32.json")) {
        let ids = ids_of(&prompt["ids"]);
        let mut stream = tokenizer.stream();
        let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        text += &stream.finish().unwrap();
        assert_eq!(text, tokenizer.decode(&ids).unwrap(), "{name}");
    }
}

#[test]
fn the_cache_is_reused_between_turns() {
    let Some((_dir, mut session)) = model(Target::Nf4) else { return };
    let mut quiet = |_: &str| ControlFlow::Continue(());
    let ids = ids_of(&prompts(&json("smollm2_f32.json"))[0].1["ids"]);
    let (_, first) = session.generate(&ids, 5, &Sampling::default(), &mut quiet).unwrap();
    let (_, again) = session.generate(&ids, 5, &Sampling::default(), &mut quiet).unwrap();
    assert_eq!((first.ids, first.prefilled, again.prefilled), (again.ids.clone(), ids.len(), 1));
    let fresh = open_exact(Path::new(session.dir()), 1).generate(&ids, 5, &Sampling::default(), &mut quiet).unwrap().1;
    assert_eq!(fresh.ids, again.ids);
}
