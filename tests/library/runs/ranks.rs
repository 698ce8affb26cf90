//! Ranks that are chosen by what gradients say of layers.

use super::{Fixture, Notes, config, fixture, stop_after, weights};
use pocketlora::adapter::{AdapterFile, Method};
use pocketlora::train::{RankChoice, TrainConfig};
use std::collections::BTreeMap;
use std::fs;

fn asked(values: usize) -> TrainConfig {
    TrainConfig { budget_parameters: Some(values), ..config() }
}

fn choose(f: &Fixture, config: &TrainConfig) -> RankChoice {
    let engine = f.engine();
    let data = engine.dataset(&f.data, 1024).unwrap();
    engine.choose_ranks(config, &data, &mut Notes::default()).unwrap()
}

/// The run keeps to the budget, its file says which ranks there are as PEFT does, and a run that was stopped goes on with the
/// ranks of its settings to the same bytes.
#[test]
fn ranks_keep_the_budget_and_are_resumed() {
    let f = fixture();
    let config = asked(6000);
    let found = choose(&f, &config);
    assert!(found.values() <= 6000 && found.values() > 5000, "{}", found.text());
    for one in &found.layers {
        for other in found.layers.iter().filter(|other| other.shape == one.shape && other.score > one.score) {
            assert!(other.rank >= one.rank, "{one:?} and {other:?}");
        }
    }
    assert!(found.layers.iter().any(|layer| layer.rank != found.layers[0].rank), "{}", found.text());
    let config = found.apply(config);
    let whole = f.whole(&config);
    let out = f.out("whole");
    found.write(&out).unwrap();
    assert_eq!(fs::read_to_string(out.join("ranks.txt")).unwrap(), found.text());
    let file = AdapterFile::open(&out).unwrap();
    let Method::Lora(lora) = &file.method else { panic!("{:?}", file.method) };
    let ranks: BTreeMap<&str, usize> = file.modules().map(|module| (module, lora.of_module(module).0)).collect();
    let expected: BTreeMap<&str, usize> =
        found.layers.iter().filter(|layer| layer.rank > 0).map(|layer| (&*layer.module, layer.rank)).collect();
    assert_eq!(ranks, expected);
    assert!(file.modules().all(|module| lora.of_module(module).1 == 2.0), "each layer has the same factor");
    assert_eq!(file.values(), found.values());
    assert!(file.warnings.is_empty(), "{:?}", file.warnings);

    let out = f.out("again");
    f.run(&config, &out, false, &mut stop_after(4));
    let written: TrainConfig = toml::from_str(&fs::read_to_string(out.join("train.toml")).unwrap()).unwrap();
    assert_eq!(written, config);
    f.run(&written, &out, true, &mut Notes::default());
    assert!(weights(&out) == whole, "resumed to other bytes");
}

/// The gradient of a weight has a norm, whatever the random directions on which it is measured.
#[test]
fn scores_are_those_of_the_weight_whatever_the_directions() {
    let f = fixture();
    let of = |seed| {
        let config = TrainConfig { seed, batch: 16, ..asked(6000) };
        choose(&f, &config).layers
    };
    for (one, other) in of(1).iter().zip(of(2)) {
        // 32 directions: an eighth of deviation each.
        let ratio = one.score / other.score;
        assert!((0.6..1.6).contains(&ratio), "{}: {} and {}", one.module, one.score, other.score);
    }
}

#[test]
fn layers_may_be_left_out_and_bad_settings_are_refused() {
    let f = fixture();
    let small = choose(&f, &asked(300));
    assert!(small.layers.iter().any(|layer| layer.rank == 0), "{}", small.text());
    let out = f.out("small");
    f.run(&TrainConfig { steps: Some(1), epochs: 3, ..small.apply(asked(300)) }, &out, false, &mut Notes::default());
    let file = AdapterFile::open(&out).unwrap();
    assert_eq!(file.modules().count(), small.layers.iter().filter(|layer| layer.rank > 0).count());
    let engine = f.engine();
    let data = engine.dataset(&f.data, 1024).unwrap();
    let of = |rank_pattern: &[(&str, usize)]| TrainConfig {
        rank_pattern: rank_pattern.iter().map(|(key, rank)| ((*key).to_owned(), *rank)).collect(),
        ..config()
    };
    for (config, init, said) in [
        (asked(6000), false, "choose them first"),
        (of(&[("no_proj", 2)]), false, "`no_proj`"),
        (TrainConfig { targets: vec!["q_proj".to_owned()], ..of(&[("q_proj", 0)]) }, false, "a rank above 0"),
        (of(&[("q_proj", 2)]), true, "`rank-pattern`"),
    ] {
        let init = init.then_some(&file);
        let error = engine.trainer(config, data.clone(), None, init, &f.out("bad")).err().unwrap().to_string();
        assert!(error.contains(said), "{said}: {error}");
    }
    for (config, said) in [(config(), "`budget-parameters`"), (asked(3), "`budget-parameters`")] {
        let error = engine.choose_ranks(&config, &data, &mut Notes::default()).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}
