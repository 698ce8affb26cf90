//! Every optimizer learns and is resumed to the bit.

use super::{Notes, config, fixture, stop_after, weights};
use crate::common::{check_all, golden};
use pocketlora::adapter::AdapterFile;
use pocketlora::train::{Optimizer, TrainConfig};

#[test]
fn every_optimizer_learns_and_resumes_to_the_same_bytes() {
    let f = fixture();
    let cases = [
        ("adamw", TrainConfig { weight_decay: 0.01, ..config() }),
        ("adamw8bit", TrainConfig { optimizer: Optimizer::AdamW8bit, ..config() }),
        ("sgd", TrainConfig { optimizer: Optimizer::Sgd, lr: 1.0, ..config() }),
        ("momentum", TrainConfig { optimizer: Optimizer::Sgd, momentum: 0.9, lr: 0.5, ..config() }),
        ("lion", TrainConfig { optimizer: Optimizer::Lion, ..config() }),
        ("plus", TrainConfig { lora_plus_ratio: 4.0, beta1: 0.8, beta2: Some(0.95), eps: 1e-6, ..config() }),
    ];
    let mut adapters = Vec::new();
    for (name, config) in &cases {
        let (out, mut notes) = (f.out(name), Notes::default());
        f.run(config, &out, false, &mut notes);
        let (first, last) = (notes.losses[0], notes.losses[notes.losses.len() - 1]);
        assert!(last < first - 0.01, "{name}: {:?}", notes.losses);
        adapters.push(weights(&out));
    }
    assert!((1..adapters.len()).all(|i| !adapters[..i].contains(&adapters[i])), "two optimizers did the same");
    check_all(cases.iter().zip(adapters), |((name, config), whole)| {
        let out = f.out(&format!("{name}-resumed"));
        f.run(config, &out, false, &mut stop_after(4));
        f.run(config, &out, true, &mut Notes::default());
        if weights(&out) == *whole { Ok(()) } else { Err(format!("{name}: resumed to other bytes")) }
    });
}

#[test]
fn states_take_what_the_plan_says() {
    let config = |optimizer| TrainConfig { optimizer, ..TrainConfig::default() };
    for (config, bytes) in [
        (config(Optimizer::AdamW), 8000),
        (config(Optimizer::AdamW8bit), 2 * (1000 + 4 * 4)),
        (config(Optimizer::Lion), 4000),
        (config(Optimizer::Sgd), 0),
        (TrainConfig { momentum: 0.9, ..config(Optimizer::Sgd) }, 4000),
    ] {
        assert_eq!(config.state_bytes(1000), bytes, "{:?}", config.optimizer);
    }
}

/// With plain SGD a step is the gradient times the rate: B's must be four times as long, A's as long as before.
#[test]
fn lora_plus_lets_b_learn_faster() {
    let f = fixture();
    let init = AdapterFile::open(&golden("adapters/lora")).unwrap();
    let step = |ratio: f32| {
        let config = TrainConfig {
            rank: 8,
            optimizer: Optimizer::Sgd,
            lora_plus_ratio: ratio,
            clip: 0.0,
            dropout: 0.0,
            warmup: 0.0,
            lr: 0.5,
            ..config()
        };
        let engine = f.engine();
        let data = engine.dataset(&f.data, 1024).unwrap();
        let mut trainer = engine.trainer(config, data, None, Some(&init), &f.out("plus")).unwrap();
        trainer.step(&mut Notes::default()).unwrap();
        trainer.snapshot().unwrap()
    };
    let (plain, plus) = (step(1.0), step(4.0));
    for module in init.modules() {
        let at = |file: &AdapterFile, part: &str| file.tensors[&format!("{module}.lora_{part}.weight")].clone();
        assert_eq!(at(&plain, "A"), at(&plus, "A"));
        let begin = at(&init, "B");
        let length = |after: &[f32]| {
            let squares = after.iter().zip(&begin.data).map(|(a, b)| f64::from(a - b).powi(2));
            squares.sum::<f64>().sqrt()
        };
        let ratio = length(&at(&plus, "B").data) / length(&at(&plain, "B").data);
        // Snapshots are rounded to f16.
        assert!((ratio - 4.0).abs() < 0.1, "{module}: {ratio}");
    }
}
