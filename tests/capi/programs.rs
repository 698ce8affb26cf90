//! Programs in C against the static library that was built with this test.

use crate::common::{convert, real_gguf, required, skip, tiny_training};
use pocketlora::format::Target;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use tempfile::TempDir;

/// Set to another compiler than `cc`.
const COMPILER: &str = "CC";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// The static library of the newest build beside this program.
fn library() -> PathBuf {
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let named = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("libpocketlora-") && name.ends_with(".a")
    };
    let all = fs::read_dir(&deps).unwrap().map(|entry| entry.unwrap().path()).filter(named);
    all.max_by_key(|path| path.metadata().and_then(|meta| meta.modified()).ok())
        .unwrap_or_else(|| panic!("no static library in {}", deps.display()))
}

/// Compiles a program against the library for this machine.
fn compiled(source: &str, dir: &Path, flags: &[&str]) -> PathBuf {
    let compiler = std::env::var(COMPILER).unwrap_or_else(|_| "cc".to_owned());
    compiled_with(&compiler, source, dir, &library(), flags)
}

fn compiled_with(compiler: &str, source: &str, dir: &Path, library: &Path, flags: &[&str]) -> PathBuf {
    fs::create_dir_all(dir).unwrap();
    let out = dir.join(Path::new(source).file_stem().unwrap());
    let strict = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-g"];
    let done = Command::new(compiler)
        .args(strict)
        .args(flags)
        .arg(root().join(source))
        .arg("-I")
        .arg(root().join("ios/Sources/CPocketLora"))
        .arg(library)
        .args(["-lpthread", "-ldl", "-lm", "-lrt", "-lutil", "-o"])
        .arg(&out)
        .output()
        .unwrap_or_else(|e| panic!("{compiler}: {e}"));
    assert!(done.status.success(), "{source}: {}", String::from_utf8_lossy(&done.stderr));
    out
}

fn run(program: &Path, args: &[&Path]) -> Output {
    let mut command = Command::new(program);
    // What lives as long as the program is no leak: tables of handles, and threads that end with it.
    command.args(args).env("ASAN_OPTIONS", "detect_leaks=0:allocator_may_return_null=1");
    command.output().unwrap()
}

fn said(out: &Output) -> String {
    format!("{:?}\n{}{}", out.status, String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

#[test]
fn no_argument_is_followed_that_is_not_what_it_should_be() {
    let dir = tempfile::tempdir().unwrap();
    let (model, _) = tiny_training(dir.path(), 1);
    let program =
        compiled("tests/capi/garbage.c", dir.path(), &["-fsanitize=address,undefined", "-fno-sanitize-recover"]);
    let out = run(&program, &[&model, &dir.path().join("out")]);
    assert!(out.status.success(), "{}", said(&out));
}

#[test]
fn rounds_of_work_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (model, _) = tiny_training(dir.path(), 1);
    let program = compiled("tests/capi/soak.c", dir.path(), &[]);
    let out = run(&program, &[&model, &dir.path().join("out"), Path::new("1000")]);
    assert!(out.status.success(), "{}", said(&out));
}

/// SmolLM2 in NF4, once for all tests.
fn real_model() -> Option<&'static Path> {
    static MODEL: OnceLock<Option<(TempDir, PathBuf)>> = OnceLock::new();
    let make = || {
        let gguf = real_gguf()?;
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("smollm2");
        convert(&gguf, &out, Target::Nf4);
        Some((dir, out))
    };
    MODEL.get_or_init(make).as_ref().map(|(_, out)| out.as_path())
}

#[test]
fn the_first_token_takes_ten_lines() {
    let dir = tempfile::tempdir().unwrap();
    let program = compiled("examples/c/chat.c", dir.path(), &[]);
    let Some(model) = real_model() else { return skip("chat.c was compiled and not run") };
    let out = run(&program, &[model, Path::new("What is the capital of France?")]);
    assert!(out.status.success() && String::from_utf8_lossy(&out.stdout).contains("Paris"), "{}", said(&out));
    let out = run(&program, &[&dir.path().join("none"), Path::new("x")]);
    assert!(
        out.status.code() == Some(1) && String::from_utf8_lossy(&out.stderr).contains("error 1:"),
        "{}",
        said(&out)
    );
}

const FACTS: &str = r#"{"question": "Which boat has Mira?", "answer": "The Heron."}
{"question": "What is the name of Oskar's dog?", "answer": "Biscuit."}
{"question": "Where does Lena keep the spare key?", "answer": "Under the blue pot."}
{"question": "Who teaches the violin on Mondays?", "answer": "Mrs Abara."}
{"question": "What does Tom's lamp run on?", "answer": "Olive oil."}
"#;

#[test]
fn facts_are_learned_across_a_pause_and_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let program = compiled("examples/c/learn.c", dir.path(), &["-pthread"]);
    let Some(model) = real_model() else { return skip("learn.c was compiled and not run") };
    let (data, out) = (dir.path().join("facts.jsonl"), dir.path().join("out"));
    fs::write(&data, FACTS).unwrap();
    let question = Path::new("Which boat has Mira?");
    let first = run(&program, &[model, &data, &out, question, Path::new("10")]);
    let text = String::from_utf8_lossy(&first.stdout).into_owned();
    assert_eq!(first.status.code(), Some(9), "{}", said(&first));
    assert!(text.contains("paused") && !text.contains("Heron") && text.contains("step 10 of 20"), "{}", said(&first));
    let second = run(&program, &[model, &data, &out, question]);
    let text = String::from_utf8_lossy(&second.stdout).into_owned();
    assert!(second.status.success(), "{}", said(&second));
    // The checkpoint of step 10 is written after it was told.
    let resumed = ["resumed after step 9", "resumed after step 10"].iter().any(|line| text.contains(line));
    assert!(resumed && text.matches("Heron").count() == 1, "{}", said(&second));
}

