//! Tokenizers, chat templates and the small files around them.

use super::common::quiet;
use super::{answer, chat, check_all, fixture, open, refused};
use pocketlora::chat::Message;
use pocketlora::{Error, ErrorCode};
use serde_json::{Value, json};
use std::fs;
use std::time::{Duration, Instant};

/// A linear congruential generator: `next(n)` is below `n`.
fn random(mut state: u64) -> impl FnMut(usize) -> usize {
    move |n| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    }
}

#[test]
fn a_broken_tokenizer_is_refused() {
    let f = fixture();
    let original = f.json("tokenizer.json");
    let good = Value::Object(original.clone()).to_string().into_bytes();
    let mut cases: Vec<(String, Vec<u8>)> = (0..good.len())
        .step_by(61)
        .chain([good.len() - 1])
        .map(|n| (format!("cut to {n}"), good[..n].to_vec()))
        .collect();
    let changed = |key: &str, value: Value| {
        let mut json = original.clone();
        json.insert(key.to_owned(), value);
        (format!("{key} changed"), Value::Object(json).to_string().into_bytes())
    };
    let model = |key: &str, value: Value| {
        let mut model = original["model"].clone();
        model[key] = value;
        changed("model", model)
    };
    let mut missing = original.clone();
    missing.shift_remove("model");
    cases.extend([
        ("no model".to_owned(), Value::Object(missing).to_string().into_bytes()),
        ("no JSON".to_owned(), b"\xff\xfe{}".to_vec()),
        ("deep".to_owned(), b"[".repeat(1 << 20)),
        changed("model", Value::Null),
        changed("model", json!({"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 5})),
        changed("model", json!({"type": "Nonsense", "vocab": {}})),
        changed(
            "pre_tokenizer",
            json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}),
        ),
        changed("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        changed("normalizer", json!({"type": "Nonsense"})),
        changed("added_tokens", json!([{"id": 1}])),
        model("vocab", json!({"a": -1})),
        model("vocab", json!({"a": 1u64 << 40})),
        model("vocab", json!([])),
        model("merges", json!([["a", "no such token"]])),
        model("merges", json!(["a"])),
        model("dropout", json!(7)),
    ]);
    check_all(cases, |(what, bytes)| {
        f.write("tokenizer.json", bytes);
        refused(what, f.answer(), ErrorCode::Format, &["tokenizer.json", "expected", "got", "again"])
    });
}

#[test]
fn flipped_bits_in_a_tokenizer_end_in_an_answer_or_an_error() {
    let f = fixture();
    let good = fs::read(f.model.join("tokenizer.json")).unwrap();
    let mut next = random(7);
    let (mut answered, mut failed) = (0, 0);
    let messages = [Message::new("user", "héllo \u{1f600} 3")];
    answer(&mut chat(&f.model).unwrap(), &messages).unwrap();
    for round in 0..3000 {
        let mut bad = good.clone();
        // The parts around the vocabulary matter most; half of all flips go there.
        for _ in 0..=next(2) {
            let at = if round % 2 == 0 { next(bad.len()) } else { next(600) };
            let at = if next(2) == 0 { at } else { bad.len() - 1 - at.min(bad.len() - 1) };
            bad[at] ^= 1 << next(8);
        }
        f.write("tokenizer.json", &bad);
        // Opening the weights 3000 times would take most of the time.
        let result = pocketlora::tokenizer::Tokenizer::open(&f.model).and_then(|mut t| {
            let template = pocketlora::chat::ChatTemplate::open(&f.model, &mut t)?;
            let ids = t.encode(&template.render(&messages, None, true)?.text, true)?;
            t.encode_with_offsets("some text", &[])?;
            t.decode(&ids)
        });
        match result {
            Ok(_) => answered += 1,
            Err(e) if e.to_string().contains("tokenizer") => failed += 1,
            Err(e) => panic!("round {round}: {e}"),
        }
    }
    assert!(answered > 100 && failed > 100, "{answered} answered, {failed} failed");
}

/// Parts that tokenizers reads but that make no sense: what they do to a text must end, one way or the other.
#[test]
fn absurd_parts_of_a_tokenizer_end_in_an_answer_or_an_error() {
    let f = fixture();
    let original = f.json("tokenizer.json");
    let regex = |r: &str| json!({"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": false});
    let replace = |p: &str, c: &str| json!({"type": "Replace", "pattern": {"String": p}, "content": c});
    let template = |ids: Value| {
        json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
               {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": ids})
    };
    let cases = [
        ("pre_tokenizer", json!({"type": "FixedLength", "length": 0})),
        ("pre_tokenizer", json!({"type": "FixedLength", "length": u64::MAX})),
        ("pre_tokenizer", regex("")),
        ("pre_tokenizer", regex("(a+)+$")),
        ("pre_tokenizer", regex("(?=(l*)*)(x|xx)*\\1y")),
        ("pre_tokenizer", regex("a{1000}{1000}{1000}")),
        ("pre_tokenizer", regex("\\9")),
        ("pre_tokenizer", json!({"type": "Metaspace", "replacement": "ab", "prepend_scheme": "always"})),
        ("normalizer", replace("", "abc")),
        ("normalizer", replace("l", "")),
        ("normalizer", json!({"type": "Prepend", "prepend": ""})),
        ("decoder", json!({"type": "Strip", "content": "a", "start": u64::MAX, "stop": u64::MAX})),
        ("decoder", json!({"type": "Strip", "content": "h", "start": 1, "stop": 9})),
        ("decoder", json!({"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": true})),
        ("decoder", replace("", "abc")),
        ("post_processor", template(json!({}))),
        ("post_processor", template(json!({"<s>": {"id": "<s>", "ids": [], "tokens": []}}))),
        (
            "post_processor",
            template(json!({"<s>": {"id": "<s>", "ids": [9, 4_000_000_000u32], "tokens": ["<s>", "a"]}})),
        ),
        ("post_processor", json!({"type": "BertProcessing", "sep": ["a", 4_000_000_000u32], "cls": ["b", 1]})),
        ("truncation", json!({"max_length": 0, "strategy": "LongestFirst", "stride": 9, "direction": "Right"})),
        (
            "padding",
            json!({"strategy": {"Fixed": 1u64 << 60}, "direction": "Left", "pad_to_multiple_of": 0,
                           "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}),
        ),
        ("model", json!({"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "none"})),
        (
            "model",
            json!({"type": "WordPiece", "vocab": {"a": 1}, "unk_token": "none", "continuing_subword_prefix": "",
                         "max_input_chars_per_word": 0}),
        ),
        ("model", json!({"type": "Unigram", "vocab": [], "unk_id": null})),
        ("model", json!({"type": "Unigram", "vocab": [["", 0.0], ["", 1e308], ["l", -1e308]], "unk_id": 0})),
        ("model", json!({"type": "BPE", "vocab": {}, "merges": [], "unk_token": "none", "byte_fallback": true})),
    ];
    check_all(cases, |(key, value)| {
        f.with("tokenizer.json", &original, key, Some(value));
        let start = Instant::now();
        let result = chat(&f.model).and_then(|mut chat| {
            answer(&mut chat, &[Message::new("user", "hello all")])?;
            chat.complete("hello all", &mut quiet)
        });
        match result {
            _ if start.elapsed() > Duration::from_secs(5) => Err(format!("{key} {value}: {:?}", start.elapsed())),
            Ok(_) => Ok(()),
            Err(e) if matches!(e.code(), ErrorCode::Format | ErrorCode::Data) => Ok(()),
            Err(e) => Err(format!("{key} {value}: {e}")),
        }
    });
}

#[test]
fn a_tokenizer_of_another_model_is_named() {
    let f = fixture();
    let mut json = f.json("tokenizer.json");
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    for (offset, (_, id)) in vocab.iter_mut().skip(2).enumerate() {
        *id = (offset as u64 + 500).into();
    }
    f.write("tokenizer.json", Value::Object(json).to_string());
    let words = ["tokenizer.json", "expected an id below", "512", "got", "this model"];
    refused("chat", f.answer(), ErrorCode::Data, &words).unwrap();
    let engine = open(&f.model).unwrap();
    let completed = engine.chat().unwrap().complete("hello", &mut quiet);
    refused("complete", completed, ErrorCode::Data, &words).unwrap();
    let data = super::common::tiny_chats(f.dir.path(), 2);
    refused("dataset", engine.dataset(&data, 1024), ErrorCode::Data, &["chats.jsonl", "line 1", "512"]).unwrap();
}

#[test]
fn the_small_files_must_have_their_types() {
    let f = fixture();
    let cases = [
        ("tokenizer_config.json", "[]", "an object"),
        ("tokenizer_config.json", "{", "JSON"),
        ("tokenizer_config.json", "", "JSON"),
        ("tokenizer_config.json", "\"\u{1}\"", "JSON"),
        ("tokenizer_config.json", r#"{"chat_template": 5}"#, "chat_template"),
        ("tokenizer_config.json", r#"{"chat_template": {}}"#, "chat_template"),
        ("tokenizer_config.json", r#"{"chat_template": [{"name": "default"}]}"#, "chat_template"),
        ("tokenizer_config.json", r#"{"chat_template": []}"#, "chat_template"),
        ("tokenizer_config.json", r#"{"eos_token": 2}"#, "eos_token"),
        ("tokenizer_config.json", r#"{"bos_token": ["<s>"]}"#, "bos_token"),
        ("tokenizer_config.json", r#"{"pad_token": {"content": 1}}"#, "pad_token"),
        ("generation_config.json", "7", "an object"),
        ("generation_config.json", "{\"eos_token_id\"", "JSON"),
        ("generation_config.json", r#"{"eos_token_id": "2"}"#, "eos_token_id"),
        ("generation_config.json", r#"{"eos_token_id": -2}"#, "eos_token_id"),
        ("generation_config.json", r#"{"eos_token_id": [2, null]}"#, "eos_token_id"),
        ("generation_config.json", r#"{"eos_token_id": 99999999999}"#, "eos_token_id"),
        ("chat_template.jinja", "{% for", "chat template"),
    ];
    let original = fs::read(f.model.join("tokenizer_config.json")).unwrap();
    check_all(cases, |(file, text, word)| {
        f.write("tokenizer_config.json", &original);
        let _ = fs::remove_file(f.model.join("generation_config.json"));
        f.write(file, text);
        refused(text, f.answer(), ErrorCode::Format, &[file, word, "expected", "got"])
    });
    fs::remove_file(f.model.join("chat_template.jinja")).unwrap();
    // All of them may be absent, and a key may be null.
    f.write("tokenizer_config.json", r#"{"eos_token": null, "chat_template": null}"#);
    f.answer().unwrap();
    fs::remove_file(f.model.join("tokenizer_config.json")).unwrap();
    f.answer().unwrap();
    f.write("chat_template.jinja", [0xff, 0xfe]);
    refused("no UTF-8", f.answer(), ErrorCode::Io, &["chat_template.jinja"]).unwrap();
}

#[test]
fn a_hostile_chat_template_ends_in_an_error() {
    use ErrorCode::{Data, Format};
    let f = fixture();
    let grow = |what: &str| {
        format!(
            "{{% set ns = namespace(x='abcdefgh') %}}{{% for i in range(200) %}}{{% set ns.x = {what} %}}{{% endfor %}}{{{{ ns.x|length }}}}"
        )
    };
    let forever = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}BODY{% endfor %}{% endfor %}{% endfor %}";
    let cases: Vec<(&str, String, ErrorCode)> = vec![
        ("unclosed", "{% for m in messages %}".into(), Format),
        ("unknown tag", "{% nonsense %}".into(), Format),
        ("unknown filter", "{{ messages|nonsense }}".into(), Data),
        ("unknown function", "{{ nonsense() }}".into(), Data),
        ("import", "{% import 'other' as o %}".into(), Data),
        ("include", "{% include '/etc/passwd' %}".into(), Data),
        ("includes itself", "{% include 'chat' %}".into(), Data),
        ("raises", "{{ raise_exception('no system prompt please') }}".into(), Data),
        ("undefined attribute", "{{ messages[0].a.b.c }}".into(), Data),
        ("parentheses", format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000)), Format),
        ("brackets", format!("{{{{ {}", "[".repeat(200_000)), Format),
        ("nested ifs", "{% if true %}".repeat(20_000), Format),
        ("nested loops", "{% for a in messages %}".repeat(20_000), Format),
        ("huge", format!("{{# {} #}}", "x".repeat(8 << 20)), Format),
        ("loops", forever.replace("BODY", ""), Data),
        ("prints", forever.replace("BODY", "{{ 'x' * 10000000 }}"), Data),
        ("repeats", "{{ ('x' * 90000000) ~ ('x' * 90000000) ~ ('x' * 90000000) ~ ('x' * 90000000) }}".into(), Data),
        ("recursive macro", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(), Data),
        ("recursive macro that grows", "{% macro m(x) %}{{ m(x ~ x) }}{% endmacro %}{{ m('abc') }}".into(), Data),
        ("doubles by ~", grow("ns.x ~ ns.x"), Data),
        ("doubles by +", grow("ns.x + ns.x"), Data),
        ("doubles by *", grow("ns.x * 2"), Data),
        ("doubles by replace", grow("ns.x|replace('a', 'aa')|replace('b', ns.x)"), Data),
        ("doubles by join", grow("[ns.x, ns.x]|join"), Data),
        ("doubles by format", grow("'%s%s'|format(ns.x, ns.x)"), Data),
        ("doubles by indent", grow("('\n' ~ ns.x)|indent(100000000)"), Data),
        ("doubles by upper", grow("(ns.x ~ ns.x)|upper"), Data),
        ("method replace", grow("ns.x.replace('a', ns.x)"), Data),
        ("method join", grow("ns.x.join([ns.x, ns.x, ns.x])"), Data),
    ];
    check_all(cases, |(what, template, code)| {
        f.write("tokenizer_config.json", json!({"chat_template": template}).to_string());
        let start = Instant::now();
        refused(what, f.answer(), *code, &["tokenizer_config.json", "chat template"])?;
        if start.elapsed() > Duration::from_secs(5) { Err(format!("{what}: {:?}", start.elapsed())) } else { Ok(()) }
    });
}

/// What a template builds must not be so deep that taking it apart overflows the stack.
#[test]
fn depth_in_a_chat_template_does_not_overflow_the_stack() {
    let f = fixture();
    let deep = |body: &str| {
        format!(
            "{{% set ns = namespace(x=1) %}}{{% for a in range(1000) %}}{{% for b in range(1000) %}}{body}{{% endfor %}}{{% endfor %}}ok"
        )
    };
    // As long as a template may be.
    let fill = |part: &str| part.repeat(((1 << 17) - 40) / part.len());
    let cases = [
        ("sums", format!("{{{{ 1{} }}}}", fill("+1"))),
        ("filters", format!("{{{{ 'a'{} }}}}", fill("|trim"))),
        ("attributes", format!("{{{{ messages{} }}}}", fill("[0]"))),
        ("calls", format!("{{{{ messages{} }}}}", fill("()"))),
        ("nots", format!("{{{{ {}1 }}}}", fill("not "))),
        ("minuses", format!("{{{{ {}1 }}}}", fill("-"))),
        ("tests", format!("{{{{ 1{} }}}}", fill(" is defined"))),
        ("elifs", format!("{{% if a %}}{}{{% endif %}}ok", fill("{% elif a %}"))),
        ("conditions", format!("{{{{ {}1 }}}}", fill("1 if a else "))),
        ("powers", format!("{{{{ 1{} }}}}", fill("**1"))),
        ("comparisons", format!("{{{{ 1{} }}}}", fill("<1"))),
        ("lists", deep("{% set ns.x = [ns.x] %}")),
        ("lists, printed", format!("{}{{{{ ns.x }}}}", deep("{% set ns.x = [ns.x] %}"))),
        ("maps", format!("{}{{{{ ns.x|tojson }}}}", deep("{% set ns.x = {'a': ns.x} %}"))),
        ("slices", deep("{% set ns.x = ['a', ns.x][:2] %}")),
        ("iterators", deep("{% set ns.x = ns.x|map('upper') %}")),
        ("dicts", deep("{% set ns.x = dict(a=ns.x) %}")),
    ];
    check_all(cases, |(what, template)| {
        f.write("tokenizer_config.json", json!({"chat_template": template}).to_string());
        let (start, result) = (Instant::now(), f.answer());
        if start.elapsed() > Duration::from_secs(5) {
            return Err(format!("{what}: {:?}", start.elapsed()));
        }
        match result {
            Ok(_) => Ok(()), // harmless, then
            Err(e) if matches!(e.code(), ErrorCode::Format | ErrorCode::Data) && e.to_string().contains("chat") => {
                Ok(())
            }
            Err(e) => Err(format!("{what}: {e}")),
        }
    });
}

#[test]
fn a_template_that_rewrites_earlier_turns_cannot_teach() {
    let f = fixture();
    let template =
        "{% for m in messages %}<|im_start|>{{ messages|length }} {{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}";
    f.write("tokenizer_config.json", json!({"chat_template": template}).to_string());
    let data = super::common::tiny_chats(f.dir.path(), 2);
    let engine = open(&f.model).unwrap();
    let refusal = engine.dataset(&data, 1024).map(|_| ());
    refused("train", refusal, ErrorCode::Data, &["chats.jsonl", "line 1", "turn 2", "tokenizer_config.json"]).unwrap();
    // Chatting works all the same: what the cache holds of the old text is dropped.
    let turns = [("user", "a"), ("assistant", "b"), ("user", "c")].map(|(r, c)| Message::new(r, c));
    let mut chat = chat(&f.model).unwrap();
    let first = answer(&mut chat, &turns[..1]).unwrap();
    answer(&mut chat, &turns).unwrap();
    let again: Result<String, Error> = answer(&mut chat, &turns[..1]);
    assert_eq!(again.unwrap(), first);
}
