//! What adapters do elsewhere than on linear layers: on norms, biases, rows of the embedding, before a text, behind an
//! invocation; in all kinds of families, where PEFT's goldens have but one.

use super::methods::{Quiet, attached, base, close, config, data, data_of, inputs_of, json, norm, of, run};
use crate::common::{check_all, golden, max_diff, open_exact, tensors};
use pocketlora::adapter::{AdapterFile, Kind};
use pocketlora::internals::{self, Adapters, Logits, Sequence, Step, Workspace};
use pocketlora::train::{Dataset, Sample, TrainConfig};
use pocketlora_kernels::Memory as _;
use std::fs;
use std::path::{Path, PathBuf};

/// What LoRA trains beside its own tensors, on a base that has biases and a tied head: gradients against differences of the
/// loss, and a file that is read as it was written.
#[test]
fn embedding_head_tokens_and_biases_are_trained_beside_lora() {
    let samples = [vec![3, 7, 1, 7, 9, 2], vec![7, 7, 5]];
    let data = || {
        Dataset::new(
            "golden",
            samples
                .iter()
                .map(|ids| Sample::new(ids.clone(), ids.iter().enumerate().map(|(i, _)| i > 0).collect()))
                .collect(),
        )
    };
    let config = TrainConfig {
        targets: ["q_proj", "embed_tokens", "lm_head"].map(str::to_owned).to_vec(),
        trainable_token_indices: vec![7, 2],
        bias: Some("all".to_owned()),
        rank: 3,
        lr: 1e-2,
        weight_decay: 0.0,
        steps: Some(3),
        ..config()
    };
    let base = golden("tiny-qwen2");
    let out = tempfile::tempdir().unwrap();
    let mut trainer = open_exact(&base, 1).trainer(config.clone(), data(), None, None, out.path()).unwrap();
    assert!(trainer.run(&mut Quiet { stop_after: 0 }).unwrap().done);
    let begun = AdapterFile::open(out.path()).unwrap();
    let names: Vec<String> = begun.replaced.names().collect();
    assert!(
        names.iter().any(|name| name.contains("k_proj.bias")) && names.iter().any(|n| n.contains("2 rows")),
        "{names:?}"
    );
    assert!(begun.tensors.contains_key("model.embed_tokens.lora_embedding_A"));
    assert!(begun.tensors.contains_key("lm_head.lora_B.weight"));
    let json = json(&out.path().join("adapter_config.json"));
    assert_eq!(
        (&json["bias"], &json["trainable_token_indices"]["model.embed_tokens"]),
        (&"all".into(), &serde_json::json!([7, 2]))
    );

    // From there on, with values that are not zero.
    let loss = |file: &AdapterFile| -> (f64, Vec<(String, Vec<f32>)>) {
        let out = tempfile::tempdir().unwrap();
        let config = TrainConfig { steps: Some(1), ..config_of_init() };
        let mut trainer = open_exact(&base, 1).trainer(config, data(), None, Some(file), out.path()).unwrap();
        let report = trainer.step(&mut Quiet { stop_after: 0 }).unwrap();
        (report.loss, trainer.gradients().unwrap().into_iter().map(|(name, grad)| (name.to_string(), grad)).collect())
    };
    let (_, grads) = loss(&begun);
    assert!(grads.iter().any(|(name, _)| name.ends_with("trainable_tokens_delta")));
    assert!(
        grads.iter().any(|(name, _)| name.ends_with("q_proj.base_layer.bias")),
        "{:?}",
        grads.iter().map(|(n, _)| n).collect::<Vec<_>>()
    );
    for (name, grad) in &grads {
        // Along the gradient itself, where a difference is largest beside rounding.
        let norm = norm(grad.iter().map(|g| f64::from(*g)));
        let at = |step: f64| {
            let mut file = begun.clone();
            let moved = |old: &[f32]| -> Vec<f32> {
                old.iter().zip(grad).map(|(v, g)| (f64::from(*v) + step * f64::from(*g) / norm) as f32).collect()
            };
            if let Some(tensor) = file.tensors.get_mut(name) {
                tensor.data = moved(&tensor.data);
            } else if name.ends_with("trainable_tokens_delta") {
                file.replaced.rows[0].values.data = moved(&file.replaced.rows[0].values.data);
            } else {
                let whole = file
                    .replaced
                    .whole
                    .iter_mut()
                    .find(|w| name.starts_with(&w.module) && name.ends_with(w.kind))
                    .unwrap();
                let old: Vec<f32> = whole.tensor.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                whole.tensor.bytes = moved(&old).iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into();
            }
            loss(&file).0
        };
        // Small beside an embedding's values, and large beside the rounding of a loss.
        let step = (5e-3 / norm).min(2e-2);
        let slope = (at(step) - at(-step)) / (2.0 * step);
        assert!((slope / norm - 1.0).abs() < 3e-2, "{name}: slope {slope} along a gradient of norm {norm}");
    }
}