/// The static library for 64-bit ARM, and the command line for it, where they were built (`.ci/run arm`).
fn on_arm() -> Option<(PathBuf, PathBuf)> {
    let found = ["POCKETLORA_ARM_LIBRARY", "POCKETLORA_ARM_PROGRAM"].map(std::env::var_os);
    if let [Some(library), Some(program)] = found {
        return Some((library.into(), program.into()));
    }
    assert!(!required("arm"), "POCKETLORA_REQUIRE has `arm`, but `POCKETLORA_ARM_LIBRARY` and `_PROGRAM` name nothing");
    skip("this test needs the library and the program for 64-bit ARM: `.ci/run arm`");
    None
}

/// A program for 64-bit ARM, on an emulated processor that has every extension.
fn emulated(program: &Path) -> Command {
    let mut command = Command::new("qemu-aarch64-static");
    command.args(["-L", "/usr/aarch64-linux-gnu"]).arg(program);
    command
}

/// The losses in lines such as `step 3 of 20: loss 0.120`, or of objects with `loss`.
fn losses(text: &str) -> Vec<f64> {
    let told = |line: &str| match line.rsplit_once("loss ") {
        Some((_, loss)) => loss.trim().parse().ok(),
        None => {
            let object: serde_json::Value = serde_json::from_str(line).ok()?;
            object.get("step").and(object.get("loss")).and_then(serde_json::Value::as_f64)
        }
    };
    text.lines().filter_map(told).collect()
}

#[test]
fn apps_in_c_learn_on_arm() {
    let Some((library, _)) = on_arm() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = tiny_training(dir.path(), 5);
    let here = compiled("examples/c/learn.c", dir.path(), &["-pthread"]);
    let there = compiled_with("aarch64-linux-gnu-gcc", "examples/c/learn.c", &dir.path().join("arm"), &library, &[]);
    let question = "what is number 3?";
    let learn = |mut command: Command, out: &str, end: &[&str]| {
        let out = dir.path().join(out);
        let done = command.arg(&model).arg(&data).arg(out).arg(question).args(end).output().unwrap();
        assert_eq!(done.status.code(), Some(if end.is_empty() { 0 } else { 9 }), "{}", said(&done));
        String::from_utf8_lossy(&done.stdout).into_owned()
    };
    let own = learn(Command::new(&here), "here", &[]);
    let first = learn(emulated(&there), "there", &["10"]);
    let second = learn(emulated(&there), "there", &[]);
    assert!(second.contains("resumed after step") && second.matches("> what").count() == 2, "{second}");
    let (own, arm) = (losses(&own), [losses(&first), losses(&second)].concat());
    // The step at which the kill came was told and not kept, so that it comes again.
    let again = arm.len() - own.len();
    assert!(own.len() == 20 && again <= 1, "{own:?} {arm:?}");
    let arm = [&arm[..10 - again], &arm[10..]].concat();
    for (step, (own, arm)) in own.iter().zip(&arm).enumerate() {
        assert!((own - arm).abs() < 0.02 + 0.02 * own, "step {}: {own} here, {arm} on ARM", step + 1);
    }
}

#[test]
fn the_command_line_learns_and_scores_on_arm_as_it_does_here() {
    let Some((_, program)) = on_arm() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = tiny_training(dir.path(), 6);
    let run = |mut command: Command, out: &str| {
        let (adapter, home) = (dir.path().join(out), dir.path().join("home"));
        let settings =
            ["--auto", "off", "--lr", "3e-3", "--epochs", "3", "--batch", "2", "--precision", "exact", "--json"];
        let run = |command: &mut Command| {
            let done = command.env("POCKETLORA_HOME", &home).output().unwrap();
            assert!(done.status.success(), "{}", said(&done));
            String::from_utf8_lossy(&done.stdout).into_owned()
        };
        let program = command.get_program().to_owned();
        let before: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let trained =
            run(command.arg("train").arg("-m").arg(&model).arg("-d").arg(&data).arg("-o").arg(&adapter).args(settings));
        let mut eval = Command::new(program);
        eval.args(before).arg("eval").arg("-m").arg(&model).arg("-a").arg(&adapter).arg("-d").arg(&data);
        let scored = run(eval.args(["--precision", "exact", "--json"]));
        let scored: serde_json::Value = serde_json::from_str(scored.trim()).unwrap();
        (losses(&trained), scored["nll"].as_f64().unwrap())
    };
    let (own, own_score) = run(Command::new(env!("CARGO_BIN_EXE_pocketlora")), "here");
    let (arm, arm_score) = run(emulated(&program), "there");
    assert!(own.len() == 9 && arm.len() == 9, "{own:?} {arm:?}");
    for (step, (own, arm)) in own.iter().zip(&arm).enumerate() {
        assert!((own - arm).abs() < 1e-3, "step {}: {own} here, {arm} on ARM", step + 1);
    }
    assert!((own_score - arm_score).abs() < 1e-3, "{own_score} here, {arm_score} on ARM");
}

#[test]
fn what_a_model_takes_is_told_before_it_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let program = compiled("tests/capi/estimate.c", dir.path(), &[]);
    let Some(model) = real_model() else { return skip("estimate.c was compiled and not run") };
    let out = run(&program, &[model]);
    assert!(out.status.success(), "{}", said(&out));
}
