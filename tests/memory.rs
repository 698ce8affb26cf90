//! Memory of training: what is planned is what is taken, a budget is kept, and what is given up for one changes nothing
//! that is learned.

#![cfg(feature = "cli")]

mod common;

use pocketlora::train::{Dataset, MemoryPlan, Observer, Sample, StepReport, TrainConfig, TrainPrecision};
use pocketlora::{Engine, Options};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;

/// A Llama large enough that its memory is not lost among a process's own, small enough to train here.
const SIZES: [(&str, usize); 6] = [
    ("hidden_size", 128),
    ("num_hidden_layers", 6),
    ("intermediate_size", 512),
    ("num_attention_heads", 4),
    ("num_key_value_heads", 2),
    ("vocab_size", 320),
];

/// Held where memory of this process itself is made or measured: tests run beside each other.
static IN_PROCESS: Mutex<()> = Mutex::new(());

fn model(dir: &Path) -> PathBuf {
    model_of(dir, &json!({"model_type": "llama"}))
}

/// A model of some sizes, and of what `more` says.
fn model_of(dir: &Path, more: &Value) -> PathBuf {
    let _alone = IN_PROCESS.lock().unwrap();
    let out = dir.join("model");
    fs::create_dir_all(&out).unwrap();
    let mut config = json!({
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": true,
        "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    });
    SIZES.iter().for_each(|(key, size)| config[*key] = (*size).into());
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    fs::write(out.join("config.json"), config.to_string()).unwrap();
    let built = pocketlora_models::build(config.as_object().unwrap()).unwrap();
    let values = |i: usize, shape: &[usize]| -> Vec<u8> {
        let len = shape.iter().product::<usize>() as u64;
        let uniform = |n| (pocketlora_kernels::mix(i as u64, n) >> 40) as f32 / (1 << 24) as f32 - 0.5;
        let value = |n| if shape.len() == 1 { 1.0 } else { uniform(n) * 0.1 };
        (0..len).flat_map(|n| value(n).to_le_bytes()).collect()
    };
    let data: Vec<_> = built.params().iter().enumerate().map(|(i, p)| (p, values(i, &p.shape))).collect();
    let views = data.iter().map(|(p, bytes)| (&p.name, TensorView::new(Dtype::F32, p.shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &out.join("model.safetensors")).unwrap();
    out
}

fn bench(model: &Path, args: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pocketlora"));
    command.args(["bench", "-m", model.to_str().unwrap(), "--no-quantize", "--train", "--json"]);
    command.args(["--threads", "1", "--trials", "1"]).args(args.split_whitespace());
    command.output().unwrap()
}

fn measured(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice::<Value>(&output.stdout).unwrap()["runs"][0].clone()
}

/// The smallest budget that would do, in MB, from the refusal of a smaller one.
fn least_budget(refused: &Output) -> u64 {
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains("`memory-budget`"), "{error}");
    error.split("expected at least `").nth(1).unwrap().split('`').next().unwrap().parse().unwrap()
}

/// Each run is a process of its own, whose memory nothing else has touched.
#[test]
fn a_plan_is_within_five_percent_of_what_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path());
    let peak_of = |args: &str| {
        let run = measured(&bench(&model, args));
        // The system does not tell everywhere.
        let deviation = run["train_memory"]["deviation_percent"].as_f64()?;
        assert!(deviation.abs() <= 5.0, "{args}: {deviation} % off {}", run["train_memory"]);
        run["peak_anonymous_bytes"].as_u64()
    };
    let peaks = ["--seq 256", "--seq 512", "--seq 768"].map(peak_of);
    if let [Some(a), Some(b), Some(c)] = peaks {
        let (first, second) = (b as f64 - a as f64, c as f64 - b as f64);
        assert!((second / first - 1.0).abs() < 0.15, "memory grows in a line: {a}, {b}, {c}");
    }
    let sgd = peak_of("--seq 512 --optimizer sgd");
    let eight = peak_of("--seq 512 --optimizer adamw8bit");
    assert!(sgd < peaks[1] && eight < peaks[1] && sgd <= eight || peaks[1].is_none(), "{sgd:?} {eight:?} {peaks:?}");
}

/// The matrices of a chunk, the states between chunks and the shares of heads are planned, too.
#[test]
fn the_plan_of_a_state_space_is_within_five_percent_of_what_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let sizes = json!({"model_type": "mamba2", "hidden_size": 256, "num_heads": 16, "head_dim": 32, "state_size": 64,
        "n_groups": 2});
    let model = model_of(dir.path(), &sizes);
    for args in ["--seq 200", "--seq 500"] {
        let run = measured(&bench(&model, args));
        let Some(deviation) = run["train_memory"]["deviation_percent"].as_f64() else { return };
        assert!(deviation.abs() <= 5.0, "{args}: {deviation} % off {}", run["train_memory"]);
    }
}

