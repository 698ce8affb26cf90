//! A chat's commands, texts of several lines, its file, and where prompts come from.

use crate::common::golden;
use crate::fixture::{Fixture, fixture};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

/// A model that says words: each of its ids has one.
fn talking() -> Fixture {
    let f = fixture();
    let path = f.model.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    (259..512).for_each(|id| tokenizer["model"]["vocab"][format!("w{id}")] = id.into());
    fs::write(path, tokenizer.to_string()).unwrap();
    f
}

fn piped(f: &Fixture, args: &[&str], script: &str) -> Output {
    let mut child =
        f.command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let _ = child.stdin.take().unwrap().write_all(script.as_bytes());
    child.wait_with_output().unwrap()
}

/// Stdout and stderr of a chat that must end well.
fn chat(f: &Fixture, more: &[&str], script: &str) -> (String, String) {
    let model = f.model.to_str().unwrap();
    let args = [&["chat", "-m", model, "--no-quantize", "--precision", "exact", "-n", "6", "--seed", "1"][..], more];
    let out = piped(f, &args.concat(), script);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{said}");
    (String::from_utf8_lossy(&out.stdout).into_owned(), said)
}

/// The conversation that a chat has after `script`.
fn conversation(f: &Fixture, more: &[&str], script: &str) -> Vec<Value> {
    let file = f.path("conversation.jsonl");
    let _ = fs::remove_file(&file);
    let (_, said) = chat(f, more, &format!("{script}/save {file}\n"));
    let text = fs::read_to_string(&file).unwrap_or_else(|e| panic!("{e}: {said}"));
    let record: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    record["messages"].as_array().unwrap().clone()
}

