//! Adapter methods on linear layers whose file is not what works there: what PEFT 0.21.2 computes with each on the base
//! `peft/base` (`tests/data/oracles/methods`), from one table.

use super::methods::{base, close, config, data, inputs, json, norm, of, train_like_peft};
use crate::common::{check_all, golden, logits, open_exact, tensors};
use pocketlora::adapter::{AdapterFile, Kind, Merged, export_gguf, export_mlx};
use pocketlora::format::{Existing, Target, open_source};
use pocketlora::internals::{self, Adapters};
use pocketlora::train::{Observer, StepReport, TrainConfig};
use pocketlora_kernels::WorkType;
use serde_json::{Value, json};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

/// A golden: its folder, its method, and the settings that begin an adapter of its config.
struct Case {
    dir: &'static str,
    kind: Kind,
    rank: Option<usize>,
    alpha: Option<f64>,
    options: Value,
    /// How far logits may be from PEFT's.
    bound: f32,
}

fn case(dir: &'static str, kind: Kind, rank: usize, alpha: f64, options: Value) -> Case {
    let (rank, alpha) = ((rank > 0).then_some(rank), (alpha > 0.0).then_some(alpha));
    Case { dir, kind, rank, alpha, options, bound: 1e-4 }
}

fn cases() -> Vec<Case> {
    let shared =
        json!({"oft_block_size": 8, "use_cayley_neumann": false, "block_share": true, "coft": true, "eps": 0.3});
    let blocks = json!({"nblocks": 2, "target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj"]});
    vec![
        case("lora_dora", Kind::Dora, 4, 8.0, json!({})),
        case("vera", Kind::Vera, 8, 0.0, json!({})),
        case("miss", Kind::Miss, 8, 0.0, json!({})),
        case("miss_mini", Kind::Miss, 8, 0.0, json!({"init_weights": "mini", "mini_r": 4})),
        case("adalora", Kind::Adalora, 6, 8.0, json!({})),
        case("adalora", Kind::Adalora, 6, 8.0, json!({"target_r": 3, "tinit": 2, "tfinal": 2})),
        case("delora", Kind::Delora, 4, 0.0, json!({"delora_lambda": 10})),
        case("loha", Kind::Loha, 4, 8.0, json!({})),
        case("road_1", Kind::Road, 0, 0.0, json!({"group_size": 16})),
        case("road_2", Kind::Road, 0, 0.0, json!({"group_size": 16, "variant": "road_2"})),
        case("road_4", Kind::Road, 0, 0.0, json!({"group_size": 16, "variant": "road_4"})),
        case("beft", Kind::Beft, 0, 0.0, json!({})),
        case("gralora", Kind::Gralora, 8, 16.0, json!({})),
        case("gralora_hybrid", Kind::Gralora, 8, 16.0, json!({"hybrid_r": 4})),
        case("hra", Kind::Hra, 4, 0.0, json!({})),
        case("oft", Kind::Oft, 0, 0.0, json!({"oft_block_size": 8, "use_cayley_neumann": false})),
        case("oft_neumann", Kind::Oft, 0, 0.0, json!({"oft_block_size": 0, "r": 4})),
        case("oft_block_share_coft", Kind::Oft, 0, 0.0, shared),
        case("lokr", Kind::Lokr, 4, 8.0, json!({})),
        case("lokr_decompose_both", Kind::Lokr, 2, 8.0, json!({"decompose_both": true, "decompose_factor": 8})),
        case("shira", Kind::Shira, 4, 0.0, json!({})),
        case("c3a", Kind::C3a, 0, 0.0, json!({"block_size": 16})),
        case("hira", Kind::Hira, 4, 0.0, json!({})),
        case("boft", Kind::Boft, 0, 0.0, json!({"boft_block_size": 8})),
        case("fourierft", Kind::Fourierft, 0, 0.0, json!({"n_frequency": 60, "scaling": 100})),
        case("glora_lora_vector", Kind::Glora, 4, 0.0, json!({"config_D_E": "vector"})),
        case("glora_vector_constant", Kind::Glora, 4, 0.0, json!({"config_A_B": "vector", "config_C": "vector"})),
        case("lora_bdlora", Kind::Bdlora, 4, 8.0, json!({"use_bdlora": blocks})),
    ]
}

/// Folders of goldens that are served and merged, but not trained as PEFT trained them.
const SERVED: &[(&str, f32)] = &[
    ("adalora_pruned", 1e-4),
    ("hra_gs", 1e-4),
    ("supertuning", 1e-4),
    ("supertuning_supra", 1e-4),
    ("miss_bat", 1e-4),
    ("vera_nosave", 1e-4),
    ("pvera", 1e-4),
    ("tinylora", 1e-4),
    ("vblora", 1e-4),
    ("vblora_topk_only", 1e-4),
    ("deft_qr", 1e-4),
    ("deft_relu", 1e-4),
];