/// What layers carry to later ones, with its gradient, is planned, too.
#[test]
fn the_plan_of_what_is_carried_is_within_five_percent_of_what_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let (full, sliding) = ("full_attention", "sliding_attention");
    let sizes = json!({"model_type": "gemma4_text", "head_dim": 32, "global_head_dim": 64, "num_kv_shared_layers": 2,
        "layer_types": [sliding, full, sliding, full, sliding, full], "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 320, "sliding_window": 64, "rope_theta": null, "hidden_act": null,
        "rope_parameters": {full: {"rope_type": "proportional"}, sliding: {"rope_type": "default"}}});
    let model = model_of(dir.path(), &sizes);
    for args in ["--seq 200", "--seq 500"] {
        let run = measured(&bench(&model, args));
        let Some(deviation) = run["train_memory"]["deviation_percent"].as_f64() else { return };
        assert!(deviation.abs() <= 5.0, "{args}: {deviation} % off {}", run["train_memory"]);
    }
}

/// Of a model so small that an allocator's own habits show: what it keeps of freed scratch is some hundred kilobytes.
#[test]
fn a_plan_of_a_megabyte_is_near_what_is_taken() {
    const SPARE: f64 = 250_000.0;
    for args in ["--seq 32", "--seq 32 --threads 2", "--seq 128", "--seq 128 --threads 2"] {
        let args = if args.contains("threads") { args.to_owned() } else { format!("{args} --threads 1") };
        let mut command = Command::new(env!("CARGO_BIN_EXE_pocketlora"));
        command.args(["bench", "--no-quantize", "--train", "--json", "--trials", "1", "-m"]);
        let run = measured(&command.arg(common::golden("tiny-llama")).args(args.split_whitespace()).output().unwrap());
        let memory = &run["train_memory"];
        let Some(taken) = memory["taken_bytes"].as_f64() else { return };
        let planned = memory["planned_bytes"].as_f64().unwrap();
        assert!(planned < 2.5e6 && (taken - planned).abs() <= SPARE.max(0.05 * planned), "{args}: {memory}");
    }
}

#[test]
fn a_budget_is_kept_or_refused_with_the_smallest_that_would_do() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path());
    let refused = bench(&model, "--seq 512 --memory-budget 1");
    let least = least_budget(&refused);
    let free = measured(&bench(&model, "--seq 512"));
    let Some(most) = free["peak_anonymous_bytes"].as_u64().map(|bytes| bytes / 1_000_000) else { return };
    assert!(least < most, "{least} of {most} MB");
    for budget in [least, (least + most) / 2] {
        let run = measured(&bench(&model, &format!("--seq 512 --memory-budget {budget}")));
        let peak = run["peak_anonymous_bytes"].as_u64().unwrap();
        assert!(peak <= budget * 1_000_000, "{peak} bytes of {budget} MB: {}", run["train_memory"]);
    }
}

/// [`model`] with a tokenizer.
fn text_model(dir: &Path) -> PathBuf {
    let (model, chat) = (model(dir), common::tiny_chat_model(dir));
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(chat.join(file), model.join(file)).unwrap();
    }
    model
}

/// A file of texts of about so many tokens.
fn texts(dir: &Path, name: &str, lengths: &[usize]) -> PathBuf {
    let path = dir.join(name);
    let line = |len: &usize| json!({ "text": "words and ".repeat(len / 10) }).to_string() + "\n";
    fs::write(&path, lengths.iter().map(line).collect::<String>()).unwrap();
    path
}

fn train(dir: &Path, model: &Path, data: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pocketlora"));
    // What questions take is looked at by itself.
    command
        .args([
            "train",
            "--auto",
            "off",
            "--no-quantize",
            "--json",
            "--overwrite",
            "--threads",
            "1",
            "--skip-check",
            "-m",
        ])
        .arg(model);
    command.arg("-d").arg(data).arg("-o").arg(dir.join("out")).args(more).output().unwrap()
}

fn summary(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    serde_json::from_str::<Value>(text.lines().last().unwrap()).unwrap()
}

