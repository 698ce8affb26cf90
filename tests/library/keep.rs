//! A run that is held to what the model knew: it stays nearer to the base, and everything else about runs stays true.

use crate::common::{logits, tiny_training};
use pocketlora::adapter::AdapterFile;
use pocketlora::train::{Forgetting, Keep, LogLine, Observer, StepReport, Summary, TrainConfig};
use pocketlora::{Engine, Error, ErrorCode, Options, Precision, Trainer};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

#[derive(Default)]
struct Notes {
    stop_after: Option<u64>,
    /// Not even the first layer may run.
    refuses: bool,
    first_loss: Option<f64>,
    held: Vec<f64>,
    prepared: Vec<(usize, usize)>,
    warnings: Vec<String>,
}

impl Observer for Notes {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        self.first_loss.get_or_insert(report.loss);
        self.held.extend(report.held_loss);
        if self.stop_after == Some(report.step) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn keep_going(&mut self) -> bool {
        !self.refuses
    }

    fn on_preparing(&mut self, done: usize, prompts: usize) {
        self.prepared.push((done, prompts));
    }

    fn on_warning(&mut self, warning: &Error) {
        self.warnings.push(warning.to_string());
    }
}

struct Fixture {
    dir: tempfile::TempDir,
    model: PathBuf,
    data: PathBuf,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = tiny_training(dir.path(), 8);
    Fixture { dir, model, data }
}

fn config(keep: Keep) -> TrainConfig {
    TrainConfig { rank: 4, lr: 1e-2, steps: Some(30), batch: 4, seed: 5, keep, ..TrainConfig::default() }
}

impl Fixture {
    fn engine(&self) -> Engine {
        Engine::open(&self.model, &Options::new().threads(1).precision(Precision::Exact)).unwrap()
    }

    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn trainer(&self, config: &TrainConfig, out: &Path) -> Trainer {
        let engine = self.engine();
        let data = engine.dataset(&self.data, config.seq).unwrap();
        engine.trainer(config.clone(), data, None, None, out).unwrap()
    }

    fn run(&self, config: &TrainConfig, out: &Path, mut notes: Notes) -> (Summary, Notes) {
        let summary = self.trainer(config, out).run(&mut notes).unwrap();
        (summary, notes)
    }
}

fn weights(out: &Path) -> Vec<u8> {
    fs::read(out.join("adapter_model.safetensors")).unwrap()
}

/// Texts that no run has seen.
const UNSEEN: [&str; 3] = ["Which way is north?", "Tell me about rain.", "How are you today?"];

/// Mean divergence of the adapter in `out` from the model as it was, with `before` or without an adapter, at the beginnings
/// of the answers to some questions.
fn divergence(f: &Fixture, before: Option<&Path>, out: &Path, questions: &[&str]) -> f64 {
    let (base, adapted) = (f.engine(), f.engine());
    before.map(|before| base.attach(before, 1.0).unwrap());
    adapted.attach(out, 1.0).unwrap();
    let vocab = base.vocabulary();
    let (mut sum, mut places) = (0.0, 0);
    for question in questions {
        let ids = base.chat().unwrap().prompt_of(&[pocketlora::Message::new("user", *question)]).unwrap();
        let [p, q] = [&base, &adapted].map(|engine| logits(engine, &ids));
        // Where the answer begins.
        if let (Some(p), Some(q)) = (p.chunks(vocab).next_back(), q.chunks(vocab).next_back()) {
            let log_softmax = |x: &[f32]| {
                let sum: f64 = x.iter().map(|x| f64::from(*x).exp()).sum();
                x.iter().map(|x| f64::from(*x) - sum.ln()).collect::<Vec<f64>>()
            };
            let (p, q) = (log_softmax(p), log_softmax(q));
            sum += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            places += 1;
        }
    }
    sum / f64::from(places)
}

