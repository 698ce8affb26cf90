//! What is given in the place of something else, and what cannot be written: told by its name, with what helps.

use crate::common::{check_all, golden};
use crate::fixture::{Fixture, fixture};
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// A run that was killed after its first checkpoint, in the folder `out`.
fn killed_run(f: &Fixture, out: &str) {
    let (model, data) = (f.model.to_str().unwrap(), f.data.to_str().unwrap());
    let args = ["train", "--auto", "off", "-m", model, "-d", data, "-o", out, "--lr", "3e-3", "--steps", "10000000"];
    let mut child = f.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while !Path::new(out).join("checkpoint.safetensors").exists() && start.elapsed() < Duration::from_secs(120) {
        thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A chat that is kept in the file `state`.
fn kept_chat(f: &Fixture, state: &str) {
    // Greedy, because a turn whose answer happens to be empty is not kept.
    let model = f.model.to_str().unwrap();
    let args = ["chat", "-m", model, "--no-quantize", "-n", "3", "--temperature", "0", "--state", state];
    let mut command = f.command(&args);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"hello\n").unwrap();
    child.wait().unwrap();
    assert!(Path::new(state).exists());
}

#[test]
fn what_stands_in_for_a_model_or_an_adapter_is_named() {
    let f = fixture();
    let (model, data) = (f.model.to_str().unwrap(), f.data.to_str().unwrap());
    let [state, run, notes] = ["a.state", "a run", "notes.txt"].map(|name| f.path(name));
    kept_chat(&f, &state);
    killed_run(&f, &run);
    fs::write(&notes, "remember the milk\n").unwrap();
    let checkpoint = Path::new(&run).join("checkpoint.safetensors").to_str().unwrap().to_owned();
    let out = f.path("out");
    let cases: [(&[&str], &str); 14] = [
        (&["generate", "-m", model, "--no-quantize", "-a", &notes, "-p", "a"], "a file without weights as an adapter"),
        (&["info", &state], "got a chat that `--state` keeps"),
        (&["generate", "-m", &state, "-p", "a"], "expected a model, got a chat"),
        (&["generate", "-m", model, "--no-quantize", "-a", &state, "-p", "a"], "expected an adapter, got a chat"),
        (&["info", &run], "got the folder of a training run that was stopped"),
        (&["export", &run, "--to", "gguf", "-o", &out], "a training run that was stopped"),
        (&["generate", "-m", model, "--no-quantize", "-a", &run, "-p", "a"], "with `--resume`"),
        (&["merge", "-m", model, "-a", &run, "-o", &out], "a training run that was stopped"),
        (&["info", &checkpoint], "got a checkpoint of a training run"),
        (
            &["generate", "-m", model, "--no-quantize", "-a", &checkpoint, "-p", "a"],
            "got a checkpoint of a training run",
        ),
        (&["info", &notes], "got a text"),
        (&["generate", "-m", &notes, "-p", "a"], "got a text"),
        (&["train", "-m", &notes, "-d", data, "-o", &out], "got a text"),
        (&["chat", "-m", model, "--no-quantize", "--state", &notes], "expected a chat that `--state` kept"),
    ];
    check_all(cases, |(args, expected)| {
        let done = f.run(args);
        let said = String::from_utf8_lossy(&done.stderr);
        let first = said.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        let right = done.status.code() == Some(1) && first.contains(expected) && !first.contains("fetch or export");
        if right { Ok(()) } else { Err(format!("{args:?}: {said}")) }
    });
    assert!(!Path::new(&out).exists());
    assert_eq!(fs::read_to_string(&notes).unwrap(), "remember the milk\n");
}

/// Some authors ship the same weights once more, in a form of their own.
#[test]
fn weights_that_lie_there_twice_are_read_once_with_a_word() {
    let f = fixture();
    fs::copy(f.model.join("model.safetensors"), f.model.join("consolidated.safetensors")).unwrap();
    let (model, out) = (f.model.to_str().unwrap(), f.path("out"));
    let word = "left out, for the weights are read from other files: consolidated.safetensors (20 tensors";
    assert!(f.ok(&["info", model]).contains(word), "{}", f.ok(&["info", model]));
    let said = f.said(&["quantize", model, "-o", &out]);
    assert!(said.contains(word), "{said}");
    assert!(!Path::new(&out).join("consolidated.safetensors").exists());
}

#[test]
fn a_checkpoint_that_is_cut_is_called_so() {
    let f = fixture();
    let run = f.path("run");
    killed_run(&f, &run);
    for name in ["checkpoint.safetensors", "checkpoint.previous.safetensors"] {
        let path = Path::new(&run).join(name);
        if let Ok(file) = fs::File::options().write(true).open(path) {
            file.set_len(1000).unwrap();
        }
    }
    let (model, data) = (f.model.to_str().unwrap(), f.data.to_str().unwrap());
    let said = f.said(&["train", "--auto", "off", "-m", model, "-d", data, "-o", &run, "--resume"]);
    let first = said.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    assert!(first.contains("got one that is cut or damaged") && first.contains("--overwrite"), "{said}");
    assert!(!first.contains("fetch"), "{said}");
}

#[test]
fn a_file_in_the_way_of_a_folder_is_named() {
    let f = fixture();
    let (model, data, file) = (f.model.to_str().unwrap(), f.data.to_str().unwrap(), f.path("file"));
    fs::write(&file, "mine").unwrap();
    let inside = format!("{file}/x/y");
    let adapter = golden("adapters/lora");
    let adapter = adapter.to_str().unwrap();
    let cases: [&[&str]; 8] = [
        &["quantize", model, "-o", &inside],
        &["merge", "-m", model, "-a", adapter, "-o", &inside],
        &["export", model, "--to", "gguf", "-o", &inside],
        &["export", adapter, "-m", model, "--to", "mlx", "-o", &inside],
        &["export", adapter, "--to", "peft", "-o", &inside],
        &["export", adapter, "--to", "peft", "-o", &file],
        &["train", "--auto", "off", "-m", model, "-d", data, "-o", &inside],
        &["chat", "-m", model, "--no-quantize", "--state", &inside],
    ];
    check_all(cases, |args| {
        let said = f.said(args);
        let right = said.contains("/file`: expected") && said.contains("got a file") && !said.contains("caused by");
        if right { Ok(()) } else { Err(format!("{args:?}: {said}")) }
    });
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    // What merge may not replace is not said to be of another command.
    let full = f.path("full");
    fs::create_dir(&full).unwrap();
    fs::write(Path::new(&full).join("notes.txt"), "mine").unwrap();
    let said = f.said(&["merge", "-m", model, "-a", adapter, "-o", &full, "--overwrite"]);
    let error = said.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    assert!(error.contains("`notes.txt`") && !error.contains("quantize"), "{said}");
}

#[test]
fn a_cache_that_cannot_be_written_is_named_by_its_variable() {
    let f = fixture();
    let home = f.path("a file");
    fs::write(&home, "").unwrap();
    let args = ["generate", "-m", f.model.to_str().unwrap(), "-p", "a", "-n", "1"];
    let done = f.command(&args).env("POCKETLORA_HOME", &home).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.code() == Some(1) && said.contains("a folder of yours in `POCKETLORA_HOME`"), "{said}");
}

