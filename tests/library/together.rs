//! Adapters of several methods trained in one run: saved each by itself, opened as one, stopped and resumed, and refused where
//! they do not go together.

use super::begun::Losses;
use super::methods::{attached, base, config, data, inputs, of, run};
use crate::common::{check_all, logits, max_diff};
use pocketlora::adapter::{AdapterFile, Kind};
use pocketlora::internals::{self, Sequence};
use pocketlora::train::{Summary, TrainConfig};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const BESIDE: [Kind; 3] = [Kind::PrefixTuning, Kind::Bottleneck, Kind::LnTuning];

fn settings() -> TrainConfig {
    let targets = ["q_proj", "v_proj", "down_proj"].map(str::to_owned).to_vec();
    TrainConfig { rank: 4, targets, num_virtual_tokens: Some(3), beside: BESIDE.to_vec(), ..config() }
}

fn train(config: TrainConfig, out: &Path, resume: bool, stop_after: u64) -> Summary {
    let mut trainer = base(2).trainer(config, data(), Some(data()), None, out).unwrap();
    if resume {
        trainer.resume().unwrap();
    }
    trainer.run(&mut Losses { stop_after, ..Losses::default() }).unwrap()
}

/// All files of adapters below `dir`.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let folders = ["", "beside/prefix-tuning", "beside/bottleneck", "beside/ln-tuning"];
    let names = folders
        .iter()
        .flat_map(|folder| ["adapter_config.json", "adapter_model.safetensors"].map(|name| format!("{folder}/{name}")));
    names
        .chain(["beside.json".to_owned()])
        .map(|name| (name.clone(), fs::read(dir.join(name.trim_start_matches('/'))).unwrap()))
        .collect()
}

#[test]
fn methods_learn_together_and_work_together() {
    let dir = tempfile::tempdir().unwrap();
    let (alone, out) = (dir.path().join("alone"), dir.path().join("together"));
    let plain = train(TrainConfig { beside: Vec::new(), num_virtual_tokens: None, ..settings() }, &alone, false, 0);
    let mut trainer = base(2).trainer(settings(), data(), Some(data()), None, &out).unwrap();
    let start = trainer.snapshot().unwrap();
    let summary = trainer.run(&mut Losses::default()).unwrap();
    assert!(
        summary.done && summary.eval_loss < plain.eval_loss,
        "{:?} is not below {:?}",
        summary.eval_loss,
        plain.eval_loss
    );

    // Each has learned, and is a whole adapter by itself.
    let file = AdapterFile::open(&out).unwrap();
    let kinds: Vec<Kind> = file.beside.iter().map(|other| other.method.kind()).collect();
    assert_eq!((file.method.kind(), &kinds[..]), (Kind::Lora, &BESIDE[..]));
    for (own, before) in file.beside.iter().zip(&start.beside) {
        let same = own.tensors == before.tensors
            && own.replaced.whole.iter().zip(&before.replaced.whole).all(|(a, b)| a.tensor.bytes == b.tensor.bytes);
        assert!(!same, "{} has not learned", own.method.kind().name());
    }
    // As one it is what they are beside each other, and what the run had.
    let engine = base(2);
    let one = engine.attach(&out, 1.0).unwrap();
    let whole = logits(&engine, &inputs());
    engine.detach(one).unwrap();
    let each: Vec<AdapterFile> = file.each();
    assert_eq!(each.len(), 4);
    let mut sequence = Sequence::new(internals::base(&engine), internals::numbers(&engine).cache).unwrap();
    let apart = run(&engine, &attached(&engine, &each), &mut sequence, &[&inputs()]);
    assert_eq!(max_diff(&whole, &apart).0, 0.0);
    engine.attach_file(trainer.snapshot().unwrap(), 1.0).unwrap();
    assert_eq!(max_diff(&whole, &logits(&engine, &inputs())).0, 0.0);
    for other in &each {
        let less = attached(&engine, std::slice::from_ref(other));
        let mut sequence = Sequence::new(internals::base(&engine), internals::numbers(&engine).cache).unwrap();
        assert!(max_diff(&whole, &run(&engine, &less, &mut sequence, &[&inputs()])).0 > 1e-3);
    }

    drop(trainer);
    // An adapter of one method in its place leaves nothing of them.
    let mut trainer = base(2)
        .trainer(TrainConfig { beside: Vec::new(), num_virtual_tokens: None, ..settings() }, data(), None, None, &out)
        .unwrap();
    trainer.replace_earlier();
    trainer.run(&mut Losses::default()).unwrap();
    assert!(AdapterFile::open(&out).unwrap().beside.is_empty() && !out.join("beside").exists());
}

/// Those that were trained together are one where adapters are mixed anew.
#[test]
fn a_mix_has_all_of_them_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("together");
    let beside = vec![Kind::Bottleneck];
    train(TrainConfig { beside, num_virtual_tokens: None, ..settings() }, &out, false, 0);
    let (later, at_once) = (base(1), base(1));
    let [all, lora] = [&out, &of("lora", "")].map(|folder| later.attach(folder, 1.0).unwrap());
    later.set_scales(&[(lora, 0.5), (all, 2.0)]).unwrap();
    at_once.attach(&out, 2.0).unwrap();
    at_once.attach(&of("lora", ""), 0.5).unwrap();
    assert_eq!(logits(&later, &inputs()), logits(&at_once, &inputs()));
    later.detach(all).unwrap();
    at_once.detach_all();
    at_once.attach(&of("lora", ""), 0.5).unwrap();
    assert_eq!(logits(&later, &inputs()), logits(&at_once, &inputs()));
}