fn config_of_init() -> TrainConfig {
    TrainConfig { weight_decay: 0.0, ..config() }
}

/// The embeddings of a text are the first ones of a prompt.
#[test]
fn a_prompt_begins_as_the_embeddings_of_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let model = crate::common::tiny_chat_model(dir.path());
    let engine = open_exact(&model, 1);
    let text = "hello";
    let ids = engine.text().unwrap().tokenizer.encode(text, false).unwrap();
    let config = TrainConfig {
        method: Kind::PromptTuning,
        num_virtual_tokens: Some(ids.len() + 1),
        prompt_init_text: Some(text.to_owned()),
        steps: Some(1),
        lr: 1e-12,
        ..config()
    };
    let data =
        Dataset::new("one", vec![Sample::new(ids.clone(), ids.iter().enumerate().map(|(i, _)| i > 0).collect())]);
    let out = dir.path().join("out");
    engine.trainer(config, data, None, None, &out).unwrap().run(&mut Quiet { stop_after: 0 }).unwrap();
    let file = AdapterFile::open(&out).unwrap();
    let json = json(&out.join("adapter_config.json"));
    assert_eq!((&json["prompt_tuning_init"], &json["prompt_tuning_init_text"]), (&"TEXT".into(), &text.into()));
    assert!(json["tokenizer_name_or_path"].is_string());
    let rows = &file.tensors["prompt_embeddings"];
    let width = rows.shape[1];
    let (first, last) = (&rows.data[..width], &rows.data[ids.len() * width..]);
    assert!(max_diff(first, last).0 < 1e-6, "the text is repeated");
    // A prompt that is the text says what the text itself says.
    let plain = [&ids[..], &ids[..1]].concat();
    let mut behind = Sequence::new(internals::base(&engine), internals::numbers(&engine).cache).unwrap();
    let mut whole = Sequence::new(internals::base(&engine), internals::numbers(&engine).cache).unwrap();
    let more = [ids[0], 5, 6];
    let expected = run(&engine, &attached(&engine, &[]), &mut whole, &[&plain, &more]);
    let got = run(&engine, &attached(&engine, &[file]), &mut behind, &[&more]);
    close("prompt", &got, &expected, 1e-4).unwrap();
}

