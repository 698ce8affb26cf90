//! Promises of training that need no reference: resuming, determinism, masks, bad data, files that survive.

use crate::common::{check_all, golden, open_exact, tiny_training};
use pocketlora::adapter::{AdapterFile, HostTensor, Method};
use pocketlora::train::{Dataset, Mask, Observer, StepReport, TrainConfig, TrainPrecision};
use pocketlora::{Engine, ErrorCode, Options, internals};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Stops after a step, or in the middle of one.
#[derive(Default)]
struct Stopper {
    after_step: Option<u64>,
    questions_left: Option<u32>,
    losses: Vec<f64>,
}

impl Observer for Stopper {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        self.losses.push(report.loss);
        if self.after_step == Some(report.step) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn keep_going(&mut self) -> bool {
        match &mut self.questions_left {
            Some(0) => false,
            Some(n) => {
                *n -= 1;
                true
            }
            None => true,
        }
    }
}

fn config() -> TrainConfig {
    TrainConfig {
        rank: 4,
        lr: 3e-3,
        epochs: 3,
        batch: 2,
        accumulate: 2,
        dropout: 0.1,
        seed: 5,
        ..TrainConfig::default()
    }
}

struct Fixture {
    dir: tempfile::TempDir,
    model: PathBuf,
    data: PathBuf,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = tiny_training(dir.path(), 11);
    Fixture { dir, model, data }
}

impl Fixture {
    fn engine(&self, threads: usize) -> Engine {
        Engine::open(&self.model, &Options::new().threads(threads)).unwrap()
    }

    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Trains to the end or to where the observer stops it.
    fn train(&self, threads: usize, out: &Path, resume: bool, observer: &mut Stopper) -> bool {
        let engine = self.engine(threads);
        let data = engine.dataset(&self.data, 1024).unwrap();
        let mut trainer = engine.trainer(config(), data, None, None, out).unwrap();
        if resume {
            trainer.resume().unwrap();
        }
        trainer.run(observer).unwrap().done
    }
}

fn weights(out: &Path) -> Vec<u8> {
    fs::read(out.join("adapter_model.safetensors")).unwrap()
}

#[test]
fn a_resumed_run_ends_in_the_same_bytes_on_any_number_of_threads() {
    let f = fixture();
    let mut observer = Stopper::default();
    assert!(f.train(1, &f.out("whole"), false, &mut observer));
    assert_eq!(observer.losses.len(), 9);
    assert!(observer.losses[8] < observer.losses[0], "{:?}", observer.losses);
    let whole = weights(&f.out("whole"));

    for (name, threads, stop) in [
        ("one", 1, Stopper { after_step: Some(1), ..Stopper::default() }),
        ("five", 2, Stopper { after_step: Some(5), ..Stopper::default() }),
        ("inside", 2, Stopper { questions_left: Some(20), ..Stopper::default() }),
    ] {
        let (out, mut stop) = (f.out(name), stop);
        assert!(!f.train(threads, &out, false, &mut stop), "{name}");
        assert!(!out.join("adapter_config.json").exists(), "{name}: an unfinished run must not look finished");
        assert!(f.train(3 - threads, &out, true, &mut Stopper::default()), "{name}");
        assert!(weights(&out) == whole, "{name}: bytes differ from the undisturbed run's");
        assert!(!out.join("checkpoint.safetensors").exists(), "{name}: a finished run leaves no checkpoint");
    }
}

/// With an adapter on the head its logits must be made; without, they never exist. Both ways give the same loss.
#[test]
fn a_head_with_an_adapter_learns_from_the_same_losses() {
    let f = fixture();
    f.train(0, &f.out("start"), false, &mut Stopper::default());
    let file = AdapterFile::open(&f.out("start")).unwrap();
    let mut with_head = AdapterFile::open(&f.out("start")).unwrap();
    let engine = f.engine(0);
    let (vocab, width) = {
        let config = internals::base(&engine).model.config();
        (config.vocab_size, config.hidden_size)
    };
    let a = HostTensor { shape: vec![4, width], data: (0..4 * width).map(|i| (i % 7) as f32 / 50.0).collect() };
    let b = HostTensor { shape: vec![vocab, 4], data: vec![0.0; 4 * vocab] };
    with_head.tensors.extend([("lm_head.lora_A.weight".to_owned(), a), ("lm_head.lora_B.weight".to_owned(), b)]);
    let losses = |init: &AdapterFile, name: &str| {
        let config = TrainConfig { dropout: 0.0, precision: TrainPrecision::Exact, ..config() };
        let data = engine.dataset(&f.data, 1024).unwrap();
        let mut observer = Stopper::default();
        engine.trainer(config, data, None, Some(init), &f.out(name)).unwrap().run(&mut observer).unwrap();
        observer.losses
    };
    let (plain, head) = (losses(&file, "plain"), losses(&with_head, "head"));
    // An adapter whose B is zero adds nothing before the first step; afterwards it goes its own way.
    assert!((plain[0] - head[0]).abs() < 1e-5 * plain[0], "{plain:?}, with the head's adapter {head:?}");
    assert!((plain[8] - head[8]).abs() > 1e-4 && head[8] < head[0], "{plain:?}, with the head's adapter {head:?}");
    let trained = AdapterFile::open(&f.out("head")).unwrap();
    let b = trained.tensors.get("lm_head.lora_B.weight").expect("the head's adapter is saved, too");
    assert!(b.data.iter().any(|b| *b != 0.0));
}

