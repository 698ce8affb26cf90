//! What is said before, beside and after the work, so that nothing is left to be found out.

use crate::common::{check_all, golden};
use crate::fixture::{Fixture, fixture};
use serde_json::Value;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;

/// Arguments of a training run on `data`.
fn learn<'a>(f: &'a Fixture, data: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let model = f.model.to_str().unwrap();
    [&["train", "--auto", "off", "-m", model, "--no-quantize", "--threads", "1", "-d", data, "-o", out][..], more]
        .concat()
}

/// The same of a few steps.
fn train<'a>(f: &'a Fixture, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    learn(f, f.data.to_str().unwrap(), out, &[&["--steps", "2"], more].concat())
}

/// Stdout and stderr of a chat.
fn chat(f: &Fixture, more: &[&str], script: impl AsRef<[u8]>) -> (String, String) {
    let args =
        [&["chat", "-m", f.model.to_str().unwrap(), "--no-quantize", "--seed", "1", "--temperature", "0.7"][..], more]
            .concat();
    let mut command = f.command(&args);
    let mut chat = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A chat that refuses to begin reads nothing.
    let _ = chat.stdin.take().unwrap().write_all(script.as_ref());
    let out = chat.wait_with_output().unwrap();
    (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
}

fn set_template(f: &Fixture, template: &str) {
    let config = serde_json::json!({"eos_token": "<|im_end|>", "chat_template": template});
    fs::write(f.model.join("tokenizer_config.json"), config.to_string()).unwrap();
}

#[test]
fn values_out_of_range_are_refused_in_plain_numbers() {
    let f = fixture();
    let model = f.model.to_str().unwrap();
    let out = f.path("out");
    let generate = |more: &[&'static str]| [&["generate", "-m", model, "-p", "a"][..], more].concat();
    let cases: Vec<(Vec<&str>, &str)> = vec![
        (generate(&["--top-p", "1.5"]), "0 < top-p <= 1"),
        (generate(&["--temperature", "-1"]), "0 <= temperature <= 100"),
        (generate(&["--min-p", "2"]), "0 <= min-p <= 1"),
        (generate(&["--repetition-penalty", "0"]), "repetition-penalty"),
        (generate(&["--threads", "9999"]), "`threads`"),
        (generate(&["-n", "0"]), "whole number from 1"),
        (vec!["chat", "-m", model, "-n", "0"], "whole number from 1"),
        (vec!["bench", "-m", model, "--trials", "0"], "whole number from 1"),
        (vec!["eval", "-m", model, "--no-quantize", "--text", file!(), "--window", "1"], "`window`"),
        (vec!["bench", "-m", model, "--threads", "9999"], "`threads`"),
        (train(&f, &out, &["--lr", "-1"]), "0 < lr <= 1"),
        (train(&f, &out, &["--lr", "1.5"]), "sgd"),
        (train(&f, &out, &["--lr", "nan"]), "NaN"),
        (train(&f, &out, &["--warmup", "2.5"]), "`warmup`"),
        (train(&f, &out, &["--dropout", "1.1"]), "got `1.1`"),
    ];
    check_all(cases, |(args, what)| {
        let done = f.run(args);
        let stderr = String::from_utf8_lossy(&done.stderr);
        let short = !stderr.contains("0000000000") && !stderr.contains("18446744073709551615");
        if !done.status.success() && stderr.contains(what) && short {
            Ok(())
        } else {
            Err(format!("{args:?}: {stderr}"))
        }
    });
    assert!(!Path::new(&out).exists());
}

/// Settings that others make idle are refused by name, from flags as from a file.
#[test]
fn settings_without_an_effect_are_refused() {
    let f = fixture();
    let (data, out, toml) = (f.data.to_str().unwrap(), f.path("out"), f.path("settings.toml"));
    let file = ["--config", &toml];
    let cases: [(&[&str], &str, &str); 12] = [
        (&["--momentum", "0.9"], "", "`momentum`"),
        (&[], "momentum = 0.9", "`momentum`"),
        (&["--optimizer", "sgd", "--beta1", "0.9"], "", "`beta1`"),
        (&["--beta2", "0.5"], "optimizer = 'sgd'", "`beta2`"),
        (&["--optimizer", "sgd", "--eps", "1"], "", "`eps`"),
        (&["--optimizer", "lion"], "eps = 1e-3", "`eps`"),
        (&["--steps", "2", "--epochs", "9"], "", "`epochs`"),
        (&[], "steps = 2\nepochs = 9", "`epochs`"),
        (&["--eval-every", "2"], "", "`eval-every`"),
        (&["--keep-best"], "eval-every = 2", "`keep-best`"),
        (&["--lora-plus-ratio", "1000", "--lr", "0.01"], "", "`lora-plus-ratio`"),
        (&["--packing", "--bucketing"], "", "`bucketing`"),
    ];
    check_all(cases, |(more, settings, name)| {
        fs::write(&toml, settings).unwrap();
        let done = f.run(&learn(&f, data, &out, &[&file[..], more].concat()));
        let said = String::from_utf8_lossy(&done.stderr);
        let right = done.status.code() == Some(1) && said.contains(&format!("setting {name}"));
        if right { Ok(()) } else { Err(format!("{more:?} {settings}: {said}")) }
    });
    assert!(!Path::new(&out).exists());
    // A flag takes the place of what a file says in other terms, and all settings of a run may serve another.
    fs::write(&toml, "epochs = 9").unwrap();
    f.ok(&learn(&f, data, &out, &[&file[..], &["--steps", "1"]].concat()));
    let told = Path::new(&out).join("train.toml");
    let again = ["--config", told.to_str().unwrap(), "--optimizer", "sgd", "--epochs", "2", "--batch", "12", "--json"];
    assert_eq!(f.json(&learn(&f, data, &f.path("again"), &again))["steps"], 2);
}

/// A run that goes on has the settings that it began with, wherever they came from; those given must agree.
#[cfg(target_os = "linux")]
#[test]
fn a_resumed_run_knows_its_settings() {
    let f = fixture();
    let out = f.path("out");
    let (data, told) = (f.data.to_str().unwrap(), Path::new(&out).join("train.toml"));
    let own = ["--resume", "--config", told.to_str().unwrap()];
    let settings = ["--lr", "0.001", "--steps", "9", "--batch", "2", "--eval-split", "0.25", "--keep-best"];
    let settings = [&settings[..], &["--eval-every", "3"]].concat();
    let cases: [(&[&str], Option<&str>); 6] = [
        (&["--resume"], None),
        (&own, None),
        (&["--resume", "--steps", "9", "--save-every", "7"], None),
        (&["--resume", "--steps", "8"], Some("`steps` was 9, is 8")),
        (&["--resume", "--epochs", "4"], Some("`steps` was 9")),
        (&["--overwrite", "--config", own[2]], Some("what it reads")),
    ];
    check_all(cases, |(more, refused)| {
        // A failure later than the first checkpoint leaves a run to go on with.
        let _ = fs::remove_dir_all(&out);
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let first = learn(&f, data, &out, &[&settings[..], &["--json"]].concat());
        let stopped = f.command(&first).stdout(full).stderr(Stdio::null()).status();
        assert!(!stopped.unwrap().success());
        assert!(Path::new(&out).join("checkpoint.safetensors").exists());
        let done = f.run(&learn(&f, data, &out, more));
        let said = String::from_utf8_lossy(&done.stderr);
        let lr = fs::read_to_string(&told).unwrap().contains("lr = 0.001");
        match refused {
            None if done.status.success() && said.contains("resuming after step") && lr => Ok(()),
            Some(what) if !done.status.success() && said.contains(what) => Ok(()),
            _ => Err(format!("{more:?}: {said}")),
        }
    });
}

#[test]
fn a_finished_run_names_the_command_that_learns_on() {
    let f = fixture();
    let out = f.path("a run");
    f.ok(&train(&f, &out, &[]));
    let said = f.said(&train(&f, &out, &["--resume"]));
    let command = said.split('`').find(|part| part.starts_with("pocketlora train")).unwrap_or_else(|| panic!("{said}"));
    // As a shell would take it: quotes stand around whole words only.
    let words: Vec<&str> = command
        .split('\'')
        .enumerate()
        .flat_map(|(i, part)| match i % 2 {
            0 => part.split_whitespace().collect(),
            _ => vec![part],
        })
        .collect();
    f.ok(&words[1..]);
    assert!(Path::new(&format!("{out}-2")).join("adapter_config.json").exists(), "{command}");
}

#[test]
fn what_lies_in_the_output_folder_is_not_replaced_unasked() {
    let f = fixture();
    let out = f.path("mine");
    fs::create_dir(&out).unwrap();
    let in_out = |name: &str| Path::new(&out).join(name);
    for name in ["train.toml", "log.jsonl", "loss.svg", "adapter_model.safetensors", "best"] {
        fs::write(in_out(name), "").unwrap();
        let said = f.said(&train(&f, &out, &[]));
        assert!(said.contains(name) && said.contains("--overwrite"), "{said}");
        fs::remove_file(in_out(name)).unwrap();
    }
    // What the run reads is kept whatever is said.
    fs::write(in_out("train.toml"), "seed = 1\n").unwrap();
    let settings = in_out("train.toml").to_str().unwrap().to_owned();
    let said = f.said(&train(&f, &out, &["--config", &settings, "--overwrite"]));
    assert!(said.contains("what it reads") && fs::read_to_string(&settings).unwrap() == "seed = 1\n", "{said}");
    let model = f.model.to_str().unwrap();
    assert!(f.said(&train(&f, model, &["--overwrite"])).contains("holds a model"));
    // What a run left that was killed before its first checkpoint is no loss.
    let killed = f.path("killed");
    f.ok(&train(&f, &killed, &[]));
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::remove_file(Path::new(&killed).join(name)).unwrap();
    }
    f.ok(&train(&f, &killed, &[]));
    // Other files are nobody's business, also in a folder that the run takes for its own while it works.
    fs::remove_file(&settings).unwrap();
    fs::create_dir(in_out("best")).unwrap();
    fs::write(in_out("best/notes.md"), "mine").unwrap();
    fs::write(in_out("notes.md"), "mine").unwrap();
    f.ok(&train(&f, &out, &["--overwrite", "--max-forgetting", "9", "--eval-every", "1"]));
    assert!(in_out("notes.md").exists() && in_out("best/notes.md").exists() && in_out("adapter_config.json").exists());
    assert!(!in_out("best/adapter_config.json").exists());
}

#[test]
fn held_out_records_that_are_learned_are_counted() {
    let f = fixture();
    let lines: Vec<String> = fs::read_to_string(&f.data).unwrap().lines().map(str::to_owned).collect();
    let other = r#"{"messages":[{"role":"user","content":"new"},{"role":"assistant","content":"yes"}]}"#;
    for (name, held, learned, of) in [
        ("the same under another name", lines.clone(), 12, 12),
        ("a part", vec![lines[3].clone(), other.to_owned(), lines[5].clone()], 2, 3),
        ("none", vec![other.to_owned()], 0, 1),
    ] {
        let (path, out) = (f.path("held.jsonl"), f.path(name));
        fs::write(&path, held.join("\n")).unwrap();
        for dry in [&["--dry-run"][..], &[]] {
            let done = f.run(&train(&f, &out, &[&["--json", "--eval-data", &path], dry].concat()));
            let (said, stdout) = (String::from_utf8(done.stderr).unwrap(), String::from_utf8(done.stdout).unwrap());
            let report: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
            assert_eq!(
                report["eval_overlap"],
                serde_json::json!({"records": of, "learned": learned}),
                "{name} {dry:?}"
            );
            let warned = said.contains("in both") && said.contains(&format!("`{learned}` of {of}"));
            assert_eq!(warned, learned > 0, "{name} {dry:?}: {said}");
        }
    }
    let split = f.json(&train(&f, &f.path("split"), &["--json", "--eval-split", "0.25"]));
    assert_eq!(split["eval_overlap"]["learned"], 0);
}

#[test]
fn a_warm_up_and_flags_beside_an_adapter_are_spoken_of() {
    let f = fixture();
    let said = f.said(&train(&f, &f.path("warm"), &["--warmup", "50"]));
    assert!(said.contains("warning: setting `warmup`") && said.contains("`50`"), "{said}");
    let rates = fs::read_to_string(Path::new(&f.path("warm")).join("log.jsonl")).unwrap();
    assert!(rates.contains("\"lr\":0.0002,"), "the peak is reached: {rates}");

    let init = golden("adapters/rslora");
    let init = ["--init", init.to_str().unwrap()];
    let toml = f.path("settings.toml");
    fs::write(&toml, "rank = 4\n").unwrap();
    for (more, what) in [
        (&["--rank", "4"][..], ["`rank`", "`8`", "`4`"]),
        (&["--config", &toml], ["`rank`", "`8`", "`4`"]),
        (&["--alpha", "1"], ["`alpha`", "`16`", "`1`"]),
        (&["--targets", "all"], ["`targets`", "q_proj", "`all`"]),
    ] {
        let said = f.said(&train(&f, &f.path("refused"), &[&init[..], more].concat()));
        assert!(what.iter().all(|w| said.contains(w)), "{more:?}: {said}");
    }
    assert!(!Path::new(&f.path("refused")).exists());
    let out = f.path("kept");
    f.ok(&train(&f, &out, &[&init[..], &["--rank", "8", "--targets", "v_proj,q_proj", "--dropout", "0.1"]].concat()));
    let told = fs::read_to_string(Path::new(&out).join("train.toml")).unwrap();
    for line in ["rank = 8", "alpha = 16.0", "rslora = true", "targets = [\"q_proj\", \"v_proj\"]"] {
        assert!(told.contains(line), "{line}: {told}");
    }
}

/// A model that knows all answers already, as one does whose mask has gone wrong.
#[test]
fn a_first_step_with_nothing_to_learn_is_warned_about() {
    let f = fixture();
    let (data, out) = (f.path("same.jsonl"), f.path("out"));
    fs::write(&data, "{\"prompt\":\"a\",\"completion\":\"b\"}\n".repeat(4)).unwrap();
    let first = ["--steps", "200", "--lr", "0.005", "--schedule", "constant", "--json"];
    let first = f.run(&learn(&f, &data, &out, &first));
    assert!(!String::from_utf8_lossy(&first.stderr).contains("almost nothing to learn"));
    let again = f.path("again");
    let done = f.run(&learn(&f, &data, &again, &["--steps", "1", "--init", &out, "--json"]));
    let (said, stdout) = (String::from_utf8_lossy(&done.stderr), String::from_utf8_lossy(&done.stdout));
    assert!(said.contains("warning: step 1") && said.contains("--dry-run"), "{said}{stdout}");
    assert!(stdout.lines().next().unwrap().contains("\"learns_little\":true"), "{stdout}");
    assert!(fs::read_to_string(Path::new(&again).join("log.jsonl")).unwrap().contains("\"learns_little\":true"));
}

#[test]
fn an_answer_says_why_it_ended() {
    let f = fixture();
    let model = f.model.to_str().unwrap();
    let generate = |prompt: &str, n: &str, json: bool| {
        let mut args = vec!["generate", "-m", model, "--no-quantize", "-p", prompt, "-n", n];
        args.extend(json.then_some("--json"));
        f.run(&args)
    };
    let finish = |prompt: &str, n: &str| {
        let report: Value = serde_json::from_slice(&generate(prompt, n, true).stdout).unwrap();
        report["finish"].as_str().unwrap().to_owned()
    };
    let said = |prompt: &str, n: &str| String::from_utf8(generate(prompt, n, false).stderr).unwrap();
    let long = "b".repeat(250);
    assert_eq!((finish("a", "3"), finish(&long, "300")), ("length".into(), "context".into()));
    assert!(said("a", "3").contains("-n"), "{}", said("a", "3"));
    assert!(said(&long, "300").contains("context of 256 tokens"), "{}", said(&long, "300"));

    // In a chat, what helps depends on what is long.
    let (_, said) = chat(&f, &["-n", "100"], "first question\nsecond question\nthird question\n/reset\nfourth\n");
    assert!(said.contains("-n") && said.contains("/reset"), "{said}");
    let (_, said) = chat(&f, &["-n", "1"], format!("{}\nshort\n", "b".repeat(300)));
    assert!(said.contains("error: question") && said.contains("shorten it") && !said.contains("/reset"), "{said}");

    fs::write(f.path("ask.jsonl"), "{\"prompt\":\"q\",\"references\":[\"a\"]}\n").unwrap();
    let report = f.json(&["eval", "-m", model, "--no-quantize", "-d", &f.path("ask.jsonl"), "-n", "2", "--json"]);
    assert_eq!(report["cut"], 1);
}

#[test]
fn a_template_without_a_system_prompt_is_told_at_once() {
    let f = fixture();
    let turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    let refuses = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}";
    let model = f.model.to_str().unwrap();
    for template in [format!("{refuses}{turns}"), turns.replace("in messages", "in messages if m.role == 'user'")] {
        set_template(&f, &template);
        let (stdout, said) = chat(&f, &["--system", "be brief", "-n", "2"], "hello\n/quit\n");
        assert!(said.contains("leave `--system` out") && !said.contains("reset"), "{said}");
        assert!(stdout.is_empty() && !said.contains("is listening"), "{stdout}{said}");
        let said = f.said(&["generate", "-m", model, "--no-quantize", "--chat", "--system", "s", "-p", "a", "-n", "1"]);
        assert!(said.contains("leave `--system` out"), "{said}");
        let (_, said) = chat(&f, &["-n", "2"], "hello\n/quit\n");
        assert!(said.contains("is listening") && !said.contains("error"), "{said}");
    }
}

