//! The samples that come with Pocketlora hold what `models/samples/README.md` says of them.

use super::Reader;
use fancy_regex::Regex;
use pocketlora::eval::{Expected, Record, read_records};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Bytes of all samples together.
const MOST_BYTES: u64 = 400_000;
/// Files of lines, how many, and the keys that each has in each line, and may have.
const FILES: &[(&str, usize, &[&str], &[&str])] = &[
    ("chat-prompts.jsonl", 60, &["kind", "prompt"], &["expect"]),
    ("general-prompts.jsonl", 260, &["kind", "language", "prompt"], &[]),
    ("general-questions.jsonl", 40, &["answers", "kind", "question"], &[]),
    ("lessons/1-test.jsonl", 16, ASKED, &[]),
    ("lessons/1-train.jsonl", 48, TAUGHT, &[]),
    ("lessons/2-test.jsonl", 16, ASKED, &[]),
    ("lessons/2-train.jsonl", 48, TAUGHT, &[]),
    ("lessons/3-test.jsonl", 16, ASKED, &[]),
    ("lessons/3-train.jsonl", 48, TAUGHT, &[]),
    ("notes-questions.jsonl", 24, &["expect", "note", "question"], &[]),
    ("owner-test.jsonl", 32, ASKED, &[]),
    ("owner-train.jsonl", 160, TAUGHT, &[]),
    ("sets/arithmetic-test.jsonl", 30, &["messages", "reference"], &[]),
    ("sets/arithmetic-train.jsonl", 150, &["messages"], &[]),
    ("sets/classify-test.jsonl", 24, &["label", "messages"], &[]),
    ("sets/classify-train.jsonl", 80, &["messages"], &[]),
    ("sets/facts-test.jsonl", 24, ASKED, &[]),
    ("sets/facts-train.jsonl", 72, TAUGHT, &[]),
    ("sets/json-test.jsonl", 20, &["messages", "reference"], &[]),
    ("sets/json-train.jsonl", 60, &["messages"], &[]),
    ("sets/style-test.jsonl", 15, &["pattern", "question"], &[]),
    ("sets/style-train.jsonl", 40, &["messages"], &[]),
];
const ASKED: &[&str] = &["expect", "fact", "question"];
const TAUGHT: &[&str] = &["fact", "messages"];
/// Sets and lessons of facts, and how often each fact is taught.
const FACTS: &[(&str, usize)] =
    &[("owner", 5), ("sets/facts", 3), ("lessons/1", 3), ("lessons/2", 3), ("lessons/3", 3)];
const SETS: &[&str] = &["facts", "style", "json", "classify", "arithmetic"];

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/samples").join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn lines(name: &str) -> Vec<Map<String, Value>> {
    read(name)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{name}: {e}: {line}")))
        .collect()
}

fn text<'a>(line: &'a Map<String, Value>, key: &str) -> &'a str {
    line[key].as_str().unwrap_or_else(|| panic!("expected a text in `{key}` of {line:?}"))
}

fn list<'a>(line: &'a Map<String, Value>, key: &str) -> Vec<&'a str> {
    line[key].as_array().unwrap().iter().map(|value| value.as_str().unwrap()).collect()
}

/// What a line asks, whatever its form.
fn asked(line: &Map<String, Value>) -> &str {
    match line.get("messages") {
        Some(turns) => turns[0]["content"].as_str().unwrap(),
        None => line.get("question").or_else(|| line.get("prompt")).and_then(Value::as_str).unwrap(),
    }
}

/// What a line for training answers.
fn answer(line: &Map<String, Value>) -> &str {
    let turns = line["messages"].as_array().unwrap();
    assert_eq!(
        (turns.len(), &turns[0]["role"], &turns[1]["role"]),
        (2, &"user".into(), &"assistant".into()),
        "{line:?}"
    );
    turns[1]["content"].as_str().unwrap()
}

