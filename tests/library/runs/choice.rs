//! Which adapter is written: the last one or the best one, and when a run ends early. Training on from PEFT's adapters.

use super::{Fixture, Notes, config, fixture, same, stop_after, weights};
use crate::common::golden;
use pocketlora::adapter::{AdapterFile, Lora, Method, Stored};
use pocketlora::train::{Summary, TrainConfig};
use pocketlora::{Trainer, internals};
use std::fs;
use std::path::Path;

/// A run that gets better at first and worse after: what is held out answers otherwise than what is learned.
fn overfitting(f: &Fixture, change: impl Fn(&mut TrainConfig), out: &Path) -> Trainer {
    let held_out = f.out("held-out.jsonl");
    let learned = fs::read_to_string(&f.data).unwrap();
    fs::write(&held_out, learned.replace("it is", "I say it is not")).unwrap();
    let engine = f.engine();
    let data = engine.dataset(&f.data, 1024).unwrap();
    let eval_data = engine.dataset(&held_out, 1024).unwrap();
    let mut config = TrainConfig { lr: 2e-2, epochs: 10, eval_every: 2, save_every: 3, dropout: 0.0, ..config() };
    change(&mut config);
    engine.trainer(config, data, Some(eval_data), None, out).unwrap()
}

fn lowest(notes: &Notes) -> u64 {
    notes.evaluations.iter().fold((0, f64::INFINITY), |best, e| if e.1 < best.1 { *e } else { best }).0
}

/// The adapter after `step`.
fn adapter_at(f: &Fixture, change: impl Fn(&mut TrainConfig), step: u64) -> AdapterFile {
    let mut trainer = overfitting(f, change, &f.out("until"));
    trainer.replace_earlier();
    trainer.run(&mut stop_after(step)).unwrap();
    trainer.snapshot().unwrap()
}

#[test]
fn the_best_adapter_is_written_and_patience_ends_the_run() {
    let f = fixture();
    type Change = fn(&mut TrainConfig);
    let cases: [(&str, Change); 3] = [
        ("best", |c| c.keep_best = true),
        ("patient", |c| c.patience = 3),
        ("both", |c| (c.keep_best, c.patience) = (true, 3)),
    ];
    for (name, change) in cases {
        let (out, mut notes) = (f.out(name), Notes::default());
        let summary: Summary = overfitting(&f, change, &out).run(&mut notes).unwrap();
        let (best, last) = (lowest(&notes), notes.evaluations.last().unwrap().0);
        assert!(best > 2 && best < last, "{name}: the case is made wrong: {:?}", notes.evaluations);
        let patient = name != "best";
        assert_eq!(summary.out_of_patience, patient, "{name}");
        assert_eq!(summary.steps, if patient { best + 3 * 2 } else { 30 }, "{name}: {:?}", notes.evaluations);
        let chosen = if name == "patient" { summary.steps } else { best };
        assert_eq!((summary.done, summary.adapter_step), (true, chosen), "{name}");
        assert!(same(&AdapterFile::open(&out).unwrap(), &adapter_at(&f, change, chosen)), "{name}");
        assert!(!out.join("best").exists(), "{name}: what was kept meanwhile must go");

        // Stopped before and after the best step, in between two checkpoints.
        for stop in [best - 1, best + 1] {
            let resumed = f.out(&format!("{name}-{stop}"));
            assert!(!overfitting(&f, change, &resumed).run(&mut stop_after(stop)).unwrap().done);
            let mut trainer = overfitting(&f, change, &resumed);
            trainer.resume().unwrap();
            let again = trainer.run(&mut Notes::default()).unwrap();
            assert_eq!((again.steps, again.adapter_step), (summary.steps, summary.adapter_step), "{name}, {stop}");
            assert!(weights(&resumed) == weights(&out), "{name}, stopped after {stop}");
        }
    }
}

/// A kept candidate that somebody deleted is found missing when the run resumes, not at its end.
#[test]
fn a_lost_candidate_is_told() {
    let f = fixture();
    let change = |c: &mut TrainConfig| c.keep_best = true;
    let out = f.out("lost");
    overfitting(&f, change, &out).run(&mut stop_after(5)).unwrap();
    fs::remove_dir_all(out.join("best")).unwrap();
    let mut trainer = overfitting(&f, change, &out);
    trainer.resume().unwrap();
    let mut notes = Notes::default();
    assert!(trainer.run(&mut notes).unwrap().done);
    assert!(notes.warnings.len() == 1 && notes.warnings[0].contains("best"), "{:?}", notes.warnings);
    AdapterFile::open(&out).unwrap();
}

fn lora(file: &AdapterFile) -> &Lora {
    match &file.method {
        Method::Lora(lora) => lora,
        other => panic!("{other:?}"),
    }
}

