//! Tiny random models against goldens of transformers, PEFT and bitsandbytes: logits, adapters, losses, gradients.

use crate::common::{check_all, convert, golden, ids, logits, max_diff, open_exact, tensors};
use pocketlora::Engine;
use pocketlora::adapter::AdapterFile;
use pocketlora::format::Target;
use pocketlora::train::{Dataset, Observer, Sample, Schedule, StepReport, TrainConfig, TrainPrecision};
use serde_json::json;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// The tiny Llama quantized by us, with f32 as the type of its dequantized weights: the reference quantized an f32 copy
/// of the bf16 file, while we, like bitsandbytes, round to the type that we found.
fn tiny_nf4(dir: &TempDir) -> PathBuf {
    let out = dir.path().join("tiny-llama-nf4");
    convert(&golden("tiny-llama"), &out, Target::Nf4);
    let path = out.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let (from, to) = (br#""dtype": "bfloat16""#, br#""dtype": "float32" "#);
    let at: Vec<usize> = bytes.windows(from.len()).enumerate().filter(|(_, w)| w == from).map(|(i, _)| i).collect();
    assert_eq!(at.len(), 14, "one state for each linear layer");
    for i in at {
        bytes[i..i + to.len()].copy_from_slice(to);
    }
    std::fs::write(&path, bytes).unwrap();
    out
}

fn expect_close(name: &str, actual: &[f32], expected: &[f32], bound: f32) -> Result<(), String> {
    let (diff, at) = max_diff(actual, expected);
    if diff <= bound {
        return Ok(());
    }
    Err(format!("{name}: index {at}: expected {}, got {}, bound {bound}", expected[at], actual[at]))
}

#[test]
fn every_family_gives_the_logits_of_transformers() {
    let mut expected = tensors(&golden("tiny_variants_logits.safetensors"));
    let ids = ids(&expected["ids"]);
    expected.extend(tensors(&golden("nf4_definition.safetensors")));
    check_all(["tiny-qwen2", "tiny-mistral", "tiny-mistral-bnb4"], |name| {
        let engine = open_exact(&golden(name), 1);
        expect_close(name, &logits(&engine, &ids), &expected[*name].data, 2e-4)
    });
}

#[test]
fn llama_3_rope_scaling_gives_the_logits_of_transformers() {
    let expected = tensors(&golden("tiny_variants_logits.safetensors"));
    let ids = ids(&expected["llama3rope_ids"]);
    let scaled = tempfile::tempdir().unwrap();
    std::fs::copy(golden("tiny-llama/config_llama3_rope.json"), scaled.path().join("config.json")).unwrap();
    std::fs::copy(golden("tiny-llama/model.safetensors"), scaled.path().join("model.safetensors")).unwrap();
    let cases = [(golden("tiny-llama"), "llamarope_last4"), (scaled.path().to_owned(), "llama3rope_last4")];
    check_all(cases, |(dir, name)| {
        let all = logits(&open_exact(dir, 1), &ids);
        let expected = &expected[*name].data;
        expect_close(name, &all[all.len() - expected.len()..], expected, 2e-4)
    });
}

/// YaRN's attention factor multiplies cosines and sines, so scores by its square: as four times the queries do.
/// (Its frequencies are compared with transformers' beside the code.)
#[test]
fn yarns_attention_factor_multiplies_queries_and_keys() {
    let mut model = std::fs::read(golden("tiny-llama/model.safetensors")).unwrap();
    let config = std::fs::read(golden("tiny-llama/config.json")).unwrap();
    let config: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&config).unwrap();
    let write = |scaling: serde_json::Value, model: &[u8]| {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config.clone();
        config.remove("rope_parameters");
        config.insert("rope_scaling".to_owned(), scaling);
        std::fs::write(dir.path().join("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
        std::fs::write(dir.path().join("model.safetensors"), model).unwrap();
        dir
    };
    let yarn = write(json!({"rope_type": "yarn", "factor": 1.0, "attention_factor": 2.0}), &model);
    let start = 8 + u64::from_le_bytes(model[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&model[8..start]).unwrap();
    let queries: Vec<_> = header.iter().filter(|(name, _)| name.ends_with("q_proj.weight")).collect();
    assert_eq!(queries.len(), 2);
    for (_, tensor) in queries {
        assert_eq!(tensor["dtype"], "BF16");
        let at = |i: usize| start + tensor["data_offsets"][i].as_u64().unwrap() as usize;
        for value in model[at(0)..at(1)].chunks_exact_mut(2) {
            let wide = f32::from_bits(u32::from(u16::from_le_bytes([value[0], value[1]])) << 16) * 4.0;
            value.copy_from_slice(&((wide.to_bits() >> 16) as u16).to_le_bytes());
        }
    }
    let larger = write(json!(null), &model);
    let ids: Vec<u32> = (0..40).map(|i| i * 7 % 500).collect();
    let logits = |dir: &TempDir| logits(&open_exact(dir.path(), 1), &ids);
    let (got, want) = (logits(&yarn), logits(&larger));
    expect_close("yarn", &got, &want, 2e-4).unwrap();
    let plain = logits(&write(json!(null), &std::fs::read(golden("tiny-llama/model.safetensors")).unwrap()));
    assert!(expect_close("plain", &got, &plain, 2e-2).is_err(), "the factor changed nothing");
}

#[test]
fn base_and_adapters_give_the_logits_of_peft() {
    let mut expected = tensors(&golden("tiny_llama_logits.safetensors"));
    let ids = ids(&expected["ids"]);
    // What bitsandbytes' forward gives on the CPU is off by its bf16 scales; see tests/data/nf4_definition.py.
    expected.extend(tensors(&golden("nf4_definition.safetensors")));
    let dir = tempfile::tempdir().unwrap();
    let (plain, nf4) = (golden("tiny-llama"), tiny_nf4(&dir));
    let cases = [
        ("base_f32", &plain, None, 2e-4),
        ("lora", &plain, Some("lora"), 2e-3),
        ("rslora", &plain, Some("rslora"), 2e-3),
        ("lora_patterns", &plain, Some("lora_patterns"), 2e-3),
        // bitsandbytes picks the neighbour of the nearest 8-bit code for 4 of this model's 4608 block scales.
        ("base_nf4", &nf4, None, 1e-2),
        ("lora_on_nf4", &nf4, Some("lora"), 1e-2),
    ];
    check_all(cases, |(name, dir, adapter, bound)| {
        let engine = open_exact(dir, 1);
        if let Some(adapter) = adapter {
            engine.attach(&golden("adapters").join(adapter), 1.0).unwrap();
        }
        expect_close(name, &logits(&engine, &ids), &expected[*name].data, *bound)
    });
}

#[test]
fn adapters_add_up_and_scale() {
    let expected = tensors(&golden("tiny_llama_logits.safetensors"));
    let ids = ids(&expected["ids"]);
    let lora = golden("adapters/lora");
    let with = |scales: &[f32]| {
        let engine = open_exact(&golden("tiny-llama"), 1);
        for &scale in scales {
            engine.attach(&lora, scale).unwrap();
        }
        logits(&engine, &ids)
    };
    expect_close("0.25 + 0.75", &with(&[0.25, 0.75]), &expected["lora"].data, 2e-3).unwrap();
    expect_close("1 - 1", &with(&[1.0, -1.0]), &expected["base_f32"].data, 2e-3).unwrap();
    let engine = open_exact(&golden("tiny-llama"), 1);
    engine.attach(&lora, 1.0).unwrap();
    engine.detach_all();
    expect_close("detached", &logits(&engine, &ids), &expected["base_f32"].data, 2e-4).unwrap();
}

/// The two sequences of the training goldens; the reference pads the second, we do not.
fn training_data() -> Dataset {
    let t = tensors(&golden("tiny_train_f32.safetensors"));
    let width = t["input_ids"].shape[1];
    let rows = t["input_ids"]
        .data
        .chunks(width)
        .zip(t["labels"].data.chunks(width))
        .zip(t["attention_mask"].data.chunks(width));
    let samples = rows.map(|((ids, labels), mask)| {
        let n = mask.iter().filter(|&&m| m > 0.0).count();
        let trained = labels[..n].iter().enumerate().map(|(i, &l)| i > 0 && l >= 0.0).collect();
        Sample::new(ids[..n].iter().map(|&i| i as u32).collect(), trained)
    });
    Dataset::new("golden", samples.collect())
}

struct Quiet;

impl Observer for Quiet {
    fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// Ten AdamW steps from adapters/lora, as the reference ran them.
fn train_like_peft(engine: &Engine, accumulate: bool, name: &str) -> Result<(), String> {
    let golden_run: serde_json::Value =
        serde_json::from_slice(&std::fs::read(golden("tiny_train.json")).unwrap()).unwrap();
    let expected = tensors(&golden(&format!("tiny_train_{name}.safetensors")));
    let losses = golden_run[name]["losses_before_each_step_and_after_10"].as_array().unwrap();
    let config = TrainConfig {
        lr: 1e-3,
        schedule: Schedule::Constant,
        warmup: 0.0,
        clip: 0.0,
        weight_decay: 0.01,
        batch: if accumulate { 1 } else { 2 },
        accumulate: if accumulate { 2 } else { 1 },
        steps: Some(11),
        precision: TrainPrecision::Exact,
        ..TrainConfig::default()
    };
    let out = tempfile::tempdir().unwrap();
    let init = AdapterFile::open(&golden("adapters/lora")).unwrap();
    let mut trainer = engine.trainer(config, training_data(), None, Some(&init), out.path()).unwrap();
    for (i, expected_loss) in losses.iter().enumerate() {
        let report = trainer.step(&mut Quiet).unwrap();
        let expected_loss = expected_loss.as_f64().unwrap();
        let bound = if i == 0 { 1e-4 } else { 1e-3 };
        if (report.loss - expected_loss).abs() > bound {
            return Err(format!("{name} step {i}: loss {} instead of {expected_loss}, bound {bound}", report.loss));
        }
        if i > 0 {
            continue;
        }
        let norm = golden_run[name]["grad_global_norm_step1"].as_f64().unwrap();
        if (report.grad_norm / norm - 1.0).abs() > 1e-3 {
            return Err(format!("{name}: gradient norm {} instead of {norm}", report.grad_norm));
        }
        for (tensor, grad) in trainer.gradients().unwrap() {
            let expected = &expected[&format!("grad.base_model.model.{tensor}")].data;
            let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
            let error = norm(&mut grad.iter().zip(expected).map(|(a, e)| f64::from(a - e)));
            let relative = error / norm(&mut expected.iter().map(|&e| f64::from(e)));
            if relative.is_nan() || relative > 1e-3 {
                return Err(format!("{name}: gradient of {tensor} off by {relative:.2e} of its norm, bound 1e-3"));
            }
        }
    }
    Ok(())
}

#[test]
fn losses_and_gradients_are_those_of_peft() {
    let dir = tempfile::tempdir().unwrap();
    let nf4 = tiny_nf4(&dir);
    let plain = golden("tiny-llama");
    let cases: [(&Path, bool, &str); 4] =
        [(&plain, false, "f32"), (&plain, true, "f32"), (&nf4, false, "nf4"), (&nf4, true, "nf4")];
    check_all(cases, |(model, accumulate, name)| train_like_peft(&open_exact(model, 2), *accumulate, name));
}