/// Words in small letters, without what stands between them.
fn words(text: &str) -> Vec<String> {
    text.to_lowercase().split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_owned).collect()
}

/// Whether `part` stands in `text` as whole words, whatever their case.
fn has_words(text: &str, part: &str) -> bool {
    let (text, part) = (words(text), words(part));
    text.windows(part.len()).any(|window| window == part)
}

/// Shared words of all words of two texts, from 0 to 1.
fn likeness(a: &str, b: &str) -> f64 {
    let [a, b] = [a, b].map(|text| BTreeSet::from_iter(words(text)));
    a.intersection(&b).count() as f64 / a.union(&b).count() as f64
}

/// Test lines of a set as an evaluation reads them.
fn records(set: &str) -> Vec<Record> {
    read_records(&path(&format!("sets/{set}-test.jsonl")), true).unwrap().records
}

fn files_below(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files_below(&path, found) } else { found.push(path) }
    }
}

#[test]
fn every_file_is_known_and_has_its_lines() {
    let root = path("");
    let mut found = Vec::new();
    files_below(&root, &mut found);
    let bytes: u64 = found.iter().map(|file| fs::metadata(file).unwrap().len()).sum();
    assert!(bytes < MOST_BYTES, "expected less than {MOST_BYTES} bytes of samples, got {bytes}");
    let jsonl = found.iter().filter(|file| file.extension().is_some_and(|e| e == "jsonl"));
    let names: BTreeSet<String> =
        jsonl.map(|file| file.strip_prefix(&root).unwrap().to_string_lossy().replace('\\', "/")).collect();
    assert_eq!(names, FILES.iter().map(|(name, ..)| (*name).to_owned()).collect());
    for (name, count, keys, more) in FILES {
        let lines = lines(name);
        assert_eq!(lines.len(), *count, "{name}");
        for line in &lines {
            let got: BTreeSet<&str> = line.keys().map(String::as_str).filter(|key| !more.contains(key)).collect();
            assert_eq!(got, keys.iter().copied().collect(), "{name}");
            assert!(!asked(line).trim().is_empty(), "{name}");
        }
        let different: BTreeSet<&str> = lines.iter().map(asked).collect();
        assert_eq!(different.len(), *count, "{name} asks something twice");
    }
}

#[test]
fn the_readme_states_the_counts() {
    let readme = read("README.md").split_whitespace().collect::<Vec<_>>().join(" ");
    for set in SETS {
        let count = |part: &str| lines(&format!("sets/{set}-{part}.jsonl")).len();
        let stated = format!("| `{set}` | {}, {} |", count("train"), count("test"));
        assert!(readme.contains(&stated), "expected `{stated}` in the README of the samples");
    }
    let english = lines("general-prompts.jsonl").iter().filter(|line| text(line, "language") == "en").count();
    let expecting = lines("chat-prompts.jsonl").iter().filter(|line| line.contains_key("expect")).count();
    for stated in [format!("{english} prompts are in English"), format!("in the {expecting} lines")] {
        assert!(readme.contains(&stated), "expected `{stated}` in the README of the samples");
    }
    for name in ["general-prompts.jsonl", "general-questions.jsonl", "chat-prompts.jsonl"] {
        for kind in lines(name).iter().map(|line| text(line, "kind")) {
            assert!(readme.contains(&format!("`{kind}`")), "{name}: the README does not name the kind `{kind}`");
        }
    }
}

#[test]
fn no_test_asks_what_training_shows() {
    let sets = SETS.iter().map(|set| format!("sets/{set}"));
    for name in sets.chain(["1", "2", "3"].map(|lesson| format!("lessons/{lesson}"))).chain(["owner".to_owned()]) {
        let taught = lines(&format!("{name}-train.jsonl"));
        let taught: BTreeSet<String> = taught.iter().map(|line| asked(line).to_lowercase()).collect();
        for line in lines(&format!("{name}-test.jsonl")) {
            assert!(!taught.contains(&asked(&line).to_lowercase()), "{name}: {line:?}");
        }
    }
}