#[test]
fn served_ones_give_the_logits_of_peft_and_so_do_merged_ones() {
    let dir = tempfile::tempdir().unwrap();
    let all = cases().into_iter().map(|case| (case.dir, case.bound)).chain(SERVED.iter().copied());
    check_all(all.enumerate(), |(i, (name, bound))| {
        let engine = base(2);
        let expected = &tensors(&of(name, "logits.safetensors"))["logits"].data;
        match engine.attach(&of(name, ""), 1.0) {
            // What changes the base's own blocks says that it wants to be merged.
            Err(e) if *name == "miss_bat" && e.to_string().contains("pocketlora merge") => {}
            Err(e) => return Err(format!("{name}: {e}")),
            Ok(_) => close(name, &logits(&engine, &inputs()), expected, *bound)?,
        }
        let (out, peft) = (dir.path().join(i.to_string()), golden("peft/base"));
        let file = AdapterFile::open(&of(name, "")).unwrap();
        let merged = Merged::new(open_source(&peft).unwrap(), &peft, &[(file, 1.0)]);
        let merged = match merged {
            // What it adds to outputs has no place in layers without a bias.
            Err(e) if e.to_string().contains("a layer without one") => return Ok(()),
            merged => merged.map_err(|e| format!("{name}: {e}"))?,
        };
        merged.write(&out, Target::F32, Existing::Keep, &mut |_| ControlFlow::Continue(())).unwrap();
        close(&format!("{name}, merged"), &logits(&open_exact(&out, 1), &inputs()), expected, *bound)
    });
}

#[test]
fn losses_and_gradients_of_made_tensors_are_those_of_peft() {
    let drawn = [("vera_nosave", false), ("deft_relu", false), ("deft_relu", true)];
    // Of C3A see below.
    let all = cases().into_iter().filter(|case| case.kind != Kind::C3a);
    let all = all.flat_map(|case| [(case.dir, false), (case.dir, true)]);
    check_all(all.chain(drawn), |(name, accumulate)| train_like_peft(name, *accumulate));
}

/// PEFT 0.21.2 passes on through C3A what a kernel read from `a + b` would, in place of `b - a` as its forward has it: of the
/// gradients in its golden only the one that came through no kernel is that of its loss. Ours are those of differences.
#[test]
fn gradients_of_c3a_are_those_of_its_loss() {
    let first = |file: &AdapterFile| {
        let out = tempfile::tempdir().unwrap();
        let mut trainer = base(2).trainer(config(), data(), None, Some(file), out.path()).unwrap();
        let loss = trainer.step(&mut First { loss: None, stop_after: 0 }).unwrap().loss;
        (loss, trainer.gradients().unwrap())
    };
    let length = |values: &[f32]| norm(values.iter().map(|v| f64::from(*v)));
    let file = AdapterFile::open(&of("c3a", "")).unwrap();
    let (_, grads) = first(&file);
    let last = grads.iter().find(|(name, _)| name.contains("layers.1.mlp")).unwrap();
    let expected = &tensors(&of("c3a", "train.safetensors"))[&format!("grad.base_model.model.{}", last.0)].data;
    let off: Vec<f32> = last.1.iter().zip(expected).map(|(a, e)| a - e).collect();
    assert!(length(&off) < 1e-3 * length(expected), "{} of {}", length(&off), length(expected));
    check_all(grads, |(name, grad)| {
        // Along the gradient, by a step that moves the loss enough to see it in f32.
        let step = 0.02 / length(grad);
        let [up, down] = [1.0, -1.0].map(|sign| {
            let mut moved = file.clone();
            let values = &mut moved.tensors.get_mut(name).unwrap().data;
            values.iter_mut().zip(grad).for_each(|(v, g)| *v += (sign * step / length(grad)) as f32 * g);
            first(&moved).0
        });
        let slope = (up - down) / (2.0 * step);
        if (slope - length(grad)).abs() > 0.01 * length(grad) {
            return Err(format!("{name}: the loss rises by {slope}, the gradient says {}", length(grad)));
        }
        Ok(())
    });
}

