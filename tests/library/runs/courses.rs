//! Courses that runs of the LoRA family can take: what each changes in a step, and that each is resumed to the bit.

use super::{Fixture, Notes, config, fixture, stop_after, weights};
use crate::common::{check_all, golden};
use pocketlora::adapter::{AdapterFile, DropoutForm, Kind, Method};
use pocketlora::train::{LayerOrder, Optimizer, TrainConfig, TrainPrecision};
use serde_json::json;
use std::collections::BTreeMap;

fn cases() -> Vec<(&'static str, TrainConfig)> {
    let form = |dropout_form| TrainConfig { dropout: 0.3, dropout_form, ..config() };
    let layers = |layers_order| TrainConfig {
        layers_at_once: Some(1),
        layers_every: Some(2),
        layers_order,
        lr: 1e-2,
        ..config()
    };
    let relora = || TrainConfig { relora: Some(3), relora_warmup: Some(0), ..config() };
    let options = json!({"target_r": 2, "tfinal": 2}).as_object().unwrap().clone();
    vec![
        ("relora", relora()),
        ("relora-whole", TrainConfig { relora_prune: Some(1.0), relora_warmup: Some(1), ..relora() }),
        ("relora-bounded", TrainConfig { relora: Some(2), relora_rank: Some(8), ..relora() }),
        ("relora-8bit", TrainConfig { relora_prune: Some(0.5), optimizer: Optimizer::AdamW8bit, ..relora() }),
        (
            "relora-embedding",
            TrainConfig { targets: vec!["q_proj".into(), "embed_tokens".into()], lr: 1e-2, ..relora() },
        ),
        ("lisa", layers(LayerOrder::Random)),
        ("rotate", layers(LayerOrder::Rotate)),
        ("dropbp", TrainConfig { dropbp: Some(0.4), ..config() }),
        ("rank", form(DropoutForm::Rank)),
        ("token", form(DropoutForm::Token)),
        ("riemannian", TrainConfig { riemannian: Some(1e-6), ..config() }),
        ("sam", TrainConfig { sam: Some(0.05), ..config() }),
        ("grow", TrainConfig { method: Kind::Adalora, options, grow_ranks: true, dropout: 0.0, lr: 2e-2, ..config() }),
        (
            "all",
            TrainConfig {
                sam: Some(0.01),
                riemannian: Some(1e-4),
                dropbp: Some(0.2),
                dropout_form: DropoutForm::Rank,
                lr: 3e-3,
                ..TrainConfig { relora: Some(3), relora_warmup: Some(0), ..layers(LayerOrder::Rotate) }
            },
        ),
    ]
}

#[test]
fn every_course_learns_and_resumes_to_the_same_bytes() {
    let f = fixture();
    let usual = f.whole(&config());
    check_all(cases(), |(name, config)| {
        let (out, mut notes) = (f.out(name), Notes::default());
        f.run(config, &out, false, &mut notes);
        let (first, last) = (notes.losses[0], notes.losses[notes.losses.len() - 1]);
        // All together are too much for nine steps, but are resumed like each.
        if *name != "all" && last >= first - 0.01 {
            return Err(format!("{name}: learned nothing, {:?}", notes.losses));
        }
        let whole = weights(&out);
        if whole == usual {
            return Err(format!("{name}: as without it"));
        }
        AdapterFile::open(&out).map_err(|e| format!("{name}: {e}"))?;
        let out = f.out(&format!("{name}-resumed"));
        // Before and behind a restart.
        f.run(config, &out, false, &mut stop_after(2));
        f.run(config, &out, true, &mut stop_after(5));
        f.run(config, &out, true, &mut Notes::default());
        if weights(&out) == whole { Ok(()) } else { Err(format!("{name}: resumed to other bytes")) }
    });
}

/// Plain gradients, one step of them: exact, without dropout, warm-up or clipping.
fn exact() -> TrainConfig {
    TrainConfig {
        rank: 8,
        optimizer: Optimizer::Sgd,
        precision: TrainPrecision::Exact,
        clip: 0.0,
        dropout: 0.0,
        warmup: 0.0,
        lr: 0.1,
        accumulate: 1,
        ..config()
    }
}

type Gradients = BTreeMap<String, Vec<f32>>;

/// Loss, gradients and adapter of the first step from `init`.
fn step(f: &Fixture, config: TrainConfig, init: &AdapterFile) -> (f64, Gradients, AdapterFile) {
    let engine = f.engine();
    let data = engine.dataset(&f.data, 1024).unwrap();
    let mut trainer = engine.trainer(config, data, None, Some(init), &f.out("step")).unwrap();
    let loss = trainer.step(&mut Notes::default()).unwrap().loss;
    (loss, trainer.gradients().unwrap().into_iter().collect(), trainer.snapshot().unwrap())
}