#[test]
fn the_adapter_is_a_peft_directory_that_changes_the_answers() {
    let f = fixture();
    let out = f.out("adapter");
    f.train(0, &out, false, &mut Stopper::default());
    let file = AdapterFile::open(&out).unwrap();
    let Method::Lora(lora) = &file.method else { panic!("{:?}", file.method) };
    assert_eq!((lora.rank, lora.alpha, file.modules().count()), (4, 8.0, 14));
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["peft_type"], &config["bias"]), (&"LORA".into(), &"none".into()));

    let engine = f.engine(0);
    let data = engine.dataset(&f.data, 1024).unwrap();
    let before = pocketlora::eval::score_data(&engine, &data, &mut |_| true).unwrap();
    engine.attach(&out, 1.0).unwrap();
    let after = pocketlora::eval::score_data(&engine, &data, &mut |_| true).unwrap();
    assert_eq!(before.tokens, after.tokens);
    assert!(after.nll() < before.nll() - 0.1, "{} to {}", before.nll(), after.nll());
}

#[test]
fn a_resume_with_other_settings_or_data_is_refused() {
    let f = fixture();
    let out = f.out("stopped");
    f.train(1, &out, false, &mut Stopper { after_step: Some(2), ..Stopper::default() });
    let engine = f.engine(1);
    let data = engine.dataset(&f.data, 1024).unwrap();
    let fewer = Dataset { samples: data.samples[1..].to_vec(), ..data.clone() };
    let cases = [
        (TrainConfig { lr: 1e-3, ..config() }, data.clone(), "`lr` was 0.003, is 0.001"),
        (TrainConfig { seed: 6, ..config() }, data, "`seed`"),
        (config(), fewer, "data changed"),
    ];
    check_all(cases, |(config, data, what)| {
        let mut trainer = engine.trainer(config.clone(), data.clone(), None, None, &out).unwrap();
        let error = trainer.resume().unwrap_err().to_string();
        if error.contains(what) && error.contains("checkpoint.safetensors") { Ok(()) } else { Err(error) }
    });
}

#[test]
fn a_broken_checkpoint_is_refused_wherever_it_is_cut_or_flipped() {
    let f = fixture();
    let out = f.out("broken");
    f.train(1, &out, false, &mut Stopper { after_step: Some(1), ..Stopper::default() });
    let path = out.join("checkpoint.safetensors");
    let good = fs::read(&path).unwrap();
    let engine = f.engine(1);
    let data = engine.dataset(&f.data, 1024).unwrap();
    let resume = || engine.trainer(config(), data.clone(), None, None, &out).unwrap().resume();
    for len in [0, 1, 7, 8, 9, 100, good.len() / 2, good.len() - 1] {
        fs::write(&path, &good[..len]).unwrap();
        assert!(resume().is_err(), "cut to {len} bytes");
    }
    for bit in (0..1600).step_by(7) {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &bad).unwrap();
        let _ = resume(); // an error or, in a spot that does not matter, success; never a panic
    }
    fs::write(&path, &good).unwrap();
    resume().unwrap();
}

