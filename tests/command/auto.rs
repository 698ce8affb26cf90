//! Settings that find themselves: what is chosen, what is said of it and of bad data, and that both are the same each time.

use crate::common::{check_all, real_gguf};
use crate::fixture::{Fixture, fixture};
use pocketlora::train::Keep;
use pocketlora::{Engine, Observer, Options, StepReport, TrainConfig};
use serde_json::{Value, json};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Output;

/// Trains the tiny model on `data`.
fn train(f: &Fixture, data: &str, out: &str, more: &[&str]) -> Output {
    let model = f.model.to_str().unwrap();
    let args = [&["train", "-m", model, "--no-quantize", "--threads", "1", "-d", data, "-o", out][..], more].concat();
    f.run(&args)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Stderr and stdout of a run that must succeed.
fn said(f: &Fixture, data: &str, out: &str, more: &[&str]) -> String {
    let done = train(f, data, out, more);
    assert!(done.status.success(), "{more:?}: {}", text(&done.stderr));
    text(&done.stderr) + &text(&done.stdout)
}

/// Writes questions and answers.
fn data(f: &Fixture, name: &str, lines: impl IntoIterator<Item = (String, String)>) -> String {
    let line = |(q, a): (String, String)| {
        json!({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}).to_string()
    };
    let path = f.path(name);
    fs::write(&path, lines.into_iter().map(line).collect::<Vec<_>>().join("\n")).unwrap();
    path
}

fn settings(out: &str) -> TrainConfig {
    toml::from_str(&fs::read_to_string(Path::new(out).join("train.toml")).unwrap()).unwrap()
}

/// What the command adds to the library's defaults.
fn usual() -> TrainConfig {
    TrainConfig { keep: Keep::Auto, check: true, ..TrainConfig::default() }
}

fn adapter(out: &str) -> Vec<u8> {
    fs::read(Path::new(out).join("adapter_model.safetensors")).unwrap()
}

#[test]
fn a_choice_is_told_in_two_lines_written_down_and_the_same_each_time() {
    let f = fixture();
    let (data, [a, b, c, d, e]) = (f.data.to_str().unwrap(), ["a", "b", "c", "d", "e"].map(|name| f.path(name)));
    let told = said(&f, data, &a, &[]);
    let lines: Vec<&str> = told.lines().filter(|line| line.starts_with("auto: ")).collect();
    assert_eq!(lines.len(), 2, "{told}");
    assert!(lines[0].contains("lr ") && lines[0].contains("rank 16") && lines[0].contains("12 answers"), "{told}");
    assert!(lines[1].contains("at most ") && lines[1].contains("other wordings"), "{told}");
    assert!(told.contains("learned: answers: "), "{told}");
    assert!(!Path::new(&a).join("probe").exists());
    let chosen = settings(&a);
    assert!(chosen.eval_reworded && chosen.patience > 0 && chosen.epochs > 3, "{chosen:?}");

    // The same command makes the same adapter, and so does what it wrote down, which leaves nothing to be chosen.
    said(&f, data, &b, &[]);
    assert_eq!((adapter(&a), &chosen), (adapter(&b), &settings(&b)));
    let written = Path::new(&a).join("train.toml");
    let told = said(&f, data, &c, &["--config", written.to_str().unwrap()]);
    assert_eq!((adapter(&a), &chosen), (adapter(&c), &settings(&c)), "{told}");

    // Each flag overrides its part, and nothing is chosen where nothing is to be.
    said(&f, data, &d, &["--lr", "3e-4", "--rank", "4", "--patience", "0"]);
    let given = settings(&d);
    let expected = TrainConfig { lr: 3e-4, rank: 4, patience: 0, ..chosen };
    assert_eq!(given, expected);
    let told = said(&f, data, &e, &["--auto", "off"]);
    assert_eq!(settings(&e), usual());
    assert!(!told.contains("auto: "), "{told}");
}

/// Stops a run after some steps.
struct Stop(u64);

impl Observer for Stop {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        if report.step >= self.0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

#[test]
fn a_resumed_run_keeps_what_was_chosen() {
    let f = fixture();
    let (data, whole, cut) = (f.data.to_str().unwrap(), f.path("whole"), f.path("cut"));
    said(&f, data, &whole, &[]);
    let engine = Engine::open(&f.model, &Options::new().threads(1)).unwrap();
    let reader = engine.reader(None).unwrap();
    let records = reader.dataset(&f.data, 1024).unwrap();
    let draft = reader.draft(usual(), &|_| false, &records).unwrap();
    let material = reader.material(&draft.config, records, None).unwrap();
    let out = Path::new(&cut);
    let (config, _) = engine.settle(draft, &material, None, out, None, &mut Stop(u64::MAX)).unwrap();
    let mut trainer = engine.trainer_of(config, material, None, out).unwrap();
    assert!(!trainer.run(&mut Stop(3)).unwrap().done);
    drop(trainer);
    let told = said(&f, data, &cut, &["--resume"]);
    assert!(told.contains("resuming after step 3") && !told.contains("auto: "), "{told}");
    assert_eq!((adapter(&cut), settings(&cut)), (adapter(&whole), settings(&whole)));
}

#[test]
fn methods_have_rates_of_their_own_and_list_only_what_is_in_force() {
    let f = fixture();
    for (method, auto) in [("ia3", "on"), ("ia3", "off"), ("prefix-tuning", "on"), ("prefix-tuning", "off")] {
        let out = f.path(&format!("{method}-{auto}"));
        said(&f, f.data.to_str().unwrap(), &out, &["--method", method, "--auto", auto, "--steps", "2"]);
        assert!(settings(&out).lr >= 2e-3, "{method} {auto}: {}", settings(&out).lr);
        let written = fs::read_to_string(Path::new(&out).join("train.toml")).unwrap();
        assert!(!written.contains("rank = ") && !written.contains("alpha = "), "{written}");
        assert_eq!(written.contains("targets = "), method == "ia3", "{written}");
    }
}

#[test]
fn odd_data_is_learned_from_and_what_is_odd_is_said() {
    let f = fixture();
    let pairs = |n: usize| (0..n).map(|i| (format!("what is number {i}?"), format!("it is {}", i * 7 % 10)));
    let one = data(&f, "one.jsonl", pairs(1));
    let torn = data(&f, "torn.jsonl", pairs(6).chain([("What is  number 2?".to_owned(), "it is not".to_owned())]));
    let notes = f.path("notes");
    fs::create_dir(&notes).unwrap();
    for (i, word) in ["Milk", "keys", "no"].iter().enumerate() {
        fs::write(Path::new(&notes).join(format!("{i}.txt")), word).unwrap();
    }
    let cases: [(&str, &[&str], &[&str]); 4] = [
        ("one sample", &[&one], &["for 1 answers", "learned: answers: "]),
        ("conflict", &[&torn], &["lines 3 and 7", "`it is 4` and `it is not`"]),
        ("words", &[&notes, "--study", "off"], &["for 3 texts", "learned: texts: perplexity"]),
        (
            "no time",
            &[&torn, "--time", "0.001s"],
            &[
                "too short for one pass",
                "at most 1 steps",
                "too short for the check",
                "too short for holding the model",
            ],
        ),
    ];
    check_all(cases, |(name, args, expected)| {
        let told = said(&f, args[0], &f.path(name), &args[1..]);
        let lacks: Vec<_> = expected.iter().filter(|e| !told.contains(**e)).collect();
        if lacks.is_empty() { Ok(()) } else { Err(format!("{name}: nothing of {lacks:?} in\n{told}")) }
    });
    let refused = train(&f, &one, &f.path("bad time"), &["--time", "soon"]);
    assert!(!refused.status.success() && text(&refused.stderr).contains("`time`"), "{}", text(&refused.stderr));
}

#[test]
fn much_data_is_passed_once_watched_on_what_is_left_out_and_ends_in_time() {
    let f = fixture();
    let many = data(&f, "many.jsonl", (0..10_000).map(|i| (format!("n {i}"), format!("{}", i * 7919 % 10_007))));
    let (out, start) = (f.path("out"), std::time::Instant::now());
    let told = said(&f, &many, &out, &["--time", "3s"]);
    assert!(told.contains("for 10000 answers") && told.contains("64 answers"), "{told}");
    assert!(told.contains("`--time` bounds"), "{told}");
    assert!(settings(&out).eval_reworded);
    // The choice, the run and what is asked at the end, on whatever machine.
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
}

#[test]
fn what_taught_nothing_or_was_known_is_called_so() {
    let f = fixture();
    let few = data(&f, "few.jsonl", [("a?".to_owned(), "b".to_owned())]);
    let [idle, knows, again] = ["idle", "knows", "again"].map(|name| f.path(name));
    let told = said(&f, &few, &idle, &["--auto", "off", "--steps", "1", "--lr", "1e-7"]);
    assert!(told.contains("learned next to nothing"), "{told}");
    // Held to nothing, it gives the answer to other wordings as well.
    said(&f, &few, &knows, &["--steps", "120", "--lr", "1e-2", "--keep", "off"]);
    let told = said(&f, &few, &again, &["--init", &knows]);
    assert!(told.contains("knows this data already") && told.contains("knew nearly all"), "{told}");
    assert_eq!(settings(&again).epochs, 1, "{told}");
}

/// Names of the shipped samples.
fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/samples").join(name)
}

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Runs the command on the model that `pull` knows; stdout, and all that was said.
fn real(args: &[&str]) -> (String, String) {
    let done = std::process::Command::new(env!("CARGO_BIN_EXE_pocketlora")).args(args).output().unwrap();
    let told = text(&done.stderr) + &text(&done.stdout);
    assert!(done.status.success(), "{told}");
    (text(&done.stdout), told)
}

#[test]
fn a_language_that_the_model_does_not_know_is_said() {
    let Some(_) = real_gguf() else { return };
    let f = fixture();
    for (name, question, answer, foreign) in [
        ("hindi", "मंदिर की चाबी कहाँ है?", "मंदिर की चाबी लाल घड़े के नीचे रखी है, दरवाज़े के पास।", true),
        ("finnish", "Missä avain on?", "Avain on vanhan kellarin oven vieressä olevassa laatikossa.", true),
        ("german", "Wo liegt der Schlüssel?", "Der Schlüssel liegt unter dem roten Krug neben der Kellertür.", false),
    ] {
        let (data, out) = (data(&f, name, [(question.to_owned(), answer.to_owned())]), f.path(&format!("{name}-out")));
        let quick = ["--lr", "1e-3", "--steps", "1", "--keep", "off", "--skip-check"];
        let (_, told) = real(&[&["train", "-m", "smollm2-135m", "-d", &data, "-o", &out][..], &quick].concat());
        assert_eq!(told.contains("hardly knows the language"), foreign, "{name}: {told}");
    }
}

/// The quick start of the README in its short form: six facts of 32.
#[test]
fn the_quick_start_learns_the_owner_without_a_setting() {
    let Some(_) = real_gguf() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (taught, out) = (dir.path().join("facts.jsonl"), dir.path().join("my-adapter"));
    let tests: Vec<Value> = lines(&shipped("owner-test.jsonl")).into_iter().take(6).collect();
    let asked = |line: &&Value| tests.iter().any(|test| test["fact"] == line["fact"]);
    let all = lines(&shipped("owner-train.jsonl"));
    fs::write(&taught, all.iter().filter(asked).map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    let [taught, out] = [&taught, &out].map(|path| path.to_str().unwrap());
    let (_, told) = real(&["train", "-m", "smollm2-135m", "-d", taught, "-o", out]);
    let right = tests.iter().filter(|test| {
        let question = test["question"].as_str().unwrap();
        let how = ["-a", out, "--chat", "--temperature", "0", "-n", "24", "-p", question];
        let (answer, _) = real(&[&["generate", "-m", "smollm2-135m"][..], &how].concat());
        let answer = answer.to_lowercase();
        test["expect"].as_array().unwrap().iter().any(|e| answer.contains(&e.as_str().unwrap().to_lowercase()))
    });
    let right = right.count();
    assert!(right >= 5, "{right} of {}\n{told}", tests.len());
}
