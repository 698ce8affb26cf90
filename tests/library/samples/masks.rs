//! What is learned of a conversation, for the chat template of each family, with its markers and without.

use super::{Reader, chat_file, line, unmarked};
use crate::common::check_all;
use pocketlora::chat::Message;
use pocketlora::train::Sample;
use serde_json::{Value, json};
use std::fs;

/// Masks of transformers; see tests/data/chat_goldens.py.
fn goldens() -> Vec<Value> {
    serde_json::from_slice(&fs::read(chat_file("goldens.json")).unwrap()).unwrap()
}

fn text<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key].as_str().unwrap()
}

#[test]
fn masks_equal_those_of_transformers_by_markers_and_by_differences() {
    let markers: &dyn Fn(String) -> String = &|t| t;
    let cases = goldens().into_iter().flat_map(|case| [(case.clone(), markers), (case, &unmarked as _)]);
    check_all(cases, |(case, change)| {
        let reader =
            Reader::new(Some(text(case, "template")), text(case, "bos_token"), text(case, "eos_token"), change);
        let name = format!("{} {}", case["template"], case["chat"]);
        let data = reader.read("one.jsonl", case["line"].to_string(), 4096).map_err(|e| format!("{name}: {e}"))?;
        let sample = data.samples.last().unwrap();
        let rendered = reader.text(&sample.ids);
        if rendered != text(case, "text") {
            return Err(format!("{name}: rendered `{rendered}`, expected {}", case["text"]));
        }
        let runs: Vec<[u32; 2]> = sample.trained.runs().iter().map(|r| [r.start, r.end]).collect();
        // Without markers, answers before a turn that the template rewrites are learned in samples of their own.
        let own = data.samples.len() - 1;
        let expected: Vec<[u32; 2]> = serde_json::from_value(case["learned"].clone()).unwrap();
        let rewrites = text(case, "template") == "mistral" && text(case, "chat") == "system";
        if runs != expected[own..] || sample.ids.len() as u64 != case["tokens"] || own > 0 && !rewrites {
            return Err(format!("{name}: learns {:?} {runs:?}, expected {expected:?}", reader.learned(sample)));
        }
        Ok(())
    });
}

/// What is asked is known without the marks around it, in every template and turn.
#[test]
fn what_is_asked_is_told_apart_from_the_marks_of_the_template() {
    for family in ["smollm2", "qwen3", "llama3", "gemma", "mistral", "phi3"] {
        let reader = Reader::family(family, "<s>", "<|im_end|>");
        let chat = line(&[("user", "how many?"), ("assistant", "how"), ("user", " what? "), ("assistant", "many")]);
        let data = reader.read("chat.jsonl", chat, 4096).unwrap();
        let sample = data.samples.last().unwrap();
        let asked: Vec<u32> = sample.asked.tokens.iter().map(|i| sample.ids[i]).collect();
        let text = reader.text(&asked);
        assert_eq!(text.split_whitespace().collect::<String>(), "howmany?what?", "{family}: {text}");
        // With every second word left out, what stays are whole words.
        let mut words = 0;
        let thinned = sample.thinned(|| {
            words += 1;
            words % 2 == 0
        });
        let left: Vec<u32> = thinned.asked.tokens.iter().map(|i| thinned.ids[i]).collect();
        assert_eq!(reader.text(&left).split_whitespace().collect::<String>(), "howwhat?", "{family}: {sample:?}");
        assert_eq!(thinned.trained_tokens(), sample.trained_tokens(), "{family}");
        assert!(sample.asked.tokens.iter().all(|i| !sample.trained.contains(i)), "{family}");
    }
}

/// Such a template shows thoughts in the last turn only.
#[test]
fn a_turn_that_is_rewritten_later_is_learned_as_it_is_answered() {
    let reader = Reader::family("qwen3", "<|endoftext|>", "<|im_end|>");
    let chat = line(&[
        ("user", "1+1"),
        ("assistant", "<think>\nadd\n</think>\n\n2"),
        ("user", "2+2"),
        ("assistant", "<think>\nagain\n</think>\n\n4"),
    ]);
    let data = reader.read("chat.jsonl", chat, 4096).unwrap();
    let all: Vec<(String, Vec<String>)> =
        data.samples.iter().map(|s: &Sample| (reader.text(&s.ids), reader.learned(s))).collect();
    let first = "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n";
    let second = "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n";
    let (a, b) = ("<think>\nadd\n</think>\n\n2<|im_end|>", "<think>\nagain\n</think>\n\n4<|im_end|>");
    let expected = [
        (format!("{first}{a}\n"), vec![a.to_owned()]),
        (format!("{first}2<|im_end|>\n{second}{b}\n"), vec![b.to_owned()]),
    ];
    assert_eq!(all, expected);
    assert_eq!((data.records, data.splits.samples), (1, 0));
}

