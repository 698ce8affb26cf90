//! Methods that train other numbers than A and B and are saved as the plain LoRA that follows of them.

use super::begun::{Losses, train};
use super::methods::{base, config, data, json};
use crate::common::{check_all, open_exact};
use pocketlora::adapter::{AdapterFile, Combination, Composition, Kind, Method, compose, cut_rank, export_compressed};
use pocketlora::format::Existing;
use pocketlora::train::{Dataset, Sample, TrainConfig};
use serde_json::{Map, Value, json};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

/// A method with options of its own, and the rank that its file has where 4 was asked for.
const KIN: [(Kind, &str, f64, usize); 6] = [
    (Kind::LoraXs, "", 0.0, 4),
    (Kind::Dylora, "", 0.0, 4),
    (Kind::Sora, "sparse_lambda", 2.0, 4),
    (Kind::Melora, "mini_loras", 2.0, 4),
    (Kind::Hydra, "", 0.0, 8),
    (Kind::DeltaLora, "delta_start", 3.0, 8),
];

fn settings((kind, option, value, _): (Kind, &str, f64, usize)) -> TrainConfig {
    let targets = ["q_proj", "v_proj", "down_proj"].map(str::to_owned).to_vec();
    let mut options = Map::new();
    if !option.is_empty() {
        options.insert(option.to_owned(), if value.fract() == 0.0 { json!(value as u64) } else { json!(value) });
    }
    let lr = if kind == Kind::LoraXs { 0.05 } else { 5e-3 };
    TrainConfig { method: kind, rank: 4, alpha: Some(8.0), targets, options, lr, ..config() }
}

fn plain() -> TrainConfig {
    TrainConfig { method: Kind::Lora, options: Map::new(), ..settings((Kind::Lora, "", 0.0, 4)) }
}

#[test]
fn their_files_are_loras_that_do_what_was_trained() {
    let dir = tempfile::tempdir().unwrap();
    let (of_base, _) = train(plain(), data(), &dir.path().join("plain"), 1, false, 1);
    let of_base = of_base.before.unwrap().held_out.unwrap();
    check_all(KIN, |case| {
        let (name, out) = (case.0.name(), dir.path().join(case.0.name()));
        let (summary, losses) = train(settings(*case), data(), &out, 2, false, 0);
        let (before, after) = (summary.before.unwrap().held_out.unwrap(), summary.eval_loss.unwrap());
        // R of LoRA-XS is not zero at first.
        if (before - of_base).abs() > 1e-4 {
            return Err(format!("{name}: the loss is {before} before the first step, the base's {of_base}"));
        }
        if after > before - 0.01 {
            return Err(format!("{name}: it does not learn: {losses:?}"));
        }
        let (file, written) = (AdapterFile::open(&out).unwrap(), json(&out.join("adapter_config.json")));
        assert_eq!((file.method.kind(), &written["peft_type"]), (Kind::Lora, &"LORA".into()), "{name}");
        assert_eq!(written["r"], json!(case.3), "{name}");
        let config = TrainConfig { rank: 8, alpha: None, targets: vec!["all".to_owned()], ..plain() };
        let again = dir.path().join(format!("{name}-again"));
        let mut trainer = base(2).trainer(config, data(), Some(data()), Some(&file), &again).unwrap();
        let from_file = trainer.run(&mut Losses { stop_after: 1, ..Losses::default() }).unwrap().before.unwrap();
        let off = (from_file.held_out.unwrap() - after).abs();
        if off > 3e-4 { Err(format!("{name}: the file's loss is {off} off")) } else { Ok(()) }
    });
}

#[test]
fn their_runs_end_in_the_same_bytes_however_often_they_stop() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = |out: &Path| fs::read(out.join("adapter_model.safetensors")).unwrap();
    check_all(KIN, |case| {
        let [whole, parts] = ["whole", "parts"].map(|end| dir.path().join(format!("{}-{end}", case.0.name())));
        train(settings(*case), data(), &whole, 1, false, 0);
        for step in [2, 4] {
            assert!(!train(settings(*case), data(), &parts, 2, step > 2, step).0.done);
        }
        assert!(train(settings(*case), data(), &parts, 3, true, 0).0.done);
        if bytes(&whole) == bytes(&parts) { Ok(()) } else { Err(format!("{}: other bytes", case.0.name())) }
    });
}

#[test]
fn gates_that_do_not_pay_close_and_their_ranks_are_gone() {
    let dir = tempfile::tempdir().unwrap();
    // Six steps of 0.005 take away 0.9 by the norm alone.
    let config = settings((Kind::Sora, "sparse_lambda", 33.0, 4));
    let rate = TrainConfig { steps: Some(40), ..config };
    let out = dir.path().join("out");
    train(rate, data(), &out, 2, false, 0);
    let file = AdapterFile::open(&out).unwrap();
    let ranks: Vec<usize> = file.modules().map(|m| file.tensors[&format!("{m}.lora_B.weight")].shape[1]).collect();
    assert!(
        ranks.iter().all(|rank| (1..=4).contains(rank)) && ranks.iter().sum::<usize>() < 4 * ranks.len(),
        "{ranks:?}"
    );
}