#[test]
fn only_what_the_assistant_says_is_learned() {
    let f = fixture();
    let engine = f.engine(1);
    let text = engine.text().unwrap();
    let tokenizer = &text.tokenizer;
    let line = r#"{"messages":[{"role":"user","content":"echo"},{"role":"assistant","content":"echo"},{"role":"user","content":"b"},{"role":"assistant","content":"c"}]}"#;
    let cases = [
        (line, "echo<|im_end|>c<|im_end|>"),
        (r#"{"prompt":"2+2=","completion":"4"}"#, "4<|im_end|>"),
        (r#"{"text":"abc"}"#, "bc<|im_end|>"),
    ];
    check_all(cases, |(line, expected)| {
        let path = f.out("one.jsonl");
        fs::write(&path, line).unwrap();
        let data = engine.dataset(&path, 1024).unwrap();
        let sample = &data.samples[0];
        let learned = sample.trained.iter().map(|i| sample.ids[i]);
        let text: String = learned
            .map(|id| if id == 2 { "<|im_end|>".to_owned() } else { tokenizer.decode(&[id]).unwrap() })
            .collect();
        if text == *expected { Ok(()) } else { Err(format!("{line}: learns `{text}`, expected `{expected}`")) }
    });
}

#[test]
fn dropout_of_attention_is_left_out_with_a_warning() {
    let f = fixture();
    let path = f.model.join("config.json");
    let mut model: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    model["attention_dropout"] = 0.1.into();
    fs::write(&path, model.to_string()).unwrap();
    let engine = f.engine(1);
    let data = engine.dataset(&f.data, 1024).unwrap();
    let out = f.out("dropped");
    let mut trainer = engine.trainer(config(), data, None, None, &out).unwrap();
    let mut warned = Warned(Vec::new());
    trainer.step(&mut warned).unwrap();
    trainer.step(&mut warned).unwrap();
    let [warning] = &warned.0[..] else { panic!("{:?}", warned.0) };
    assert!(warning.contains("the base's own attention dropout of 0.1 is left out in training"), "{warning}");
    drop(trainer);
    // Nothing else is different.
    model["attention_dropout"] = 0.0.into();
    fs::write(&path, model.to_string()).unwrap();
    let engine = f.engine(1);
    let plain = f.out("plain");
    let mut trainer = engine.trainer(config(), engine.dataset(&f.data, 1024).unwrap(), None, None, &plain).unwrap();
    let mut quiet = Warned(Vec::new());
    trainer.step(&mut quiet).unwrap();
    assert_eq!(quiet.0, Vec::<String>::new());
}

struct Warned(Vec<String>);

impl Observer for Warned {
    fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn on_warning(&mut self, warning: &pocketlora::Error) {
        self.0.push(warning.to_string());
    }
}

#[test]
fn bad_data_names_its_file_and_line() {
    let f = fixture();
    let engine = f.engine(1);
    let good = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;
    let cases = [
        (String::new(), "the file is empty"),
        ("\n  \n".to_owned(), "at least one line"),
        (format!("{good}\n{{oops\n"), "line 2"),
        (format!("{good}\n[1, 2]\n"), "line 2"),
        (format!("{good}\n\n{{\"question\": 1}}"), "line 3"),
        (r#"{"messages":[{"role":"user","content":"a"}]}"#.to_owned(), "`assistant`"),
        (r#"{"messages":[]}"#.to_owned(), "`assistant`"),
        (r#"{"text":""}"#.to_owned(), "nothing"),
    ];
    check_all(cases, |(text, what)| {
        let path = f.out("bad.jsonl");
        fs::write(&path, text).unwrap();
        match engine.dataset(&path, 1024) {
            Ok(_) => Err(format!("accepted: {text}")),
            Err(e) if e.code() == ErrorCode::Data && e.to_string().contains("bad.jsonl") => {
                let message = e.to_string();
                if message.contains(what) || *what == "nothing" { Ok(()) } else { Err(format!("{text}: {message}")) }
            }
            Err(e) => Err(format!("{text}: {e}")),
        }
    });
    let path = f.out("bytes.jsonl");
    fs::write(&path, [0xff, 0xfe, b'\n']).unwrap();
    assert!(engine.dataset(&path, 1024).unwrap_err().to_string().contains("bytes.jsonl"));
    assert_eq!(engine.dataset(&f.out("none.jsonl"), 1024).unwrap_err().code(), ErrorCode::Io);
}

#[test]
fn adapters_for_other_bases_or_of_other_methods_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let lora = golden("adapters/lora");
    let text = fs::read_to_string(lora.join("adapter_config.json")).unwrap();
    let with = |name: &str, change: &dyn Fn(&mut serde_json::Value), bytes: Option<Vec<u8>>| {
        let out = dir.path().join(name);
        fs::create_dir_all(&out).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        change(&mut json);
        fs::write(out.join("adapter_config.json"), json.to_string()).unwrap();
        let bytes = bytes.unwrap_or_else(|| fs::read(lora.join("adapter_model.safetensors")).unwrap());
        fs::write(out.join("adapter_model.safetensors"), bytes).unwrap();
        out
    };
    let good = fs::read(lora.join("adapter_model.safetensors")).unwrap();
    use ErrorCode::{AdapterMismatch, Format, Unsupported};
    let cases = [
        (golden("adapters/dora"), golden("tiny-qwen2"), AdapterMismatch),
        (golden("adapters/vera"), golden("tiny-qwen2"), AdapterMismatch),
        (lora.clone(), golden("tiny-qwen2"), AdapterMismatch),
        (with("rank", &|j| j["r"] = 16.into(), None), golden("tiny-llama"), Format),
        (with("method", &|j| j["peft_type"] = "FOURIERFT".into(), None), golden("tiny-llama"), Unsupported),
        (with("pissa", &|j| j["init_lora_weights"] = "pissa_niter_4".into(), None), golden("tiny-llama"), Unsupported),
        (with("bias", &|j| j["lora_bias"] = true.into(), None), golden("tiny-llama"), Format),
        (with("saved", &|j| j["modules_to_save"] = vec!["lm_head"].into(), None), golden("tiny-llama"), Format),
        (with("alpha", &|j| j["lora_alpha"] = "a".into(), None), golden("tiny-llama"), Format),
        (with("pattern", &|j| j["alpha_pattern"] = serde_json::json!({"(": 1}), None), golden("tiny-llama"), Format),
        (with("cut", &|_| (), Some(good[..good.len() - 1].to_vec())), golden("tiny-llama"), Format),
        (with("empty", &|_| (), Some(Vec::new())), golden("tiny-llama"), Format),
        (dir.path().join("nowhere"), golden("tiny-llama"), ErrorCode::Io),
    ];
    check_all(cases, |(adapter, base, code)| {
        let engine = open_exact(base, 1);
        match engine.attach(adapter, 1.0) {
            Ok(_) => Err(format!("{} was accepted", adapter.display())),
            Err(_) if !engine.attached().is_empty() => Err(format!("{} is half attached", adapter.display())),
            Err(e) if e.code() == *code => Ok(()),
            Err(e) => Err(format!("{}: expected {code:?}, got {:?}: {e}", adapter.display(), e.code())),
        }
    });
}

#[test]
fn flipped_bits_in_an_adapter_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let lora = golden("adapters/rslora");
    let good = fs::read(lora.join("adapter_model.safetensors")).unwrap();
    let engine = open_exact(&golden("tiny-llama"), 1);
    fs::copy(lora.join("adapter_config.json"), dir.path().join("adapter_config.json")).unwrap();
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    for bit in (0..header * 8).step_by(5) {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        fs::write(dir.path().join("adapter_model.safetensors"), bad).unwrap();
        let _ = engine.attach(dir.path(), 1.0);
        engine.detach_all();
    }
}

#[test]
fn a_diverged_run_stops_with_its_checkpoint() {
    let f = fixture();
    let engine = f.engine(1);
    let data = engine.dataset(&f.data, 1024).unwrap();
    let init = AdapterFile::open(&golden("adapters/lora")).unwrap();
    let mut broken = init.clone();
    broken.tensors.first_entry().expect("it has some").get_mut().data[0] = f32::NAN;
    let out = f.out("diverged");
    let config = TrainConfig { rank: 8, ..config() };
    let mut trainer = engine.trainer(config, data, None, Some(&broken), &out).unwrap();
    let error = trainer.run(&mut Stopper::default()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Diverged);
    assert!(error.to_string().contains("step 1"), "{error}");
    assert!(!out.join("adapter_model.safetensors").exists());
}

/// The gradient of a sample must not depend on what it is batched with.
#[test]
fn samples_in_one_batch_do_not_see_each_other() {
    let f = fixture();
    let engine = f.engine(1);
    let data = engine.dataset(&f.data, 1024).unwrap();
    let grads = |samples: Vec<pocketlora::train::Sample>| {
        let config = TrainConfig { rank: 8, batch: samples.len(), clip: 0.0, dropout: 0.0, ..config() };
        let data = Dataset { samples, ..data.clone() };
        let init = AdapterFile::open(&golden("adapters/lora")).unwrap();
        let mut trainer = engine.trainer(config, data, None, Some(&init), &f.out("g")).unwrap();
        trainer.step(&mut Stopper::default()).unwrap();
        trainer.gradients().unwrap()
    };
    let silent = |mut s: pocketlora::train::Sample| {
        s.trained = Mask::default();
        s
    };
    let (a, b) = (data.samples[0].clone(), data.samples[1].clone());
    let alone = grads(vec![a.clone()]);
    let together = grads(vec![a, silent(b)]);
    for ((name, x), (_, y)) in alone.iter().zip(&together) {
        let norm = x.iter().map(|v| v * v).sum::<f32>().sqrt();
        let off = x.iter().zip(y).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
        assert!(off <= 1e-4 * norm, "{name}: {off} of {norm}");
    }
}