/// Checks that a small run took what was planned: less by so many percent at most, more by 5 % and what an allocator keeps
/// of freed memory. That changes from run to run, for the tokenizer's hash maps differ in order, and with them the gaps
/// that they leave in the heap: 25 runs of one command spread over 0.9 MB. False where the system does not tell.
fn keeps_to_its_plan(run: &Value, percent_below: f64) -> bool {
    const KEPT: f64 = 1e6;
    let Some(peak) = run["peak_anonymous_bytes"].as_f64() else { return false };
    let (taken, planned) = (peak - run["plan"]["before"].as_f64().unwrap(), run["planned_bytes"].as_f64().unwrap());
    let range = planned * (1.0 - percent_below / 100.0)..=planned * 1.05 + KEPT;
    assert!(range.contains(&taken), "{taken} bytes were taken, {planned} planned: {}", run["plan"]);
    true
}

/// General questions are asked when passes hold nothing. What an allocator keeps of that is less than so many bytes.
#[test]
fn questions_take_little_more_than_passes() {
    const SPARE: f64 = 1.5e6;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let (model, data) = (text_model(dir), texts(dir, "data.jsonl", &[300, 200]));
    let mut command = Command::new(env!("CARGO_BIN_EXE_pocketlora"));
    command
        .args(["train", "--auto", "off", "--no-quantize", "--json", "--threads", "1", "--steps", "2", "-m"])
        .arg(&model);
    let run = summary(&command.arg("-d").arg(&data).arg("-o").arg(dir.join("asked")).output().unwrap());
    assert!(run["general_questions"]["asked"].as_u64().unwrap() > 10 && run["plan"]["asking"].as_u64().unwrap() > 0);
    let Some(peak) = run["peak_anonymous_bytes"].as_f64() else { return };
    let planned = run["planned_bytes"].as_f64().unwrap() + run["plan"]["before"].as_f64().unwrap();
    assert!(peak <= planned + SPARE, "{peak} bytes of {planned}: {}", run["plan"]);
}

/// Virtual tokens are rows of attention for each sample, however short it is.
#[test]
fn a_prefix_is_planned_for_every_sample_of_a_pass() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let model = text_model(dir);
    let many: Vec<usize> = (0..60).map(|i| 10 + i % 5 * 10).chain([200, 300]).collect();
    let (few, many) = (texts(dir, "few.jsonl", &[100, 150, 120, 80]), texts(dir, "many.jsonl", &many));
    for (data, more) in [
        (&few, "--batch 1 --num-virtual-tokens 4"),
        (&few, "--batch 4 --num-virtual-tokens 64"),
        (&many, "--batch 8 --num-virtual-tokens 32"),
        (&many, "--batch 2 --packing --num-virtual-tokens 32"),
    ] {
        let settings = ["--method", "prefix-tuning", "--steps", "3", "--seq", "300"];
        let run = summary(&train(dir, &model, data, &[&settings[..], &more.split(' ').collect::<Vec<_>>()].concat()));
        // AVX-512's products get room for their longest case, which is some percent of so small a run.
        if !keeps_to_its_plan(&run, 12.0) {
            return;
        }
    }
}

/// Short samples to learn and one long sample to evaluate: it is what takes most.
#[test]
fn evaluation_and_saving_keep_to_the_plan_and_to_a_budget() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let model = text_model(dir);
    let (data, held_out) = (texts(dir, "data.jsonl", &[60]), texts(dir, "held_out.jsonl", &[900]));
    let train = |more: &[&str]| train(dir, &model, &data, &[&["--steps", "2", "--seq", "1024"], more].concat());
    let bytes = |summary: &Value| summary["planned_bytes"].as_u64().unwrap();
    let held = &["--rank", "2", "--eval-data", held_out.to_str().unwrap()];
    let alone = summary(&train(&held[..2]));
    let free = summary(&train(held));
    assert!(bytes(&free) > 2 * bytes(&alone), "{} with it, {} without", free["plan"], alone["plan"]);
    let layout = &free["plan"]["layout"];
    assert!(layout["part"].is_null() && layout["loss_rows"].is_null(), "what is not bounded: {layout}");
    if !keeps_to_its_plan(&free, 8.0) {
        return;
    }
    let [before, samples, text, loaded] =
        ["before", "data", "tokenizer", "tokenizer_loaded"].map(|key| free["plan"][key].as_u64().unwrap());
    // The held-out sample alone has 900 tokens; the tokenizer is let go before the run.
    assert!(samples > 4 * 900 && samples < before && text == 0 && loaded > 0, "{}", free["plan"]);

    // Whatever is saved on the way, an adapter larger than all activations too, comes one tensor at a time.
    let saving = ["--rank", "64", "--eval-data", data.to_str().unwrap(), "--eval-every", "1"];
    let saving = summary(&train(&[&saving[..], &["--keep-best", "--save-every", "1"]].concat()));
    assert!(keeps_to_its_plan(&saving, 8.0));
    assert!(saving["adapter_eval_loss"].is_number() && saving["adapter_general_loss"].is_number(), "{saving}");

    let refused = train(&[&held[..], &["--memory-budget", "1"]].concat());
    let least = least_budget(&refused);
    assert!(least * 1_000_000 < free["peak_anonymous_bytes"].as_u64().unwrap(), "{least} MB of {free}");
    let kept = summary(&train(&[&held[..], &["--memory-budget", &(least + 1).to_string()]].concat()));
    let peak = kept["peak_anonymous_bytes"].as_u64().unwrap();
    assert!(peak <= (least + 1) * 1_000_000, "{peak} bytes of {least} + 1 MB: {}", kept["plan"]);
    assert!(kept["plan"]["layout"]["part"].as_u64().unwrap() < 900, "{}", kept["plan"]);
}

