//! What is too long for a sample becomes several, and nothing to learn is lost.

use super::Reader;
use pocketlora::train::{Dataset, TrainConfig, hold_out};
use serde_json::{Value, json};
use std::collections::BTreeSet;

fn chat(system: &str, exchanges: &[(&str, &str)]) -> String {
    let mut turns = vec![json!({"role": "system", "content": system})];
    for (question, answer) in exchanges {
        turns.push(json!({"role": "user", "content": question}));
        turns.push(json!({"role": "assistant", "content": answer}));
    }
    json!({ "messages": turns }).to_string()
}

fn texts(reader: &Reader, data: &Dataset) -> Vec<String> {
    data.samples.iter().map(|s| reader.text(&s.ids)).collect()
}

fn learned(reader: &Reader, data: &Dataset) -> Vec<String> {
    data.samples.iter().flat_map(|s| reader.learned(s)).collect()
}

fn reader() -> Reader {
    Reader::family("qwen2", "<|endoftext|>", "<|im_end|>")
}

/// Tokens of an exchange in this template: markers, role names and line ends.
const AROUND: usize = 3 + "user\n\n".len() + 1 + "assistant\n\n".len();

#[test]
fn a_conversation_is_split_between_exchanges_behind_its_system_turn() {
    let reader = reader();
    let pairs = [("q1", "a1"), ("q2", "a2"), ("q3", "a3"), ("q4", "a4"), ("q5", "a5")];
    let head = 2 + "system\nS\n".len();
    let seq = head + 2 * (AROUND + 4);
    let data = reader.read("a.jsonl", chat("S", &pairs), seq).unwrap();
    let turn = |q: &str, a: &str| format!("<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n");
    let system = "<|im_start|>system\nS<|im_end|>\n";
    let expected = [
        format!("{system}{}{}", turn("q1", "a1"), turn("q2", "a2")),
        format!("{system}{}{}", turn("q3", "a3"), turn("q4", "a4")),
        format!("{system}{}", turn("q5", "a5")),
    ];
    assert_eq!(texts(&reader, &data), expected);
    assert_eq!(data.samples[0].ids.len(), seq);
    assert_eq!(learned(&reader, &data), ["a1", "a2", "a3", "a4", "a5"].map(|a| format!("{a}<|im_end|>")));
    assert_eq!((data.records, data.splits.samples, data.splits.parts, data.splits.left_out_tokens), (1, 1, 3, 0));
    let whole = reader.read("a.jsonl", chat("S", &pairs), 4096).unwrap();
    assert_eq!(whole.trained_tokens(), data.trained_tokens());
}

#[test]
fn a_turn_longer_than_a_sample_is_split_within_and_learned_whole() {
    let reader = reader();
    let long: String = (0..100).map(|i| format!("word{i} ")).collect();
    let data = reader.read("a.jsonl", chat("S", &[("q", &long), ("q2", "a2")]), 128).unwrap();
    assert!(data.samples.iter().all(|s| s.ids.len() <= 128));
    assert_eq!(learned(&reader, &data).concat(), format!("{long}<|im_end|>a2<|im_end|>"));
    assert_eq!(data.splits.left_out_tokens, 0);
    // A system turn that leaves no room is left out, and counted.
    let data = reader.read("a.jsonl", chat(&long, &[("q", "a")]), 128).unwrap();
    assert_eq!((learned(&reader, &data), data.splits.without_system), (vec!["a<|im_end|>".to_owned()], 1));
    // Of a question that is too long the end is read.
    let data = reader.read("a.jsonl", chat("S", &[(&long, "a")]), 128).unwrap();
    assert_eq!(learned(&reader, &data), ["a<|im_end|>"]);
    assert!(data.samples[0].ids.len() == 128 - 1 || data.samples[0].ids.len() == 128);
    assert!(data.splits.left_out_tokens > long.len() - 128, "{:?}", data.splits);
}

