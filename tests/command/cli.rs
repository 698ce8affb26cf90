//! The command as people run it: what it prints, its exit codes, and what a kill leaves behind.

use crate::common::{check_all, golden};
use crate::fixture::fixture;
use serde_json::Value;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn the_commands_work_together() {
    let f = fixture();
    let model = f.model.to_str().unwrap();
    let nf4 = f.path("nf4");
    let report = f.json(&["quantize", model, "-o", &nf4, "--json"]);
    assert_eq!(report["quantized"], 14);

    let info = f.json(&["info", &nf4, "--json"]);
    assert_eq!((&info["model_type"], &info["layers"]), (&"llama".into(), &2.into()));

    let out = f.path("adapter");
    let lines: Vec<Value> = f.ok(&f.train_args(&out)).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let (summary, steps) = lines.split_last().unwrap();
    assert_eq!((steps.len(), &summary["done"], &summary["steps"]), (24, &true.into(), &24.into()));
    assert_eq!(summary["padded_tokens"], 0);
    for key in ["loss", "tok_s", "trained_tokens", "seconds", "peak_anonymous_bytes", "mapped_bytes", "adapter", "plan"]
    {
        assert!(!summary[key].is_null(), "{key} in {summary}");
    }
    for key in ["step", "loss", "lr", "tok_s"] {
        assert!(steps.iter().all(|s| s[key].is_number()), "{key}");
    }
    assert_eq!(
        names(Path::new(&out)),
        [
            "adapter_config.json",
            "adapter_model.safetensors",
            "centroid.safetensors",
            "lessons.json",
            "log.jsonl",
            "loss.svg",
            "train.toml"
        ]
    );
    assert_eq!(f.json(&["info", &out, "--json"])["rank"], 8);

    let data = f.data.to_str().unwrap();
    let before = f.json(&["eval", "-m", model, "-d", data, "--json"]);
    let after = f.json(&["eval", "-m", &nf4, "-a", &out, "-d", data, "--json"]);
    assert!(after["nll"].as_f64().unwrap() < before["nll"].as_f64().unwrap(), "{before} {after}");
    let none = f.json(&["eval", "-m", &nf4, "-a", &format!("{out}=0"), "-d", data, "--json"]);
    let gap = none["nll"].as_f64().unwrap() - before["nll"].as_f64().unwrap();
    assert!(gap.abs() < 1e-6, "a scale of 0 must do nothing: {gap}");

    let answer =
        f.json(&["generate", "-m", &nf4, "-a", &out, "-p", "what is number 3?", "--chat", "-n", "6", "--json"]);
    for key in
        ["text", "prompt_tokens", "tokens", "prefill_tok_s", "decode_tok_s", "peak_anonymous_bytes", "mapped_bytes"]
    {
        assert!(!answer[key].is_null(), "{key} in {answer}");
    }
    let plain = f.ok(&["generate", "-m", &nf4, "-p", "a", "-n", "3"]);
    assert_eq!(plain, f.ok(&["generate", "-m", &nf4, "-p", "a", "-n", "3"]), "greedy answers repeat");
}

