//! How samples begin and end: one beginning, one end at which generation stops, whatever names or writes them.

use super::{byte_tokenizer, chat_file, line};
use crate::common::check_all;
use pocketlora::chat::{ChatTemplate, Message};
use pocketlora::tokenizer::{SpecialText, Tokenizer};
use pocketlora::train::{Dataset, SampleLimits};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

const PLAIN: &str = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                     {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A model's text files: the tokenizer of single bytes, which puts `<s>` before texts if `prefixed`, and `files`.
fn model(dir: &Path, prefixed: bool, files: &[(&str, Value)]) -> (Tokenizer, ChatTemplate) {
    model_with(dir, prefixed, SpecialText::Auto, files)
}

fn model_with(dir: &Path, prefixed: bool, special: SpecialText, files: &[(&str, Value)]) -> (Tokenizer, ChatTemplate) {
    let mut json: Value = serde_json::from_slice(&fs::read(chat_file("tokenizer.json")).unwrap()).unwrap();
    if prefixed {
        // A token after texts as well, which belongs to no prompt.
        json["post_processor"] = json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]},
                               "</s>": {"id": "</s>", "ids": [257], "tokens": ["</s>"]}}});
    }
    fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
    for (name, content) in files {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content.as_str().map_or_else(|| content.to_string(), str::to_owned)).unwrap();
    }
    let mut tokenizer = Tokenizer::open(dir).unwrap();
    tokenizer.special_text = special;
    let template = ChatTemplate::open(dir, &mut tokenizer).unwrap();
    (tokenizer, template)
}

/// What is read of one record, with what is learned in brackets.
fn learned(dir: &Path, (tokenizer, template): &(Tokenizer, ChatTemplate), record: &str) -> Result<String, String> {
    let path = dir.join("one.jsonl");
    fs::write(&path, record).unwrap();
    let limits = SampleLimits { tokens: 4096, vocab: 1000 };
    let data = Dataset::open(&path, tokenizer, template, limits).map_err(|e| e.to_string())?;
    let mut out = String::new();
    for sample in &data.samples {
        for (i, id) in sample.ids.iter().enumerate() {
            let (now, before) = (sample.trained.contains(i), i > 0 && sample.trained.contains(i - 1));
            out += if now && !before {
                "["
            } else if before && !now {
                "]"
            } else {
                ""
            };
            out += &tokenizer.decode_with_special(&[*id]).unwrap();
        }
        out += if sample.trained.contains(sample.ids.len() - 1) { "]" } else { "" };
    }
    Ok(out)
}

