//! What goes wrong in the middle of a run, and what is refused before it begins.

use super::{Notes, config, fixture, stop_after, weights};
use crate::common::{check_all, golden};
use pocketlora::adapter::AdapterFile;
use pocketlora::train::{Dataset, Mask, Observer, StepReport, TrainConfig};
use pocketlora::{Error, ErrorCode, internals};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

const NEWEST: &str = "checkpoint.safetensors";
const PREVIOUS: &str = "checkpoint.previous.safetensors";

fn saving() -> TrainConfig {
    TrainConfig { save_every: 1, ..config() }
}

#[test]
fn a_damaged_newest_checkpoint_falls_back_to_the_one_before() {
    let f = fixture();
    let whole = f.whole(&saving());
    let out = f.out("damaged");
    f.run(&saving(), &out, false, &mut stop_after(4));
    let [newest, previous] = [NEWEST, PREVIOUS].map(|name| fs::read(out.join(name)).unwrap());
    type Damage = fn(&mut Vec<u8>);
    let cases: [(&str, Option<Damage>); 5] = [
        ("cut", Some(|bytes| bytes.truncate(bytes.len() / 2))),
        ("empty", Some(Vec::clear)),
        ("a bit of a tensor", Some(|bytes| *bytes.iter_mut().rev().nth(5000).unwrap() ^= 4)),
        (
            "a bit of the step",
            Some(|bytes| {
                let at = bytes.windows(6).position(|w| w == b"step\\\"").unwrap();
                bytes[at + 7] ^= 1;
            }),
        ),
        ("gone", None),
    ];
    check_all(cases, |(name, damage)| {
        fs::write(out.join(PREVIOUS), &previous).unwrap();
        match damage {
            // The case before ended its run.
            None => assert!(!out.join(NEWEST).exists()),
            Some(damage) => {
                let mut bytes = newest.clone();
                damage(&mut bytes);
                fs::write(out.join(NEWEST), bytes).unwrap();
            }
        }
        let mut trainer = f.trainer(saving(), &out);
        trainer.resume().map_err(|e| format!("{name}: {e}"))?;
        let (step, mut notes) = (trainer.step_number(), stop_after(5));
        trainer.run(&mut notes).unwrap();
        drop(trainer);
        if step != 3 || notes.warnings.len() != 1 || !notes.warnings[0].contains(NEWEST) {
            return Err(format!("{name}: step {step}, warnings {:?}", notes.warnings));
        }
        // What it has saved since is sound, and carries the run to the same end.
        let mut notes = Notes::default();
        f.run(&saving(), &out, true, &mut notes);
        if weights(&out) == whole && notes.warnings.is_empty() { Ok(()) } else { Err(format!("{name}: {notes:?}")) }
    });
    assert!(![NEWEST, PREVIOUS].iter().any(|name| out.join(name).exists()), "a finished run leaves no checkpoint");

    // Both damaged: an error that names the newest.
    fs::write(out.join(NEWEST), &newest[..100]).unwrap();
    fs::write(out.join(PREVIOUS), &previous[..100]).unwrap();
    let error = f.trainer(saving(), &out).resume().unwrap_err();
    assert!(error.code() == ErrorCode::Format && error.to_string().contains(NEWEST), "{error}");
}

impl std::fmt::Debug for Notes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "losses {:?}, warnings {:?}", self.losses, self.warnings)
    }
}

/// Takes the output folder away for some steps: no checkpoint can be written meanwhile.
struct Thief {
    out: PathBuf,
    notes: Notes,
}

impl Observer for Thief {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        let away = self.out.with_extension("away");
        match report.step {
            2 => fs::rename(&self.out, &away).unwrap(),
            5 => fs::rename(&away, &self.out).unwrap(),
            _ => {}
        }
        let _ = self.notes.on_step(report);
        ControlFlow::Continue(())
    }

    fn on_warning(&mut self, warning: &Error) {
        self.notes.on_warning(warning);
    }
}

#[test]
fn a_checkpoint_that_cannot_be_written_is_tried_again() {
    let f = fixture();
    let whole = f.whole(&saving());
    let out = f.out("stolen");
    let mut thief = Thief { out: out.clone(), notes: Notes::default() };
    let summary = f.trainer(saving(), &out).run(&mut thief).unwrap();
    assert!(summary.done && weights(&out) == whole);
    // Of steps 2, 3 and 4; that of step 5 could be written.
    let of = |file: &str| thief.notes.warnings.iter().filter(|w| w.contains(file)).count();
    assert_eq!((of(NEWEST), of("log.jsonl")), (3, 1), "{:?}", thief.notes.warnings);
    assert_eq!(thief.notes.warnings.len(), 4, "{:?}", thief.notes.warnings);
}

#[test]
fn half_written_files_of_killed_runs_are_swept() {
    let f = fixture();
    let out = f.out("swept");
    fs::create_dir_all(&out).unwrap();
    let stale = [
        ".checkpoint.safetensors.tmp-a1b2c3",
        ".adapter_model.safetensors.tmp-d4e5f6",
        ".loss.svg.tmp-a7b8c9",
        ".train.toml.tmp-a7b8c9",
    ];
    stale.iter().for_each(|name| fs::write(out.join(name), "half").unwrap());
    fs::write(out.join("notes.txt"), "mine").unwrap();
    drop(f.trainer(config(), &out));
    let left: Vec<_> = fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["notes.txt"]);
}