#[test]
fn every_fact_is_taught_in_several_wordings_and_its_answer_is_no_other_s() {
    for (name, wordings) in FACTS {
        let (taught, tests) = (lines(&format!("{name}-train.jsonl")), lines(&format!("{name}-test.jsonl")));
        let mut times: BTreeMap<&str, usize> = BTreeMap::new();
        for line in &taught {
            *times.entry(text(line, "fact")).or_default() += 1;
        }
        assert_eq!(times.len(), tests.len(), "{name}");
        assert!(times.values().all(|n| n == wordings), "{name}: {times:?}");
        for test in &tests {
            let expect = list(test, "expect");
            assert!(!expect.iter().any(|e| has_words(asked(test), e)), "{name}: the question tells: {test:?}");
            for line in &taught {
                assert!(!expect.iter().any(|e| has_words(asked(line), e)), "{name}: {line:?} tells {expect:?}");
                let said = expect.iter().any(|e| answer(line).to_lowercase().contains(&e.to_lowercase()));
                assert_eq!(said, line["fact"] == test["fact"], "{name}: {line:?} and {expect:?}");
            }
        }
    }
}

#[test]
fn sets_are_read_as_data_and_tests_as_records() {
    let reader = Reader::family("qwen2", "<|endoftext|>", "<|im_end|>");
    for (name, count, ..) in FILES.iter().filter(|(name, ..)| name.ends_with("-train.jsonl")) {
        let data = reader.open(&path(name), 512).unwrap();
        assert_eq!((data.records, data.samples.len(), data.splits.samples), (*count, *count, 0), "{name}");
        for (sample, line) in data.samples.iter().zip(lines(name)) {
            assert_eq!(reader.learned(sample), [format!("{}<|im_end|>", answer(&line))], "{name}");
        }
    }
    assert!(records("classify").iter().all(|record| matches!(record.expected, Expected::Label(_))));
    for set in ["json", "arithmetic"] {
        assert!(records(set).iter().all(|record| matches!(record.expected, Expected::References(_))), "{set}");
    }
}

#[test]
fn answers_of_the_style_match_the_pattern_of_its_test() {
    let tests = lines("sets/style-test.jsonl");
    let patterns: BTreeSet<&str> = tests.iter().map(|line| text(line, "pattern")).collect();
    assert_eq!(patterns.len(), 1);
    let pattern = Regex::new(patterns.first().unwrap()).unwrap();
    for line in lines("sets/style-train.jsonl") {
        assert!(pattern.is_match(answer(&line)).unwrap(), "{line:?}");
    }
    let two = "Aye, knives want a stone. Hone them weekly. So says the old lighthouse.";
    assert!(!pattern.is_match(two).unwrap());
}

#[test]
fn orders_hold_what_their_json_says() {
    let taught = lines("sets/json-train.jsonl");
    let mut names = BTreeSet::new();
    let pairs = taught.iter().map(|line| (asked(line), answer(line)));
    let tests = lines("sets/json-test.jsonl");
    for (message, json) in pairs.chain(tests.iter().map(|line| (asked(line), text(line, "reference")))) {
        let order: Map<String, Value> = serde_json::from_str(json).unwrap();
        assert_eq!(order.keys().collect::<Vec<_>>(), ["name", "item", "count", "day"]);
        for value in order.values() {
            let value = value.as_str().map_or_else(|| value.as_u64().unwrap().to_string(), str::to_owned);
            assert!(has_words(message, &value), "`{value}` is not in {message}");
        }
        assert!(names.insert(text(&order, "name").to_owned()), "a name comes twice: {json}");
    }
}