#[test]
fn a_failed_export_leaves_no_folder() {
    let f = fixture();
    let adapter = golden("adapters/lora");
    let other = f.path("other");
    fs::create_dir(&other).unwrap();
    for (to, out) in [("mlx", "a/mlx"), ("gguf", "b/adapter.gguf")] {
        let out = f.path(out);
        let said = f.said(&["export", adapter.to_str().unwrap(), "-m", &other, "--to", to, "-o", &out]);
        assert!(said.contains("error: "), "{said}");
        assert!(!Path::new(&out).parent().unwrap().exists(), "{to}");
    }
}

#[test]
fn a_prompt_in_another_encoding_is_told_how_to_become_one() {
    let f = fixture();
    let (model, file) = (f.model.to_str().unwrap(), f.path("prompt.txt"));
    let args = |prompt: &[&str]| {
        let all = [&["generate", "-m", model, "--no-quantize", "-n", "2", "--json"][..], prompt].concat();
        all.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let as_refs = |args: &[String]| args.iter().map(|a| &*a.clone().leak()).collect::<Vec<&'static str>>();
    fs::write(&file, b"caf\xe9 au lait").unwrap();
    let said = f.said(&as_refs(&args(&["-f", &file])));
    assert!(said.contains("byte 3") && said.contains("iconv -f ISO-8859-1") && !said.contains("fetch"), "{said}");
    // A mark that editors write is no part of the text.
    fs::write(&file, "\u{feff}hello").unwrap();
    let (marked, plain) = (f.json(&as_refs(&args(&["-f", &file]))), f.json(&as_refs(&args(&["-p", "hello"]))));
    assert_eq!((&marked["ids"], &marked["prompt_tokens"]), (&plain["ids"], &plain["prompt_tokens"]));
    // In data it also stands where files were joined.
    let line = "\u{feff}{\"prompt\": \"what is it?\", \"completion\": \" a lamp\"}\n";
    let data = f.path("joined.jsonl");
    fs::write(&data, line.repeat(2)).unwrap();
    let report = f.json(&["train", "-m", model, "--no-quantize", "-d", &data, "-o", "unused", "--dry-run", "--json"]);
    assert_eq!(report["data"]["records"], 2);
}

#[test]
fn a_report_s_place_is_looked_at_before_anything_is_measured() {
    let f = fixture();
    let (model, notes, record) = (f.model.to_str().unwrap(), f.path("notes.txt"), f.path("record.json"));
    fs::write(&notes, "mine").unwrap();
    let bench = |record: &str| {
        let args =
            ["bench", "-m", model, "--no-quantize", "--no-kernels", "--no-train", "--prefill", "4", "--decode", "2"];
        f.run(&[&args[..], &["--trials", "1", "--record", record]].concat())
    };
    for (place, expected) in [(&notes, "got a file of another kind"), (&f.path("no such/x.json"), "expected a folder")]
    {
        let done = bench(place);
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.code() == Some(1) && said.contains(expected) && done.stdout.is_empty(), "{said}");
    }
    assert_eq!(fs::read_to_string(&notes).unwrap(), "mine");
    // A report takes the place of an older one.
    for _ in 0..2 {
        let done = bench(&record);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    assert!(fs::read_to_string(&record).unwrap().contains("pocketlora bench"));
}

/// What a killed command has left beside its output goes with the next one that writes there, but not what another is at
/// work on.
#[cfg(unix)] // folders cannot be locked elsewhere
#[test]
fn what_killed_commands_left_goes_with_the_next_one() {
    let f = fixture();
    let model = f.model.to_str().unwrap().to_owned();
    let adapter = golden("adapters/lora").to_str().unwrap().to_owned();
    let commands: [(&str, Vec<&str>); 4] = [
        ("merged", vec!["merge", "-m", &model, "-a", &adapter]),
        ("copy", vec!["quantize", &model]),
        ("mlx", vec!["export", &adapter, "-m", &model, "--to", "mlx"]),
        ("adapter.gguf", vec!["export", &adapter, "-m", &model, "--to", "gguf"]),
    ];
    for (name, args) in commands {
        let parent = f.dir.path().join(format!("for {name}"));
        let [left, held] = ["AAAAAA", "BBBBBB"].map(|end| parent.join(format!(".older.tmp-pocketlora-{end}")));
        for dir in [&left, &held] {
            fs::create_dir_all(dir).unwrap();
            fs::write(dir.join("model.safetensors"), "half").unwrap();
        }
        let (file, foreign) = (parent.join(".x.gguf.tmp-pocketlora-CCCCCC"), parent.join(".x.tmp-AAAAAA"));
        fs::write(&file, "half").unwrap();
        fs::write(&foreign, "somebody's").unwrap();
        let lock = fs::File::open(&held).unwrap();
        lock.lock().unwrap();
        let out = parent.join(name);
        f.ok(&[&args[..], &["-o", out.to_str().unwrap()]].concat());
        assert!(!left.exists() && !file.exists(), "{name}");
        assert!(held.join("model.safetensors").exists() && foreign.exists() && out.exists(), "{name}");
    }
}

/// A disk with room for the adapter, but not for checkpoints beside it: the adapter is what the run is for.
#[cfg(target_os = "linux")]
#[test]
fn the_adapter_has_its_room_on_a_full_disk() {
    let f = fixture();
    let (model, data) = (f.model.to_str().unwrap(), f.data.to_str().unwrap());
    let train = |out: &str, more: &[&str]| {
        let args = ["train", "--auto", "off", "--keep", "off", "--skip-check", "-m", model, "-d", data, "-o", out];
        let more =
            [&["--steps", "6", "--batch", "2", "--threads", "1", "--no-quantize", "--save-every", "1"], more].concat();
        [&args[..], &more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let whole = f.path("whole");
    f.ok(&train(&whole, &[]).iter().map(String::as_str).collect::<Vec<_>>());
    let weights = fs::read(Path::new(&whole).join("adapter_model.safetensors")).unwrap();
    let disk = f.path("disk");
    fs::create_dir(&disk).unwrap();
    // A file system of its own, which no other process sees, and the last of what is on it.
    let on_disk = |kilobytes: u64, args: &[String]| {
        let script = "mount -t tmpfs -o size=$1k none \"$2\" || exit 77; d=$2; shift 2; \"$@\"; code=$?; \
                      cat \"$d/out/adapter_model.safetensors\" 2>/dev/null; exit $code";
        let mut command = Command::new("unshare");
        command.args([
            "-rm",
            "sh",
            "-c",
            script,
            "sh",
            &kilobytes.to_string(),
            &disk,
            env!("CARGO_BIN_EXE_pocketlora"),
        ]);
        command.args(args).env("POCKETLORA_HOME", f.dir.path().join("home")).stdin(Stdio::null()).output()
    };
    let out = format!("{disk}/out");
    let quiet = train(&out, &["--json"]);
    let adapter = weights.len() as u64 / 1024 + 1;
    // Room for the adapter, its companions (log, picture, settings, in pages of 4 kB), and some of a checkpoint, which is six
    // times as large; then for one checkpoint, for two, and for a third that is written before the first goes.
    for more in [2, 7, 13, 22] {
        let done = match on_disk(adapter * (1 + more) + 64, &quiet) {
            Ok(done) if done.status.code() != Some(77) => done,
            _ => return crate::common::skip("this test needs to mount a file system of its own (`unshare -rm`)"),
        };
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{more}: {said}");
        assert!(done.stdout.ends_with(&weights), "{more}: another adapter, or none: {said}");
        assert_eq!(more < 22, said.contains("checkpoint.safetensors`: could not write it"), "{more}: {said}");
    }
    // Without room for the adapter there is no first step.
    let done = on_disk(adapter / 2, &quiet).unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.code() == Some(1) && said.contains("adapter_model.safetensors`: could not write it"), "{said}");
    assert!(!String::from_utf8_lossy(&done.stdout).contains("\"step\":1"), "{said}");
}

#[test]
fn a_method_on_what_it_is_not_for_is_refused_before_any_work() {
    let f = fixture();
    let (model, data) = (f.model.to_str().unwrap(), f.data.to_str().unwrap());
    let cases: [(&[&str], &str); 8] = [
        (&["--method", "dora", "--targets", "embed_tokens"], "setting `targets`: expected linear layers, or the head"),
        (&["--method", "lora-fa", "--targets", "q_proj,embed_tokens"], "or the head, for LoRA-FA"),
        (&["--alora-invocation-tokens", "99999999"], "below the vocabulary's"),
        (&["--method", "road", "--option", "group_size=33"], "setting `group_size`"),
        (&["--method", "road", "--option", "=3"], "`KEY=VALUE`"),
        (&["--method", "bdlora"], "setting `use_bdlora`"),
        (&["--method", "road", "--option", "block=3"], "some of `group_size`, `variant`"),
        (&["--method", "nothing"], "nothing"),
    ];
    check_all(cases, |(more, says)| {
        let out = f.path("none");
        let args = ["train", "--auto", "off", "-m", model, "--no-quantize", "-d", data, "-o", &out, "--steps", "1"];
        let said = f.said(&[&args[..], more].concat());
        let right = said.contains(says) && !said.contains("panicked") && !said.contains("fetch or export");
        let nothing = !Path::new(&out).join("adapter_model.safetensors").exists();
        if right && nothing { Ok(()) } else { Err(format!("{more:?}: {said}")) }
    });
    // JSON is as good as TOML.
    let blocks = r#"use_bdlora={"target_modules_bd_a": ["q_proj"], "nblocks": 2}"#;
    let args = ["train", "--auto", "off", "-m", model, "--no-quantize", "-d", data, "-o", &f.path("blocks")];
    f.ok(&[&args[..], &["--steps", "1", "--method", "bdlora", "--targets", "q_proj", "--option", blocks]].concat());
}