/// An alpha that no arithmetic survives: the second step, the first with a B that is not zero, has no finite loss.
#[test]
fn a_run_that_diverges_says_where_and_keeps_its_last_checkpoint() {
    let f = fixture();
    let out = f.out("diverged");
    let config = TrainConfig { alpha: Some(1e30), batch: 1, accumulate: 2, dropout: 0.0, ..saving() };
    let mut trainer = f.trainer(config.clone(), &out);
    let error = trainer.run(&mut Notes::default()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Diverged);
    let text = error.to_string();
    assert!(text.starts_with("step 2, samples ") && text.contains("last checkpoint"), "{text}");
    drop(trainer);
    assert!(!AdapterFile::exists(&out));
    let mut trainer = f.trainer(config, &out);
    trainer.resume().unwrap();
    assert_eq!(trainer.step_number(), 1);
}

#[test]
fn unusable_settings_and_data_are_refused_before_the_first_step() {
    let f = fixture();
    let engine = f.engine();
    let data = engine.dataset(&f.data, 1024).unwrap();
    let vocabulary = u32::try_from(internals::base(&engine).model.config().vocab_size).unwrap();
    let mut strange = data.clone();
    strange.samples[4].ids[3] = vocabulary;
    let mut silent = data.clone();
    silent.samples.iter_mut().for_each(|s| s.trained = Mask::default());
    let with = |change: fn(&mut TrainConfig)| {
        let mut config = config();
        change(&mut config);
        config
    };
    use ErrorCode::{Config, Data};
    let cases: Vec<(TrainConfig, Dataset, Option<Dataset>, ErrorCode, &str)> = vec![
        (with(|c| c.lr = 0.0), data.clone(), None, Config, "`lr`"),
        (with(|c| c.lr = 1e9), data.clone(), None, Config, "`lr`"),
        (with(|c| c.warmup = -1.0), data.clone(), None, Config, "`warmup`"),
        (with(|c| c.lr = f32::NAN), data.clone(), None, Config, "`lr`"),
        (with(|c| c.patience = 2), data.clone(), Some(data.clone()), Config, "`patience`"),
        (with(|c| (c.patience, c.eval_every) = (2, 1)), data.clone(), None, Config, "`patience`"),
        (with(|c| (c.keep_best, c.eval_every) = (true, 1)), data.clone(), None, Config, "`keep-best`"),
        (config(), strange.clone(), None, Data, "sample 5: token 3"),
        (config(), data.clone(), Some(strange), Data, "sample 5: token 3"),
        (config(), silent.clone(), None, Data, "at least one token to learn"),
        (config(), data.clone(), Some(silent), Data, "at least one token to learn"),
    ];
    check_all(cases, |(config, data, eval_data, code, what)| {
        let out = f.out("refused");
        match engine.trainer(config.clone(), data.clone(), eval_data.clone(), None, &out) {
            Ok(_) => Err(format!("{what}: accepted")),
            Err(e) if e.code() == *code && e.to_string().contains(what) && !out.exists() => Ok(()),
            Err(e) => Err(format!("{what}: {e}")),
        }
    });
}

/// A run goes on where there is less memory, or more, to the same bytes where nothing has to be given up for it; but not
/// with moments in 8 bits instead of those that it has.
#[test]
fn a_resume_may_have_another_memory_budget() {
    let f = fixture();
    let whole = f.whole(&config());
    // Only what fits beside all that this process's other tests may hold at the time gives nothing up.
    let budgets = [None, Some(100_000), Some(90_000)].map(|memory_budget| TrainConfig { memory_budget, ..config() });
    let out = f.out("budgets");
    f.run(&budgets[1], &out, false, &mut stop_after(2));
    f.run(&budgets[2], &out, true, &mut stop_after(4));
    assert!(f.run(&budgets[0], &out, true, &mut Notes::default()).done);
    assert_eq!(weights(&out), whole);

    let out = f.out("moments");
    let eight = TrainConfig { optimizer: pocketlora::train::Optimizer::AdamW8bit, ..config() };
    f.run(&eight, &out, false, &mut stop_after(2));
    let error = f.trainer(budgets[1].clone(), &out).resume().unwrap_err();
    assert!(
        error.code() == ErrorCode::Config && error.to_string().contains("`optimizer` was \"adamw8bit\""),
        "{error}"
    );
}

/// A resume lists all that differs, not the first thing only.
#[test]
fn a_resume_lists_every_difference() {
    let f = fixture();
    let out = f.out("changed");
    f.run(&config(), &out, false, &mut stop_after(2));
    let refused = |config: TrainConfig, init: Option<&Path>| {
        let engine = f.engine();
        let data = engine.dataset(&f.data, 1024).unwrap();
        let init = init.map(|dir| AdapterFile::open(dir).unwrap());
        let mut trainer = engine.trainer(config, data, None, init.as_ref(), &out).unwrap();
        let error = trainer.resume().unwrap_err();
        assert_eq!(error.code(), ErrorCode::Config, "{error}");
        error.to_string()
    };
    let both = refused(TrainConfig { lr: 1e-3, optimizer: pocketlora::train::Optimizer::Lion, ..config() }, None);
    assert!(both.contains("`lr` was 0.003") && both.contains("`optimizer` was \"adamw\", is \"lion\""), "{both}");
    let rank = refused(TrainConfig { rank: 2, ..config() }, None);
    assert!(rank.contains("`rank` was 4, is 2"), "{rank}");
    let init = refused(TrainConfig { rank: 8, ..config() }, Some(&golden("adapters/lora")));
    assert!(init.contains("`rank` was 4, is 8") && init.contains("the initial adapter changed"), "{init}");
    // When it saves is nobody's business but the run's own.
    let engine = f.engine();
    let data = engine.dataset(&f.data, 1024).unwrap();
    let config = TrainConfig { save_every: 7, save_seconds: 0, ..config() };
    engine.trainer(config, data, None, None, &out).unwrap().resume().unwrap();
}