/// A fresh adapter's run in the folder `out`, on the layers of the golden.
fn train(case: &Case, out: &Path, threads: usize, resume: bool, stop_after: u64) -> (bool, f64) {
    let peft = json(&of(case.dir, "adapter_config.json"));
    let targets = peft["target_modules"].as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned());
    let mut config = TrainConfig { method: case.kind, targets: targets.collect(), ..config() };
    config.options = case.options.as_object().unwrap().clone();
    config.rank = case.rank.unwrap_or(config.rank);
    config.alpha = case.alpha;
    let mut trainer = base(threads).trainer(config, data(), None, None, out).unwrap();
    if resume {
        trainer.resume().unwrap();
    }
    let mut first = First { loss: None, stop_after };
    let done = trainer.run(&mut first).unwrap().done;
    (done, first.loss.unwrap_or_default())
}

/// Keeps the loss of the first step.
struct First {
    loss: Option<f64>,
    stop_after: u64,
}

impl Observer for First {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        self.loss.get_or_insert(report.loss);
        if report.step == self.stop_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

#[test]
fn fresh_ones_begin_as_the_base_and_are_saved_as_peft_saves_them() {
    let dir = tempfile::tempdir().unwrap();
    let lora = case("lora_dora", Kind::Lora, 4, 8.0, json!({}));
    let (_, of_base) = train(&lora, &dir.path().join("lora"), 1, false, 1);
    check_all(cases(), |case| {
        let out = dir.path().join(format!("{} {}", case.dir, case.options).replace(['"', ':', '/'], "_"));
        let name = case.dir;
        let (done, loss) = train(case, &out, 1, false, 0);
        // AdaLoRA's has what keeps its ranks apart in it.
        if !done || (loss - of_base).abs() > 1e-4 && case.kind != Kind::Adalora {
            return Err(format!("{name}: begins with a loss of {loss} instead of {of_base}"));
        }
        let (ours, theirs) = (json(&out.join("adapter_config.json")), json(&of(name, "adapter_config.json")));
        for (key, value) in &theirs {
            let names = |value: &Value| {
                let mut names: Vec<_> = value.as_array().into_iter().flatten().map(Value::to_string).collect();
                names.sort();
                names
            };
            // The seeds are ours, and so is what PEFT notes of itself.
            let mut free = vec!["peft_version", "base_model_name_or_path", "projection_prng_key", "random_seed"];
            // A schedule is the run's.
            free.extend(["target_r", "tinit", "tfinal", "total_step"]);
            // So is where it begins; and PEFT makes a single factor where its config has two.
            free.extend(["init_weights", "boft_n_butterfly_factor"]);
            let same = match ours.get(key) {
                Some(own) if own.is_array() => names(own) == names(value),
                Some(own) => own == value || own.as_f64().is_some() && own.as_f64() == value.as_f64(),
                // Keys that say nothing need not be there.
                None => *value == Value::Null || *value == json!({}) || *value == json!(false),
            };
            let tools = key.starts_with("megatron") || key.starts_with("qalora");
            if !(same || tools || free.contains(&key.as_str())) {
                return Err(format!("{name}: `{key}` is {:?} instead of {value}", ours.get(key)));
            }
        }
        let shapes = |path: &Path| -> Vec<(String, Vec<usize>)> {
            let read = tensors(&path.join("adapter_model.safetensors"));
            read.into_iter().map(|(name, tensor)| (name, tensor.shape)).collect()
        };
        if shapes(&out) != shapes(&of(name, "")) {
            return Err(format!("{name}: {:?}", shapes(&out)));
        }
        // It opens again, and is served as it was trained.
        base(1).attach(&out, 1.0).map(drop).map_err(|e| format!("{name}: {e}"))
    });
}

#[test]
fn runs_of_made_tensors_end_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = |out: &Path| fs::read(out.join("adapter_model.safetensors")).unwrap();
    check_all(cases(), |case| {
        let name = format!("{} {}", case.dir, case.options).replace(['"', ':', '/'], "_");
        let [whole, cut] = ["whole", "cut"].map(|part| dir.path().join(format!("{name}-{part}")));
        assert!(train(case, &whole, 2, false, 0).0);
        assert!(!train(case, &cut, 1, false, 2).0);
        assert!(train(case, &cut, 1, true, 0).0);
        if bytes(&whole) != bytes(&cut) { Err(format!("{}: other bytes", case.dir)) } else { Ok(()) }
    });
}