#[test]
fn eval_gives_one_field_for_each_score() {
    let f = fixture();
    let (model, data, answers) = (f.model.to_str().unwrap(), f.path("ask.jsonl"), f.path("answers.jsonl"));
    let took = ["seconds", "tok_s", "peak_anonymous_bytes", "mapped_bytes"];
    for (line, flags, scores) in [
        (r#"{"question":"q","choices":["a","b"],"answer":"B"}"#, &["--chat"][..], &["choice", "choice_norm"][..]),
        (r#"{"prompt":"q","label":"a"}"#, &[], &["accuracy", "f1"]),
        (r#"{"prompt":"q","label":"a"}"#, &["--metrics", "f1", "--labels-by", "generation", "-n", "2"], &["f1"]),
        (
            r#"{"prompt":"q","references":["a","b"]}"#,
            &["-n", "3", "--stemmer", "--answers", &answers],
            &["exact", "bleu", "rouge1", "rouge2", "rougeL", "generated_tokens", "decode_tok_s"],
        ),
        (r#"{"prompt":"q","completion":"a"}"#, &["--metrics", "perplexity,exact", "-n", "3"], &["perplexity", "exact"]),
        (r#"{"text":"some text"}"#, &[], &["tokens", "nll", "perplexity"]),
    ] {
        fs::write(&data, format!("{line}\n{line}\n")).unwrap();
        let report = f.json(&[&["eval", "-m", model, "-d", &data, "--json"], flags].concat());
        for key in scores.iter().chain(&took) {
            assert!(report[key].is_number(), "{key} in {report} for {line}");
        }
    }
    let written = fs::read_to_string(answers).unwrap();
    let lines: Vec<Value> = written.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert!(lines.len() == 2 && lines[1]["line"] == 2 && lines[1]["answer"].is_string(), "{written}");

    let out = f.run(&["eval", "-m", model, "-d", &data, "--metrics", "bleu"]);
    let message = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && message.contains("`bleu`"), "{message}");
}

#[test]
fn eval_ids_saves_the_logits_it_scored() {
    let f = fixture();
    let (ids, out) = (f.path("ids.json"), f.path("logits.safetensors"));
    fs::write(&ids, "[[1, 2, 3, 4], [5, 6]]").unwrap();
    let dir = golden("tiny-llama");
    let model = ["-m", dir.to_str().unwrap(), "--no-quantize", "--precision", "exact"];
    let score = f.json(&[&["eval"], &model[..], &["--ids", &ids, "--save-logits", &out, "--json"]].concat());
    assert_eq!(score["tokens"], 4);
    let same = f.json(&[&["eval"], &model[..], &["--ids", &ids, "--json"]].concat());
    assert_eq!(score["nll"], same["nll"]);
    let logits = crate::common::tensors(Path::new(&out));
    assert_eq!((&logits["logits.0"].shape, &logits["logits.1"].shape), (&vec![4, 512], &vec![2, 512]));
    let text = f.path("text.txt");
    fs::write(&text, "some words to read").unwrap();
    let model = f.model.to_str().unwrap();
    assert!(f.json(&["eval", "-m", model, "--text", &text, "--json"])["perplexity"].as_f64().unwrap() > 1.0);
}

#[test]
fn a_chat_answers_and_obeys_its_commands() {
    let f = fixture();
    let saved = f.path("saved.jsonl");
    let model = f.model.to_str().unwrap();
    let mut chat = f
        .command(&["chat", "-m", model, "-n", "4", "--seed", "1", "--temperature", "0.7", "--top-p", "0.9"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let adapter = golden("adapters/lora");
    let script = format!(
        "hello\n/adapter {}=0.5\n/adapter\n/adapter nowhere\n/stats\nagain\n/save {saved}\n/reset\n/nonsense\n/help\n/quit\n",
        adapter.display()
    );
    chat.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let out = chat.wait_with_output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{stderr}");
    assert!(stdout.contains("lora=0.5") && stdout.contains("/save FILE"), "{stdout}");
    assert!(stderr.contains("nowhere") && stderr.contains("/nonsense") && stderr.contains("tok/s"), "{stderr}");
    let line: Value = serde_json::from_str(&fs::read_to_string(&saved).unwrap()).unwrap();
    assert_eq!(line["messages"][0]["content"], "hello");
}

#[test]
fn a_killed_quantization_leaves_nothing_under_the_final_name() {
    let f = fixture();
    let out = f.path("nf4");
    for wait in [0, 2, 5, 10] {
        let mut child = f.command(&["quantize", f.model.to_str().unwrap(), "-o", &out]).spawn().unwrap();
        thread::sleep(Duration::from_millis(wait));
        let _ = child.kill();
        child.wait().unwrap();
        let whole = Path::new(&out).join("config.json").exists() && Path::new(&out).join("model.safetensors").exists();
        assert!(whole || !Path::new(&out).exists(), "half a model under the final name after {wait} ms");
    }
    f.ok(&["quantize", f.model.to_str().unwrap(), "-o", &out]);
    f.ok(&["info", &out]);
}

#[test]
fn bench_shows_where_a_training_step_s_time_goes() {
    let f = fixture();
    let model = golden("tiny-mistral-bnb4");
    let args = ["bench", "-m", model.to_str().unwrap(), "--threads", "2", "--trials", "1", "--seq", "16", "--json"];
    let report = f.json(&[&args[..], &["--train", "--profile"]].concat());
    let run = &report["runs"][0];
    assert!(run["train_tok_s"].as_f64().unwrap() > 0.0, "{run}");
    let profile = &run["profile"];
    let ops = profile["ops"].as_array().unwrap();
    let named = |name: &str| ops.iter().find(|op| op["op"] == name).unwrap_or_else(|| panic!("no {name} in {ops:?}"));
    assert_eq!((&named("AttentionVjp")["calls"], &named("LinearCrossEntropy")["calls"]), (&2.0.into(), &1.0.into()));
    let within: f64 = ops.iter().map(|op| op["share"].as_f64().unwrap()).sum();
    assert!((within + profile["rest"].as_f64().unwrap() - 1.0).abs() < 1e-9 && within < 1.0, "{profile}");
}

#[test]
fn bench_measures_a_model_and_writes_a_record() {
    let f = fixture();
    let (model, record) = (golden("tiny-mistral-bnb4"), f.path("record.json"));
    let args = ["bench", "-m", model.to_str().unwrap(), "--threads", "1,2", "--trials", "1", "--json"];
    let report =
        f.json(&[&args[..], &["--prefill", "32", "--decode", "8", "--seq", "16", "--record", &record]].concat());
    let positive = |value: &Value, what: &str| {
        let number = value.as_f64().unwrap_or_else(|| panic!("{what} is {value}"));
        assert!(number.is_finite() && number > 0.0, "{what} is {number}");
        number
    };
    let runs = report["runs"].as_array().unwrap();
    assert_eq!(runs.iter().map(|run| run["threads"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    for run in runs {
        assert!(run["isa"].is_string());
        for key in ["prefill_tok_s", "decode_tok_s", "adapter_decode_tok_s", "train_tok_s", "decode_gb_s"] {
            positive(&run[key], key);
        }
        for key in ["read", "int8", "train"] {
            assert!(positive(&run["share"][key], key) < 2.0, "share of {key}: {}", run["share"][key]);
        }
        for key in ["decode", "train"] {
            if cfg!(target_os = "linux") {
                positive(&run["peak_anonymous_bytes"][key], key);
            }
        }
        let decode = &run["figures"]["decode"];
        assert_eq!((&decode["median"], decode["trials"].as_array().unwrap().len()), (&run["decode_tok_s"], 1));
    }
    for key in ["read_gb_s", "f32_gflops", "int8_gops"] {
        positive(&report["limits"][key], key);
    }
    assert!(report["limits"]["bf16_gflops"].is_null() || report["limits"]["bf16_gflops"].as_f64().unwrap() > 0.0);
    // Two layers of seven matrices, and what stays in floats is not read in four bits.
    positive(&report["model"]["bytes_per_token"], "bytes_per_token");
    let kernels = report["kernels"].as_array().unwrap();
    for name in [
        "nf4_matvec@",
        "nf4_matmul@",
        "nf4_matmul_vjp_x@",
        "f32_linear_cross_entropy@",
        "attention@",
        "attention_vjp@",
        "attention_cached@",
    ] {
        let kernel = kernels.iter().find(|k| k["name"].as_str().unwrap().starts_with(name));
        let kernel = kernel.unwrap_or_else(|| panic!("no {name} in {kernels:?}"));
        positive(&kernel["gb_s"], name);
        positive(if kernel["gops"].is_null() { &kernel["gflops"] } else { &kernel["gops"] }, name);
    }
    let kept: Value = serde_json::from_str(&fs::read_to_string(&record).unwrap()).unwrap();
    assert_eq!((&kept["runs"], &kept["machine"]), (&report["runs"], &report["machine"]));
    let command = kept["command"].as_str().unwrap();
    assert!(command.starts_with("pocketlora bench -m tiny-mistral-bnb4") && !command.contains("/"), "{command}");

    let less = f.json(&[&args[..], &["--no-train", "--no-kernels", "--decode", "2", "--prefill", "2"]].concat());
    assert!(less["runs"][0]["train_tok_s"].is_null() && less["kernels"].as_array().unwrap().is_empty());
}

#[test]
fn bench_makes_a_model_of_a_known_shape() {
    let f = fixture();
    let keep = f.path("shapes");
    let args = ["bench", "--shape", "smollm2-135m", "--keep", &keep, "--threads", "1", "--trials", "1", "--no-train"];
    let out = f.ok(&[&args[..], &["--no-kernels", "--prefill", "16", "--decode", "4"]].concat());
    assert!(out.contains("smollm2-135m") && out.contains("prefill@"), "{out}");
    let info = f.json(&["info", Path::new(&keep).join("smollm2-135m").to_str().unwrap(), "--json"]);
    assert_eq!((&info["model_type"], &info["layers"]), (&"llama".into(), &30.into()));
}

#[test]
fn wrong_usage_and_bad_input_have_their_exit_codes() {
    let f = fixture();
    let model = f.model.to_str().unwrap();
    let bad = f.path("bad.jsonl");
    fs::write(&bad, "{\"text\": \"ab\"}\n{oops\n").unwrap();
    let (out, toml, isa) = (f.path("out"), f.path("train.toml"), f.path("x"));
    fs::write(&toml, "rnak = 4\n").unwrap();
    let train = ["train", "--auto", "off", "-m", model, "-d", f.data.to_str().unwrap(), "-o", &out];
    let cases: Vec<(Vec<&str>, i32, &str)> = vec![
        (vec!["nonsense"], 2, "nonsense"),
        (vec!["generate", "-m", model], 1, "give it with `-p`"),
        (vec!["eval", "-m", model], 2, "--text"),
        (vec!["generate", "-m", "no-such-model", "-p", "a"], 1, "no-such-model"),
        (vec!["generate", "-m", model, "-p", "a", "--temperature=-1"], 1, "temperature"),
        (vec!["generate", "-m", model, "-a", "nowhere", "-p", "a"], 1, "adapter_config.json"),
        (vec!["train", "--auto", "off", "-m", model, "-d", &bad, "-o", &isa], 1, "line 2"),
        ([&train[..], &["--config", &toml]].concat(), 1, "rnak"),
        ([&train[..], &["--schedule", "sideways"]].concat(), 1, "sideways"),
        ([&train[..], &["--targets", "qproj"]].concat(), 1, "q_proj"),
        ([&train[..], &["--targets", "qproj"]].concat(), 1, "or `embed_tokens` and `lm_head` beside them"),
        ([&train[..], &["--lr", "0"]].concat(), 1, "lr"),
        ([&train[..], &["--resume"]].concat(), 1, "checkpoint"),
        (vec!["bench", "--shape", "llama-9b"], 1, "llama-1b"),
        (vec!["bench", "-m", model, "--shape", "llama-1b"], 2, "--shape"),
        (vec!["bench", "-m", model, "--decode", "1"], 1, "decode"),
        (vec!["pull", "../etc"], 1, "../etc"),
        (vec!["quantize", "nowhere.gguf", "-o", &out], 1, "nowhere.gguf"),
    ];
    check_all(cases, |(args, code, what)| {
        let done = f.run(args);
        let stderr = String::from_utf8_lossy(&done.stderr);
        if done.status.code() != Some(*code) {
            return Err(format!("{args:?}: exit code {:?} instead of {code}: {stderr}", done.status.code()));
        }
        if stderr.contains(what) { Ok(()) } else { Err(format!("{args:?}: no `{what}` in {stderr}")) }
    });
    assert!(!Path::new(&out).join("adapter_config.json").exists());
    let unknown = f.command(&["generate", "-m", model, "-p", "a"]).env("POCKETLORA_ISA", "mmx").output().unwrap();
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("mmx"), "an unknown instruction set is an error");
}

#[test]
fn a_dry_run_shows_what_is_learned_and_writes_nothing() {
    let f = fixture();
    let out = f.path("adapter");
    let with = |more: &[&'static str]| [&f.train_args(&out)[..], &["--dry-run"], more].concat();
    let before = names(f.dir.path());
    let args: Vec<&str> = with(&[]).into_iter().filter(|a| *a != "--json").collect();
    let text = f.ok(&args);
    for what in [
        "sample 1 of 12: ",
        "<|im_start|>user\nwhat is number 0?<|im_end|>\n<|im_start|>assistant\n\u{ab}it is 0<|im_end|>\u{bb}\n",
        "12 records, 12 samples",
        "0 padded",
        "24 steps in all",
        "up to ",
    ] {
        assert!(text.contains(what), "{what}: {text}");
    }
    // What would be chosen is told; here all is given.
    assert!(!text.contains("auto:"), "{text}");
    let chosen = ["train", "-m", f.model.to_str().unwrap(), "-d", f.data.to_str().unwrap(), "--dry-run"];
    let text = f.ok(&chosen);
    assert!(text.contains("auto: lr ") && text.contains("a probe will choose") && text.contains("epochs)"), "{text}");
    let text = f.ok(&[&chosen[..], &["--lr", "1e-3", "--epochs", "4"]].concat());
    assert!(text.contains("auto: lr 1e-3") && !text.contains("a probe") && text.contains("(4 epochs)"), "{text}");
    let rest = f.json(&with(&["--eval-split", "0.25"]));
    assert_eq!((&rest["data"]["records"], &rest["data"]["samples"]), (&9.into(), &9.into()), "what is learned");
    let report = f.json(&with(&["--packing", "--seq", "128"]));
    let (data, sample) = (&report["data"], &report["samples"][1]);
    assert_eq!(sample["parts"][1], serde_json::json!({"text": "it is 7<|im_end|>", "trained": true}));
    assert_eq!((&data["records"], &data["batches"]["padded_tokens"]), (&12.into(), &0.into()));
    // 12 chats of some fifty tokens in passes of up to 256.
    assert_eq!((&data["batches"]["micro_batches"], &data["total_steps"]), (&3.into(), &12.into()));
    let split = f.json(&with(&["--seq", "32"]));
    assert_eq!((&split["data"]["splits"]["samples"], &split["data"]["samples"]), (&12.into(), &12.into()));
    assert_eq!(names(f.dir.path()), before);
}

#[test]
fn packed_training_takes_fewer_steps_and_pads_nothing() {
    let f = fixture();
    let out = f.path("one");
    let summary = f.json(&[&f.train_args(&out)[..], &["--packing", "--seq", "128"]].concat());
    let (data, steps) = (&summary["data"], summary["steps"].as_u64().unwrap());
    assert_eq!((&summary["padded_tokens"], &data["total_steps"]), (&0.into(), &summary["steps"]));
    let learned = data["trained_tokens"].as_u64().map(|n| 4 * n);
    assert!(steps < 24 && summary["trained_tokens"].as_u64() == learned, "{summary}");
}

#[test]
fn sampling_is_the_models_own_and_each_flag_has_its_way() {
    let f = fixture();
    let model = f.model.to_str().unwrap();
    assert_eq!(f.json(&["info", model, "--json"])["sampling"]["from"], "by its size");
    let own = r#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "num_beams": 3, "eos_token_id": 2}"#;
    fs::write(f.model.join("generation_config.json"), own).unwrap();
    let info = &f.json(&["info", model, "--json"])["sampling"];
    for (key, value) in
        [("temperature", 0.6), ("top_k", 20.0), ("top_p", 1.0), ("dry_multiplier", 0.8), ("dry_after", 3.0)]
    {
        assert_eq!(info[key], value, "{key} in {info}");
    }
    assert_eq!((&info["from"], &info["unused"][0]), (&"generation_config.json".into(), &"num_beams".into()));
    let said = f.ok(&["info", model]);
    for part in ["temperature 0.6, top k 20, guarded against loops (generation_config.json)", "num_beams, which is not"]
    {
        assert!(said.contains(part), "{part} in {said}");
    }

    let sampling = |flags: &[&str]| {
        let args = [&["chat", "-m", model, "--no-quantize"][..], flags].concat();
        let mut chat = f.command(&args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        chat.stdin.take().unwrap().write_all(b"/sampling\n").unwrap();
        String::from_utf8(chat.wait_with_output().unwrap().stdout).unwrap()
    };
    for (flags, said) in [
        (&[][..], "temperature 0.6, top k 20, guarded against loops\n"),
        (&["--top-k", "0", "--min-p", "0.1"], "temperature 0.6, min p 0.1, guarded against loops\n"),
        (&["--temperature", "0", "--no-guard"], "the likeliest token, top k 20, unguarded\n"),
        (&["--dry-multiplier", "0"], "temperature 0.6, top k 20, unguarded\n"),
    ] {
        assert_eq!(sampling(flags), said, "{flags:?}");
    }
    let out = f.run(&["generate", "-m", model, "-p", "a", "--no-guard", "--dry-after", "2"]);
    assert_eq!(out.status.code(), Some(2), "either the guard is off, or it has settings");
    let said = f.said(&["generate", "-m", model, "-p", "a", "--dry-base", "0.5"]);
    assert!(said.contains("`1 <= dry-base <= 100`, got `0.5`"), "{said}");
}

/// An answer that the cap ends is no whole answer: people are told, and programs.
#[test]
fn a_cut_answer_is_called_so() {
    let f = fixture();
    let generate = ["generate", "-m", f.model.to_str().unwrap(), "--no-quantize", "-p", "a", "-n", "3"];
    let said = f.said(&generate);
    assert!(said.contains("(cut after 3 tokens") && said.contains("-n allows more"), "{said}");
    assert_eq!(f.json(&[&generate[..], &["--json"]].concat())["finish"], "length");
    let full = [&generate[..6], &["-n", "100", "--context", "8"]].concat();
    let said = f.said(&full);
    assert!(said.contains("(cut before its end") && said.contains("--context"), "{said}");
    assert_eq!(f.json(&[&full[..], &["--json"]].concat())["finish"], "context");
}
