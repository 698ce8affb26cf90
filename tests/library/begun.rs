//! How a fresh LoRA begins: what PEFT 0.21.2 begins with on the same base, what the model says at first, and what is saved.

use super::methods::{base, config, data, json, of};
use crate::common::{check_all, golden, tensors};
use pocketlora::adapter::{AdapterFile, HostTensor, Kind};
use pocketlora::train::{Dataset, Observer, Optimizer, StepReport, Summary, TrainConfig};
use serde_json::Value;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Those that are taken away again, and those whose `B A` is zero.
const MOVED: [&str; 7] = ["pissa", "pissa_niter_3", "milora", "olora", "corda", "corda_kpm", "lora_ga"];
const ZERO: [&str; 4] = ["true", "gaussian", "orthogonal", "eva"];

/// Keeps the losses of all steps, and stops after one of them.
#[derive(Default)]
pub(super) struct Losses {
    pub all: Vec<f64>,
    pub stop_after: u64,
}

impl Observer for Losses {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        self.all.push(report.loss);
        if report.step == self.stop_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

fn settings(init: &str) -> TrainConfig {
    let targets = ["q_proj", "v_proj", "down_proj"].map(str::to_owned).to_vec();
    let loftq_source = (init == "loftq").then(|| golden("peft/base"));
    let init_lora_weights = Some(init.to_owned());
    TrainConfig { rank: 4, alpha: Some(8.0), targets, init_lora_weights, loftq_source, ..config() }
}

/// A run in the folder `out`.
pub(super) fn train(
    config: TrainConfig,
    data: Dataset,
    out: &Path,
    threads: usize,
    resume: bool,
    stop_after: u64,
) -> (Summary, Vec<f64>) {
    let mut trainer = base(threads).trainer(config, data.clone(), Some(data), None, out).unwrap();
    if resume {
        trainer.resume().unwrap();
    }
    let mut losses = Losses { stop_after, ..Losses::default() };
    let summary = trainer.run(&mut losses).unwrap();
    (summary, losses.all)
}

/// `B A` of a module.
fn product(a: &HostTensor, b: &HostTensor, ranks: std::ops::Range<usize>) -> Vec<f64> {
    let (rank, cols) = (a.shape[0], a.shape[1]);
    let value = |row: &[f32], col: usize| {
        ranks.clone().map(|k| f64::from(row[k]) * f64::from(a.data[k * cols + col])).sum::<f64>()
    };
    b.data.chunks(rank).flat_map(|row| (0..cols).map(move |col| value(row, col)).collect::<Vec<_>>()).collect()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

#[test]
fn what_peft_begins_with_is_begun_with() {
    let dir = tempfile::tempdir().unwrap();
    check_all(["pissa", "olora", "corda"], |init| {
        // A step so small that it changes no digit; of the data what PEFT looked at.
        let one = Dataset::new("golden", data().samples[..1].to_vec());
        let small = TrainConfig { lr: 1e-30, optimizer: Optimizer::Sgd, steps: Some(1), batch: 1, ..settings(init) };
        let out = dir.path().join(init);
        train(TrainConfig { weight_decay: 0.0, ..small }, one, &out, 2, false, 0);
        let (ours, folder) = (AdapterFile::open(&out).unwrap(), format!("lora_{init}"));
        let theirs = tensors(&of(&folder, "initial_adapter/adapter_model.safetensors"));
        for module in ours.modules() {
            let [a, b] = ["lora_A.weight", "lora_B.weight"].map(|part| &ours.tensors[&format!("{module}.{part}")]);
            let [their_a, their_b] = ["lora_A.weight", "lora_B.weight"].map(|part| {
                let tensor = &theirs[&format!("base_model.model.{module}.{part}")];
                HostTensor { shape: tensor.shape.clone(), data: tensor.data.clone() }
            });
            // A's first rows and B's last columns are what was begun with.
            let (cols, rank) = (a.shape[1], 4);
            let first = HostTensor { shape: vec![rank, cols], data: a.data[..rank * cols].to_vec() };
            let last = b.data.chunks(2 * rank).flat_map(|row| row[rank..].to_vec()).collect();
            let last = HostTensor { shape: vec![b.shape[0], rank], data: last };
            let (own, their) = (product(&first, &last, 0..rank), product(&their_a, &their_b, 0..rank));
            let off = norm(&own.iter().zip(&their).map(|(o, t)| o - t).collect::<Vec<_>>()) / norm(&their);
            if off > 2e-3 {
                return Err(format!("{init}, {module}: B A is {off:.1e} of its norm off"));
            }
            // And each rank is PEFT's up to its sign.
            for k in 0..rank {
                let (own, their) = (&first.data[k * cols..][..cols], &their_a.data[k * cols..][..cols]);
                let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum::<f64>();
                let off = (dot(own, their).abs() / dot(their, their) - 1.0).abs();
                if off > 5e-3 {
                    return Err(format!("{init}, {module}: row {k} of A is {off:.1e} off"));
                }
            }
        }
        Ok(())
    });
}

/// Layers of other ranks begin as the others do.
#[test]
fn layers_of_their_own_rank_begin_so_too() {
    let dir = tempfile::tempdir().unwrap();
    let plain = train(settings("true"), data(), &dir.path().join("plain"), 2, false, 0).0.before.unwrap().held_out;
    check_all(["pissa", "lora_ga", "eva"], |init| {
        let out = dir.path().join(init);
        let rank_pattern = [("q_proj".to_owned(), 2), ("0.self_attn.v_proj".to_owned(), 6)].into();
        // A step so small that it changes no digit.
        let small = TrainConfig { lr: 1e-30, optimizer: Optimizer::Sgd, weight_decay: 0.0, ..settings(init) };
        let (summary, _) = train(TrainConfig { rank_pattern, ..small }, data(), &out, 2, false, 0);
        let before = summary.before.unwrap().held_out.unwrap();
        if (before - plain.unwrap()).abs() > 1e-5 {
            return Err(format!("{init}: the loss is {before} before the first step, the base's {plain:?}"));
        }
        let file = AdapterFile::open(&out).unwrap();
        let times = if MOVED.contains(init) { 2 } else { 1 };
        for (module, rank) in [("0.self_attn.q_proj", 2), ("0.self_attn.v_proj", 6), ("1.self_attn.v_proj", 4)] {
            let a = &file.tensors[&format!("model.layers.{module}.lora_A.weight")];
            assert_eq!(a.shape[0], times * rank, "{init}: {module}");
            // Singular vectors are orthogonal, and random ones are not.
            let (first, second) = (&a.data[..a.shape[1]], &a.data[a.shape[1]..2 * a.shape[1]]);
            let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum::<f64>();
            let cosine = dot(first, second) / (dot(first, first) * dot(second, second)).sqrt();
            if cosine.abs() > 1e-3 {
                return Err(format!("{init}, {module}: the first rows of A have the cosine {cosine}"));
            }
        }
        Ok(())
    });
}

#[test]
fn a_model_says_at_first_what_its_base_does_and_at_last_what_its_file_does() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, _) = train(settings("true"), data(), &dir.path().join("plain"), 1, false, 0);
    let plain = plain.before.unwrap().held_out.unwrap();
    check_all(MOVED.into_iter().chain(ZERO), |init| {
        let out = dir.path().join(init);
        let (summary, losses) = train(settings(init), data(), &out, 2, false, 0);
        let (before, after) = (summary.before.unwrap().held_out.unwrap(), summary.eval_loss.unwrap());
        if (before - plain).abs() > 1e-5 {
            return Err(format!("{init}: the loss is {before} before the first step, the base's {plain}"));
        }
        if losses[losses.len() - 1] > losses[0] - 0.01 || after > before - 0.01 {
            return Err(format!("{init}: it does not learn: {losses:?}"));
        }
        // What was saved is a plain LoRA on the base as it is: a run from it begins where this one ended.
        let file = AdapterFile::open(&out).unwrap();
        let moved = MOVED.contains(init);
        let written = json(&out.join("adapter_config.json"));
        assert_eq!((&written["init_lora_weights"], &written["use_dora"]), (&Value::Bool(true), &Value::Bool(false)));
        let numbers = [&written["r"], &written["lora_alpha"]].map(|number| number.as_f64().unwrap());
        assert_eq!(numbers, if moved { [8.0, 16.0] } else { [4.0, 8.0] }, "{init}");
        assert!(file.tensors.keys().all(|name| name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight")));
        let config = TrainConfig {
            init_lora_weights: None,
            rank: 8,
            alpha: None,
            targets: vec!["all".to_owned()],
            ..settings(init)
        };
        let again = dir.path().join(format!("{init}-again"));
        let mut trainer = base(2).trainer(config, data(), Some(data()), Some(&file), &again).unwrap();
        let from_file = trainer.run(&mut Losses { stop_after: 1, ..Losses::default() }).unwrap().before.unwrap();
        let off = (from_file.held_out.unwrap() - after).abs();
        if off > 2e-4 { Err(format!("{init}: the file's loss is {off} off")) } else { Ok(()) }
    });
}

/// Hears of beginnings, and stops one when so much of it is done.
struct Impatient {
    stop_at: usize,
    heard: Vec<(usize, usize)>,
}

impl Observer for Impatient {
    fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
        ControlFlow::Break(())
    }

    fn on_beginning(&mut self, done: usize, all: usize) {
        self.heard.push((done, all));
    }

    fn keep_going(&mut self) -> bool {
        self.heard.last().is_none_or(|(done, _)| *done < self.stop_at)
    }
}

/// A beginning can be stopped; the run then begins anew and ends as one that was not. After a step nothing is begun again.
#[test]
fn a_beginning_stops_when_asked_and_is_done_once() {
    let dir = tempfile::tempdir().unwrap();
    let of = |init: &str| match init {
        "lora-xs" => TrainConfig { method: Kind::LoraXs, init_lora_weights: None, ..settings("true") },
        _ => settings(init),
    };
    let bytes = |out: &Path| fs::read(out.join("adapter_model.safetensors")).unwrap();
    check_all(["pissa", "loftq", "eva", "corda", "lora_ga", "lora-xs"], |init| {
        let (whole, out) = (dir.path().join(format!("{init}-whole")), dir.path().join(init));
        train(of(init), data(), &whole, 2, false, 0);
        let hears = |resume: bool, stop_at: usize| {
            let mut trainer = base(2).trainer(of(init), data(), Some(data()), None, &out).unwrap();
            if resume {
                trainer.resume().unwrap();
            }
            let mut observer = Impatient { stop_at, heard: Vec::new() };
            let summary = trainer.run(&mut observer).unwrap();
            (observer.heard, summary)
        };
        let (heard, summary) = hears(false, 1);
        if summary.done || summary.steps > 0 || heard.last().is_none_or(|(done, all)| *done != 1 || *all < 2) {
            return Err(format!("{init}: stopped after {} steps, heard {heard:?}", summary.steps));
        }
        let (heard, summary) = hears(true, usize::MAX);
        if summary.steps != 1 || heard.last().is_none_or(|(done, all)| done != all) {
            return Err(format!("{init}: {} steps, heard {heard:?}", summary.steps));
        }
        let (heard, summary) = hears(true, usize::MAX);
        if summary.steps != 2 || !heard.is_empty() {
            return Err(format!("{init}: {} steps, heard {heard:?}", summary.steps));
        }
        train(of(init), data(), &out, 2, true, 0);
        if bytes(&out) == bytes(&whole) { Ok(()) } else { Err(format!("{init}: other bytes than in one run")) }
    });
}

#[test]
fn runs_end_in_the_same_bytes_however_often_they_stop() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = |out: &Path| fs::read(out.join("adapter_model.safetensors")).unwrap();
    check_all(MOVED.into_iter().chain(["eva", "orthogonal"]), |init| {
        let [whole, parts]: [PathBuf; 2] = ["whole", "parts"].map(|name| dir.path().join(format!("{init}-{name}")));
        train(settings(init), data(), &whole, 1, false, 0);
        for step in [2, 4] {
            assert!(!train(settings(init), data(), &parts, 2, step > 2, step).0.done, "{init}");
        }
        assert!(train(settings(init), data(), &parts, 3, true, 0).0.done, "{init}");
        if bytes(&whole) == bytes(&parts) { Ok(()) } else { Err(format!("{init}: other bytes")) }
    });
}