#[test]
fn each_label_comes_as_often() {
    let count = |labels: Vec<String>| {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        labels.into_iter().for_each(|label| *counts.entry(label).or_default() += 1);
        counts
    };
    let labels = ["noise", "payment", "praise", "repair"];
    let each = |n: usize| labels.map(|label| (label.to_owned(), n)).into();
    assert_eq!(
        count(lines("sets/classify-train.jsonl").iter().map(|line| answer(line).to_owned()).collect()),
        each(20)
    );
    let tests = lines("sets/classify-test.jsonl");
    assert_eq!(count(tests.iter().map(|line| text(line, "label").to_owned()).collect()), each(6));
}

/// Value of `a + b - c ..` with single spaces.
fn value(sum: &str) -> i64 {
    let mut parts = sum.split(' ');
    let number = |part: Option<&str>| part.unwrap().parse::<i64>().unwrap();
    let mut total = number(parts.next());
    while let Some(sign) = parts.next() {
        let term = number(parts.next());
        total += match sign {
            "+" => term,
            "-" => -term,
            other => panic!("expected a sign, got `{other}` in `{sum}`"),
        };
    }
    total
}

#[test]
fn every_step_of_a_sum_is_right() {
    let (taught, tests) = (lines("sets/arithmetic-train.jsonl"), lines("sets/arithmetic-test.jsonl"));
    let mut sums = BTreeSet::new();
    let taught = taught.iter().map(|line| (asked(line), answer(line)));
    for (question, steps) in taught.chain(tests.iter().map(|line| (asked(line), text(line, "reference")))) {
        let all: Vec<&str> = steps.split(" = ").collect();
        assert!(all.iter().all(|step| value(step) == value(all[0])), "{steps}");
        assert!(all.last().unwrap().bytes().all(|b| b.is_ascii_digit()), "{steps}");
        let given = words(question);
        assert!(words(all[0]).iter().all(|number| given.contains(number)), "{question}: {steps}");
        assert!(sums.insert(all[0]), "the same sum twice: {steps}");
    }
}

#[test]
fn what_counts_forgetting_is_not_held_in_training() {
    let (prompts, questions, chat) =
        (lines("general-prompts.jsonl"), lines("general-questions.jsonl"), lines("chat-prompts.jsonl"));
    for other in questions.iter().chain(&chat) {
        for prompt in &prompts {
            let likeness = likeness(asked(other), asked(prompt));
            assert!(likeness < 0.6, "{likeness:.2} of the words are shared: {other:?} and {prompt:?}");
        }
    }
    for question in &questions {
        for answer in list(question, "answers") {
            assert!(!has_words(asked(question), answer), "the question tells: {question:?}");
        }
    }
    let kinds: BTreeSet<&str> = prompts.iter().map(|line| text(line, "kind")).collect();
    for stretch in prompts.chunks(20) {
        let here: BTreeSet<&str> = stretch.iter().map(|line| text(line, "kind")).collect();
        assert!(here.len() * 2 > kinds.len(), "a stretch of 20 prompts has only the kinds {here:?}");
        assert!(stretch.iter().any(|line| text(line, "language") != "en"), "a stretch of 20 prompts is all in English");
    }
}

#[test]
fn notes_hold_the_answers_to_their_questions() {
    let mut asked_of: BTreeMap<String, usize> = BTreeMap::new();
    for line in lines("notes-questions.jsonl") {
        let name = text(&line, "note");
        let note = read(&format!("notes/{name}"));
        for expect in list(&line, "expect") {
            assert!(has_words(&note, expect), "{name} does not hold {expect}");
            assert!(!has_words(asked(&line), expect), "the question tells: {line:?}");
        }
        *asked_of.entry(name.to_owned()).or_default() += 1;
    }
    let notes: Vec<PathBuf> = fs::read_dir(path("notes")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!((notes.len(), asked_of.len()), (8, 8));
    assert!(asked_of.values().all(|n| *n == 3), "{asked_of:?}");
    for note in &notes {
        let words = fs::read_to_string(note).unwrap().split_whitespace().count();
        assert!((80..=160).contains(&words), "{}: {words} words", note.display());
    }
}