#[test]
fn a_system_turn_that_moves_makes_samples_of_their_own() {
    let reader = Reader::family("mistral", "<s>", "</s>");
    let chat = line(&[("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
    let data = reader.read("chat.jsonl", chat, 4096).unwrap();
    let all: Vec<(String, Vec<String>)> =
        data.samples.iter().map(|s| (reader.text(&s.ids), reader.learned(s))).collect();
    let expected = [
        ("<s>[INST] S\n\na [/INST] b</s>".to_owned(), vec![" b</s>".to_owned()]),
        ("<s>[INST] a [/INST] b</s>[INST] S\n\nc [/INST] d</s>".to_owned(), vec![" d</s>".to_owned()]),
    ];
    assert_eq!(all, expected);
}

/// A template may ask for an answer in other words than it tells one in: then the answer is found by its content.
#[test]
fn answers_are_found_where_asking_and_telling_differ() {
    // The system's turn goes with a user's that comes last and is gone once it is answered, as in Mistral's of 2024.
    let vanishing = "<s>{% if messages[0].role == 'system' %}{% set system = messages[0].content %}\
                     {% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}[INST] \
                     {% if loop.last and system is defined %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]{% else %} \
                     {{ m.content | trim }}</s>{% endif %}{% endfor %}";
    // It asks for a thought, but tells none, as reasoning models do.
    let thinking = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                    {% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";
    // It forgets to close the tool's turn where that comes last.
    let open = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if not loop.last or m.role != 'tool' %}|{% endif %}\
                {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
    let chat = [("system", "S"), ("user", "a"), ("assistant", "x b"), ("user", "c"), ("assistant", "d")];
    let tool = [("user", "a"), ("tool", "42"), ("assistant", "it is 42")];
    type Learned = &'static [(&'static str, &'static [&'static str])];
    let cases: [(&str, &[_], &str, Learned); 3] = [
        (
            vanishing,
            &chat,
            "</s>",
            &[
                ("<s>[INST] S\n\na[/INST] x b</s>", &[" x b</s>"]),
                ("<s>[INST] a[/INST] x b</s>[INST] S\n\nc[/INST] d</s>", &[" d</s>"]),
            ],
        ),
        (
            thinking,
            &chat[1..3],
            "<|im_end|>",
            &[("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nx b<|im_end|>\n", &["x b<|im_end|>"])],
        ),
        (open, &tool, "</s>", &[("user:a|tool:42|assistant:it is 42|</s>", &["it is 42|</s>"])]),
    ];
    for (template, turns, eos, expected) in cases {
        let reader = Reader::new(Some("phi3"), "<s>", eos, &|_| template.to_owned());
        let data = reader.read("chat.jsonl", line(turns), 4096).unwrap();
        let all: Vec<(String, Vec<String>)> =
            data.samples.iter().map(|s| (reader.text(&s.ids), reader.learned(s))).collect();
        let owned = |(text, learned): &(&str, &[&str])| {
            ((*text).to_owned(), learned.iter().map(|l| (*l).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(all, expected.iter().map(owned).collect::<Vec<_>>());
    }
}

#[test]
fn a_turn_without_content_prints_none() {
    let template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.name }}{{ 'name' in m }}|{% endfor %}";
    let reader = Reader::new(Some("phi3"), "<s>", "</s>", &|_| template.to_owned());
    let chat =
        json!({"messages": [{"role": "user", "content": null, "name": null}, {"role": "assistant", "content": "b"}]});
    let data = reader.read("chat.jsonl", chat.to_string(), 4096).unwrap();
    assert_eq!(reader.text(&data.samples[0].ids), "user:False|assistant:bFalse|</s>");
}

#[test]
fn a_template_whose_answers_cannot_be_placed_is_refused_with_the_turn() {
    let reversed = "{% for m in messages | reverse %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    let reader = Reader::new(Some("phi3"), "<s>", "</s>", &|_| reversed.to_owned());
    let chat = line(&[("user", "a"), ("assistant", "b")]);
    let error = reader.read("chat.jsonl", chat, 4096).unwrap_err().to_string();
    for what in ["chat.jsonl` line 1", "turn 2", "leaves earlier turns alone"] {
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn markers_within_a_macro_give_way_to_differences() {
    let template = "{% macro say(m) %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}|\
                    {% endgeneration %}{% else %}{{ m.content }}|{% endif %}{% endmacro %}{% for m in messages %}\
                    {{ say(m) }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    let reader = Reader::new(Some("phi3"), "<s>", "</s>", &|_| template.to_owned());
    let data = reader.read("chat.jsonl", line(&[("user", "a"), ("assistant", "b")]), 4096).unwrap();
    assert_eq!(reader.learned(&data.samples[0]), ["b|</s>"]);
}

#[test]
fn json_in_templates_is_pythons() {
    let template = "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ tools | tojson(ensure_ascii=False) }}";
    let reader = Reader::new(Some("phi3"), "<s>", "</s>", &|_| template.to_owned());
    let tools = json!([{"b": "<\u{e9}'&>", "a": [1, 2.5, true, null]}]);
    let flat = "[{\"b\": \"<\u{e9}'&>\", \"a\": [1, 2.5, true, null]}]";
    let tall = "[\n  {\n    \"b\": \"<\u{e9}'&>\",\n    \"a\": [\n      1,\n      2.5,\n      true,\n      null\n    ]\n  }\n]";
    let text = reader.template.render(&[Message::new("user", "")], Some(&tools), false).unwrap().text;
    assert_eq!(text, format!("{flat}{tall}{flat}"));
}

/// What the data marks as not to be learned is read, by markers and by differences.
#[test]
fn answers_that_are_marked_are_read_and_not_learned() {
    for change in [&unmarked as &dyn Fn(String) -> String, &|t| t] {
        let reader = Reader::new(Some("qwen2"), "<|endoftext|>", "<|im_end|>", change);
        let (user, answer) = (Message::new("user", "q"), |c: &str| Message::new("assistant", c));
        let mut turns = vec![user.clone(), answer("no"), user.clone(), answer("yes"), user, answer("no")];
        turns[1].learned = false;
        turns[5].learned = false;
        let rendered = reader.template.render_with_answers(&turns, None, 0).unwrap();
        let answers: Vec<&str> = rendered.iter().flat_map(|r| r.answers.iter().map(|a| &r.text[a.clone()])).collect();
        assert_eq!(answers.len(), 1, "{answers:?}");
        assert!(answers[0].starts_with("yes<|im_end|>"), "{answers:?}");
    }
}
