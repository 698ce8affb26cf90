//! Samples that share a pass do not see each other.

use crate::common::{convert, golden, open_exact, tiny_chat_model};
use pocketlora::Engine;
use pocketlora::adapter::AdapterFile;
use pocketlora::format::Target;
use pocketlora::train::{Dataset, Mask, Observer, Sample, StepReport, TrainConfig, TrainPrecision};
use std::ops::ControlFlow;
use std::path::Path;

/// Stops after a step, if there is one of that number.
struct StopAfter(u64);

impl Observer for StopAfter {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        if report.step == self.0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

fn engine(dir: &Path) -> Engine {
    let plain = tiny_chat_model(dir);
    convert(&plain, &dir.join("nf4"), Target::Nf4);
    open_exact(&dir.join("nf4"), 1)
}

fn sample(n: usize, salt: usize) -> Sample {
    let ids = (0..n).map(|i| 3 + ((i * 37 + salt * 101 + i * i * 11) % 200) as u32).collect();
    Sample::new(ids, (0..n).map(|i| i > 0 && !(i + salt).is_multiple_of(3)).collect())
}

/// Loss sum and gradients of the loss sum, in f32 arithmetic.
fn pass(engine: &Engine, dir: &Path, samples: Vec<Sample>) -> (f64, Vec<Vec<f64>>) {
    let config = TrainConfig {
        packing: true,
        batch: 1,
        seq: 256,
        clip: 0.0,
        precision: TrainPrecision::Exact,
        ..Default::default()
    };
    let init = AdapterFile::open(&golden("adapters/lora")).unwrap();
    let data = Dataset::new("made", samples);
    let mut trainer = engine.trainer(config, data, None, Some(&init), &dir.join("out")).unwrap();
    let report = trainer.step(&mut StopAfter(0)).unwrap();
    let trained = report.trained as f64;
    let grads = trainer.gradients().unwrap();
    let sums = grads.into_iter().map(|(_, g)| g.into_iter().map(|v| f64::from(v) * trained).collect());
    (report.loss * trained, sums.collect())
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| v * v).sum::<f64>().sqrt()
}

#[test]
fn the_gradient_of_a_packed_pass_is_the_sum_of_its_samples_gradients() {
    let dir = tempfile::tempdir().unwrap();
    let engine = engine(dir.path());
    let samples: Vec<Sample> = [40, 7, 3, 65, 33].iter().zip(0..).map(|(&n, salt)| sample(n, salt)).collect();
    let (loss, together) = pass(&engine, dir.path(), samples.clone());
    let alone: Vec<_> = samples.iter().map(|s| pass(&engine, dir.path(), vec![s.clone()])).collect();
    let sum: f64 = alone.iter().map(|a| a.0).sum();
    assert!((loss - sum).abs() <= 1e-5 * sum, "{loss} and {sum}");
    for (i, packed) in together.iter().enumerate() {
        let sums: Vec<f64> = (0..packed.len()).map(|j| alone.iter().map(|a| a.1[i][j]).sum()).collect();
        let off = norm(packed.iter().zip(&sums).map(|(a, b)| a - b));
        // Sums in f32 of some hundred terms: a part in 10^5 of the norm is far above their rounding and far below a leak.
        assert!(off <= 1e-5 * norm(sums.iter().copied()), "tensor {i}: {off} of {}", norm(sums.iter().copied()));
    }
}

#[test]
fn a_changed_token_changes_no_other_samples_loss() {
    let dir = tempfile::tempdir().unwrap();
    let engine = engine(dir.path());
    // Only the middle one is learned, so that the loss is its loss.
    let silent = |n, salt| Sample { trained: Mask::default(), ..sample(n, salt) };
    let (first, middle, last) = (silent(30, 1), sample(31, 2), silent(29, 3));
    let loss =
        |first: &Sample, last: &Sample| pass(&engine, dir.path(), vec![first.clone(), middle.clone(), last.clone()]).0;
    let before = loss(&first, &last);
    for at in [0, 15, 28] {
        let change = |s: &Sample| {
            let mut s = s.clone();
            s.ids[at] = 7;
            s
        };
        assert_eq!(loss(&change(&first), &change(&last)), before, "token {at}");
    }
    let mut other = middle.clone();
    other.ids[3] = 7;
    assert_ne!(pass(&engine, dir.path(), vec![first, other, last]).0, before);
}

/// Epochs of packed samples differ in their number of steps, so a resumed run has to find its place among them.
#[test]
fn a_resumed_packed_run_ends_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let engine = engine(dir.path());
    let samples: Vec<Sample> = (0..23).map(|i| sample(3 + i * 5 % 19, i)).collect();
    let train = |packing, name: &str, stops: &[u64]| {
        let config = TrainConfig {
            packing,
            bucketing: !packing,
            batch: 2,
            seq: 24,
            epochs: 3,
            dropout: 0.1,
            ..Default::default()
        };
        let out = dir.path().join(format!("{name}{packing}"));
        for (i, &stop) in stops.iter().enumerate() {
            let data = Dataset::new("made", samples.clone());
            let mut trainer = engine.trainer(config.clone(), data, None, None, &out).unwrap();
            if i > 0 {
                trainer.resume().unwrap();
            }
            let summary = trainer.run(&mut StopAfter(stop)).unwrap();
            assert_eq!(summary.done, stop == 0, "{summary:?}");
        }
        std::fs::read(out.join("adapter_model.safetensors")).unwrap()
    };
    for packing in [true, false] {
        assert!(train(packing, "whole", &[0]) == train(packing, "stopped", &[1, 7, 13, 0]), "packing {packing}");
    }
}