#[test]
fn the_first_ranks_of_dylora_are_a_lora() {
    let dir = tempfile::tempdir().unwrap();
    let (out, cut) = (dir.path().join("out"), dir.path().join("cut"));
    let steps = TrainConfig { steps: Some(60), ..settings(KIN[1]) };
    let (summary, _) = train(steps, data(), &out, 2, false, 0);
    let file = AdapterFile::open(&out).unwrap();
    cut_rank(&file, 1, &cut, Existing::Keep).unwrap();
    let loss = |file: &AdapterFile| {
        let config = TrainConfig { rank: 8, alpha: None, targets: vec!["all".to_owned()], ..plain() };
        let again = tempfile::tempdir().unwrap();
        let mut trainer = base(2).trainer(config, data(), Some(data()), Some(file), again.path()).unwrap();
        trainer.run(&mut Losses { stop_after: 1, ..Losses::default() }).unwrap().before.unwrap().held_out.unwrap()
    };
    let (before, whole, first) =
        (summary.before.unwrap().held_out.unwrap(), loss(&file), loss(&AdapterFile::open(&cut).unwrap()));
    assert!(whole < before - 0.5 && first < before - 0.4, "{before}, {whole} of all ranks, {first} of the first");
}

/// What a layer with a bias gives is behind it, too.
#[test]
fn hydra_is_a_lora_with_a_bias_on_layers_that_have_one() {
    let dir = tempfile::tempdir().unwrap();
    let engine = || open_exact(&crate::common::golden("tiny-qwen2"), 2);
    let ids: Vec<u32> = (1..20).collect();
    let data = || Dataset::new("ids", vec![Sample::new(ids.clone(), (0..ids.len()).map(|i| i > 0).collect())]);
    let config = TrainConfig { batch: 1, lr: 0.02, ..settings(KIN[4]) };
    let mut trainer = engine().trainer(config, data(), Some(data()), None, &dir.path().join("out")).unwrap();
    let after = trainer.run(&mut Losses::default()).unwrap().eval_loss.unwrap();
    let file = AdapterFile::open(&dir.path().join("out")).unwrap();
    assert!(matches!(&file.method, Method::Lora(lora) if lora.bias));
    let config = TrainConfig { batch: 1, rank: 8, alpha: None, targets: vec!["all".to_owned()], ..plain() };
    let again = dir.path().join("again");
    let served = engine();
    served.attach(&dir.path().join("out"), 1.0).unwrap();
    // A LoRA with a bias is served; and trained on.
    let mut trainer = engine().trainer(config, data(), Some(data()), Some(&file), &again).unwrap();
    let before = trainer.run(&mut Losses { stop_after: 1, ..Losses::default() }).unwrap().before.unwrap();
    assert!((before.held_out.unwrap() - after).abs() < 1e-3, "{before:?} instead of {after}");
}

#[test]
fn options_that_do_not_fit_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let of = |kind: Kind, option: &str, value: Value| {
        let mut config = settings((kind, "", 0.0, 4));
        config.options.insert(option.to_owned(), value);
        config
    };
    let cases: Vec<(TrainConfig, &str)> = vec![
        (of(Kind::Melora, "mini_loras", 3.into()), "`mini_loras`"),
        (TrainConfig { rank: 96, ..of(Kind::Melora, "mini_loras", 48.into()) }, "`mini_loras`"),
        (of(Kind::Sora, "sparse_lambda", (-1).into()), "sparse_lambda"),
        (of(Kind::Dylora, "r_min", 1.into()), "r_min"),
        (TrainConfig { rank: 33, options: Map::new(), ..settings(KIN[0]) }, "at most the 32"),
        (TrainConfig { lora_plus_ratio: 2.0, ..settings(KIN[1]) }, "lora-plus-ratio"),
    ];
    check_all(cases, |(config, said)| {
        match base(1).trainer(config.clone(), data(), None, None, &dir.path().join("out")) {
            Ok(_) => Err(format!("{:?} with {:?} is taken", config.method, config.options)),
            Err(e) if format!("{} {e}", e.place()).contains(said) => Ok(()),
            Err(e) => Err(format!("`{}: {e}` does not say {said}", e.place())),
        }
    });
}

/// A rank without its partner would be another adapter; brought to half the rank it is a LoRA as any.
#[test]
fn ranks_that_are_pairs_are_not_taken_apart() {
    let dir = tempfile::tempdir().unwrap();
    let [out, half] = ["out", "half"].map(|name| dir.path().join(name));
    let config = TrainConfig { init_lora_weights: Some("pissa".to_owned()), ..plain() };
    train(config, data(), &out, 1, false, 0);
    let file = AdapterFile::open(&out).unwrap();
    let engine = base(1);
    let model = pocketlora::internals::base(&engine).model.as_ref();
    let cut = cut_rank(&file, 2, &dir.path().join("cut"), Existing::Keep).map(|_| ());
    // As PEFT writes them: the second half is what the first began as, with its sign turned in B.
    let mut as_peft = file.clone();
    for (name, tensor) in &mut as_peft.tensors {
        let rank = 8;
        let (count, half) = (tensor.data.len(), tensor.data.len() / 2);
        if name.ends_with("lora_A.weight") {
            (0..half).for_each(|i| tensor.data[half + i] = tensor.data[i] - tensor.data[half + i]);
        } else {
            for row in (0..count).step_by(rank) {
                for k in row..row + rank / 2 {
                    tensor.data[k] += tensor.data[k + rank / 2];
                    tensor.data[k + rank / 2] *= -1.0;
                }
            }
        }
    }
    let small = export_compressed(&as_peft, model, 0, 0.5, &dir.path().join("small")).map(|_| ());
    for refused in [cut, small] {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("pairs") && error.contains("--method svd"), "{error}");
    }
    let composition = Composition { rank: Some(4), ..Composition::new(Combination::Svd) };
    compose(&[(file, 1.0)], &composition, &half, Existing::Keep, &mut |_| ControlFlow::Continue(())).unwrap();
    let file = AdapterFile::open(&half).unwrap();
    cut_rank(&file, 2, &dir.path().join("cut"), Existing::Keep).unwrap();
    export_compressed(&file, model, 0, 0.5, &dir.path().join("small")).unwrap();
}