#[test]
fn what_rounding_took_is_given_back() {
    // The base in 4 bits, and what it was rounded from.
    let dir = tempfile::tempdir().unwrap();
    let (source, nf4) = (golden("peft/base"), dir.path().join("nf4"));
    let (existing, target) = (pocketlora::format::Existing::Keep, pocketlora::format::Target::Nf4);
    let opened = pocketlora::format::open_source(&source).unwrap();
    pocketlora::format::quantize(opened.as_ref(), &nf4, target, existing, &mut |_| ControlFlow::Continue(())).unwrap();
    let before = |config: TrainConfig| {
        let engine = crate::common::open_exact(&nf4, 2);
        let out = tempfile::tempdir().unwrap();
        let mut trainer = engine.trainer(config, data(), Some(data()), None, out.path()).unwrap();
        trainer.run(&mut Losses { stop_after: 1, ..Losses::default() }).unwrap().before.unwrap().held_out.unwrap()
    };
    let whole = |init: &str| TrainConfig { targets: vec!["all".to_owned()], rank: 24, alpha: None, ..settings(init) };
    let out = dir.path().join("exact");
    let exact = train(settings("true"), data(), &out, 2, false, 1).0.before.unwrap().held_out.unwrap();
    let (rounded, given_back) = (before(whole("true")), before(whole("loftq")));
    assert!(
        (given_back - exact).abs() < 0.7 * (rounded - exact).abs(),
        "{exact}, {rounded} rounded, {given_back} with loftq"
    );
}