#[test]
fn there_is_one_beginning_and_one_end() {
    let names = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": PLAIN});
    let bare = json!({"bos_token": "<s>", "eos_token": "</s>"});
    let unnamed = json!({"chat_template": PLAIN});
    let chat = line(&[("user", "q"), ("assistant", "a")]);
    let pair = r#"{"prompt": "q", "completion": " a"}"#;
    let turn = "<s><|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[a<|im_end|>]\n";
    type Files = Vec<(&'static str, Value)>;
    let cases: Vec<(&str, bool, Files, &str, &str)> = vec![
        ("pair", true, vec![("tokenizer_config.json", names.clone())], pair, "<s>q[ a</s>]"),
        ("no prefix", false, vec![("tokenizer_config.json", names.clone())], pair, "q[ a</s>]"),
        (
            "written by the user",
            true,
            vec![("tokenizer_config.json", names.clone())],
            r#"{"prompt": "<s>q", "completion": " a</s>"}"#,
            "<s>q[ a</s>]",
        ),
        (
            "text, with another end and a line end behind it",
            true,
            vec![("tokenizer_config.json", names.clone())],
            r#"{"text": "<s>q a<|im_end|>\n"}"#,
            "<s>[q a<|im_end|>]\n",
        ),
        (
            "two ends",
            true,
            vec![("tokenizer_config.json", names.clone())],
            r#"{"text": "<s>q<|im_end|></s>"}"#,
            "<s>[q<|im_end|>]</s>",
        ),
        ("chat", true, vec![("tokenizer_config.json", names.clone())], &chat, turn),
        (
            "special_tokens_map.json",
            true,
            vec![
                ("tokenizer_config.json", unnamed.clone()),
                ("special_tokens_map.json", json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>"})),
            ],
            &chat,
            turn,
        ),
        (
            "config.json, numbers",
            true,
            vec![
                ("tokenizer_config.json", unnamed.clone()),
                ("config.json", json!({"bos_token_id": 256, "eos_token_id": 257})),
            ],
            pair,
            "<s>q[ a</s>]",
        ),
        (
            "generation_config.json, lists",
            true,
            vec![
                ("tokenizer_config.json", unnamed.clone()),
                ("generation_config.json", json!({"bos_token_id": [256], "eos_token_id": [257, 263]})),
            ],
            pair,
            "<s>q[ a</s>]",
        ),
        (
            "a beginning that the config denies",
            true,
            vec![("tokenizer_config.json", json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": false}))],
            pair,
            "q[ a</s>]",
        ),
        (
            "a beginning that only the config adds",
            false,
            vec![("tokenizer_config.json", json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}))],
            pair,
            "<s>q[ a</s>]",
        ),
        (
            "no template, but its tokens",
            true,
            vec![("tokenizer_config.json", bare.clone())],
            &chat,
            "<s><|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[a<|im_end|>]\n",
        ),
        (
            "line ends of another system in a template",
            true,
            vec![("tokenizer_config.json", bare), ("chat_template.jinja", PLAIN.replace('\n', "\r\n").into())],
            &chat,
            turn,
        ),
    ];
    check_all(cases, |(name, prefixed, files, record, expected)| {
        let dir = tempfile::tempdir().unwrap();
        let text = model(dir.path(), *prefixed, files);
        let found = learned(dir.path(), &text, record);
        if found.as_deref() != Ok(*expected) {
            return Err(format!("{name}: {found:?}, expected {expected:?}"));
        }
        // A prompt has the same beginning, once, and no end.
        let prompt = if *prefixed && !name.contains("denies") { "<s>x" } else { "x" };
        let wants = *prefixed && !name.contains("denies") || name.contains("adds");
        let ids = text.0.encode(prompt, true).unwrap();
        let count = ids.iter().filter(|&&id| id == 256).count();
        if (count, ids.contains(&257)) != (usize::from(wants), false) {
            return Err(format!("{name}: prompt `{prompt}` becomes {ids:?}"));
        }
        Ok(())
    });
}

/// A base of which nobody knows how it ends a turn learns to end with its end of text.
#[test]
fn a_base_without_a_template_learns_to_stop() {
    let dir = tempfile::tempdir().unwrap();
    let text = model(dir.path(), true, &[("tokenizer_config.json", json!({"bos_token": "<s>", "eos_token": "</s>"}))]);
    let written: Value = serde_json::from_slice(&fs::read(dir.path().join("tokenizer.json")).unwrap()).unwrap();
    let mut json = byte_tokenizer();
    json["post_processor"] = written["post_processor"].clone();
    let taken = |text: &str| text.starts_with("<|");
    json["model"]["vocab"].as_object_mut().unwrap().retain(|text, id| id.as_u64() < Some(256) || !taken(text));
    json["added_tokens"].as_array_mut().unwrap().retain(|t| !t["content"].as_str().unwrap().starts_with("<|"));
    fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    drop(text);
    let mut tokenizer = Tokenizer::open(dir.path()).unwrap();
    let template = ChatTemplate::open(dir.path(), &mut tokenizer).unwrap();
    let text = (tokenizer, template);
    let chat = line(&[("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]);
    let found = learned(dir.path(), &text, &chat).unwrap();
    assert!(found.starts_with("<s>Below is an instruction"), "{found}");
    let turns = "### Instruction:\nq\n\n### Response:\n[a</s>]\n\n### Instruction:\nr\n\n### Response:\n[b</s>]\n\n";
    assert!(found.ends_with(turns), "{found}");
    // An answer is asked for in the same words.
    let asked = text.1.render(&[Message::new("user", "q")], None, true).unwrap();
    assert!(asked.text.ends_with("### Instruction:\nq\n\n### Response:\n"), "{asked:?}");
}

#[test]
fn special_tokens_in_messages_are_text_and_in_texts_are_not() {
    use SpecialText::{Auto, Parse, Text};
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": PLAIN});
    let chat = line(&[("user", "<|im_end|>"), ("assistant", "a</s>b")]);
    let pair = r#"{"prompt": "<|im_end|>", "completion": "a<|im_end|>b"}"#;
    // How many tokens are special: those of the template are 5.
    let cases =
        [(Auto, &chat[..], 5), (Text, &chat, 5), (Parse, &chat, 7), (Auto, pair, 4), (Parse, pair, 4), (Text, pair, 2)];
    check_all(cases, |(special, record, expected)| {
        let dir = tempfile::tempdir().unwrap();
        let (tokenizer, template) =
            model_with(dir.path(), true, *special, &[("tokenizer_config.json", config.clone())]);
        let path = dir.path().join("one.jsonl");
        fs::write(&path, record).unwrap();
        let data = Dataset::open(&path, &tokenizer, &template, SampleLimits { tokens: 999, vocab: 999 }).unwrap();
        let found = data.samples[0].ids.iter().filter(|&&id| id >= 256).count();
        if found == *expected { Ok(()) } else { Err(format!("{special:?} {record}: {found}, expected {expected}")) }
    });
}

#[test]
fn marks_of_special_tokens_cannot_be_forged() {
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": PLAIN});
    let dir = tempfile::tempdir().unwrap();
    let (tokenizer, template) = model(dir.path(), true, &[("tokenizer_config.json", config)]);
    let content = "\u{fdd1}<|im_end|>\u{fdd0}x\u{fdd0}";
    let asked = template.render(&[Message::new("user", content)], None, false).unwrap();
    assert_eq!(asked.text, "<s><|im_start|>user\n<|im_end|>x<|im_end|>\n");
    let ids = tokenizer.encode_chat(&asked.text, &asked.plain).unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == 259).count(), 1, "{ids:?}");
}

#[test]
fn templates_are_found_by_file_and_by_name() {
    let named = json!([{"name": "default", "template": "D{{ messages[0].content }}"},
                       {"name": "tool_use", "template": "T{{ tools | length }}"}]);
    let only_rag = json!([{"name": "rag", "template": "R"}]);
    type Files = Vec<(&'static str, Value)>;
    let cases: [(&str, Files, &str, &str); 6] = [
        ("a list", vec![("tokenizer_config.json", json!({ "chat_template": named }))], "Dq", "T1"),
        (
            "a folder",
            vec![
                ("chat_template.jinja", "D{{ messages[0].content }}".into()),
                ("additional_chat_templates/tool_use.jinja", "T{{ tools | length }}".into()),
            ],
            "Dq",
            "T1",
        ),
        (
            "a processor's file counts last",
            vec![
                ("chat_template.json", json!({"chat_template": {"default": "O"}})),
                ("tokenizer_config.json", json!({"chat_template": "N"})),
            ],
            "N",
            "N",
        ),
        ("a processor's file", vec![("chat_template.json", json!({"chat_template": "P"}))], "P", "P"),
        (
            "the newest counts",
            vec![("chat_template.jinja", "\u{feff}J".into()), ("tokenizer_config.json", json!({"chat_template": "N"}))],
            "J",
            "J",
        ),
        ("none for this", vec![("tokenizer_config.json", json!({ "chat_template": only_rag }))], "rag", "rag"),
    ];
    check_all(cases, |(name, files, plain, with_tools)| {
        let dir = tempfile::tempdir().unwrap();
        let (_, template) = model(dir.path(), false, files);
        let tools = json!([{"name": "f"}]);
        for (tools, expected) in [(None, plain), (Some(&tools), with_tools)] {
            let found = template.render(&[Message::new("user", "q")], tools, false);
            match found {
                Ok(rendered) if rendered.text == *expected => {}
                Err(e) if *expected == "rag" && e.to_string().contains("got only `rag`") => {}
                other => return Err(format!("{name}: {other:?}, expected {expected}")),
            }
        }
        Ok(())
    });
}

/// The end of a turn that only the template knows stops generation.
#[test]
fn an_end_that_only_the_template_writes_stops_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let template = "{% for m in messages %}<|user|>{{ m.content }}<|system|>{% endfor %}";
    let config = json!({"eos_token": "</s>", "chat_template": template});
    let (tokenizer, _) = model(dir.path(), false, &[("tokenizer_config.json", config)]);
    assert!(tokenizer.stop.contains(&272), "{:?}", tokenizer.stop);
}

/// Small templates print what Jinja2 prints of them (tests/data/jinja_goldens.py), or are refused; never anything else.
#[test]
fn templates_print_what_jinja_prints_or_are_refused() {
    /// What this engine does not know. A template that uses it is refused when it is rendered.
    const REFUSED: usize = 24;
    let goldens: Vec<[String; 2]> = serde_json::from_slice(&fs::read(chat_file("jinja.json")).unwrap()).unwrap();
    let special = vec![("bos_token".to_owned(), "<s>".to_owned()), ("eos_token".to_owned(), "</s>".to_owned())];
    let messages = [Message::new("user", "q"), Message::new("assistant", "a")];
    let mut refused = 0;
    let mut wrong = Vec::new();
    for [template, expected] in goldens {
        let rendered = ChatTemplate::new(template.clone(), special.clone(), "golden".into())
            .and_then(|t| t.render(&messages, None, false));
        match rendered {
            Err(_) => refused += 1,
            Ok(rendered) if rendered.text == expected => {}
            Ok(rendered) => wrong.push(format!("{template:?}: {:?}, expected {expected:?}", rendered.text)),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(refused <= REFUSED, "{refused} are refused");
}

/// A template that leaves out what the model needs is refused by the key; what it makes of an answer is told.
#[test]
fn what_a_template_leaves_out_is_not_lost_without_a_word() {
    let config = |template: &str| json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template});
    let without = |what: &str| PLAIN.replace("for m in messages", &format!("for m in messages if {what}"));
    let user = json!({"role": "user", "content": "q"});
    let answer = |more: Value| {
        let mut turn = json!({"role": "assistant", "content": "a"});
        turn.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        turn
    };
    let call = json!({"tool_calls": [{"function": {"name": "f", "arguments": {}}}]});
    let system = json!([{"role": "system", "content": "s"}, user, answer(json!({}))]);
    let thought = PLAIN.replace("{{ m.content }}", "{{ m.content.split('</t>')[-1] }}");
    // Template, record, and what is said: refused with this, or else the parts left out and shortened answers.
    type Said = Result<(&'static str, usize), &'static str>;
    let cases: [(&str, String, Value, Said); 6] = [
        ("tools", PLAIN.into(), json!({"messages": [user, answer(json!({}))], "tools": [{"name": "f"}]}), Err("tools")),
        ("a call", PLAIN.into(), json!({"messages": [user, answer(call.clone())]}), Err("tool_calls")),
        ("a system's turn", without("m.role != 'system'"), json!({ "messages": system }), Err("system")),
        (
            "a thought",
            PLAIN.into(),
            json!({"messages": [user, answer(json!({"reasoning_content": "r"}))]}),
            Ok(("assistant.reasoning_content", 0)),
        ),
        (
            "a part of an answer",
            thought,
            json!({"messages": [user, {"role": "assistant", "content": "x</t>a"}]}),
            Ok(("", 1)),
        ),
        ("nothing", PLAIN.into(), json!({ "messages": system }), Ok(("", 0))),
    ];
    check_all(cases, |(name, template, record, expected)| {
        let dir = tempfile::tempdir().unwrap();
        let (tokenizer, chat) = model(dir.path(), true, &[("tokenizer_config.json", config(template))]);
        let path = dir.path().join("one.jsonl");
        fs::write(&path, record.to_string()).unwrap();
        let found = Dataset::open(&path, &tokenizer, &chat, SampleLimits { tokens: 999, vocab: 999 });
        let found = found.map(|data| {
            let left_out: Vec<String> = data.checks.left_out.into_iter().collect();
            (left_out.join(" "), data.checks.shortened)
        });
        match (&found, expected) {
            (Ok((left_out, shortened)), Ok(expected)) if (left_out.as_str(), *shortened) == *expected => Ok(()),
            (Err(e), Err(key)) if e.to_string().contains(&format!("`{key}`")) => Ok(()),
            _ => Err(format!("{name}: {found:?}")),
        }
    });
}

/// What only the files beside a tokenizer declare is one token, or refused by name.
#[test]
fn declared_tokens_are_tokens() {
    type Files = Vec<(&'static str, Value)>;
    // `Q!` is in the vocabulary, and only these files call it special.
    let named = |key: &str| json!({ key: "Q!", "chat_template": PLAIN });
    let decoder = |id: &str| json!({"added_tokens_decoder": {id: {"content": "<new>", "special": true}}});
    let cases: [(&str, Files, Result<&str, &str>); 9] = [
        ("eos", vec![("tokenizer_config.json", named("eos_token"))], Ok("Q!")),
        ("eos, older file", vec![("special_tokens_map.json", named("eos_token"))], Ok("Q!")),
        ("a list", vec![("tokenizer_config.json", json!({"additional_special_tokens": ["Q!"]}))], Ok("Q!")),
        ("an object", vec![("tokenizer_config.json", json!({"extra_special_tokens": {"image": "Q!"}}))], Ok("Q!")),
        ("by id", vec![("tokenizer_config.json", decoder("274"))], Ok("<new>")),
        ("oldest form", vec![("added_tokens.json", json!({"<new>": 274}))], Ok("<new>")),
        ("another id", vec![("tokenizer_config.json", decoder("400"))], Err("id 400")),
        ("unknown", vec![("tokenizer_config.json", json!({"bos_token": "<nope>"}))], Err("<nope>")),
        ("an end that is none", vec![("config.json", json!({"eos_token_id": 9999}))], Err("9999")),
    ];
    check_all(cases, |(name, files, expected)| {
        let dir = tempfile::tempdir().unwrap();
        let mut json = byte_tokenizer();
        json["model"]["vocab"]["Q!"] = 273.into();
        fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        files.iter().for_each(|(file, content)| fs::write(dir.path().join(file), content.to_string()).unwrap());
        let ids = Tokenizer::open(dir.path()).map(|t| expected.map(|text| t.encode(text, false).unwrap().len()));
        match (&ids, expected) {
            (Ok(Ok(1)), Ok(_)) => Ok(()),
            (Err(e), Err(said)) if e.to_string().contains(said) => Ok(()),
            _ => Err(format!("{name}: {ids:?}")),
        }
    });
}

#[test]
fn a_tokenizer_is_what_its_file_says() {
    let dir = tempfile::tempdir().unwrap();
    let write = |change: &dyn Fn(&mut Value)| {
        let mut json = byte_tokenizer();
        change(&mut json);
        fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        Tokenizer::open(dir.path())
    };
    // Another id would be another row of the embedding.
    let moved = write(&|json| json["added_tokens"][3]["id"] = 500.into());
    assert!(moved.is_err_and(|e| e.to_string().contains("<|im_end|>") || e.to_string().contains("500")));
    // Chance has no place in reading a text.
    let merges = |json: &mut Value| {
        json["model"]["vocab"]["ab"] = 300.into();
        json["model"]["merges"] = json!([["a", "b"]]);
        json["model"]["dropout"] = 0.9.into();
    };
    let tokenizer = write(&merges).unwrap();
    assert_eq!(tokenizer.encode(&"ab".repeat(50), false).unwrap().len(), 50);
}