/// In pieces, with the invocation cut in two, with a second one, and after going back: as PEFT has it, the adapter works
/// from the last one of what there is.
#[test]
fn an_activated_adapter_works_from_the_last_invocation_on() {
    let engine = base(1);
    let file = AdapterFile::open(&of("alora", "")).unwrap();
    let adapters = attached(&engine, std::slice::from_ref(&file));
    let invocation = [7, 11, 13];
    assert!(file.method.describe().0.ends_with("from the last of the tokens [7, 11, 13] on"));
    let mut ids = inputs_of("alora");
    let first = ids.windows(3).position(|w| w == invocation).unwrap();
    ids.extend([5, 7, 11, 13, 6, 7, 11, 9]);
    let new = || Sequence::new(internals::base(&engine), internals::numbers(&engine).cache).unwrap();
    let whole = |ids: &[u32]| run(&engine, &adapters, &mut new(), &[ids]);
    let last = |all: &[f32]| all[all.len() - 256..].to_vec();
    let mut sequence = new();
    for end in 1..=ids.len() {
        let got = run(&engine, &adapters, &mut sequence, &[&ids[end - 1..end]]);
        close(&format!("token {end}"), &got, &last(&whole(&ids[..end])), 1e-4).unwrap();
    }
    for to in [ids.len() - 1, ids.len() - 5, ids.len() - 6, first + 4, first + 1, 1] {
        let reached = sequence.rewind(internals::base(&engine), to);
        assert!(reached <= to);
        let got = run(&engine, &adapters, &mut sequence, &[&ids[reached..to + 1]]);
        close(&format!("back to {to}"), &last(&got), &last(&whole(&ids[..to + 1])), 1e-4).unwrap();
        run(&engine, &adapters, &mut sequence, &[&ids[to + 1..]]);
    }
    // Before the invocation it is the base, whose text it can share.
    let none = Adapters::none(internals::base(&engine));
    let plain = run(&engine, &none, &mut new(), &[&ids[..first]]);
    close("before", &run(&engine, &adapters, &mut new(), &[&ids[..first]]), &plain, 1e-6).unwrap();
    let mut begun = new();
    run(&engine, &none, &mut begun, &[&ids[..first]]);
    let mut work = Workspace::new(internals::numbers(&engine).arithmetic);
    let step = Step { sequence: &mut begun, ids: &ids[first..], adapters: &adapters, logits: 0..0 };
    let refused = internals::base(&engine).forward(&mut work, &mut [step], &mut || true, &mut |_| Ok(()));
    assert!(refused.unwrap_err().to_string().contains("invocation"));
    // In a batch beside others.
    let lora = attached(&engine, &[AdapterFile::open(&of("lora", "")).unwrap()]);
    let (mut one, mut other) = (new(), new());
    let mut got = Vec::new();
    let mut take = |logits: &Logits| {
        got.extend_from_slice(&logits.values);
        Ok(())
    };
    let mut steps = [
        Step { sequence: &mut one, ids: &ids[..9], adapters: &lora, logits: 8..9 },
        Step { sequence: &mut other, ids: &ids, adapters: &adapters, logits: ids.len() - 1..ids.len() },
    ];
    internals::base(&engine).forward(&mut work, &mut steps, &mut || true, &mut take).unwrap();
    close("in a batch", &got[256..], &last(&whole(&ids)), 1e-4).unwrap();
}

/// A cartridge begins as the text in the context, keeps its first row bit by bit, and learns the others.
#[test]
fn a_cartridge_begins_as_the_text_that_it_is_of() {
    let engine = base(1);
    let text: Vec<u32> = data().samples.iter().flat_map(|sample| sample.ids.clone()).take(6).collect();
    let new = || Sequence::new(internals::base(&engine), internals::numbers(&engine).cache).unwrap();
    let begun = |lr: f32, steps: u64| {
        let out = tempfile::tempdir().unwrap();
        let config = TrainConfig {
            method: Kind::Cartridge,
            num_virtual_tokens: Some(6),
            num_frozen_tokens: Some(2),
            lr,
            steps: Some(steps),
            ..config()
        };
        engine.trainer(config, data(), None, None, out.path()).unwrap().run(&mut Quiet { stop_after: 0 }).unwrap();
        AdapterFile::open(out.path()).unwrap()
    };
    let more = [9, 8, 7];
    let file = begun(1e-12, 1);
    let rows = file.tensors["prompt_embeddings"].data.clone();
    let got = run(&engine, &attached(&engine, &[file]), &mut new(), &[&more]);
    let whole = run(&engine, &Adapters::none(internals::base(&engine)), &mut new(), &[&[&text[..], &more].concat()]);
    close("as its text", &got, &whole[6 * 256..], 1e-4).unwrap();
    let moved = begun(1e-2, 4).tensors["prompt_embeddings"].data.clone();
    let fixed = 2 * rows.len() / 6;
    assert_eq!(rows[..fixed], moved[..fixed]);
    assert!(max_diff(&rows[fixed..], &moved[fixed..]).0 > 1e-3);
}