fn init() -> AdapterFile {
    AdapterFile::open(&golden("adapters/lora")).unwrap()
}

fn norm<'a>(values: impl Iterator<Item = &'a f32>) -> f64 {
    values.map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

/// What went into A and B, for a module of a LoRA: the change of the layer's weight `[out, in]`.
fn change(file: &AdapterFile, module: &str) -> Vec<f64> {
    let Method::Lora(lora) = &file.method else { panic!("{:?}", file.method) };
    let (rank, factor) = lora.of_module(module);
    let part = |part: &str| &file.tensors[&format!("{module}.lora_{part}.weight")];
    let (a, b) = (part("A"), part("B"));
    assert_eq!([a.shape[0], b.shape[1]], [rank; 2], "{module}");
    let input = a.shape[1];
    let mut change = Vec::with_capacity(b.data.len() / rank * input);
    for row in b.data.chunks(rank) {
        for c in 0..input {
            let products = row.iter().enumerate().map(|(k, b)| f64::from(*b) * f64::from(a.data[k * input + c]));
            change.push(products.sum::<f64>() * f64::from(factor));
        }
    }
    change
}

/// A restart changes nothing of what the adapter does: it is that of the run without one, with more ranks.
#[test]
fn a_restart_puts_aside_what_was_learned() {
    let f = fixture();
    let after = |config: &TrainConfig, name: &str, steps: u64| {
        let mut trainer = f.trainer(config.clone(), &f.out(name));
        (0..steps).for_each(|_| {
            trainer.step(&mut Notes::default()).unwrap();
        });
        trainer.snapshot().unwrap()
    };
    let relora = TrainConfig { relora: Some(3), relora_warmup: Some(0), ..config() };
    let bounded = TrainConfig { relora: Some(1), relora_rank: Some(8), ..relora.clone() };
    let (plain, restarted) = (after(&config(), "plain", 3), after(&relora, "restarted", 3));
    for module in plain.modules() {
        let (before, now) = (change(&plain, module), change(&restarted, module));
        let worst = before.iter().zip(&now).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-6, "{module}: {worst}");
    }
    let first = plain.modules().next().unwrap();
    let rank = |file: &AdapterFile| file.tensors[&format!("{first}.lora_A.weight")].shape[0];
    let [twice, four] = [after(&relora, "twice", 6), after(&bounded, "four", 4)];
    assert_eq!([rank(&plain), rank(&restarted), rank(&twice), rank(&four)], [4, 8, 12, 8]);
    // Where there is no room for both, the nearest of that rank is left: what is missing has nothing in common with it.
    let all = TrainConfig { relora: Some(1), ..relora };
    let [all, bounded] = [after(&all, "all", 2), after(&bounded, "bounded", 2)];
    for module in all.modules() {
        let (all, bounded) = (change(&all, module), change(&bounded, module));
        let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
        let (whole, kept) = (squares(&mut all.iter().copied()), squares(&mut bounded.iter().copied()));
        let left = squares(&mut all.iter().zip(&bounded).map(|(x, y)| x - y));
        assert!(
            (kept + left - whole).abs() < 1e-2 * whole && left < 0.5 * whole,
            "{module}: {kept} and {left} of {whole}"
        );
    }
}

/// Layers that rest stay as they are, and those that learn do so from the gradient that they have anyway.
#[test]
fn layers_that_rest_stay_as_they_are() {
    let (f, init) = (fixture(), init());
    let (_, plain, _) = step(&f, exact(), &init);
    let rotate = TrainConfig { layers_at_once: Some(1), layers_order: LayerOrder::Rotate, ..exact() };
    let (_, found, after) = step(&f, rotate, &init);
    let layers =
        plain.keys().filter_map(|name| name.split('.').find_map(|part| part.parse::<usize>().ok())).max().unwrap();
    for (name, gradient) in &plain {
        let learns = name.contains(&format!(".{layers}."));
        if learns {
            assert_eq!(&found[name], gradient, "{name}");
        } else {
            assert!(found[name].iter().all(|g| *g == 0.0), "{name}");
            let same = after.tensors[name].data.iter().zip(&init.tensors[name].data);
            // Rounded to f16.
            assert!(same.map(|(now, then)| (now - then).abs()).all(|off| off < 1e-3), "{name}");
        }
    }
    assert!(found.iter().any(|(_, gradient)| norm(gradient.iter()) > 0.0));
}

