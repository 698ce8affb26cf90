//! Programs in C against the static library that was built with this test.

use crate::common::{convert, real_gguf, skip, tiny_training};
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

fn compiler() -> Command {
    Command::new(std::env::var(COMPILER).unwrap_or_else(|_| "cc".to_owned()))
}

/// Compiles a program once; programs that several tests use are compiled by the first of them.
fn compiled(source: &str, dir: &Path, flags: &[&str]) -> PathBuf {
    let out = dir.join(Path::new(source).file_stem().unwrap());
    let strict = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-g"];
    let done = compiler()
        .args(strict)
        .args(flags)
        .arg(root().join(source))
        .arg("-I")
        .arg(root().join("ios/Sources/CPocketLora"))
        .arg(library())
        .args(["-lpthread", "-ldl", "-lm", "-lrt", "-lutil", "-o"])
        .arg(&out)
        .output()
        .expect("a C compiler");
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