/// Numbers of a config changed one at a time, and bits of the tensors' header: errors, and nothing half attached.
#[test]
fn broken_files_of_layer_methods_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let engine = base(1);
    let all = cases().into_iter().map(|case| case.dir).chain(SERVED.iter().map(|(name, _)| *name));
    check_all(all, |name| {
        let [config, weights] = ["adapter_config.json", "adapter_model.safetensors"];
        let (good, good_config) = (fs::read(of(name, weights)).unwrap(), json(&of(name, config)));
        let attach = |config_text: String, bytes: &[u8]| {
            fs::write(dir.path().join(config), config_text).unwrap();
            fs::write(dir.path().join(weights), bytes).unwrap();
            let attached = engine.attach(dir.path(), 1.0).is_ok();
            let half = !attached && !engine.attached().is_empty();
            engine.detach_all();
            if half { Err(format!("{name}: half attached")) } else { Ok(()) }
        };
        for (key, value) in good_config.iter().filter(|(_, value)| value.is_number() || value.is_boolean()) {
            for other in [
                json!(0),
                json!(1),
                json!(3),
                json!(-2),
                json!(65_536),
                json!(0.5),
                json!(!value.as_bool().unwrap_or(true)),
            ] {
                let mut changed = good_config.clone();
                changed.insert(key.clone(), other);
                attach(Value::from(changed).to_string(), &good)?;
            }
        }
        let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
        for bit in (0..header * 8).step_by(331) {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            attach(Value::from(good_config.clone()).to_string(), &bad)?;
        }
        Ok(())
    });
}

#[test]
fn what_layer_methods_cannot_do_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let engine = base(1);
    let model = internals::base(&engine).model.as_ref();
    check_all(cases(), |case| {
        let file = AdapterFile::open(&of(case.dir, "")).unwrap();
        for (format, made) in [
            ("GGUF", export_gguf(&file, model, &dir.path().join("a.gguf"))),
            ("mlx", export_mlx(&file, model, &dir.path().join("mlx"))),
        ] {
            let error = made.err().map(|e| e.to_string()).unwrap_or_default();
            if !error.contains(format) || !error.contains(case.kind.name()) || !error.contains("merge") {
                return Err(format!("{} as {format}: {error}", case.dir));
            }
        }
        Ok(())
    });
    // A place beyond the layer.
    let mut file = AdapterFile::open(&of("shira", "")).unwrap();
    let (name, places) = file.tensors.iter_mut().find(|(name, _)| name.ends_with("q_proj.shira_indices")).unwrap();
    places.data[0] = 64.0;
    let module = name.strip_suffix(".shira_indices").unwrap().to_owned();
    let mut adapters = Adapters::none(internals::base(&engine));
    let error = adapters.attach(internals::base(&engine), &file, 1.0, WorkType::F32).unwrap_err().to_string();
    assert!(error.contains(&module) && error.contains("`64`"), "{error}");
    // Settings that no adapter can begin with.
    let begin = |kind, rank, options: Value| {
        let options = options.as_object().unwrap().clone();
        let config = TrainConfig { method: kind, rank, options, ..config() };
        let out = tempfile::tempdir().unwrap();
        base(1).trainer(config, data(), None, None, out.path()).map(|_| ()).unwrap_err().to_string()
    };
    let rank = TrainConfig::default().rank;
    for (kind, rank, options, said) in [
        (Kind::Road, rank, json!({"group_size": 7}), "group_size"),
        (Kind::Road, rank, json!({"group_size": 48}), "group_size"),
        (Kind::Road, rank, json!({"variant": "road_3"}), "road_3"),
        (Kind::Road, rank, json!({"block_size": 4}), "block_size"),
        (Kind::Vera, rank, json!({"save_projection": false}), "save_projection"),
        (Kind::C3a, rank, json!({"block_size": 24}), "block_size"),
        (Kind::Boft, rank, json!({"boft_block_size": 24}), "boft_block_size"),
        (Kind::Boft, rank, json!({"boft_block_size": 8, "boft_n_butterfly_factor": 5}), "boft_block_size"),
        (Kind::Fourierft, rank, json!({"n_frequency": 3000}), "n_frequency"),
        (Kind::Pvera, rank, json!({}), "vera"),
        (Kind::Deft, rank, json!({}), "--init"),
        (Kind::Glora, rank, json!({"config_A_B": "constant"}), "config_A_B"),
        (Kind::MultitaskPromptTuning, rank, json!({}), "prompt-tuning"),
        (Kind::Miss, rank, json!({"init_weights": "bat"}), "bat"),
        (Kind::Miss, rank, json!({"init_weights": "mini", "mini_r": 5}), "mini_r"),
        (Kind::Miss, 65, json!({}), "rank"),
        (Kind::Hra, 3, json!({}), "rank"),
        (Kind::Hra, 4, json!({"apply_GS": true}), "apply_GS"),
        (Kind::Oft, rank, json!({"oft_block_size": 24}), "oft_block_size"),
        (Kind::Gralora, 9, json!({}), "gralora_k"),
        (Kind::Loha, 65, json!({}), "`r`"),
        (Kind::Shira, 40, json!({}), "rank"),
        (Kind::Bdlora, rank, json!({}), "use_bdlora"),
        (Kind::Supertuning, rank, json!({}), "supertuning"),
        (Kind::Lora, rank, json!({"group_size": 4}), "options"),
    ] {
        let error = begin(kind, rank, options.clone());
        assert!(error.contains(said), "{}, {options}: {error}", kind.name());
    }
}

