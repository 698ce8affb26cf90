//! What a run tells about itself: losses before and after, what it forgets, and the files beside the adapter.

use crate::common::tiny_training;
use pocketlora::adapter::AdapterFile;
use pocketlora::train::{Check, LogLine, Observer, StepReport, Summary, TrainConfig};
use pocketlora::{Engine, ErrorCode, Options};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Stops after a step, if told to.
struct Stopper(Option<u64>);

impl Observer for Stopper {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        if self.0 == Some(report.step) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// Stops when the check after a step is at something.
struct Impatient {
    step: u64,
    at: (u64, Check),
    stopped: bool,
}

impl Observer for Impatient {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        self.step = report.step;
        ControlFlow::Continue(())
    }

    fn on_checking(&mut self, what: Check, _: usize, _: usize) {
        self.stopped |= (self.step, what) == self.at;
    }

    fn keep_going(&mut self) -> bool {
        !self.stopped
    }
}

struct Fixture {
    dir: tempfile::TempDir,
    engine: Engine,
    data: PathBuf,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = tiny_training(dir.path(), 20);
    let engine = Engine::open(&model, &Options::new().threads(1)).unwrap();
    Fixture { dir, engine, data }
}

fn config() -> TrainConfig {
    TrainConfig {
        rank: 4,
        lr: 1e-2,
        steps: Some(12),
        batch: 2,
        eval_split: Some(0.25),
        eval_every: 3,
        save_every: 4,
        ..TrainConfig::default()
    }
}

impl Fixture {
    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn train(&self, config: &TrainConfig, out: &Path, stop: Option<u64>, resume: bool) -> Summary {
        let data = self.engine.dataset(&self.data, 1024).unwrap();
        let mut trainer = self.engine.trainer(config.clone(), data, None, None, out).unwrap();
        if resume {
            trainer.resume().unwrap();
        }
        trainer.run(&mut Stopper(stop)).unwrap()
    }
}

/// The log without times, which no two runs share.
fn log(out: &Path) -> Vec<LogLine> {
    let text = fs::read_to_string(out.join("log.jsonl")).unwrap();
    text.lines().map(|l| LogLine { seconds: None, ..serde_json::from_str(l).unwrap() }).collect()
}

#[test]
fn the_folder_tells_the_course_of_the_run() {
    let f = fixture();
    let out = f.out("whole");
    let summary = f.train(&config(), &out, None, false);
    let log = log(&out);
    assert_eq!(log.iter().map(|l| l.step).collect::<Vec<_>>(), (0..=12).collect::<Vec<_>>());
    for line in &log {
        assert_eq!(line.loss.is_some(), line.step > 0, "{line:?}");
        assert_eq!(line.eval_loss.is_some(), line.step % 3 == 0, "{line:?}");
        assert_eq!(line.general_loss.is_some(), line.step % 3 == 0, "{line:?}");
    }
    let before = summary.before.unwrap();
    assert_eq!((before.held_out, before.general), (log[0].eval_loss, log[0].general_loss));
    assert_eq!((summary.eval_loss, summary.general_loss), (log[12].eval_loss, log[12].general_loss));
    assert!(summary.eval_loss < before.held_out, "{before:?} {summary:?}");

    let settings: TrainConfig = toml::from_str(&fs::read_to_string(out.join("train.toml")).unwrap()).unwrap();
    assert_eq!(settings, config());
    let picture = fs::read_to_string(out.join("loss.svg")).unwrap();
    assert!(picture.starts_with("<svg") && picture.contains("held-out"), "{}", &picture[..200]);
    AdapterFile::open(&out).unwrap();
}

#[test]
fn a_check_that_was_stopped_has_no_figures() {
    let f = fixture();
    let stopped_at = |name: &str, at| {
        let data = f.engine.dataset(&f.data, 1024).unwrap();
        let config = TrainConfig { eval_every: 0, ..config() };
        let mut trainer = f.engine.trainer(config, data, None, None, &f.out(name)).unwrap();
        trainer.run(&mut Impatient { step: 0, at, stopped: false }).unwrap()
    };
    // The observer hears of the last step after its check.
    let end = stopped_at("end", (11, Check::HeldOut));
    assert!(end.done && end.before.unwrap().held_out.is_some(), "{end:?}");
    assert_eq!((end.eval_loss, end.general_loss, end.of_adapter().held_out), (None, None, None));
    assert_eq!(end.unmeasured(), ["loss on the held-out data", "loss on the general text"]);

    let start = stopped_at("start", (0, Check::GeneralText));
    assert_eq!((start.done, start.steps, start.before, start.eval_loss), (false, 0, None, None));
    // What was measured before the first step is not what holds at the end.
    let out = f.out("first");
    let first = f.train(&TrainConfig { eval_every: 0, ..config() }, &out, Some(1), false);
    assert_eq!((first.steps, first.eval_loss, first.general_loss), (1, None, None));
    assert!(first.before.unwrap().held_out.is_some() && first.unmeasured().is_empty());
}

