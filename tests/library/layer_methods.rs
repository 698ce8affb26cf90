//! Adapter methods on linear layers whose file is not what works there: what PEFT 0.21.2 computes with each on the base
//! `peft/base` (`tests/data/oracles/methods`), from one table.

use super::methods::{base, close, config, data, inputs, json, of, train_like_peft};
use crate::common::{check_all, golden, logits, open_exact, tensors};
use pocketlora::adapter::{AdapterFile, Kind, Merged};
use pocketlora::format::{Existing, Target, open_source};
use pocketlora::train::{Observer, StepReport, TrainConfig};
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
        case("adalora", Kind::AdaLora, 6, 8.0, json!({})),
        case("delora", Kind::Delora, 4, 0.0, json!({"delora_lambda": 10})),
        case("loha", Kind::Loha, 4, 8.0, json!({})),
        case("road_1", Kind::Road, 0, 0.0, json!({"group_size": 16})),
        case("road_2", Kind::Road, 0, 0.0, json!({"group_size": 16, "variant": "road_2"})),
        case("road_4", Kind::Road, 0, 0.0, json!({"group_size": 16, "variant": "road_4"})),
        case("beft", Kind::Beft, 0, 0.0, json!({})),
        case("gralora", Kind::GraLora, 8, 16.0, json!({})),
        case("gralora_hybrid", Kind::GraLora, 8, 16.0, json!({"hybrid_r": 4})),
        case("hra", Kind::Hra, 4, 0.0, json!({})),
        case("oft", Kind::Oft, 0, 0.0, json!({"oft_block_size": 8, "use_cayley_neumann": false})),
        case("oft_neumann", Kind::Oft, 0, 0.0, json!({"oft_block_size": 0, "r": 4})),
        case("oft_block_share_coft", Kind::Oft, 0, 0.0, shared),
        case("lokr", Kind::Lokr, 4, 8.0, json!({})),
        case("lokr_decompose_both", Kind::Lokr, 2, 8.0, json!({"decompose_both": true, "decompose_factor": 8})),
        case("shira", Kind::Shira, 4, 0.0, json!({})),
        case("lora_bdlora", Kind::BdLora, 4, 8.0, json!({"use_bdlora": blocks})),
    ]
}

/// Folders of goldens that are served and merged, but not trained as PEFT trained them.
const SERVED: &[(&str, f32)] =
    &[("adalora_pruned", 1e-4), ("hra_gs", 1e-4), ("supertuning", 1e-4), ("supertuning_supra", 1e-4)];

#[test]
fn served_ones_give_the_logits_of_peft_and_so_do_merged_ones() {
    let dir = tempfile::tempdir().unwrap();
    let all = cases().into_iter().map(|case| (case.dir, case.bound)).chain(SERVED.iter().copied());
    check_all(all, |(name, bound)| {
        let engine = base(2);
        engine.attach(&of(name, ""), 1.0).map_err(|e| format!("{name}: {e}"))?;
        let expected = &tensors(&of(name, "logits.safetensors"))["logits"].data;
        close(name, &logits(&engine, &inputs()), expected, *bound)?;
        let (out, peft) = (dir.path().join(name), golden("peft/base"));
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
    let all = cases().into_iter().flat_map(|case| [(case.dir, false), (case.dir, true)]);
    check_all(all, |(name, accumulate)| train_like_peft(name, *accumulate));
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
        let (name, out) = (case.dir, dir.path().join(case.dir));
        let (done, loss) = train(case, &out, 1, false, 0);
        // AdaLoRA's has what keeps its ranks apart in it.
        if !done || (loss - of_base).abs() > 1e-4 && case.kind != Kind::AdaLora {
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
            // All ranks are kept, which needs no schedule.
            free.extend(["target_r", "tinit", "tfinal", "total_step"]);
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
        let [whole, cut] = ["whole", "cut"].map(|part| dir.path().join(format!("{}-{part}", case.dir)));
        assert!(train(case, &whole, 2, false, 0).0);
        assert!(!train(case, &cut, 1, false, 2).0);
        assert!(train(case, &cut, 1, true, 0).0);
        if bytes(&whole) != bytes(&cut) { Err(format!("{}: other bytes", case.dir)) } else { Ok(()) }
    });
}