/// What is left out has no gradient, and what is above it has the one that it has anyway.
#[test]
fn layers_that_backward_leaves_out_have_no_gradient() {
    let (f, init) = (fixture(), init());
    let engine = f.engine();
    let config = |dropbp| TrainConfig { dropbp, lr: 1e-30, epochs: 12, ..exact() };
    let of = |dropbp, name: &str| {
        let data = engine.dataset(&f.data, 1024).unwrap();
        engine.trainer(config(dropbp), data, None, Some(&init), &f.out(name)).unwrap()
    };
    let (mut plain, mut drops) = (of(None, "plain"), of(Some(0.6), "drops"));
    let layer = |name: &str| name.split('.').find_map(|part| part.parse::<usize>().ok());
    let mut seen = BTreeMap::new();
    for number in 1..=12 {
        for trainer in [&mut plain, &mut drops] {
            trainer.step(&mut Notes::default()).unwrap();
        }
        let [whole, some] = [&plain, &drops].map(|trainer| trainer.gradients().unwrap());
        let last = whole.iter().filter_map(|(name, _)| layer(name)).max().unwrap();
        let mut left_out: Vec<usize> = Vec::new();
        for ((name, expected), (_, found)) in whole.iter().zip(&some) {
            let Some(own) = layer(name) else { continue };
            if found.iter().all(|g| *g == 0.0) {
                left_out.push(own);
            } else if own == last {
                assert_eq!(found, expected, "{name} in step {number}");
            }
        }
        left_out.dedup();
        assert!(number > 1 || left_out.is_empty(), "the first step measures");
        *seen.entry(left_out).or_insert(0) += 1;
    }
    assert!(seen.len() > 2, "{seen:?}");
}

/// `(BᵀB + δ) dA' = dA` and `dB' (A Aᵀ + δ) = dB`, with the gradients of a plain step.
#[test]
fn preconditioned_gradients_are_those_of_the_inverse() {
    let (f, init) = (fixture(), init());
    let (_, plain, _) = step(&f, exact(), &init);
    let delta = 1e-3;
    let (_, found, _) = step(&f, TrainConfig { riemannian: Some(delta), ..exact() }, &init);
    for module in init.modules() {
        let [name_a, name_b] = ["A", "B"].map(|part| format!("{module}.lora_{part}.weight"));
        let (a, b) = (&init.tensors[&name_a], &init.tensors[&name_b]);
        let (rank, input) = (a.shape[0], a.shape[1]);
        let value = |x: &[f32], at: usize| f64::from(x[at]);
        let damped = |i: usize, j: usize| if i == j { delta } else { 0.0 };
        let (mut errors, mut norms) = ([0.0; 2], [0.0; 2]);
        for (i, column) in (0..rank).flat_map(|i| (0..input).map(move |c| (i, c))) {
            let gram = |j: usize| {
                let products = (0..b.shape[0]).map(|o| value(&b.data, o * rank + i) * value(&b.data, o * rank + j));
                products.sum::<f64>() + damped(i, j)
            };
            let back: f64 = (0..rank).map(|j| gram(j) * value(&found[&name_a], j * input + column)).sum();
            errors[0] += (back - value(&plain[&name_a], i * input + column)).powi(2);
            norms[0] += value(&plain[&name_a], i * input + column).powi(2);
        }
        for (row, j) in (0..b.shape[0]).flat_map(|row| (0..rank).map(move |j| (row, j))) {
            let gram = |i: usize| {
                let products = (0..input).map(|c| value(&a.data, i * input + c) * value(&a.data, j * input + c));
                products.sum::<f64>() + damped(i, j)
            };
            let back: f64 = (0..rank).map(|i| gram(i) * value(&found[&name_b], row * rank + i)).sum();
            errors[1] += (back - value(&plain[&name_b], row * rank + j)).powi(2);
            norms[1] += value(&plain[&name_b], row * rank + j).powi(2);
        }
        for (error, norm) in errors.iter().zip(norms) {
            assert!(error.sqrt() < 1e-3 * norm.sqrt(), "{module}: {errors:?} of {norms:?}");
        }
    }
}

/// The gradient is that of a plain step from the place up the hill, and the step is taken from where it was.
#[test]
fn a_sharpness_aware_step_has_the_gradient_up_the_hill() {
    let (f, init) = (fixture(), init());
    let (loss, plain, _) = step(&f, exact(), &init);
    let rho = 0.5;
    let (same, found, after) = step(&f, TrainConfig { sam: Some(rho), ..exact() }, &init);
    assert_eq!(loss, same, "the loss is that of the place itself");
    let length = norm(plain.values().flatten());
    let mut up = init.clone();
    for (name, tensor) in &mut up.tensors {
        let along = plain[name].iter().map(|g| (f64::from(rho) * f64::from(*g) / length) as f32);
        tensor.data.iter_mut().zip(along).for_each(|(w, e)| *w += e);
    }
    let (higher, expected, _) = step(&f, exact(), &up);
    assert!(higher > loss + 0.1 * f64::from(rho) * length, "{higher} after {loss}");
    for (name, expected) in &expected {
        let off = found[name].iter().zip(expected).map(|(a, b)| a - b).collect::<Vec<f32>>();
        assert!(norm(off.iter()) < 1e-3 * norm(expected.iter()), "{name}");
        // The step, rounded to f16.
        for ((w, g), now) in init.tensors[name].data.iter().zip(&found[name]).zip(&after.tensors[name].data) {
            assert!((w - 0.1 * g - now).abs() < 1e-3 * (1.0 + w.abs()), "{name}");
        }
    }
}