/// A line of a pipe that is no text costs itself alone; and no cause is told twice.
#[test]
fn a_line_that_is_not_utf8_is_passed_over() {
    let f = fixture();
    let (stdout, said) = chat(&f, &["-n", "2"], b"caf\xe9\nhello\n/save \n/stats\n");
    assert!(said.contains("error: line of stdin: expected") && said.contains(": on)"), "{said}");
    assert!(!said.contains("caused by") && !stdout.is_empty(), "{said}");
}

/// Commands of a chat answer, and what is saved can be trained on.
#[test]
fn commands_of_a_chat_answer() {
    let f = fixture();
    let saved = f.path("saved.jsonl");
    fs::write(&saved, "{\"text\":\"a line without an end\"}").unwrap();
    let script = format!(
        "/save {saved}\nhello\n/stats\n/reset\n/save {saved}\n/adapter\n/adapter none\n/nonsense\n /not a command\n\
         /save {saved}\n/save {0}\n/adapter nowhere\n",
        f.path("no such folder/file.jsonl")
    );
    let (_, said) = chat(&f, &["-n", "3", "--system", "be brief"], &script);
    assert_eq!(said.matches("error: /save: expected a question").count(), 2, "{said}");
    for what in [": on)", "(forgot 2 turns)", "(no adapter is attached)", "`/nonsense`", "(saved 2 turns", "caused by:"]
    {
        assert!(said.contains(what), "{what}: {said}");
    }
    let lines = fs::read_to_string(&saved).unwrap();
    assert_eq!(lines.lines().count(), 2, "{lines}");
    assert!(lines.contains("/not a command") && lines.contains("be brief"), "{lines}");
    let args = learn(&f, &saved, "unused", &["--dry-run", "--json"]);
    // Its answer was cut, and is counted among what is not learned.
    let data = &f.json(&args)["data"];
    assert_eq!((&data["records"], &data["unused"]["records"]), (&1.into(), &1.into()));
    // Somebody's notes are no place for it.
    let notes = f.path("notes.txt");
    fs::write(&notes, "remember the milk\n").unwrap();
    // With rounded products, the three tokens depend on the processor, and may be no text.
    let script = format!("hello\n/stats on\n/stats on\n/save {notes}\n");
    let (_, said) = chat(&f, &["-n", "3", "--precision", "exact"], script);
    assert!(said.contains("notes.txt`: expected a new file") && !said.contains(": off)"), "{said}");
    assert_eq!(fs::read_to_string(&notes).unwrap(), "remember the milk\n");
}

#[test]
fn shells_and_manuals_know_every_command() {
    let f = fixture();
    let script = f.ok(&["completions", "bash"]);
    let pages = f.path("man");
    f.ok(&["man", "-o", &pages]);
    for command in ["chat", "train", "quantize", "seal", "completions"] {
        assert!(script.contains(&format!("pocketlora__{command}")) || script.contains(command), "{command}");
        let page = fs::read_to_string(Path::new(&pages).join(format!("pocketlora-{command}.1"))).unwrap();
        assert!(page.contains(".SH OPTIONS") && page.contains(&format!("pocketlora\\-{command}")), "{command}: {page}");
    }
    let (short, long) = (f.ok(&["-V"]), f.ok(&["--version"]));
    assert_eq!(short.lines().count(), 1);
    assert!(long.contains("features: hub") && long.contains("built for: "), "{long}");
}