#[test]
fn the_gradient_of_all_is_the_slope_of_the_loss() {
    let dir = tempfile::tempdir().unwrap();
    // Norms are no tensors of a file by that name.
    let beside = vec![Kind::PrefixTuning, Kind::Bottleneck];
    let config = TrainConfig { clip: 0.0, beside, ..settings() };
    let mut trainer = base(2).trainer(config, data(), None, None, &dir.path().join("out")).unwrap();
    // From where B is not zero.
    trainer.step(&mut Losses::default()).unwrap();
    let at = trainer.snapshot().unwrap();
    trainer.step(&mut Losses::default()).unwrap();
    let gradients: BTreeMap<String, Vec<f32>> = trainer.gradients().unwrap().into_iter().collect();
    let norm = gradients.values().flatten().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
    let along = |by: f64| {
        let mut moved = at.clone();
        for file in std::iter::once(&mut moved.tensors).chain(moved.beside.iter_mut().map(|other| &mut other.tensors)) {
            for (name, tensor) in file {
                tensor
                    .data
                    .iter_mut()
                    .zip(&gradients[name])
                    .for_each(|(w, g)| *w += (by * f64::from(*g) / norm) as f32);
            }
        }
        base(2).loss_with(Some(moved), &data(), &mut Losses::default()).unwrap()
    };
    let slope = (along(0.02) - along(-0.02)) / 0.04;
    assert!((slope - norm).abs() < 0.02 * norm, "{slope} instead of {norm}");
}

#[test]
fn together_they_stop_and_go_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("stopped"));
    let config = || TrainConfig { keep_best: true, eval_every: 1, ..settings() };
    train(config(), &whole, false, 0);
    train(config(), &out, false, 1);
    assert!(!AdapterFile::exists(&out));
    train(config(), &out, true, 3);
    assert!(train(config(), &out, true, 0).done);
    assert!(files(&whole) == files(&out));
    assert!(!out.join("best").exists());
}

#[test]
fn what_does_not_go_together_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let with = |beside: &[Kind], change: &dyn Fn(&mut TrainConfig)| {
        let mut config = TrainConfig { beside: beside.to_vec(), num_virtual_tokens: None, ..settings() };
        change(&mut config);
        config
    };
    let cases: [(TrainConfig, &str); 10] = [
        (with(&[Kind::Lora], &|_| ()), "the same"),
        (with(&[Kind::Ia3, Kind::Ia3], &|_| ()), "the same"),
        (with(&[Kind::PromptTuning, Kind::PrefixTuning], &|_| ()), "virtual tokens"),
        (with(&[Kind::Vera], &|_| ()), "prefix-tuning"),
        (with(&[Kind::Lora], &|c| c.method = Kind::Dora), "lora_A.weight"),
        (with(&[Kind::Ia3], &|c| c.relora = Some(2)), "relora"),
        (with(&[Kind::Ia3], &|c| c.init_lora_weights = Some("pissa".to_owned())), "init-lora-weights"),
        (
            with(&[Kind::Lora], &|c| {
                (c.method, c.init_lora_weights) = (Kind::PromptTuning, Some("eva".to_owned()));
            }),
            "init-lora-weights",
        ),
        (
            with(&[Kind::Bottleneck], &|c| c.options = json!({"group_size": 4}).as_object().unwrap().clone()),
            "group_size",
        ),
        (with(&[Kind::PrefixTuning], &|c| c.num_virtual_tokens = Some(60_000)), "virtual tokens"),
    ];
    check_all(cases, |(config, said)| {
        match base(1).trainer(config.clone(), data(), None, None, &dir.path().join("out")) {
            Ok(_) => Err(format!("{:?} beside {:?} is taken", config.beside, config.method)),
            Err(e) if format!("{} {e}", e.place()).contains(said) => Ok(()),
            Err(e) => Err(format!("`{e}` does not say {said}")),
        }
    });
    let out = dir.path().join("together");
    train(settings(), &out, false, 0);
    let all = AdapterFile::open(&out).unwrap();
    let again = base(1).trainer(
        TrainConfig { targets: vec!["all".to_owned()], ..config() },
        data(),
        None,
        Some(&all),
        &dir.path().join("again"),
    );
    assert!(again.is_err_and(|e| e.to_string().contains("trained together")));
    let one = AdapterFile::open(&of("lora", "")).unwrap();
    let beside = TrainConfig { beside: vec![Kind::Ia3], ..config() };
    let again = base(1).trainer(beside, data(), None, Some(&one), &dir.path().join("again"));
    assert!(again.is_err_and(|e| e.place().contains("beside")));

    // Without the list they are not used, and that is said.
    let list = out.join("beside.json");
    assert!(AdapterFile::open(&out).unwrap().warnings.iter().all(|warning| !warning.contains("beside.json")));
    fs::remove_file(&list).unwrap();
    let alone = AdapterFile::open(&out).unwrap();
    assert!(alone.beside.is_empty() && alone.warnings.iter().any(|warning| warning.contains("beside.json")));

    // Lists that are broken.
    check_all(
        [
            (json!({"beside": ["../together/beside/bottleneck"]}), "below"),
            (json!({"beside": ["/tmp"]}), "below"),
            (json!({"beside": "bottleneck"}), "list"),
            (json!({}), "list"),
            (json!({"beside": ["beside/none"]}), "none"),
            (json!([]), "object"),
        ],
        |(text, said)| {
            fs::write(&list, text.to_string()).unwrap();
            match AdapterFile::open(&out) {
                Ok(_) => Err(format!("{text} is taken")),
                Err(e) if format!("{} {e}", e.place()).contains(said) => Ok(()),
                Err(e) => Err(format!("{text}: `{e}` at {} does not say {said}", e.place())),
            }
        },
    );
}