/// Gradients of the network that P-tuning learns with, against differences of the loss; its file has what it gives.
#[test]
fn p_tuning_learns_through_its_network() {
    let dir = tempfile::tempdir().unwrap();
    let config = |steps| TrainConfig {
        method: Kind::PTuning,
        num_virtual_tokens: Some(5),
        encoder_hidden_size: Some(12),
        steps: Some(steps),
        weight_decay: 0.0,
        ..config()
    };
    let out = dir.path().join("whole");
    let mut trainer = base(1).trainer(config(4), data(), None, None, &out).unwrap();
    let first = trainer.step(&mut Quiet { stop_after: 0 }).unwrap().loss;
    let grads: Vec<(String, f64)> = trainer
        .gradients()
        .unwrap()
        .into_iter()
        .map(|(name, grad)| (name.to_string(), norm(grad.iter().map(|g| f64::from(*g)))))
        .collect();
    assert_eq!(grads.len(), 7, "{grads:?}");
    // The sum of squares of all gradients is the slope of the loss along them: a plain step of SGD shows it.
    let squares: f64 = grads.iter().map(|(_, norm)| norm * norm).sum();
    let slope = {
        let rate = 1e-3 / squares.sqrt();
        let config = TrainConfig { optimizer: pocketlora::train::Optimizer::Sgd, lr: rate as f32, ..config(2) };
        let mut trainer = base(1).trainer(config, data(), None, None, &dir.path().join("sgd")).unwrap();
        let before = trainer.step(&mut Quiet { stop_after: 0 }).unwrap().loss;
        let after = trainer.step(&mut Quiet { stop_after: 0 }).unwrap().loss;
        assert!((before - first).abs() < 1e-6);
        (before - after) / rate
    };
    assert!((slope / squares - 1.0).abs() < 3e-2, "slope {slope} instead of {squares}: {grads:?}");
    // The run's own end, the same after a kill, and what is served.
    trainer.run(&mut Quiet { stop_after: 0 }).unwrap();
    let file = AdapterFile::open(&out).unwrap();
    assert_eq!(file.tensors.keys().collect::<Vec<_>>(), ["prompt_embeddings"]);
    let json = json(&out.join("adapter_config.json"));
    assert_eq!((&json["peft_type"], &json["encoder_reparameterization_type"]), (&"P_TUNING".into(), &"MLP".into()));
    let cut = dir.path().join("cut");
    let mut stopped = base(1).trainer(config(4), data(), None, None, &cut).unwrap();
    assert!(!stopped.run(&mut Quiet { stop_after: 2 }).unwrap().done);
    drop(stopped);
    let mut resumed = base(1).trainer(config(4), data(), None, None, &cut).unwrap();
    resumed.resume().unwrap();
    resumed.run(&mut Quiet { stop_after: 0 }).unwrap();
    let bytes = |out: &Path| fs::read(out.join("adapter_model.safetensors")).unwrap();
    assert_eq!(bytes(&out), bytes(&cut));
}

fn family(name: &str) -> PathBuf {
    golden("families").join(name)
}