#[test]
fn a_resumed_run_has_the_log_of_an_undisturbed_one() {
    let f = fixture();
    let whole = f.out("whole");
    f.train(&config(), &whole, None, false);
    // Step 7 lies after a checkpoint, step 6 has an evaluation.
    for stop in [1, 6, 7] {
        let out = f.out(&format!("stopped after {stop}"));
        assert!(!f.train(&config(), &out, Some(stop), false).done);
        // As if the process had been killed later, with no checkpoint of its last steps.
        let text = fs::read_to_string(out.join("log.jsonl")).unwrap();
        let later = serde_json::to_string(&LogLine { step: stop + 1, loss: Some(9.0), ..LogLine::default() }).unwrap();
        fs::write(out.join("log.jsonl"), format!("{text}{later}\n{{\"step\":")).unwrap();
        assert!(f.train(&config(), &out, None, true).done);
        assert_eq!(log(&out), log(&whole), "stopped after step {stop}");
        let weights = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
        assert_eq!(weights(&out), weights(&whole), "stopped after step {stop}");
    }
}

#[test]
fn the_last_adapter_within_the_bound_on_forgetting_is_kept() {
    let f = fixture();
    // A random model learns something about text from any text, but not from this.
    let odd = |i: usize| format!("{{\"prompt\":\"{i}\",\"completion\":\"{}\"}}\n", "~".repeat(20 + i));
    fs::write(&f.data, (0..20).map(odd).collect::<String>()).unwrap();
    let free = f.out("free");
    let config = TrainConfig { lr: 4e-2, ..config() };
    f.train(&config, &free, None, false);
    let found: Vec<(u64, f64)> = log(&free).iter().filter_map(|l| Some((l.step, l.general_loss?))).collect();
    let rises: Vec<(u64, f64)> = found.iter().map(|(step, loss)| (*step, loss - found[0].1)).collect();
    let highest = rises.iter().map(|r| r.1).fold(0.0, f64::max);
    assert!(rises[1..].iter().all(|r| r.1 > 0.0), "who learns this forgets all else: {rises:?}");
    // Nothing but the beginning passes, some pass, all do.
    for bound in [0.0, highest * 0.5, highest] {
        let out = f.out(&format!("bound {bound}"));
        let limited = TrainConfig { max_forgetting: Some(bound.into()), ..config.clone() };
        let summary = f.train(&limited, &out, Some(7), false);
        assert!(!summary.done);
        let summary = f.train(&limited, &out, None, true);
        let expected = rises.iter().rfind(|(_, rise)| *rise <= bound).unwrap().0;
        assert_eq!(summary.adapter_step, expected, "bound {bound} of {rises:?}");
        // Its own losses, not those of the last step, which are reported beside it.
        let [own, last] = [expected, 12].map(|step| log(&out).into_iter().find(|l| l.step == step).unwrap());
        let found = summary.of_adapter();
        assert_eq!((found.held_out, found.general), (own.eval_loss, own.general_loss), "bound {bound}");
        assert_eq!((summary.eval_loss, summary.general_loss), (last.eval_loss, last.general_loss), "bound {bound}");
        let kept = AdapterFile::open(&out).unwrap();
        let still = kept
            .tensors
            .iter()
            .filter(|(name, _)| name.ends_with("lora_B.weight"))
            .all(|(_, t)| t.data.iter().all(|&b| b == 0.0));
        assert_eq!(still, expected == 0, "bound {bound}: step 0 has changed nothing yet");
        assert!(!out.join("best").exists(), "bound {bound}");
    }
}

#[test]
fn a_log_that_cannot_be_written_costs_a_warning_and_not_the_run() {
    struct Warned(Vec<String>);
    impl Observer for Warned {
        fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
            ControlFlow::Continue(())
        }

        fn on_warning(&mut self, warning: &pocketlora::Error) {
            assert_eq!(warning.code(), ErrorCode::Io);
            self.0.push(warning.to_string());
        }
    }
    let f = fixture();
    let out = f.out("occupied");
    fs::create_dir_all(out.join("log.jsonl")).unwrap();
    let data = f.engine.dataset(&f.data, 1024).unwrap();
    let mut trainer = f.engine.trainer(config(), data, None, None, &out).unwrap();
    let mut observer = Warned(Vec::new());
    assert!(trainer.run(&mut observer).unwrap().done);
    assert!(observer.0.len() == 1 && observer.0[0].contains("log.jsonl"), "{:?}", observer.0);
    AdapterFile::open(&out).unwrap();
}