#[test]
fn of_a_long_prompt_the_latest_turns_are_read() {
    let reader = reader();
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let prompt: Vec<Value> = (0..9).map(|i| turn(["user", "assistant"][i % 2], &format!("turn{i}"))).collect();
    let line = json!({"prompt": prompt, "completion": [turn("assistant", "end")]}).to_string();
    let data = reader.read("a.jsonl", line, 150).unwrap();
    let text = &texts(&reader, &data)[0];
    assert_eq!((data.samples.len(), learned(&reader, &data)), (1, vec!["end<|im_end|>".to_owned()]));
    assert!(text.contains("turn7") && text.contains("turn8") && !text.contains("turn0"), "{text}");
    assert!(data.splits.left_out_turns > 0 && data.splits.left_out_turns.is_multiple_of(2), "{:?}", data.splits);
}

#[test]
fn text_is_split_at_paragraphs_and_learned_whole() {
    for (bos, family) in [("<|endoftext|>", "qwen2"), ("<s>", "phi3")] {
        let reader = Reader::family(family, bos, "<|im_end|>");
        let note: String = (0..40).map(|i| format!("Paragraph {i} says a little. And more.\n\n")).collect();
        let data = reader.read("note.md", &note, 100).unwrap();
        assert!(data.samples.iter().all(|s| s.ids.len() <= 100));
        let all = learned(&reader, &data);
        assert_eq!(all.concat(), format!("{}<|im_end|>", &note[1..]), "{family}");
        assert!(all.iter().rev().skip(1).all(|part| part.ends_with("\n\n")), "{all:?}");
        assert_eq!((data.splits.samples, data.splits.parts), (1, data.samples.len()));
    }
}

#[test]
fn a_long_completion_keeps_what_comes_before_it() {
    let reader = reader();
    let completion = "abcdefghij".repeat(30);
    let line = json!({"prompt": "continue: ", "completion": completion}).to_string();
    let data = reader.read("a.jsonl", line, 64).unwrap();
    assert_eq!(learned(&reader, &data).concat(), format!("{completion}<|im_end|>"));
    assert!(texts(&reader, &data)[0].starts_with("continue: abc"));
    assert!(data.samples[1..].iter().all(|s| s.trained.runs()[0].start >= 32 || s.ids.len() == 64));
}

#[test]
fn memory_of_a_data_set_is_four_bytes_a_token_and_little_more() {
    let reader = reader();
    let lines: String =
        (0..50).map(|i| format!("{}\n", chat("S", &[("a question", &format!("answer {i}"))]))).collect();
    let data = reader.read("a.jsonl", lines, 4096).unwrap();
    assert!(data.bytes() >= 4 * data.tokens() && data.bytes() < 4 * data.tokens() + 50 * 128, "{}", data.bytes());
}

/// Texts of one letter each, most of them of several samples.
#[test]
fn no_record_is_on_both_sides_of_a_split() {
    let reader = reader();
    let line = |i: u8| json!({ "text": char::from(b'a' + i).to_string().repeat(10 + 20 * usize::from(i)) });
    let lines: Vec<String> = (0..20).map(|i| line(i).to_string()).collect();
    let data = reader.read("letters.jsonl", lines.join("\n"), 64).unwrap();
    assert!(data.records == 20 && data.splits.samples > 10 && data.samples.len() > 60);
    for seed in 0..10 {
        let config = TrainConfig { eval_split: Some(0.25), seed, ..TrainConfig::default() };
        let (rest, held) = hold_out(&config, data.clone(), None).unwrap();
        let held = held.unwrap();
        let letters = |side: &Dataset| -> BTreeSet<char> {
            let texts = texts(&reader, side);
            texts.iter().filter_map(|t| t.chars().find(char::is_ascii_lowercase)).collect()
        };
        assert!(letters(&rest).is_disjoint(&letters(&held)), "seed {seed}");
        assert_eq!((rest.records, held.records), (15, 5), "seed {seed}");
        assert_eq!((letters(&rest).len(), letters(&held).len()), (15, 5), "seed {seed}");
        assert_eq!(rest.splits.parts + held.splits.parts, data.splits.parts, "seed {seed}");
        for side in [&rest, &held] {
            assert_eq!(side.samples.len() - side.splits.parts, side.records - side.splits.samples, "seed {seed}");
        }
    }
}
