//! Adapters in few bits: what is kept, what is lost, what is refused.

use crate::common::{check_all, golden, logits, max_diff, open_exact, tiny_training};
use pocketlora::adapter::{AdapterFile, Method, export_compressed};
use pocketlora::train::{Observer, StepReport, TrainConfig};
use pocketlora::{Engine, ErrorCode, Options, internals};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

struct Quiet;

impl Observer for Quiet {
    fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

const SEED: u64 = 11;

/// An adapter that was trained here with [`SEED`], and its engine.
fn trained(dir: &Path) -> (Engine, AdapterFile) {
    let (model, data) = tiny_training(dir, 20);
    let engine = Engine::open(&model, &Options::new().threads(1)).unwrap();
    let config = TrainConfig { rank: 4, lr: 1e-2, steps: Some(6), batch: 2, seed: SEED, ..TrainConfig::default() };
    let data = engine.dataset(&data, config.seq).unwrap();
    let out = dir.join("adapter");
    engine.trainer(config, data, None, None, &out).unwrap().run(&mut Quiet).unwrap();
    let file = AdapterFile::open(&out).unwrap();
    (engine, file)
}

/// The terms `s B A` of `file`, one after another, and how far those of `other` are from them, over their size.
fn distance(file: &AdapterFile, other: &AdapterFile) -> f64 {
    let terms = |file: &AdapterFile| -> Vec<f64> {
        let Method::Lora(lora) = &file.method else { panic!("no LoRA") };
        let mut all = Vec::new();
        for module in file.modules() {
            let (rank, factor) = lora.of_module(module);
            let part = |part: &str| &file.tensors[&format!("{module}.{part}.weight")];
            let (a, b) = (part("lora_A"), part("lora_B"));
            for row in b.data.chunks(rank) {
                for column in 0..a.shape[1] {
                    let products = (0..rank).map(|r| f64::from(row[r]) * f64::from(a.data[r * a.shape[1] + column]));
                    all.push(f64::from(factor) * products.sum::<f64>());
                }
            }
        }
        all
    };
    let (own, other) = (terms(file), terms(other));
    let lost: f64 = own.iter().zip(&other).map(|(a, b)| (a - b).powi(2)).sum();
    (lost / own.iter().map(|a| a * a).sum::<f64>()).sqrt()
}

#[test]
fn what_training_changed_stays_in_few_bits() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, file) = trained(dir.path());
    let (model, out) = (internals::base(&engine).model.clone(), dir.path().join("a.signs"));
    let modules = file.modules().count();
    let mut before = f64::INFINITY;
    for density in [0.05, 0.2, 0.6] {
        let done = export_compressed(&file, model.as_ref(), SEED, density, &out).unwrap();
        let back = AdapterFile::open(&out).unwrap();
        assert_eq!((done.values, done.differences), (file.values(), modules), "{density}");
        assert_eq!(done.bytes as u64, fs::metadata(&out).unwrap().len());
        assert_eq!((back.base_mark, back.base.as_ref()), (file.base_mark.clone(), file.base.as_ref()));
        let back = AdapterFile::open(&out).unwrap();
        // As an independent sum over the whole products has it.
        let lost = distance(&file, &back);
        assert!((done.error - lost).abs() < 1e-3 * lost, "{density}: {} and {lost}", done.error);
        assert!(lost < before, "{density}: {lost} after {before}");
        before = lost;
        engine.attach_file(back, 1.0).map(|id| engine.detach(id)).unwrap().unwrap();
    }
    // Another seed begins elsewhere: then A is written as it is.
    let done = export_compressed(&file, model.as_ref(), SEED + 1, 0.6, &out).unwrap();
    assert_eq!(done.differences, 0);
    assert!(distance(&file, &AdapterFile::open(&out).unwrap()) < 0.75);
}

/// One value in each matrix of size one is what it was.
#[test]
fn a_compressed_adapter_does_what_its_matrices_say() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open_exact(&golden("tiny-llama"), 1);
    let (base, out) = (internals::base(&engine).model.clone(), dir.path().join("a.signs"));
    check_all(["lora", "rslora", "lora_patterns"], |name| {
        let file = AdapterFile::open(&golden("adapters").join(name)).unwrap();
        export_compressed(&file, base.as_ref(), 0, 1.0, &out).map_err(|e| e.to_string())?;
        let back = AdapterFile::open(&out).map_err(|e| e.to_string())?;
        let Method::Lora(lora) = &back.method else { return Err("no LoRA".to_owned()) };
        let Method::Lora(own) = &file.method else { return Err("no LoRA".to_owned()) };
        for module in file.modules() {
            let ((rank, factor), (expected, strength)) = (lora.of_module(module), own.of_module(module));
            if rank != expected || (factor - strength).abs() > 1e-6 * strength {
                return Err(format!("{name}: {module} has rank {rank} and factor {factor}"));
            }
        }
        let run = |file: AdapterFile| {
            let engine = open_exact(&golden("tiny-llama"), 1);
            engine.attach_file(file, 1.0).unwrap();
            logits(&engine, &[5, 80, 3, 20])
        };
        let peft = dir.path().join(name);
        back.save_exact(&peft).map_err(|e| e.to_string())?;
        let (diff, at) = max_diff(&run(AdapterFile::open(&peft).unwrap()), &run(back));
        if diff > 1e-6 { Err(format!("{name}: off by {diff} at {at} as PEFT's")) } else { Ok(()) }
    });
}

#[test]
fn what_cannot_be_compressed_or_read_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open_exact(&golden("tiny-llama"), 1);
    let (base, out) = (internals::base(&engine).model.clone(), dir.path().join("a.signs"));
    let file = AdapterFile::open(&golden("adapters/lora")).unwrap();
    check_all([0.0, -1.0, 1.5, f64::NAN, 1e-5], |density| {
        let failed = export_compressed(&file, base.as_ref(), 0, *density, &out).unwrap_err();
        match failed.code() {
            ErrorCode::Config if failed.to_string().contains("from 0.001 to 1") => Ok(()),
            _ => Err(format!("{density}: {failed}")),
        }
    });
    assert!(!out.exists());
    let dora = AdapterFile::open(&golden("adapters/dora")).unwrap();
    let failed = export_compressed(&dora, base.as_ref(), 0, 0.5, &out).unwrap_err();
    assert_eq!(failed.code(), ErrorCode::Unsupported, "{failed}");

    export_compressed(&file, base.as_ref(), 0, 0.3, &out).unwrap();
    let whole = fs::read(&out).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 4;
    let longer = [&whole[..], &[0]].concat();
    check_all([&whole[..whole.len() - 1], &whole[..20], &whole[..8], &flipped, &longer], |bytes| {
        fs::write(&out, bytes).unwrap();
        let failed = AdapterFile::open(&out).map(|_| ()).unwrap_err();
        match failed.code() {
            ErrorCode::Format if failed.to_string().contains("a damaged one") => Ok(()),
            _ => Err(format!("{} bytes: {failed}", bytes.len())),
        }
    });
}