#[test]
fn beginnings_that_do_not_fit_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let at = |init: &str, change: &dyn Fn(&mut TrainConfig)| {
        let mut config = settings(init);
        change(&mut config);
        config
    };
    let cases: [(TrainConfig, &str); 12] = [
        (at("pisa", &|_| ()), "`pissa`"),
        (at("pissa_niter_0", &|_| ()), "from 1 to 64"),
        (at("pissa_niter_x", &|_| ()), "from 1 to 64"),
        (at("orthogonal", &|c| c.rank = 3), "even"),
        (at("pissa", &|c| c.rank = 33), "at most 32"),
        (at("lora_ga", &|c| c.rank = 17), "at most 16"),
        (at("milora", &|c| c.targets = vec!["embed_tokens".to_owned()]), "linear layers"),
        (at("corda", &|c| c.targets = vec!["lm_head".to_owned()]), "decoder"),
        (at("pissa", &|c| c.alora_invocation_tokens = vec![3]), "alora-invocation-tokens"),
        (at("loftq", &|c| c.loftq_source = None), "`loftq-source`"),
        (at("true", &|c| c.loftq_source = Some(golden("peft/base"))), "loftq"),
        (at("pissa", &|c| c.init_steps = Some(2)), "`eva`"),
    ];
    check_all(cases, |(config, said)| {
        match base(1).trainer(config.clone(), data(), None, None, &dir.path().join("out")) {
            Ok(_) => Err(format!("{:?} is taken", config.init_lora_weights)),
            Err(e) if format!("{} {e}", e.place()).contains(said) => Ok(()),
            Err(e) => Err(format!("`{e}` does not say {said}")),
        }
    });
    // A source of another model.
    let other = at("loftq", &|c| c.loftq_source = Some(golden("tiny-llama")));
    let refused = base(1).trainer(other, data(), None, None, &dir.path().join("out")).map(|_| ()).unwrap_err();
    assert!(refused.to_string().contains("of shape"), "{refused}");
    // An adapter to go on from has begun.
    let init = AdapterFile::open(&of("lora", "")).unwrap();
    let pissa = TrainConfig { init_lora_weights: Some("pissa".to_owned()), ..config() };
    let refused = base(1).trainer(pissa, data(), None, Some(&init), &dir.path().join("out")).map(|_| ()).unwrap_err();
    assert!(refused.place().contains("init-lora-weights"), "{refused}");
}