#[test]
fn a_held_model_stays_nearer_to_the_base_and_learns_the_same() {
    let f = fixture();
    let [free, held] = [("free", Keep::Off), ("held", Keep::Weight(4.0))].map(|(name, keep)| {
        let (summary, notes) = f.run(&config(keep), &f.out(name), Notes::default());
        assert!(notes.warnings.is_empty(), "{:?}", notes.warnings);
        assert!(
            summary.loss < notes.first_loss.unwrap() - 1.0,
            "{name}: {} after {:?}",
            summary.loss,
            notes.first_loss
        );
        (divergence(&f, None, &f.out(name), &UNSEEN), notes)
    });
    assert!(held.0 < 0.7 * free.0, "{} held, {} free", held.0, free.0);
    // What is held begins where the base is, and the run tells how far it goes.
    assert!(free.1.held.is_empty() && free.1.prepared.is_empty());
    assert!(held.1.held.len() > 3 && held.1.held[0].abs() < 1e-2, "{:?}", held.1.held);
    let (done, prompts) = *held.1.prepared.last().unwrap();
    assert!(done == prompts && prompts > 1, "{:?}", held.1.prepared);
}

#[test]
fn a_held_run_goes_on_in_the_same_bytes_wherever_it_was_stopped() {
    let f = fixture();
    let config = TrainConfig { dropout: 0.1, steps: Some(9), ..config(Keep::Auto) };
    f.run(&config, &f.out("whole"), Notes::default());
    let whole = weights(&f.out("whole"));
    assert!(!f.out("whole").join("keep.safetensors").exists(), "a run that is over needs no answers");
    for (name, stop, forget) in [("kept", Some(4), false), ("forgotten", Some(4), true), ("at once", None, false)] {
        let out = f.out(name);
        let notes = Notes { stop_after: stop, refuses: stop.is_none(), ..Notes::default() };
        let (stopped, _) = f.run(&config, &out, notes);
        assert!(!stopped.done && stopped.steps == stop.unwrap_or(0), "{name}: {stopped:?}");
        assert_eq!(out.join("keep.safetensors").exists(), stop.is_some(), "{name}");
        if forget {
            fs::remove_file(out.join("keep.safetensors")).unwrap();
        }
        let (mut trainer, mut notes) = (f.trainer(&config, &out), Notes::default());
        trainer.resume().unwrap();
        assert!(trainer.run(&mut notes).unwrap().done, "{name}");
        assert_eq!(notes.prepared.is_empty(), stop.is_some() && !forget, "{name}: asked again");
        assert!(weights(&out) == whole, "{name}: other bytes");
    }
    // Another seed holds other prompts in other steps, and a run that is not held is another one.
    f.run(&TrainConfig { keep: Keep::Off, ..config.clone() }, &f.out("off"), Notes::default());
    assert!(weights(&f.out("off")) != whole);
    let (stopped, out) = (Notes { stop_after: Some(2), ..Notes::default() }, f.out("changed"));
    f.run(&config, &out, stopped);
    let error = f.trainer(&TrainConfig { keep: Keep::Weight(3.0), ..config }, &out).resume().unwrap_err();
    assert!(error.to_string().contains("`keep`"), "{error}");
}

#[test]
fn prompts_that_have_no_room_are_left_out_and_counted() {
    let f = fixture();
    let report = |seq| f.trainer(&TrainConfig { seq, ..config(Keep::Auto) }, &f.out("report")).keep_report();
    let (all, few) = (report(1024).unwrap(), report(120).unwrap());
    assert!(few.left_out > all.left_out && few.prompts > 0, "{all:?} {few:?}");
    assert_eq!(report(48), None, "bytes are tokens here: no prompt is so short");
    // A run without any goes on as if it had not been asked for.
    let mut trainer = f.trainer(&TrainConfig { seq: 48, steps: Some(2), ..config(Keep::Auto) }, &f.out("none"));
    assert!(trainer.run(&mut Notes::default()).unwrap().done);
}

