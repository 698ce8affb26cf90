//! Training the real model beside PEFT and bitsandbytes: same base, same samples in the same order, same start.
//! `tests/data/peft_curve.py` made the curve.

use crate::common::{convert, real_gguf};
use pocketlora::adapter::{AdapterFile, HostTensor, Lora, Method};
use pocketlora::format::Target;
use pocketlora::train::{Dataset, Observer, Sample, Schedule, StepReport, TrainConfig, TrainPrecision};
use pocketlora::{Engine, Options, internals};
use pocketlora_models::Role;
use serde::Deserialize;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Curve {
    rank: usize,
    alpha: f64,
    lr: f32,
    /// Tokens of the first sample; each has one more than the one before.
    shortest: usize,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    tokens: usize,
    loss: f64,
}

fn data_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// Stretches of the text, one after the other.
fn samples(curve: &Curve) -> Dataset {
    let path = data_file("oracles/smollm2_ppl_ids.json");
    let ids: Vec<u32> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let mut rest = &ids[..];
    let sample = |length| {
        let ids = rest.split_off(..length).unwrap().to_vec();
        Sample::of_text(ids)
    };
    Dataset::new(path, (curve.shortest..).take(curve.steps.len()).map(sample).collect())
}

/// The script's matrices: A from a hash of the index, in values that f16 holds; B zero.
fn start(engine: &Engine, curve: &Curve) -> AdapterFile {
    let value = |i: u64| (((i * 2_654_435_761) >> 16) % 2048) as f32 / 1024.0 / 16.0 - 1.0 / 16.0;
    let linears = internals::base(engine).model.params().iter().filter(|p| p.role == Role::Linear);
    let tensors = linears.flat_map(|p| {
        let (out, input) = (p.shape[0], p.shape[1]);
        let a = (0..(curve.rank * input) as u64).map(value).collect();
        let a = HostTensor { shape: vec![curve.rank, input], data: a };
        let b = HostTensor { shape: vec![out, curve.rank], data: vec![0.0; out * curve.rank] };
        [("lora_A.weight", a), ("lora_B.weight", b)].map(|(part, t)| (format!("{}.{part}", p.module()), t))
    });
    let method = Method::Lora(Lora::new(curve.rank, curve.alpha));
    AdapterFile::new(PathBuf::new(), method, tensors.collect())
}

struct Quiet;

impl Observer for Quiet {
    fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// Trains as the script did for so many steps; no loss may be off by more than `bound`, as a share of the reference's.
fn follows_the_reference(precision: TrainPrecision, steps: usize, bound: f64) {
    let Some(gguf) = real_gguf() else { return };
    let curve: Curve = serde_json::from_slice(&fs::read(data_file("peft_curve.json")).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    convert(&gguf, &model, Target::Nf4);
    let engine = Engine::open(&model, &Options::new().threads(2)).unwrap();
    let config = TrainConfig {
        lr: curve.lr,
        schedule: Schedule::Constant,
        warmup: 0.0,
        clip: 0.0,
        weight_decay: 0.0,
        batch: 1,
        epochs: 1,
        precision,
        ..TrainConfig::default()
    };
    let init = start(&engine, &curve);
    let mut trainer = engine.trainer(config, samples(&curve), None, Some(&init), &dir.path().join("out")).unwrap();
    for (i, expected) in curve.steps[..steps].iter().enumerate() {
        let report = trainer.step(&mut Quiet).unwrap();
        assert_eq!(
            report.tokens,
            expected.tokens,
            "step {}: another sample; `first_epoch` in the script is old",
            i + 1
        );
        let off = report.loss / expected.loss - 1.0;
        println!("{precision:?} step {}: {:+.4} %", i + 1, off * 100.0);
        // Of a NaN, too.
        assert!(off.abs() <= bound, "{precision:?}: step {} is {off:+} off, bound {bound}", i + 1);
    }
}

// Adam divides small gradients by their own size, so that differences in rounding grow from step to step.

#[test]
fn fifty_steps_have_the_losses_of_peft_on_bitsandbytes() {
    follows_the_reference(TrainPrecision::Exact, 50, 0.002);
}

#[test]
fn twenty_steps_in_bf16_have_nearly_the_losses_of_peft_on_bitsandbytes() {
    follows_the_reference(TrainPrecision::Bf16, 20, 0.004);
}