/// The gradient along it is the slope of the loss, with the same ranks or tokens left out.
#[test]
fn dropout_forms_have_the_gradient_of_what_they_leave() {
    let (f, init) = (fixture(), init());
    check_all([DropoutForm::Input, DropoutForm::Rank, DropoutForm::Token], |form| {
        let config = || TrainConfig { dropout: 0.4, dropout_form: *form, ..exact() };
        let (_, gradients, _) = step(&f, config(), &init);
        let length = norm(gradients.values().flatten());
        let along = |by: f64| {
            let mut moved = init.clone();
            for (name, tensor) in &mut moved.tensors {
                let step = gradients[name].iter().map(|g| (by * f64::from(*g) / length) as f32);
                tensor.data.iter_mut().zip(step).for_each(|(w, e)| *w += e);
            }
            step(&f, config(), &moved).0
        };
        let slope = (along(0.02) - along(-0.02)) / 0.04;
        if (slope - length).abs() < 0.01 * length {
            Ok(())
        } else {
            Err(format!("{form:?}: {slope} instead of {length}"))
        }
    });
}

/// Ranks grow from one of each module to the target, and no further.
#[test]
fn growing_ranks_reach_the_target() {
    let f = fixture();
    let (_, config) = cases().into_iter().find(|(name, _)| *name == "grow").unwrap();
    let mut trainer = f.trainer(config.clone(), &f.out("grow"));
    let ranks = |file: &AdapterFile| {
        let of = |(name, t): (&String, &pocketlora::adapter::HostTensor)| {
            name.ends_with("lora_E").then(|| t.data.iter().filter(|e| **e != 0.0).count())
        };
        file.tensors.iter().filter_map(of).collect::<Vec<usize>>()
    };
    let mut before = 0;
    for number in 1..=trainer.total_steps() {
        trainer.step(&mut Notes::default()).unwrap();
        let now = ranks(&trainer.snapshot().unwrap());
        let all: usize = now.iter().sum();
        assert!(all >= before && all <= 2 * now.len(), "after {number}: {now:?}");
        assert!(number > 1 || all == now.len(), "{now:?}");
        before = all;
    }
    let last = ranks(&trainer.snapshot().unwrap());
    assert_eq!(last.iter().sum::<usize>(), 2 * last.len());
    assert!(last.iter().any(|rank| *rank != 2), "{last:?}");
}

#[test]
fn courses_that_cannot_be_are_refused() {
    let f = fixture();
    let of = |method| TrainConfig { method, ..config() };
    for (config, said) in [
        (TrainConfig { relora: Some(100), ..config() }, "`relora`"),
        (TrainConfig { relora: Some(2), ..of(Kind::Dora) }, "`relora`"),
        (TrainConfig { relora: Some(2), init_lora_weights: Some("pissa".into()), ..config() }, "`init-lora-weights`"),
        (
            TrainConfig {
                rank_pattern: [("q_proj".to_owned(), 3)].into(),
                init_lora_weights: Some("orthogonal".into()),
                ..config()
            },
            "`rank-pattern`",
        ),
        (TrainConfig { riemannian: Some(1e-6), ..of(Kind::Dora) }, "`riemannian`"),
        (TrainConfig { riemannian: Some(0.0), ..config() }, "`riemannian`"),
        (TrainConfig { sam: Some(-1.0), ..config() }, "`sam`"),
        (TrainConfig { dropout: 0.0, dropout_form: DropoutForm::Rank, ..config() }, "`dropout-form`"),
        (
            TrainConfig { layers_at_once: Some(1), method: Kind::PrefixTuning, ..TrainConfig::default() },
            "`layers-at-once`",
        ),
        (TrainConfig { grow_ranks: true, ..config() }, "`grow-ranks`"),
        (
            TrainConfig {
                grow_ranks: true,
                options: json!({"target_r": 4}).as_object().unwrap().clone(),
                dropout: 0.0,
                ..of(Kind::Adalora)
            },
            "`grow-ranks`",
        ),
    ] {
        let engine = f.engine();
        let data = engine.dataset(&f.data, 1024).unwrap();
        let made = engine.trainer(config, data, None, None, &f.out("bad")).map(|_| ());
        assert!(made.as_ref().is_err_and(|e| e.to_string().contains(said)), "{said}: {made:?}");
    }
}