/// What a file of theirs comes to is a LoRA, and is one in all that is done with it.
#[test]
fn recipes_for_a_lora_are_loras() {
    let dir = tempfile::tempdir().unwrap();
    let engine = base(1);
    check_all(["tinylora", "vblora", "vblora_topk_only"], |name| {
        let file = AdapterFile::open(&of(name, "")).map_err(|e| format!("{name}: {e}"))?;
        let rank = if *name == "tinylora" { "rank 2" } else { "rank 4" };
        if file.method.kind() != Kind::Lora || !file.warnings.iter().any(|warning| warning.contains(rank)) {
            return Err(format!("{name}: {:?}", file.warnings));
        }
        export_gguf(&file, internals::base(&engine).model.as_ref(), &dir.path().join(name))
            .map_err(|e| e.to_string())?;
        file.save_exact(&dir.path().join(format!("{name}-lora"))).map_err(|e| e.to_string())?;
        let (engine, expected) = (base(1), &tensors(&of(name, "logits.safetensors"))["logits"].data);
        engine.attach(&dir.path().join(format!("{name}-lora")), 1.0).map_err(|e| e.to_string())?;
        close(name, &logits(&engine, &inputs()), expected, 1e-4)
    });
}

/// A budget leaves as many singular values as it says, on average over the modules, and not the same ones in all.
#[test]
fn adalora_gives_up_the_ranks_that_matter_least() {
    let out = tempfile::tempdir().unwrap();
    let budget = json!({"target_r": 3, "tinit": 1, "tfinal": 2});
    assert!(train(&case("adalora", Kind::Adalora, 6, 8.0, budget), out.path(), 1, false, 0).0);
    let file = AdapterFile::open(out.path()).unwrap();
    let singular = file.tensors.iter().filter(|(name, _)| name.ends_with("lora_E"));
    let kept: Vec<usize> = singular.map(|(_, e)| e.data.iter().filter(|e| **e != 0.0).count()).collect();
    assert_eq!((kept.len(), kept.iter().sum::<usize>()), (6, 18), "{kept:?}");
    assert!(kept.iter().any(|kept| *kept != 3), "{kept:?}");
    // There is no step for a budget.
    let none = json!({"target_r": 3, "tinit": 4, "tfinal": 4}).as_object().unwrap().clone();
    let config = TrainConfig { method: Kind::Adalora, rank: 6, options: none, ..config() };
    let error = base(1).trainer(config, data(), None, None, out.path()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("tinit"), "{error}");
}

/// What is trained is B alone, and the file is a LoRA's.
#[test]
fn lora_fa_leaves_a_as_it_was_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let case = case("lora_dora", Kind::LoraFa, 4, 8.0, json!({}));
    let [long, cut] = ["long", "cut"].map(|name| dir.path().join(name));
    assert!(train(&case, &long, 2, false, 0).0);
    assert!(!train(&case, &cut, 1, false, 1).0);
    let drawn = tensors(&cut.join("checkpoint.safetensors"));
    assert!(drawn.keys().all(|name| !name.contains("lora_A")), "there is no state of what is not trained");
    assert!(train(&case, &cut, 1, true, 0).0);
    let bytes = |out: &Path| fs::read(out.join("adapter_model.safetensors")).unwrap();
    assert_eq!(bytes(&long), bytes(&cut));
    let file = AdapterFile::open(&long).unwrap();
    assert_eq!(file.method.kind(), Kind::Lora);
    let lora = dir.path().join("lora");
    assert!(!train(&Case { kind: Kind::Lora, ..case }, &lora, 1, false, 1).0);
    let of_lora = tensors(&lora.join("checkpoint.safetensors"));
    for (name, tensor) in &file.tensors {
        if name.ends_with("lora_B.weight") {
            assert!(tensor.data.iter().any(|b| *b != 0.0), "{name}");
            continue;
        }
        // Both draw alike, and one step of 5e-3 has moved LoRA's.
        let (moved, _) = crate::common::max_diff(&tensor.data, &of_lora[&format!("param.{name}")].data);
        assert!(moved < 0.02, "{name}: {moved}");
    }
}
