//! How programs end that are stopped from outside: by signals, by a reader that goes away, by a full disk.

use crate::common::check_all;
use crate::fixture::{Fixture, fixture};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Long enough for a machine that does other things, too.
const PATIENCE: Duration = Duration::from_secs(60);

fn start(f: &Fixture, args: &[&str]) -> Child {
    let mut command = heeding_signals(f.command(args));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// The same command with signals as a terminal's programs have them. Tests that run in a shell's background inherit an
/// ignored SIGINT, and a program rightly keeps ignoring it.
fn heeding_signals(direct: Command) -> Command {
    if !cfg!(target_os = "linux") {
        return direct; // `env` can do this in the GNU tools only
    }
    let mut command = Command::new("env");
    command.arg("--default-signal=INT,TERM,HUP").arg(direct.get_program()).args(direct.get_args());
    command.envs(direct.get_envs().filter_map(|(key, value)| Some((key, value?))));
    command
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

/// Waits until a file has something in it.
fn await_file(path: &Path) {
    let start = Instant::now();
    while fs::metadata(path).map_or(0, |m| m.len()) == 0 {
        assert!(start.elapsed() < PATIENCE, "no {}", path.display());
        thread::sleep(Duration::from_millis(5));
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A run without an end, without checkpoints but those that time asks for.
fn endless<'a>(f: &'a Fixture, out: &'a str) -> Vec<&'a str> {
    let (model, data) = (f.model.to_str().unwrap(), f.data.to_str().unwrap());
    let steps = ["--steps", "10000000", "--save-every", "0"];
    [
        &["train", "--auto", "off", "-m", model, "-d", data, "-o", out, "--lr", "3e-3", "--batch", "2", "--json"][..],
        &steps,
    ]
    .concat()
}

#[test]
fn signals_end_training_with_a_checkpoint() {
    let f = fixture();
    check_all(["-INT", "-TERM", "-HUP"], |name| {
        let out = f.path(name);
        let child = start(&f, &endless(&f, &out));
        await_file(&Path::new(&out).join("log.jsonl"));
        signal(&child, name);
        if *name != "-INT" {
            // Some senders repeat themselves; a second Ctrl-C is a person who is in a hurry.
            signal(&child, name);
        }
        let done = child.wait_with_output().unwrap();
        let stderr = text(&done.stderr);
        let last: Value =
            serde_json::from_str(text(&done.stdout).lines().last().unwrap_or_default()).unwrap_or_default();
        let saved = Path::new(&out).join("checkpoint.safetensors").exists();
        let right = done.status.code() == Some(1) && last["done"] == false && saved && stderr.contains("--resume");
        if right { Ok(()) } else { Err(format!("{name}: {:?}, saved: {saved}, {last}: {stderr}", done.status)) }
    });
}

/// Who does not wait for the last check has the adapter all the same.
#[test]
fn ctrl_c_in_the_last_check_leaves_the_adapter() {
    let f = fixture();
    let (many, out) = (f.path("many.jsonl"), f.path("checked"));
    // So many that looking at them takes far longer than the only step.
    fs::write(&many, fs::read_to_string(&f.data).unwrap().repeat(300)).unwrap();
    let (model, data) = (f.model.to_str().unwrap(), f.data.to_str().unwrap());
    let run = ["train", "--auto", "off", "-m", model, "-d", data, "-o", &out, "--steps", "1", "--batch", "1", "--json"];
    let child = start(&f, &[&run[..], &["--eval-data", &many, "--keep", "off", "--threads", "1"]].concat());
    // The first check is done, and the step will be soon.
    await_file(&Path::new(&out).join("log.jsonl"));
    thread::sleep(Duration::from_millis(200));
    signal(&child, "-INT");
    let done = child.wait_with_output().unwrap();
    let (stdout, stderr) = (text(&done.stdout), text(&done.stderr));
    let last: Value = serde_json::from_str(stdout.lines().last().unwrap_or_default()).unwrap_or_default();
    assert!(done.status.code() == Some(0) && last["done"] == true, "{:?}, {last}: {stderr}", done.status);
    assert!(last["eval_loss_before"].is_number() && last["eval_loss"].is_null(), "{last}");
    assert!(Path::new(&out).join("adapter_model.safetensors").exists(), "{stderr}");
    assert!(!Path::new(&out).join("checkpoint.safetensors").exists(), "{stderr}");
}

/// `nohup` means that a terminal may go.
#[cfg(target_os = "linux")]
#[test]
fn a_hang_up_that_is_to_be_ignored_is() {
    let f = fixture();
    let out = f.path("kept on");
    let program = env!("CARGO_BIN_EXE_pocketlora");
    let mut command = Command::new("nohup");
    command.arg(program).args(endless(&f, &out)).env("POCKETLORA_HOME", f.path("home"));
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let log = Path::new(&out).join("log.jsonl");
    await_file(&log);
    signal(&child, "-HUP");
    let before = fs::metadata(&log).unwrap().len();
    let start = Instant::now();
    while fs::metadata(&log).unwrap().len() < before + 10_000 {
        assert!(child.try_wait().unwrap().is_none(), "ended by a signal that was to be ignored");
        assert!(start.elapsed() < PATIENCE, "stands still");
        thread::sleep(Duration::from_millis(5));
    }
    signal(&child, "-TERM");
    child.wait().unwrap();
}

/// Time alone asks for the first checkpoint, soon.
#[test]
fn a_young_run_that_is_killed_leaves_a_checkpoint() {
    let f = fixture();
    let out = f.path("young");
    let mut child = f.command(&endless(&f, &out)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    await_file(&Path::new(&out).join("checkpoint.safetensors"));
    child.kill().unwrap();
    child.wait().unwrap();
    let log = fs::read_to_string(Path::new(&out).join("log.jsonl")).unwrap();
    let mut resumed = start(&f, &[&endless(&f, &out)[..], &["--resume"]].concat());
    let mut lines = BufReader::new(resumed.stdout.take().unwrap()).lines();
    let first: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    // Nobody reads on, which ends it.
    drop(lines);
    resumed.wait().unwrap();
    let step = first["step"].as_u64().unwrap();
    assert!(step > 1 && step <= log.lines().count() as u64 + 1, "resumed at {step}");
}

/// Whoever reads stdout may have read enough: that ends the work, keeps its state, and is nobody's panic.
#[test]
fn a_reader_that_goes_away_ends_the_work_quietly() {
    let f = fixture();
    let model = f.model.to_str().unwrap();
    let closed = |args: &[&str], read: usize| -> Output {
        let mut child = start(&f, args);
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut vec![0; read]).unwrap();
        drop(stdout);
        child.wait_with_output().unwrap()
    };
    let out = f.path("closed");
    let quiet: Vec<(Vec<&str>, usize)> = vec![
        (vec!["generate", "-m", model, "-p", "a", "-n", "300"], 1),
        (vec!["pull", "--list"], 0),
        (vec!["info", model], 0),
        (vec!["chat", "-m", model, "--help"], 0),
        (vec!["help", "train"], 0),
        (vec!["--version"], 0),
    ];
    check_all(quiet, |(args, read)| {
        let done = closed(args, *read);
        let stderr = text(&done.stderr);
        let right = done.status.code() == Some(0) && !stderr.contains("panicked") && !stderr.contains("error");
        if right { Ok(()) } else { Err(format!("{args:?}: {:?}: {stderr}", done.status)) }
    });
    let done = closed(&endless(&f, &out), 20);
    let stderr = text(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("stdout") && stderr.contains("--resume") && !stderr.contains("panicked"), "{stderr}");
    assert!(Path::new(&out).join("checkpoint.safetensors").exists());

    // Nobody is left to complain to.
    let mut child = f.command(&["info", "no such model"]).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_under_stdout_is_an_error() {
    let f = fixture();
    let model = f.model.to_str().unwrap();
    let out = f.path("full");
    let train = f.train_args(&out);
    let cases: Vec<Vec<&str>> = vec![
        vec!["generate", "-m", model, "-p", "a", "-n", "30"],
        vec!["pull", "--list"],
        vec!["info", model, "--json"],
        vec!["help"],
        vec!["train", "--help"],
        vec!["--version"],
        train,
    ];
    check_all(cases, |args| {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let done = f.command(args).stdout(full).output().unwrap();
        let stderr = text(&done.stderr);
        let right = done.status.code() == Some(1) && stderr.contains("error: stdout") && !stderr.contains("panicked");
        if right { Ok(()) } else { Err(format!("{args:?}: {:?}: {stderr}", done.status)) }
    });
    assert!(Path::new(&out).join("checkpoint.safetensors").exists(), "what was learned is kept");
}

/// A second Ctrl-C while an answer runs ends the chat, but not what was asked in it; a system that shuts down gets no
/// answer from a prompt and must not wait for one.
#[test]
fn a_chat_that_is_ended_keeps_its_history() {
    let f = fixture();
    let model = f.model.to_str().unwrap();
    let history = f.dir.path().join("home/chat-history");
    for (name, question) in [("-KILL", "first question"), ("-TERM", "second question"), ("-HUP", "third question")] {
        let mut child = start(&f, &["chat", "-m", model, "-n", "2"]);
        let mut input = child.stdin.take().unwrap();
        input.write_all(format!("{question}\n").as_bytes()).unwrap();
        let begin = Instant::now();
        while !fs::read_to_string(&history).unwrap_or_default().contains(question) {
            assert!(begin.elapsed() < PATIENCE, "{question} is not in the history");
            thread::sleep(Duration::from_millis(5));
        }
        // The answer is short; what follows is the prompt.
        thread::sleep(Duration::from_millis(200));
        signal(&child, name);
        assert!(!child.wait().unwrap().success());
        drop(input);
    }
    let kept = fs::read_to_string(&history).unwrap();
    assert!(kept.contains("first") && kept.contains("second") && kept.contains("third"), "{kept}");
}