#[test]
fn questions_are_asked_before_and_after_and_can_bound_a_run() {
    let f = fixture();
    let bound = Some(Forgetting::Percent(5.0));
    let config = TrainConfig { check: true, max_forgetting: bound, eval_every: 1, steps: Some(2), ..config(Keep::Off) };
    let out = f.out("asked");
    let (summary, _) = f.run(&config, &out, Notes::default());
    // Noise knows nothing, so it loses nothing; some questions are longer than its context.
    assert!(summary.asked > 10 && summary.adapter_step == 2, "{summary:?}");
    let known = [summary.before.unwrap().known, summary.known, summary.of_adapter().known];
    assert!(known.iter().all(|known| known.is_some_and(|known| known.count() < 5)), "{known:?}");
    let log = fs::read_to_string(out.join("log.jsonl")).unwrap();
    let lines: Vec<LogLine> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() == 3 && lines.iter().all(|line| line.known.is_some() && line.general_loss.is_some()), "{log}");

    // Without a template for chats a model cannot be asked.
    let settings = f.model.join("tokenizer_config.json");
    fs::write(&settings, r#"{"eos_token": "<|im_end|>"}"#).unwrap();
    let engine = f.engine();
    let trainer = |config: &TrainConfig| {
        let texts = f.dir.path().join("texts.jsonl");
        fs::write(&texts, "{\"text\": \"a text to learn\"}\n").unwrap();
        engine.trainer(config.clone(), engine.dataset(&texts, 64)?, None, None, &f.out("base"))
    };
    let error = trainer(&config).map(|_| ()).unwrap_err();
    assert_eq!((error.code(), error.place()), (ErrorCode::Config, "setting `max-forgetting`"), "{error}");
    let held = TrainConfig { max_forgetting: None, keep: Keep::Auto, eval_every: 0, ..config };
    let mut plain = trainer(&held).unwrap();
    assert_eq!(plain.questions(), 0);
    let summary = plain.run(&mut Notes::default()).unwrap();
    assert!(summary.done && summary.known.is_none() && summary.general_loss.is_some(), "{summary:?}");
}

#[test]
fn a_second_lesson_keeps_the_first() {
    let f = fixture();
    let first = f.out("first");
    f.run(&config(Keep::Auto), &first, Notes::default());
    let engine = f.engine();
    let texts = f.dir.path().join("second.jsonl");
    let line = |i: usize| {
        let messages = serde_json::json!([
            {"role": "user", "content": format!("SECOND {i}!")},
            {"role": "assistant", "content": format!("{i}{i}{i} AND MORE")},
        ]);
        format!("{}\n", serde_json::json!({ "messages": messages }))
    };
    fs::write(&texts, (0..8).map(line).collect::<String>()).unwrap();
    let data = engine.dataset(&texts, 1024).unwrap();
    let init = AdapterFile::open(&first).unwrap();
    let second = |keep, name: &str| {
        let (out, mut notes) = (f.out(name), Notes::default());
        let mut trainer = engine.trainer(config(keep), data.clone(), None, Some(&init), &out).unwrap();
        let report = trainer.keep_report();
        let summary = trainer.run(&mut notes).unwrap();
        assert!(
            summary.loss < notes.first_loss.unwrap() - 0.5,
            "{name}: {} after {:?}",
            summary.loss,
            notes.first_loss
        );
        (divergence(&f, Some(&first), &out, &["what is number 3?", "what is number 6?"]), report)
    };
    let (free, held) = (second(Keep::Off, "free"), second(Keep::Weight(2.0), "held"));
    assert!(free.1.is_none() && held.1.is_some_and(|report| report.taught == 8), "{:?}", held.1);
    assert!(held.0 < 0.7 * free.0, "{} held, {} free", held.0, free.0);
    // What lies beside the adapter then is both lessons, for a third.
    let third = engine.trainer(
        config(Keep::Auto),
        data.clone(),
        None,
        Some(&AdapterFile::open(&f.out("held")).unwrap()),
        &f.out("third"),
    );
    assert_eq!(third.unwrap().keep_report().unwrap().taught, 16);
    assert!(!f.out("free").join("lessons.json").exists());
}