struct Quiet;

impl Observer for Quiet {
    fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// Loss and gradients of one step of four samples under a budget, and the plan that it led to. The samples are long enough
/// that what is given up for a budget takes more than the megabyte by which budgets differ.
fn step(model: &Path, out: &Path, memory_budget: Option<u64>) -> Option<(f64, Vec<f32>, MemoryPlan)> {
    let engine = Engine::open(model, &Options::new().threads(1)).unwrap();
    let sample = |n: usize| {
        let ids = (0..100 + 80 * n).map(|i| (7 * n + 3 * i) as u32 % 320).collect();
        Sample::new(ids, (0..100 + 80 * n).map(|i| i > 5).collect())
    };
    let samples = (0..4).map(sample).collect();
    let data = Dataset::new("samples", samples);
    let config = TrainConfig {
        batch: 4,
        dropout: 0.1,
        clip: 0.0,
        precision: TrainPrecision::Exact,
        memory_budget,
        steps: Some(1),
        ..TrainConfig::default()
    };
    let mut trainer = engine.trainer(config, data, None, None, out).ok()?;
    let report = trainer.step(&mut Quiet).unwrap();
    let gradients = trainer.gradients().unwrap().into_iter().flat_map(|(_, values)| values).collect();
    Some((report.loss, gradients, trainer.plan()))
}

#[cfg(target_os = "linux")]
#[test]
fn what_a_run_and_its_engine_held_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (model(dir.path()), dir.path().join("out"));
    let _quiet = IN_PROCESS.lock().unwrap();
    let before = pocketlora::memory::anonymous_bytes().unwrap();
    let (.., plan) = step(&model, &out, None).unwrap();
    let after = pocketlora::memory::anonymous_bytes().unwrap();
    let left = after.saturating_sub(before);
    assert!(left < plan.anonymous() / 5, "{left} bytes are left of {plan:?}");
}

#[test]
fn what_is_given_up_for_a_budget_changes_no_gradient() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (model(dir.path()), dir.path().join("out"));
    let _quiet = IN_PROCESS.lock().unwrap();
    let (loss, gradients, free) = step(&model, &out, None).unwrap();
    let norm = gradients.iter().map(|g| g * g).sum::<f32>().sqrt();
    let mut plans = vec![free];
    for megabytes in (1..=free.anonymous() / 1_000_000).rev() {
        // What a budget leaves for the run: the process holds more before it once a run was there.
        let before = plans.last().map_or(0, |last| last.before);
        let budget = before / 1_000_000 + megabytes;
        let Some((got_loss, got, plan)) = step(&model, &out, Some(budget)) else { continue };
        let off = gradients.iter().zip(&got).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt() / norm;
        assert!(
            (loss - got_loss).abs() < 1e-5 && off < 1e-5,
            "{got_loss} for {loss}, gradients off by {off}: {plan:?}"
        );
        plans.push(plan);
    }
    let tried = |what: &dyn Fn(&MemoryPlan) -> bool| assert!(plans.iter().any(what), "{plans:?}");
    tried(&|plan| plan.pass_tokens < free.pass_tokens);
    tried(&|plan| plan.layout.part < plan.pass_tokens);
    tried(&|plan| plan.layout.every > 1);
}
