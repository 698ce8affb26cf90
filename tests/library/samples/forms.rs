//! Every form of data, and what is wrong with bad data.

use super::Reader;
use crate::common::check_all;
use pocketlora::ErrorCode;
use pocketlora::train::{Dataset, SampleLimits};
use std::fs;

fn reader() -> Reader {
    Reader::family("qwen2", "<|endoftext|>", "<|im_end|>")
}

const SYSTEM: &str = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n";

/// Text of a sample, and what of it is learned.
type Shown = (String, Vec<String>);

/// The samples in `file`.
fn read(reader: &Reader, file: &str, bytes: &[u8]) -> Result<Vec<Shown>, String> {
    let data = reader.read(file, bytes, 4096).map_err(|e| e.to_string())?;
    Ok(data.samples.iter().map(|s| (reader.text(&s.ids), reader.learned(s))).collect())
}

#[test]
fn all_forms_are_read() {
    let reader = reader();
    let chat = |question: &str, answer: &str| {
        let text =
            format!("{SYSTEM}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n");
        (text, vec![format!("{answer}<|im_end|>")])
    };
    let plain =
        |given: &str, learned: &str| (format!("{given}{learned}<|im_end|>"), vec![format!("{learned}<|im_end|>")]);
    let cases: Vec<(&str, &[u8], Vec<Shown>)> = vec![
        ("a.jsonl", br#"{"prompt": "2+2=", "completion": "4"}"#, vec![plain("2+2=", "4")]),
        ("a.jsonl", br#"{"text": "abc", "id": 5}"#, vec![plain("a", "bc")]),
        (
            "a.jsonl",
            br#"{"prompt": [{"role":"user","content":"q"}], "completion": [{"role":"assistant","content":"r"}]}"#,
            vec![chat("q", "r")],
        ),
        ("a.jsonl", br#"{"instruction": "Add", "input": "1 2", "output": "3"}"#, vec![chat("Add\n\n1 2", "3")]),
        ("a.jsonl", br#"{"instruction": "Hi", "output": "Ho", "input": null}"#, vec![chat("Hi", "Ho")]),
        (
            "a.jsonl",
            b"\xef\xbb\xbf{\"text\":\"abc\"}\r\n\r\n \t\r\n{\"instruction\":\"u\",\"output\":\"v\"}",
            vec![plain("a", "bc"), chat("u", "v")],
        ),
        (
            "a.CSV",
            b"\xef\xbb\xbfinstruction,input, output ,note\r\nSay it,,\"a, \"\"b\"\"\nc\",x\r\n,,,\r\nAdd,1 2,3,\r\n",
            vec![chat("Say it", "a, \"b\"\nc"), chat("Add\n\n1 2", "3")],
        ),
        ("a.csv", b"prompt,completion\n1+1=,2\n", vec![plain("1+1=", "2")]),
        (
            "a.csv",
            b"messages\n\"[{\"\"role\"\":\"\"user\"\",\"\"content\"\":\"\"q\"\"},{\"\"role\"\":\"\"assistant\"\",\"\"content\"\":\"\"r\"\"}]\"\n",
            vec![chat("q", "r")],
        ),
        ("note.md", b"\xef\xbb\xbf# T\n", vec![plain("#", " T\n")]),
    ];
    check_all(cases, |(file, bytes, expected)| {
        let found = read(&reader, file, bytes);
        if found.as_ref() == Ok(expected) { Ok(()) } else { Err(format!("{file}: {found:?}, expected {expected:?}")) }
    });
}

#[test]
fn only_the_completion_of_a_conversation_is_learned() {
    let reader = reader();
    let line = br#"{"prompt": [{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"c"}],
                    "completion": [{"role":"assistant","content":"d"}]}"#;
    let line: Vec<u8> = line.iter().copied().filter(|b| *b != b'\n').collect();
    for change in [&super::unmarked as &dyn Fn(String) -> String, &|t| t] {
        let reader = Reader::new(Some("qwen2"), "<|endoftext|>", "<|im_end|>", change);
        assert_eq!(read(&reader, "a.jsonl", &line).unwrap()[0].1, ["d<|im_end|>"]);
    }
    assert!(reader.template.is_own());
}

#[test]
fn instructions_for_a_model_without_a_template_have_the_layout_of_alpaca() {
    let reader = Reader::new(None, "<s>", "</s>", &|t| t);
    let (text, learned) =
        read(&reader, "a.jsonl", br#"{"instruction":"Add","input":"1","output":"2"}"#).unwrap().remove(0);
    assert!(text.contains("\n\n### Instruction:\nAdd\n\n### Input:\n1\n\n### Response:\n2</s>"), "{text}");
    assert_eq!(learned, ["2</s>"]);
}

#[test]
fn a_folder_of_notes_is_read_by_name() {
    let reader = reader();
    let notes = reader.path("notes");
    fs::create_dir_all(notes.join("b")).unwrap();
    fs::create_dir_all(notes.join(".git")).unwrap();
    for (name, text) in [
        ("c.md", "third"),
        ("b/x.txt", "second"),
        ("a.TXT", "first"),
        ("d.md", " \n"),
        ("e.pdf", "no"),
        (".hidden.md", "no"),
        (".git/y.md", "no"),
    ] {
        fs::write(notes.join(name), text).unwrap();
    }
    let data = reader.open(&notes, 4096).unwrap();
    let texts: Vec<String> = data.samples.iter().map(|s| reader.text(&s.ids)).collect();
    assert_eq!(texts, ["first<|im_end|>", "second<|im_end|>", "third<|im_end|>"]);
    assert_eq!(data.records, 3);
    fs::write(notes.join("b/bad.md"), [0xff]).unwrap();
    let error = reader.open(&notes, 4096).unwrap_err();
    assert!(error.code() == ErrorCode::Data && error.to_string().contains("bad.md"), "{error}");
    let empty = reader.path("empty");
    fs::create_dir_all(&empty).unwrap();
    assert!(reader.open(&empty, 4096).unwrap_err().to_string().contains("`.md`"));
}

#[test]
fn bad_data_is_refused_with_its_file_and_line() {
    let reader = reader();
    let deep = format!("{{\"text\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let cases: Vec<(&str, &[u8], &str)> = vec![
        ("a.jsonl", b" \n", "at least one line"),
        ("a.csv", b"text\n", "at least one line"),
        ("a.txt", b" \n", "at least one line"),
        ("a.jsonl", b"{\"text\":\"abc\"}\n\xff\xfe", "line 2"),
        ("a.jsonl", b"{\"text\":\"abc\"}\n{\"text\":\"a\xff\"}", "UTF-8"),
        ("a.jsonl", deep.as_bytes(), "line 1"),
        ("a.jsonl", b"{\"text\": 5}", "a number"),
        ("a.jsonl", b"{\"question\": \"a\"}", "rename the keys"),
        ("a.jsonl", b"{\"prompt\": \"a\"}", "rename the keys"),
        ("a.jsonl", b"{\"prompt\": \"a\", \"completion\": []}", "both"),
        ("a.jsonl", b"{\"messages\": \"hello\"}", "a list of messages"),
        ("a.jsonl", b"{\"messages\": [{\"content\": \"x\"}]}", "`role`"),
        ("a.jsonl", b"{\"messages\": [{\"role\":\"user\",\"content\":[{\"type\":\"image\"}]}]}", "\"image\""),
        ("a.jsonl", b"{\"messages\": [{\"role\":\"user\",\"content\":7}]}", "list of text parts"),
        ("a.jsonl", b"{\"messages\": []}", "`assistant`"),
        ("a.jsonl", b"{\"text\":\"abc\"}\n\n{\"messages\": [{\"role\":\"user\",\"content\":\"x\"}]}", "line 3"),
        ("a.jsonl", b"{\"tools\": 3, \"messages\": []}", "a list of tools"),
        // Learned is a text but its first token, and of a prompt only what follows: nothing in these.
        (
            "a.jsonl",
            b"{\"prompt\": \"a\", \"completion\": \"\"}",
            "nothing to learn|completion: expected something to learn",
        ),
        ("a.csv", b"text\nabc\n\"a\xff\"\n", "a.csv"),
        ("a.csv", b"text,id\nabc,1\nabc\n", "line 3"),
        ("a.csv", b"prompt,note\na,b\n", "line 2"),
    ];
    check_all(cases, |(file, bytes, what)| match reader.read(file, bytes, 4096) {
        Ok(data) => Err(format!("{file} {what}: accepted with {} samples", data.samples.len())),
        Err(e) if e.code() != ErrorCode::Data => Err(format!("{file} {what}: {e}")),
        Err(e) => {
            let message = e.to_string();
            let named = message.contains(file) && what.split('|').any(|w| message.contains(w));
            if named { Ok(()) } else { Err(format!("{file} {what}: {message}")) }
        }
    });
    assert_eq!(reader.open(&reader.path("none.jsonl"), 4096).unwrap_err().code(), ErrorCode::Io);
    assert_eq!(reader.read("a.jsonl", "{\"text\":\"abc\"}", 1).unwrap_err().code(), ErrorCode::Config);
}

#[test]
fn an_answer_that_is_not_shown_is_refused() {
    let template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}";
    let reader = Reader::new(Some("qwen2"), "<s>", "</s>", &|_| template.to_owned());
    let lines = r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"r"}]}"#;
    let error = reader.read("a.jsonl", lines, 4096).unwrap_err().to_string();
    assert!(error.contains("line 1") && error.contains("tokens to learn in turn 2"), "{error}");
}

#[test]
fn ids_without_an_embedding_are_refused_with_their_line() {
    let reader = reader();
    let path = reader.path("a.jsonl");
    fs::write(&path, "{\"text\": \"abc\"}\n{\"text\": \"abc<s>\"}\n").unwrap();
    let error =
        Dataset::open(&path, &reader.tokenizer, &reader.template, SampleLimits { tokens: 99, vocab: 256 }).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Data);
    let message = error.to_string();
    // This tokenizer's special tokens come after the 256 bytes; the first line ends with one, too.
    assert!(message.contains("a.jsonl` line 1") && message.contains("below the vocabulary's 256"), "{message}");
}
