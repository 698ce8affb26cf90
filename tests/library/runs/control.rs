//! Runs steered from outside, and generating beside them.

use super::{Fixture, Notes, config, fixture, weights};
use crate::common::complete;
use pocketlora::adapter::AdapterFile;
use pocketlora::train::{Directive, Observer, StepReport, TrainConfig};
use pocketlora::{Engine, Error, ErrorCode};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Long enough for a machine that does other things, too.
const PATIENCE: Duration = Duration::from_secs(20);

/// Counts steps where other threads see it.
#[derive(Clone, Default)]
struct Counter(Arc<AtomicU64>);

impl Counter {
    fn wait_for(&self, step: u64) {
        let start = Instant::now();
        while self.0.load(Ordering::SeqCst) < step {
            assert!(start.elapsed() < PATIENCE, "no step {step}");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Observer for Counter {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        self.0.store(report.step, Ordering::SeqCst);
        ControlFlow::Continue(())
    }
}

fn long() -> TrainConfig {
    TrainConfig { steps: Some(60), ..config() }
}

#[test]
fn a_paused_run_stands_still_and_ends_in_the_same_bytes() {
    let f = fixture();
    let whole = f.whole(&long());
    let out = f.out("paused");
    let mut trainer = f.trainer(long(), &out);
    let (handle, counter) = (trainer.handle(), Counter::default());
    let mut watcher = counter.clone();
    handle.pause();
    let run = thread::spawn(move || trainer.run(&mut watcher).unwrap());
    for step in [0, 3, 8] {
        handle.resume();
        counter.wait_for(step);
        handle.pause();
        assert!(handle.wait_paused(PATIENCE), "not paused after step {step}");
        let before = counter.0.load(Ordering::SeqCst);
        thread::sleep(Duration::from_millis(60));
        assert!(handle.is_paused());
        assert_eq!(counter.0.load(Ordering::SeqCst), before, "a paused run went on");
    }
    handle.resume();
    let summary = run.join().unwrap();
    assert!(summary.done && !handle.is_paused());
    assert!(weights(&out) == whole);
}

#[test]
fn a_cancelled_run_leaves_a_checkpoint_and_can_go_on() {
    let f = fixture();
    let whole = f.whole(&long());
    let out = f.out("cancelled");
    let mut trainer = f.trainer(long(), &out);
    let (handle, counter) = (trainer.handle(), Counter::default());
    let mut watcher = counter.clone();
    let run = thread::spawn(move || {
        let summary = trainer.run(&mut watcher).unwrap();
        (trainer, summary)
    });
    counter.wait_for(2);
    // A pause must not hide the wish to stop.
    handle.pause();
    assert!(handle.wait_paused(PATIENCE));
    handle.cancel();
    let (mut trainer, summary) = run.join().unwrap();
    assert!(!summary.done && summary.steps >= 2 && out.join("checkpoint.safetensors").exists());
    assert!(!trainer.run(&mut Counter::default()).unwrap().done, "a stop holds until it is taken back");
    handle.resume();
    assert!(trainer.run(&mut Counter::default()).unwrap().done);
    assert!(weights(&out) == whole);
}

#[test]
fn the_hosts_policy_is_asked_between_layers() {
    let f = fixture();
    let whole = f.whole(&config());
    let out = f.out("policy");
    let mut trainer = f.trainer(config(), &out);
    let asked = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&asked);
    trainer.set_policy(Box::new(move || match count.fetch_add(1, Ordering::SeqCst) {
        10..=12 | 30 => Directive::Pause,
        50 => Directive::Stop,
        _ => Directive::Run,
    }));
    let summary = trainer.run(&mut Notes::default()).unwrap();
    let so_far = asked.load(Ordering::SeqCst);
    assert!(!summary.done && so_far == 51, "{so_far} questions");
    assert!(summary.steps > 0, "two layers and some steps within 50 questions");
    assert!(trainer.run(&mut Notes::default()).unwrap().done);
    assert!(weights(&out) == whole);
}

fn answer(engine: &Engine, adapter: &AdapterFile) -> String {
    engine.detach_all();
    engine.attach_file(adapter.clone(), 1.0).unwrap();
    complete(engine, "what is number 3?", 24).text
}

/// Chat while training: the same base, mapped once, serves both.
#[test]
fn snapshots_answer_as_the_saved_adapter_would() {
    let f = fixture();
    let config = TrainConfig { lr: 2e-2, ..long() };
    let whole = f.whole(&config);
    let engine = f.engine();
    let data = engine.dataset(&f.data, 1024).unwrap();
    let out = f.out("beside");
    let mut trainer = engine.trainer(config.clone(), data, None, None, &out).unwrap();
    let handle = trainer.handle();
    assert_eq!(handle.snapshot().unwrap_err().code(), ErrorCode::Config, "nobody is at work to serve it");
    let untrained = answer(&engine, &trainer.snapshot().unwrap());

    let counter = Counter::default();
    let mut watcher = counter.clone();
    let run = thread::spawn(move || {
        let summary = trainer.run(&mut watcher).unwrap();
        (trainer, summary)
    });
    // While it works.
    counter.wait_for(5);
    let early = handle.snapshot().unwrap();
    answer(&engine, &early);
    // While it is paused: the snapshot is that of the last whole step.
    counter.wait_for(30);
    handle.pause();
    assert!(handle.wait_paused(PATIENCE));
    let (step, paused) = (counter.0.load(Ordering::SeqCst), handle.snapshot().unwrap());
    let beside = answer(&engine, &paused);
    assert_eq!(saved_answer(&f, &config, step), beside, "step {step}");
    assert_ne!(beside, untrained);
    handle.resume();
    let (trainer, summary) = run.join().unwrap();
    assert!(summary.done && weights(&out) == whole, "generating must not change what is learned");
    let last = answer(&engine, &trainer.snapshot().unwrap());
    engine.detach_all();
    engine.attach(&out, 1.0).unwrap();
    assert_eq!(complete(&engine, "what is number 3?", 24).text, last);
}

/// The answer of the adapter that a run up to `step` writes, read back from its files in an engine of its own.
fn saved_answer(f: &Fixture, config: &TrainConfig, step: u64) -> String {
    let out = f.out("saved");
    let mut trainer = f.trainer(config.clone(), &out);
    trainer.run(&mut super::stop_after(step)).unwrap();
    trainer.save_adapter().unwrap();
    answer(&f.engine(), &AdapterFile::open(&out).unwrap())
}

#[test]
fn a_folder_has_one_trainer_at_a_time() {
    let f = fixture();
    let out = f.out("shared");
    let first = f.trainer(config(), &out);
    let engine = f.engine();
    let data = engine.dataset(&f.data, 1024).unwrap();
    let second = || -> Result<(), Error> { engine.trainer(config(), data.clone(), None, None, &out).map(|_| ()) };
    let error = second().unwrap_err();
    assert_eq!(error.code(), ErrorCode::Config);
    assert!(error.to_string().contains("shared") && error.to_string().contains("another trainer"), "{error}");
    drop(first);
    second().unwrap();
}