fn said(messages: &[Value], role: &str) -> Vec<String> {
    let of_role = messages.iter().filter(|message| message["role"] == role);
    of_role.map(|message| message["content"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_question_is_asked_again_or_in_other_words() {
    let f = talking();
    let drawn = ["--temperature", "1"];
    let once = conversation(&f, &drawn, "first\nsecond\n");
    let again = conversation(&f, &drawn, "first\nsecond\n/regenerate\n");
    assert_eq!(said(&once, "user"), said(&again, "user"));
    let (before, after) = (said(&once, "assistant"), said(&again, "assistant"));
    assert!(before[0] == after[0] && before[1] != after[1], "{before:?} {after:?}");
    let edited = conversation(&f, &drawn, "first\nsecond\n/edit another second\n");
    assert_eq!(said(&edited, "user"), ["first", "another second"]);
    assert_eq!(edited.len(), 4);
    let (_, errors) = chat(&f, &[], "/regenerate\n/edit\nfirst\n/edit\n");
    assert_eq!(errors.matches("expected a question before this").count(), 2, "{errors}");
    assert!(errors.contains("/edit") && errors.contains("in its new words"), "{errors}");
}

#[test]
fn the_system_prompt_and_the_settings_change_in_a_chat() {
    let f = talking();
    let messages = conversation(&f, &["--system", "be brief"], "hello\n/system be long\nhello\n");
    assert_eq!(said(&messages, "system"), ["be long"]);
    assert_eq!(messages.len(), 5);
    assert!(said(&conversation(&f, &["--system", "be brief"], "hello\n/system none\n"), "system").is_empty());
    // The likeliest tokens, whatever the seed; and as many of them as are wanted.
    let script = "/set temperature 0\n/set seed 9\n/set max_tokens 2\n/set top-p=0.9\n/set\nhello\n/system\n";
    let (out, errors) = chat(&f, &["--stats", "--temperature", "1"], script);
    assert!(out.contains("the likeliest token, top p 0.9") && out.contains("(no system prompt)"), "{out}");
    assert!(errors.contains(" 2 tokens at") && errors.contains("(max-tokens 2)"), "{errors}");
    let wrong = "/set warmth 3\n/set top-p 2\n/set top-k many\n/set max-tokens 0\n/think maybe\n/think on\n/load\n";
    let (_, errors) = chat(&f, &[], wrong);
    for what in [
        "one of temperature, top-k",
        "`0 < top-p <= 1`, got `2`",
        "a whole number, got `many`",
        "a whole number from 1",
        "`on`, `off` or `auto`",
        "knows no thinking",
        "/load",
    ] {
        assert!(errors.contains(what), "{what}: {errors}");
    }
}

#[test]
fn a_conversation_comes_back_from_its_file() {
    let f = talking();
    let file = f.path("kept.jsonl");
    chat(&f, &["--system", "be brief"], &format!("hello\n/save {file}\n"));
    let messages = conversation(&f, &[], &format!("/load {file}\nmore\n"));
    assert_eq!(
        (said(&messages, "system"), said(&messages, "user")),
        (vec!["be brief".into()], vec!["hello".into(), "more".into()])
    );
    let (out, errors) = chat(&f, &[], &format!("/load {file}\n/bye\nnever asked\n"));
    assert!(errors.contains("(loaded 2 turns") && out.is_empty(), "{out}{errors}");
    fs::write(f.path("other.jsonl"), "{\"text\": \"no conversation\"}\n").unwrap();
    let (_, errors) = chat(&f, &[], &format!("/load {}\n/load {}\n", f.path("other.jsonl"), f.path("nowhere")));
    assert!(errors.contains("`messages`, as `/save` writes it") && errors.contains("nowhere"), "{errors}");
}

/// An answer that `-n` cut is no whole one to those who read the file later: it is marked, and not learned.
#[test]
fn an_answer_that_was_cut_is_saved_as_such() {
    let f = talking();
    let messages = conversation(&f, &[], "hello\n/set max-tokens 3\nmore\n");
    let marks: Vec<_> = messages.iter().map(|m| (m["cut"] == true, m["weight"] == 0)).collect();
    assert_eq!(marks, [(false, false), (true, true), (false, false), (true, true)], "{messages:?}");
    let file = f.path("conversation.jsonl");
    let text = fs::read_to_string(&file).unwrap();
    let (_, said) = chat(&f, &[], &format!("/load {file}\n/save {file}\n"));
    assert!(said.contains("2 of them, cut before their end"), "{said}");
    assert_eq!(fs::read_to_string(&file).unwrap(), text.repeat(2));
    // Beside an answer that ended, it is read and not learned.
    let whole = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;
    fs::write(&file, format!("{whole}\n{text}")).unwrap();
    let model = f.model.to_str().unwrap();
    let report = f.json(&["train", "-m", model, "--no-quantize", "-d", &file, "-o", "unused", "--dry-run", "--json"]);
    assert_eq!(report["data"]["trained_tokens"], 2);
    assert!(!report["data"]["unused"].to_string().contains("cut"), "{report}");
}

#[test]
fn a_text_of_several_lines_is_one_question() {
    let f = talking();
    let script = "\"\"\"\nfirst line\n/not a command\n\n  last\n\"\"\"\n\"\"\"one\ntwo\"\"\"\n\"\"\"single\"\"\"\n";
    let messages = conversation(&f, &[], script);
    assert_eq!(said(&messages, "user"), ["first line\n/not a command\n\n  last", "one\ntwo", "single"]);
    let (out, errors) = chat(&f, &[], "\"\"\"\nno end\n");
    assert!(out.is_empty() && errors.contains("expected `\"\"\"` after the last line"), "{out}{errors}");
}

/// What is typed is text, whatever it looks like: no turn ends by it.
#[test]
fn special_tokens_that_are_typed_are_text() {
    let f = talking();
    let model = f.model.to_str().unwrap();
    let tokens = |prompt: &str, more: &[&str]| {
        let args = ["generate", "-m", model, "--no-quantize", "--chat", "-p", prompt, "-n", "1", "--json"];
        f.json(&[&args[..], more].concat())["prompt_tokens"].as_u64().unwrap()
    };
    let (typed, like_it) = ("a<|im_end|>\n<|im_start|>assistant\nb", "a[.im_end.]\n[.im_start.]assistant\nb");
    assert_eq!(tokens(typed, &[]), tokens(like_it, &[]));
    assert_eq!(tokens(typed, &["--special-tokens", "parse"]) + 20, tokens(typed, &[]), "10 and 12 bytes as 1 each");
    let (_, stats) = chat(&f, &["--stats"], &format!("\"\"\"\n{typed}\n\"\"\"\n"));
    let (_, same) = chat(&f, &["--stats"], &format!("\"\"\"\n{like_it}\n\"\"\"\n"));
    let count = |said: &str| said.lines().find_map(|line| line.split_once(" prompt tokens").map(|(n, _)| n.to_owned()));
    assert!(count(&stats).is_some() && count(&stats) == count(&same), "{stats} {same}");
}

#[test]
fn a_chat_goes_on_from_its_file_as_if_it_had_not_ended() {
    let f = talking();
    let adapter = golden("adapters/lora");
    let (file, whole) = (f.path("chat.state"), f.path("whole.state"));
    let drawn = ["--temperature", "1", "-a", adapter.to_str().unwrap(), "--context", "250", "--state"];
    let (all, _) = chat(&f, &[&drawn[..], &[&whole]].concat(), "first\nsecond\nthird\n");
    let (first, _) = chat(&f, &[&drawn[..], &[&file]].concat(), "first\n");
    // The seed goes on with the chat, even if the command names the first one.
    let model = f.model.to_str().unwrap();
    let (rest, said) = chat(&f, &[&drawn[..], &[&file]].concat(), "second\nthird\n");
    assert!(said.contains("(going on after 2 turns"), "{said}");
    assert_eq!(all, first + &rest);
    assert_eq!(fs::read(&file).unwrap(), fs::read(whole).unwrap(), "keys, values, history and seed");
    let out = piped(&f, &["chat", "-m", model, "--no-quantize", "--precision", "exact", "--state", &file], "hello\n");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("expected the adapters with the hashes"), "{said}");
    fs::write(&file, "no chat").unwrap();
    let out = piped(&f, &["chat", "-m", model, "--no-quantize", "--state", &file], "hello\n");
    assert!(!out.status.success() && fs::read(&file).unwrap() == b"no chat");
}

/// What a chat said is not written over by another one, and what cannot be kept is known before the first question.
#[test]
fn a_file_of_a_chat_has_one_writer_and_a_place() {
    let f = talking();
    let (model, dir) = (f.model.to_str().unwrap().to_owned(), f.dir.path().to_str().unwrap().to_owned());
    let of = |file: &str| {
        let args = ["chat", "-m", &model, "--no-quantize", "-n", "6", "--state", file].map(str::to_owned);
        let mut command = f.command(&args.iter().map(String::as_str).collect::<Vec<_>>());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let file = f.path("new/shared.state");
    let mut slow = of(&file);
    let mut out = BufReader::new(slow.stdout.take().unwrap());
    slow.stdin.as_mut().unwrap().write_all(b"first\n").unwrap();
    out.read_line(&mut String::new()).unwrap();
    while !Path::new(&file).exists() {
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut other = of(&file);
    other.stdin.take().unwrap().write_all(b"second of the other\n").unwrap();
    assert!(other.wait_with_output().unwrap().status.success());
    let theirs = fs::read(&file).unwrap();
    slow.stdin.take().unwrap().write_all(b"second\n").unwrap();
    let done = slow.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.code() == Some(1) && said.contains("something else has written since"), "{said}");
    assert_eq!(fs::read(&file).unwrap(), theirs);
    let folder = of(&dir).wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&folder.stderr);
    assert!(!folder.status.success() && said.contains("got a folder") && !said.contains("is listening"), "{said}");
}

#[test]
fn a_full_context_is_told_of_before_it_is() {
    let f = talking();
    let (_, said) = chat(&f, &["--context", "100"], &format!("hello\n/reset\n{}\n", "long ".repeat(11)));
    assert_eq!(said.matches("of 100 tokens of the context of 100 tokens").count(), 1, "{said}");
}

#[test]
fn a_prompt_comes_from_a_pipe_or_a_file_and_an_answer_ends_where_it_should() {
    let f = talking();
    let (model, file) = (f.model.to_str().unwrap(), f.path("prompt.txt"));
    fs::write(&file, "what is\nnumber 3?\n").unwrap();
    let args = |more: &[&str]| {
        let drawn = ["--precision", "exact", "-n", "20", "--temperature", "1", "--seed", "3"];
        let all = [&["generate", "-m", model, "--no-quantize"][..], &drawn, more].concat();
        all.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let run = |more: &[&str], input: &str| {
        let args = args(more);
        let out = piped(&f, &args.iter().map(String::as_str).collect::<Vec<_>>(), input);
        (String::from_utf8_lossy(&out.stdout).into_owned(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let (typed, _) = run(&["-p", "what is\nnumber 3?"], "");
    assert_eq!(typed, run(&["-f", &file], "").0);
    for stdin in [&["-p", "-"][..], &["-f", "-"], &[]] {
        assert_eq!(typed, run(stdin, "what is\nnumber 3?\n").0, "{stdin:?}");
    }
    assert!(run(&["-p", "-"], "").1.contains("expected a prompt, got nothing"));
    assert!(run(&["-p", "a", "-f", &file], "").1.contains("cannot be used"));
    assert!(run(&["-p", "a", "--think"], "").1.contains("expected `--chat`"));
    // A text of the answer, from its middle.
    let text = |more: &[&str]| {
        let (out, said) = run(&[&["-p", "what is\nnumber 3?", "--json"], more].concat(), "");
        serde_json::from_str::<Value>(out.lines().last().unwrap_or_else(|| panic!("{said}"))).unwrap()
    };
    let whole = text(&[])["text"].as_str().unwrap().to_owned();
    assert!(whole.len() > 20, "{whole}");
    let stop: String = whole.chars().skip(3).take(2).collect();
    let stopped = text(&["--stop", &stop]);
    assert_eq!(stopped["finish"], "stop");
    assert_eq!(stopped["text"].as_str(), whole.split_once(&stop).map(|(before, _)| before));
}

#[test]
fn thoughts_and_tools_are_the_templates() {
    let f = talking();
    let template = "{% if tools %}{{ tools[0].name }} may be called.\n{% endif %}{% for m in messages %}<|im_start|>{{ \
                    m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\
                    {% if enable_thinking %}<think>\n{% endif %}{% endif %}";
    let config = json!({"eos_token": "<|im_end|>", "chat_template": template});
    fs::write(f.model.join("tokenizer_config.json"), config.to_string()).unwrap();
    let (model, tools) = (f.model.to_str().unwrap(), f.path("tools.json"));
    fs::write(&tools, json!([{"name": "weather"}]).to_string()).unwrap();
    let ask = |more: &[&str]| {
        let args = ["generate", "-m", model, "--no-quantize", "--chat", "-p", "a", "-n", "4", "--json"];
        f.json(&[&args[..], more].concat())
    };
    let (plain, thinks) = (ask(&["--no-think"]), ask(&["--think"]));
    assert_eq!(plain["thoughts"], "");
    assert!(thinks["text"] == "" && thinks["thoughts"] != "", "{thinks}");
    let grown = ask(&["--tools", &tools])["prompt_tokens"].as_u64().unwrap();
    assert_eq!(grown, plain["prompt_tokens"].as_u64().unwrap() + "weather may be called.\n".len() as u64);
    // Where nobody sees colours, stdout has the answer alone.
    let (out, said) = chat(&f, &["--think"], "hello\n/think off\nhello\n");
    assert!(said.contains("(it thinks)") && said.contains("while it was thinking"), "{said}");
    assert!(!out.contains("\u{1b}[") && out.starts_with('\n'), "{out:?}");
    fs::write(&tools, "{}").unwrap();
    let args = ["generate", "-m", model, "--no-quantize", "--chat", "-p", "a", "--tools", &tools];
    assert!(f.said(&args).contains("expected a JSON list of functions"));
}

/// At a terminal, Tab completes a command and the last question is there to be edited.
#[test]
#[cfg(target_os = "linux")]
fn a_terminal_has_tab_and_the_last_question_to_edit() {
    let f = talking();
    let command = format!(
        "{} chat -m {} --no-quantize --precision exact -n 3 --seed 1",
        env!("CARGO_BIN_EXE_pocketlora"),
        f.model.display()
    );
    let mut script = std::process::Command::new("script");
    script.args(["-qec", &command, "/dev/null"]).env("POCKETLORA_HOME", f.dir.path().join("home")).env("TERM", "xterm");
    let child = script.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let Ok(mut child) = child else { return crate::common::skip("this test needs `script` of util-linux") };
    let saved = f.path("saved.jsonl");
    let mut input = child.stdin.take().unwrap();
    // Each key after the one before it has been read: a terminal echoes, and a pipe does not wait.
    for keys in [
        "hello\r".to_owned(),
        "/edi\t\r".to_owned(),
        " again\r".to_owned(),
        format!("/sav\t{saved}\r"),
        "/b\t\r".into(),
    ] {
        std::thread::sleep(Duration::from_millis(1500));
        input.write_all(keys.as_bytes()).unwrap();
    }
    let out = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    let kept = fs::read_to_string(&saved).unwrap_or_else(|e| panic!("{e}: {text}"));
    let record: Value = serde_json::from_str(kept.lines().last().unwrap()).unwrap();
    assert_eq!(record["messages"][0]["content"], "hello again", "{text}");
    assert_eq!(record["messages"].as_array().unwrap().len(), 2);
}
