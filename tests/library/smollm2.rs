//! The real model against goldens made with PyTorch and bitsandbytes: ids, logits, continuations, perplexity.

use crate::common::{convert, golden, logits, open_exact, quiet, real_gguf};
use pocketlora::eval::score_text;
use pocketlora::format::Target;
use pocketlora::{Chat, Dry, Engine, Generated, Message, Options, Precision, Sampling, internals};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

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

/// The model in NF4, quantized once for all tests of a run. It stays in cargo's folder for tests until the next run.
fn nf4() -> Option<Engine> {
    static COPY: LazyLock<PathBuf> = LazyLock::new(|| {
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("smollm2-nf4");
        if out.exists() {
            fs::remove_dir_all(&out).unwrap();
        }
        convert(&real_gguf().expect("it was there just now"), &out, Target::Nf4);
        out
    });
    // Each test skips by itself.
    real_gguf()?;
    Some(open_exact(&COPY, 0))
}

/// The greedy continuation of `ids`.
fn generate(chat: &mut Chat, ids: &[u32], max_tokens: usize) -> Generated {
    chat.max_tokens = max_tokens;
    chat.generate(ids.to_vec(), &mut quiet).unwrap().generated
}

/// Compares ids and the last logits; returns the names of the prompts whose greedy continuation differs.
fn compare(engine: &Engine, oracle: &Value, bound: f32) -> Vec<String> {
    let mut differing = Vec::new();
    for (name, prompt) in prompts(oracle) {
        let ids = ids_of(&prompt["ids"]);
        let text = prompt["text"].as_str().unwrap();
        assert_eq!(engine.text().unwrap().tokenizer.encode(text, true).unwrap(), ids, "{name}: ids");

        let all = logits(engine, &ids);
        let last = &all[all.len() - internals::base(engine).model.config().vocab_size..];
        for (id, expected) in ids_of(&prompt["top50_ids"]).iter().zip(prompt["top50_logits"].as_array().unwrap()) {
            let (actual, expected) = (last[*id as usize], expected.as_f64().unwrap() as f32);
            let off = (actual - expected).abs();
            assert!(off <= bound, "{name}: token {id}: {actual} instead of {expected}, bound {bound}");
        }
        let mut greedy = ids_of(&prompt["greedy48_ids"]);
        greedy.pop_if(|last| *last == 2); // the reference keeps the token that ends the answer
        if generate(&mut engine.chat().unwrap(), &ids, 48).ids != greedy {
            differing.push(name);
        }
    }
    differing
}

#[test]
fn f32_weights_give_the_reference_logits_and_continuations() {
    let Some(gguf) = real_gguf() else { return };
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    convert(&gguf, &model, Target::F32);
    let engine = open_exact(&model, 0);
    let differing = compare(&engine, &json("smollm2_f32.json"), 2e-3);
    for form in ["raw", "chat"] {
        let count = differing.iter().filter(|name| name.ends_with(form)).count();
        assert!(count <= 1, "greedy continuations differ for {differing:?}; one prompt of eight may");
    }
}

#[test]
fn a_conversation_renders_as_the_reference_renders_it() {
    let Some(engine) = nf4() else { return };
    let oracle = &json("smollm2_f32.json")["multi_turn"];
    let messages: Vec<Message> = serde_json::from_value(oracle["messages"].clone()).unwrap();
    let text = engine.text().unwrap().template.render(&messages, None, true).unwrap().text;
    assert_eq!(text, oracle["text"].as_str().unwrap());
    assert_eq!(engine.text().unwrap().tokenizer.encode(&text, false).unwrap(), ids_of(&oracle["ids"]));
}

#[test]
fn nf4_weights_reach_the_perplexity_of_bitsandbytes() {
    let Some(engine) = nf4() else { return };
    let text = fs::read_to_string(golden("ppl_text.txt")).unwrap();
    let ids = engine.text().unwrap().tokenizer.encode(&text, true).unwrap();
    assert_eq!(ids, ids_of(&json("smollm2_ppl_ids.json")));
    let oracle = &json("smollm2_nf4.json")["perplexity"];
    for (key, window) in [("full_window", ids.len()), ("windows_512_no_overlap", 512)] {
        let score = score_text(&engine, &ids, window, &mut |_| true).unwrap();
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
    let Some(exact) = nf4() else { return };
    let ids = &ids_of(&json("smollm2_ppl_ids.json"))[..TOKENS];
    let perplexity = |engine: &Engine| score_text(engine, ids, 512, &mut |_| true).unwrap().perplexity();
    let base = perplexity(&exact);
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let fast = Options::new().cache_dir(&cache);
    let settings = [
        ("bf16", 1.005, Options::new().precision(Precision::Bf16)),
        ("8-bit products", 1.015, Options::default()),
        ("with the head in 8 bits", 1.02, fast.clone()),
        ("with the cache in 8 bits", 1.025, fast.int8_cache(true)),
    ];
    for (name, bound, options) in settings {
        let cost = perplexity(&Engine::open(exact.dir(), &options).unwrap()) / base;
        assert!(cost < bound && cost > 0.99, "{name}: perplexity times {cost}, bound {bound}");
    }
    assert_eq!(fs::read_dir(cache).unwrap().count(), 1, "one copy of the head");
}

/// Streaming pieces join to what decoding all ids at once gives.
#[test]
fn streamed_text_is_the_whole_text() {
    let Some(engine) = nf4() else { return };
    let text = engine.text().unwrap();
    let tokenizer = &text.tokenizer;
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
    let Some(engine) = nf4() else { return };
    let ids = ids_of(&prompts(&json("smollm2_f32.json"))[0].1["ids"]);
    let mut chat = engine.chat().unwrap();
    let first = generate(&mut chat, &ids, 5);
    let again = generate(&mut chat, &ids, 5);
    assert_eq!((first.ids, first.prefilled, again.prefilled), (again.ids.clone(), ids.len(), 1));
    let fresh = generate(&mut open_exact(engine.dir(), 1).chat().unwrap(), &ids, 5);
    assert_eq!(fresh.ids, again.ids);
}

/// It says "The train" for ever where nothing keeps it from that.
#[test]
fn a_guard_breaks_a_loop_and_leaves_a_good_answer_as_it_is() {
    let Some(engine) = nf4() else { return };
    let answer = |asked: &str, dry: Dry| {
        let mut chat = engine.chat().unwrap();
        (chat.max_tokens, chat.sampling) = (200, Sampling { dry, ..Sampling::default() });
        chat.reply(&[Message::new("user", asked)], &mut quiet).unwrap()
    };
    let song = "Write a song with a chorus that repeats three times, about a train.";
    let [free, guarded] = [Dry::OFF, Dry::GUARD].map(|dry| answer(song, dry));
    let ends_in_copies = |ids: &[u32], period: usize| {
        let end = &ids[ids.len().saturating_sub(5 * period)..];
        end.len() == 5 * period && end[period..] == end[..4 * period]
    };
    let loops = |ids: &[u32]| (1..=ids.len() / 5).any(|period| ends_in_copies(ids, period));
    assert!(free.generated.finish.is_cut() && loops(&free.generated.ids), "{}", free.text);
    assert!(!loops(&guarded.generated.ids), "{}", guarded.text);

    let city = "What is the largest city of Australia?";
    let [free, guarded] = [Dry::OFF, Dry::GUARD].map(|dry| answer(city, dry));
    assert!(free.text.contains("Sydney") && free.generated.ids == guarded.generated.ids, "{}", guarded.text);
}