/// The slope of the loss along its gradient is the gradient's square: a small step of SGD shows it, whatever is trained.
fn slope_is_the_gradient(what: &str, model: &Path, config: &TrainConfig) -> Result<(), String> {
    let samples = [vec![3, 17, 41, 7, 9, 22, 41], vec![41, 30, 5, 3, 60]];
    let sample = |ids: &Vec<u32>| Sample::new(ids.clone(), (0..ids.len()).map(|i| i > 0).collect());
    let out = tempfile::tempdir().unwrap();
    let run = |lr: f64, steps: u64| {
        let config = TrainConfig {
            optimizer: pocketlora::train::Optimizer::Sgd,
            lr: lr as f32,
            steps: Some(steps),
            ..config.clone()
        };
        let data = Dataset::new("families", samples.iter().map(sample).collect());
        open_exact(model, 1).trainer(config, data, None, None, &out.path().join(steps.to_string()))
    };
    let mut first = run(1e-3, 1).map_err(|e| format!("{what}: {e}"))?;
    let before = first.step(&mut Quiet { stop_after: 0 }).unwrap().loss;
    let gradients = first.gradients().unwrap();
    // One half of a fresh low-rank term is zero, and the other has no gradient then.
    let still = |one: &&(String, Vec<f32>)| !one.0.contains(".lora_") && one.1.iter().all(|g| *g == 0.0);
    if let Some((name, _)) = gradients.iter().find(still) {
        return Err(format!("{what}: {name} has no gradient"));
    }
    let squares: f64 = gradients.iter().map(|(_, grad)| norm(grad.iter().map(|g| f64::from(*g))).powi(2)).sum();
    // From both sides, so that what bends does not count.
    let at = |change: f64| {
        let mut trainer = run(change.abs(), if change > 0.0 { 2 } else { 3 }).unwrap();
        trainer.step(&mut Quiet { stop_after: 0 }).unwrap();
        trainer.step(&mut Quiet { stop_after: 0 }).unwrap().loss
    };
    let rate = 4e-3 / squares;
    let slope = (before - at(rate)) / rate;
    let half = (before - at(-rate / 2.0)) / (rate / 2.0);
    let slope = 2.0 * half - slope;
    if (slope / squares - 1.0).abs() < 4e-2 {
        Ok(())
    } else {
        Err(format!("{what}: slope {slope} instead of {squares}"))
    }
}

/// Norms of all kinds: with their factors less one, centred with biases, of single heads, gated ones of recurrent layers.
#[test]
fn norms_biases_and_embeddings_learn_in_other_families() {
    let norms = |targets: &[&str]| TrainConfig {
        method: Kind::LnTuning,
        targets: targets.iter().map(|t| (*t).to_owned()).collect(),
        weight_decay: 0.0,
        ..config()
    };
    let embedding = TrainConfig {
        targets: vec!["embed_tokens".to_owned(), "lm_head".to_owned()],
        trainable_token_indices: vec![41, 3],
        weight_decay: 0.0,
        ..config()
    };
    let biases = TrainConfig { bias: Some("all".to_owned()), weight_decay: 0.0, ..config() };
    let prompt = TrainConfig { method: Kind::PromptTuning, num_virtual_tokens: Some(3), weight_decay: 0.0, ..config() };
    let rows = TrainConfig {
        method: Kind::TrainableTokens,
        trainable_token_indices: vec![41, 3],
        weight_decay: 0.0,
        ..config()
    };
    let cases = [
        ("gemma3_text", norms(&["auto"])),
        ("gemma3_text", rows.clone()),
        ("gemma3_text", prompt.clone()),
        ("gpt2", norms(&["auto"])),
        ("gpt2", prompt.clone()),
        ("lfm2", norms(&["auto"])),
        ("lfm2", rows),
        ("lfm2", prompt.clone()),
        ("qwen2", biases.clone()),
        ("qwen3", norms(&["q_norm", "k_norm", "norm"])),
        ("qwen3_5_text", norms(&["auto"])),
        ("qwen3_5_text", prompt),
        ("starcoder2", norms(&["auto"])),
        ("starcoder2", biases),
        ("llama", embedding),
    ];
    check_all(cases, |(name, config)| slope_is_the_gradient(name, &family(name), config));
}