/// Ranks, alphas and their exceptions of an adapter from PEFT stay what they were.
#[test]
fn training_on_keeps_the_shape_of_a_peft_adapter() {
    let f = fixture();
    for name in ["lora", "rslora", "lora_patterns"] {
        let init = AdapterFile::open(&golden("adapters").join(name)).unwrap();
        let engine = f.engine();
        let data = engine.dataset(&f.data, 1024).unwrap();
        let out = f.out(name);
        // What is not said is the adapter's.
        let config = TrainConfig { rank: 8, dropout: 0.0, steps: Some(2), ..config() };
        let mut trainer = engine.trainer(config, data, None, Some(&init), &out).unwrap();
        let mut rounded = init.clone();
        for t in rounded.tensors.values_mut() {
            *t = t.clone().rounded(Stored::F16, "t").unwrap();
        }
        assert!(same(&trainer.snapshot().unwrap(), &rounded), "{name}: begins elsewhere");
        trainer.run(&mut Notes::default()).unwrap();
        let trained = AdapterFile::open(&out).unwrap();
        // What is trained here also knows its base.
        assert!(trained.base_mark.is_some(), "{name}");
        assert_eq!((&trained.method, &trained.base), (&init.method, &init.base), "{name}");
        let text = fs::read_to_string(out.join("train.toml")).unwrap();
        let told: TrainConfig = toml::from_str(&text).unwrap();
        assert_eq!(
            (told.rank, told.alpha, told.rslora),
            (lora(&init).rank, Some(lora(&init).alpha), lora(&init).rslora)
        );
        assert_eq!(told.targets, init.method.targets(), "{name}");
        assert_eq!(trained.tensors.len(), init.tensors.len(), "{name}");
        for (tensor, before) in &init.tensors {
            let after = &trained.tensors[tensor];
            assert_eq!(after.shape, before.shape, "{name}: {tensor}");
            assert!(tensor.contains("lora_A") || after.data != before.data, "{name}: {tensor} did not learn");
        }
        for module in init.modules() {
            assert_eq!(lora(&trained).of_module(module), lora(&init).of_module(module), "{name}: {module}");
        }
    }
}

/// What is said beside an adapter to start from agrees with it or is refused; dropout is nobody's but the run's.
#[test]
fn settings_beside_an_adapter_agree_with_it() {
    let f = fixture();
    let init = AdapterFile::open(&golden("adapters/rslora")).unwrap();
    let engine = f.engine();
    let model = internals::base(&engine).model.as_ref();
    let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
    let theirs =
        TrainConfig { rank: 8, alpha: Some(16.0), rslora: true, targets: list(&["v_proj", "q_proj"]), ..config() };
    let with = |change: &dyn Fn(&mut TrainConfig)| {
        let mut config = theirs.clone();
        change(&mut config);
        config
    };
    let full: Vec<String> = init.modules().map(str::to_owned).collect();
    for (config, given, refused) in [
        (theirs.clone(), "rank", None),
        (theirs.clone(), "targets", None),
        (with(&|c| c.targets = full.clone()), "targets", None),
        (with(&|c| c.rank = 4), "lr", None),
        (with(&|c| c.rank = 4), "rank", Some(["`8`", "`4`"])),
        (with(&|c| c.alpha = Some(8.0)), "alpha", Some(["`16`", "`8`"])),
        (with(&|c| c.rslora = false), "rslora", Some(["`true`", "`false`"])),
        (with(&|c| c.targets = list(&["all"])), "targets", Some(["q_proj", "`all`"])),
        (with(&|c| c.targets = list(&["q_proj"])), "targets", Some(["v_proj", "`q_proj`"])),
    ] {
        match (config.with_adapter(model, &init, &|key| key == given), refused) {
            (Ok(config), None) => {
                assert_eq!((config.rank, config.alpha(), config.rslora), (8, 16.0, true), "{given}");
                assert_eq!((config.dropout, &config.targets[..]), (0.0, init.method.targets()), "{given}");
            }
            (Err(e), Some(values)) => {
                let e = e.to_string();
                assert!(e.contains(&format!("`{given}`")) && values.iter().all(|v| e.contains(v)), "{given}: {e}");
            }
            (got, _) => panic!("{given}: {got:?}"),
        }
    }
    let dropout = TrainConfig { rank: 8, steps: Some(1), ..config() };
    let data = engine.dataset(&f.data, 1024).unwrap();
    let trainer = engine.trainer(dropout, data.clone(), None, Some(&init), &f.out("dropout")).unwrap();
    assert_eq!(lora(&trainer.snapshot().unwrap()).dropout, 0.1, "the digits that were typed");
    let error = engine.trainer(config(), data, None, Some(&init), &f.out("rank")).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("`rank`"), "{error}");
}

/// An expression for the modules, or layers left out, comes back as the full paths that it stands for.
#[test]
fn modules_named_by_expressions_are_listed() {
    let f = fixture();
    for (name, change) in [
        ("expression", serde_json::json!({"target_modules": ".*_proj"})),
        ("layers", serde_json::json!({"layers_to_transform": [0, 1]})),
    ] {
        let dir = f.out(name);
        fs::create_dir(&dir).unwrap();
        let source = golden("adapters/lora");
        fs::write(dir.join("adapter_model.safetensors"), weights(&source)).unwrap();
        let text = fs::read(source.join("adapter_config.json")).unwrap();
        let mut config: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&text).unwrap();
        config.extend(change.as_object().unwrap().clone());
        fs::write(dir.join("adapter_config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
        let file = AdapterFile::open(&dir).unwrap();
        assert_eq!(file.method.targets().iter().collect::<Vec<_>>(), file.modules().collect::<Vec<_>>(), "{name}");
    }
}