/// Virtual tokens with the embeddings of tokens say what these say, whatever layers remember of them: keys and values, a
/// convolution's inputs, a state. Gemma scales what it looks up.
#[test]
fn virtual_tokens_are_read_as_tokens_are() {
    let (text, more) = ([5_u32, 60, 41, 7], [9_u32, 8, 33]);
    check_all([("gemma3_text", true), ("gpt2", false), ("lfm2", false), ("qwen3_5_text", false)], |(name, scales)| {
        let engine = open_exact(&family(name), 1);
        let config = internals::base(&engine).model.config();
        let (width, layers, heads) = (config.hidden_size, config.layers, config.heads);
        let weights = tensors(&family(name).join("model.safetensors"));
        let is_table = |n: &&String| n.ends_with("embed_tokens.weight") || n.ends_with("wte.weight");
        let table = &weights[weights.keys().find(is_table).unwrap()].data;
        // As Gemma's is rounded.
        let factor = if *scales { half::bf16::from_f32((width as f32).sqrt()).to_f32() } else { 1.0 };
        let row = |id: &u32| table[*id as usize * width..][..width].iter().map(|v| v * factor).collect::<Vec<f32>>();
        let dir = tempfile::tempdir().unwrap();
        let keys = serde_json::json!({
            "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": text.len(), "token_dim": width,
            "num_layers": layers, "num_attention_heads": heads,
        });
        fs::write(dir.path().join("adapter_config.json"), keys.to_string()).unwrap();
        let bytes: Vec<u8> = text.iter().flat_map(row).flat_map(f32::to_le_bytes).collect();
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![text.len(), width], &bytes).unwrap();
        let file = safetensors::serialize([("prompt_embeddings", view)], None).unwrap();
        fs::write(dir.path().join("adapter_model.safetensors"), file).unwrap();
        let prompt = attached(&engine, &[AdapterFile::open(dir.path()).unwrap()]);
        let new = || Sequence::new(internals::base(&engine), internals::numbers(&engine).cache).unwrap();
        let none = Adapters::none(internals::base(&engine));
        let whole = run(&engine, &none, &mut new(), &[&[&text[..], &more].concat()]);
        let vocab = whole.len() / (text.len() + more.len());
        let expected = &whole[text.len() * vocab..];
        let mut sequence = new();
        let got = run(&engine, &prompt, &mut sequence, &[&more[..1], &more[1..]]);
        close(name, &got, expected, 1e-4)?;
        sequence.snapshot(internals::base(&engine)).unwrap();
        for to in [2, 1, 0] {
            let reached = sequence.rewind(internals::base(&engine), to);
            let again = run(&engine, &prompt, &mut sequence, &[&more[reached..]]);
            close(&format!("{name}, back to {to}"), &again, &expected[reached * vocab..], 1e-4)?;
        }
        Ok(())
    });
}

/// The golden's targets are the tokens that were there before the invocation was put in their place.
#[test]
fn gradients_of_an_activated_adapter_are_those_of_peft() {
    let engine = base(2);
    let on = internals::base(&engine);
    let adapters = attached(&engine, &[AdapterFile::open(&of("alora", "")).unwrap()]);
    let wanted = data();
    let targets: Vec<u32> =
        wanted.samples.iter().flat_map(|s| s.trained.iter().filter(|i| *i > 0).map(|i| s.ids[i])).collect();
    let micro = internals::MicroBatch::new(&data_of("train_ids_alora").samples).with_targets(targets);
    let buffers = adapters.held().specs().map(|(_, spec)| Some(on.backend.buffer(spec.values()).unwrap()));
    let mut grads = internals::Gradients { tensors: buffers.collect(), resting: Vec::new() };
    let mut sums = internals::Sums::new(&on.backend, 1).unwrap();
    let (trained, mut peak) = (micro.trained() as f32, pocketlora::memory::Peak::default());
    let mut watch = internals::Watch { keep_going: &mut || true, peak: &mut peak };
    internals::micro_step(
        on,
        &adapters,
        &micro,
        1.0 / trained,
        None,
        pocketlora_kernels::Arithmetic::Exact,
        &internals::Layout::fast(false),
        (Some(&mut grads), &mut internals::Depth::default()),
        &mut internals::Pool::default(),
        (&mut sums, 0),
        &mut watch,
    )
    .unwrap();
    let expected = tensors(&of("alora", "train.safetensors"));
    let loss = sums.read(&on.backend).unwrap()[0] / f64::from(trained);
    assert!((loss - f64::from(expected["losses"].data[0])).abs() < 1e-4, "loss {loss}");
    for ((_, spec), grad) in adapters.held().specs().zip(&grads.tensors) {
        let grad = crate::common::values_of(&on.backend, grad.as_ref().unwrap());
        let expected = &expected[&format!("grad.base_model.model.{}", spec.name)].data;
        let error = norm(grad.iter().zip(expected).map(|(a, e)| f64::from(a - e)));
        let relative = error / norm(expected.iter().map(|e| f64::from(*e)));
        assert!(relative < 1e-3, "gradient of {} off by {relative:.2e} of its norm", spec.name);
    }
}
