//! Adapter methods beside LoRA, in the files that PEFT wrote: served, trained, saved, resumed, and refused where they do not
//! fit. `tests/data/oracles/methods` holds what PEFT 0.21.2 computes with each on the base `peft/base`.

use crate::common::{check_all, golden, ids, logits, max_diff, open_exact, tensors};
use pocketlora::adapter::{AdapterFile, Kind};
use pocketlora::internals::Adapters;
use pocketlora::internals::{Logits, Sequence, Step, Workspace};
use pocketlora::train::{Dataset, Observer, Sample, Schedule, StepReport, TrainConfig, TrainPrecision};
use pocketlora::{Engine, ErrorCode, Finish, internals};
use pocketlora_kernels::{Cpu, WorkType};
use serde_json::{Map, Value};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

const METHODS: [&str; 6] = ["ia3", "prefix_tuning", "cartridge", "ln_tuning", "trainable_tokens", "prompt_tuning"];
/// Used, and not trained.
const SERVED: [&str; 2] = ["p_tuning_mlp", "p_tuning_lstm"];
/// What LoRA can be asked for beside rank and alpha.
const LORA: [&str; 11] = [
    "alora",
    "lora",
    "lora_bias",
    "lora_embedding_head",
    "lora_layers_regex",
    "lora_layers_to_transform",
    "lora_modules_to_save",
    "lora_monteclora",
    "lora_target_parameters",
    "lora_trainable_tokens",
    "lora_velora",
];

pub(super) fn of(method: &str, file: &str) -> PathBuf {
    golden("methods").join(method).join(file)
}

pub(super) fn base(threads: usize) -> Engine {
    open_exact(&golden("peft/base"), threads)
}

/// What PEFT gave the method: a text with an invocation to that which has one.
pub(super) fn inputs_of(method: &str) -> Vec<u32> {
    match tensors(&of(method, "logits.safetensors")).get("ids") {
        Some(own) => ids(own),
        None => inputs(),
    }
}

pub(super) fn inputs() -> Vec<u32> {
    ids(&tensors(&golden("methods/inputs.safetensors"))["ids"])
}

/// Tokens of the base, and how many of them goldens have logits of: as many as a state is wide, so that nothing hides from them.
const VOCABULARY: usize = 256;
const KEPT: usize = 64;

pub(super) fn close(what: &str, got: &[f32], expected: &[f32], bound: f32) -> Result<(), String> {
    let kept: Vec<f32> = match expected.len() < got.len() {
        true => got.chunks(VOCABULARY).flat_map(|row| &row[..KEPT]).copied().collect(),
        false => got.to_vec(),
    };
    let got = &kept[..];
    // PEFT gives logits behind the virtual tokens of a prompt, too.
    let expected = &expected[expected.len() - got.len()..];
    let (diff, at) = max_diff(got, expected);
    if diff <= bound { Ok(()) } else { Err(format!("{what}: logit {at} is off by {diff}, bound {bound}")) }
}

#[test]
fn served_adapters_give_the_logits_of_peft() {
    check_all(METHODS.into_iter().chain(SERVED).chain(LORA), |method| {
        let engine = base(2);
        engine.attach(&of(method, ""), 1.0).unwrap();
        let expected = &tensors(&of(method, "logits.safetensors"))["logits"].data;
        close(method, &logits(&engine, &inputs_of(method)), expected, 1e-4)
    });
}

/// Logits of `ids` in `pieces`, from where `sequence` stands.
pub(super) fn run(
    engine: &Engine,
    adapters: &Adapters<Cpu>,
    sequence: &mut Sequence<Cpu>,
    pieces: &[&[u32]],
) -> Vec<f32> {
    let mut work = Workspace::new(internals::numbers(engine).arithmetic);
    let mut all = Vec::new();
    for ids in pieces {
        let mut take = |logits: &Logits| {
            all.extend(&logits.values);
            Ok(())
        };
        let step = Step { sequence: &mut *sequence, ids, adapters, logits: 0..ids.len() };
        internals::base(engine).forward(&mut work, &mut [step], &mut || true, &mut take).unwrap();
    }
    all
}

pub(super) fn attached(engine: &Engine, files: &[AdapterFile]) -> Adapters<Cpu> {
    let mut adapters = Adapters::none(internals::base(engine));
    files.iter().for_each(|file| adapters.attach(internals::base(engine), file, 1.0, WorkType::F32).unwrap());
    adapters
}

#[test]
fn a_rewound_sequence_keeps_its_adapter() {
    let ids = inputs();
    check_all(METHODS, |method| {
        let engine = base(1);
        let adapters = attached(&engine, &[AdapterFile::open(&of(method, "")).unwrap()]);
        let expected = &tensors(&of(method, "logits.safetensors"))["logits"];
        let vocab = *expected.shape.last().unwrap();
        let expected = &expected.data[expected.data.len() - ids.len() * vocab..];
        let mut sequence = Sequence::new(internals::base(&engine), internals::numbers(&engine).cache).unwrap();
        let whole = run(&engine, &adapters, &mut sequence, &[&ids[..3], &ids[3..4], &ids[4..5], &ids[5..]]);
        close(&format!("{method} in pieces"), &whole, expected, 1e-4)?;
        for to in [4, 0] {
            assert_eq!(sequence.rewind(internals::base(&engine), to), to);
            let again = run(&engine, &adapters, &mut sequence, &[&ids[to..]]);
            close(&format!("{method} from {to} again"), &again, &expected[to * vocab..], 1e-4)?;
            assert_eq!(sequence.len(), ids.len(), "virtual tokens are not counted");
        }
        Ok(())
    });
}

/// A text that was begun with a prefix goes on with that one alone.
#[test]
fn a_prefix_is_not_changed_in_the_middle_of_a_text() {
    let (engine, ids) = (base(1), inputs());
    let file = AdapterFile::open(&of("prefix_tuning", "")).unwrap();
    let [first, second] = [0, 1].map(|_| attached(&engine, std::slice::from_ref(&file)));
    let none = Adapters::none(internals::base(&engine));
    let mut sequence = Sequence::new(internals::base(&engine), internals::numbers(&engine).cache).unwrap();
    run(&engine, &first, &mut sequence, &[&ids[..4]]);
    for other in [&second, &none] {
        let mut work = Workspace::new(internals::numbers(&engine).arithmetic);
        let step = Step { sequence: &mut sequence, ids: &ids[4..5], adapters: other, logits: 0..0 };
        let refused = internals::base(&engine).forward(&mut work, &mut [step], &mut || true, &mut |_| Ok(()));
        assert!(refused.unwrap_err().to_string().contains("virtual tokens"));
    }
    // Without tokens it is anybody's.
    sequence.rewind(internals::base(&engine), 0);
    let plain = run(&engine, &none, &mut sequence, &[&ids]);
    let expected = &tensors(&golden("methods/inputs.safetensors"))["logits"].data;
    close("without", &plain, expected, 1e-4).unwrap();
}

/// IA3 whose scales are all `value` but for those of the golden's sign pattern.
fn ia3(value: f32) -> AdapterFile {
    let mut file = AdapterFile::open(&of("ia3", "")).unwrap();
    for tensor in file.tensors.values_mut() {
        tensor.data.iter_mut().step_by(2).for_each(|l| *l = value);
    }
    file
}

#[test]
fn sequences_of_a_batch_have_adapters_of_their_own() {
    let engine = base(2);
    let prefix = AdapterFile::open(&of("prefix_tuning", "")).unwrap();
    let sets = [vec![ia3(0.0)], vec![], vec![ia3(1.5), ia3(-0.5)], vec![prefix], vec![ia3(0.7)]];
    let sets: Vec<Adapters<Cpu>> = sets.iter().map(|files| attached(&engine, files)).collect();
    let ids = inputs();
    let new = || Sequence::new(internals::base(&engine), internals::numbers(&engine).cache).unwrap();
    let apart: Vec<Vec<f32>> =
        sets.iter().map(|set| run(&engine, set, &mut new(), &[&ids[..9], &ids[9..10]])).collect();
    let mut sequences: Vec<_> = sets.iter().map(|_| new()).collect();
    let mut together: Vec<Vec<f32>> = sets.iter().map(|_| Vec::new()).collect();
    let mut work = Workspace::new(internals::numbers(&engine).arithmetic);
    for piece in [&ids[..9], &ids[9..10]] {
        let steps = sequences.iter_mut().zip(&sets);
        let step = |(sequence, adapters)| Step { sequence, ids: piece, adapters, logits: 0..piece.len() };
        let mut steps: Vec<_> = steps.map(step).collect();
        let mut take = |logits: &Logits| {
            let width = logits.values.len() / logits.places.len();
            for ((step, _), row) in logits.places.iter().zip(logits.values.chunks(width)) {
                together[*step].extend_from_slice(row);
            }
            Ok(())
        };
        internals::base(&engine).forward(&mut work, &mut steps, &mut || true, &mut take).unwrap();
    }
    for (i, (together, apart)) in together.iter().zip(&apart).enumerate() {
        close(&format!("sequence {i}"), together, apart, 1e-4).unwrap();
    }
    assert!(close("they differ", &together[0], &together[4], 1e-2).is_err());
}

/// The two sequences of the training goldens; the reference pads the second, we do not.
pub(super) fn data() -> Dataset {
    data_of("train_ids")
}

pub(super) fn data_of(ids: &str) -> Dataset {
    let t = tensors(&golden("methods/inputs.safetensors"));
    let width = t["train_ids"].shape[1];
    let [ids, labels, mask] = [ids, "train_labels", "train_mask"].map(|name| t[name].data.chunks(width));
    let samples = ids.zip(labels).zip(mask).map(|((ids, labels), mask)| {
        let n = mask.iter().filter(|&&m| m > 0.0).count();
        let trained = labels[..n].iter().enumerate().map(|(i, &l)| i > 0 && l >= 0.0).collect();
        Sample::new(ids[..n].iter().map(|&i| i as u32).collect(), trained)
    });
    Dataset::new("golden", samples.collect())
}

pub(super) struct Quiet {
    pub stop_after: u64,
}

impl Observer for Quiet {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        if report.step == self.stop_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

pub(super) fn config() -> TrainConfig {
    TrainConfig {
        lr: 5e-3,
        schedule: Schedule::Constant,
        warmup: 0.0,
        clip: 0.0,
        weight_decay: 0.01,
        batch: 2,
        steps: Some(6),
        precision: TrainPrecision::Exact,
        ..TrainConfig::default()
    }
}

pub(super) fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

/// Five AdamW steps as the reference ran them, its losses before each and after, and the gradients of the first.
pub(super) fn train_like_peft(method: &str, accumulate: bool) -> Result<(), String> {
    let expected = tensors(&of(method, "train.safetensors"));
    let (batch, accumulate) = if accumulate { (1, 2) } else { (2, 1) };
    let config = TrainConfig { batch, accumulate, ..config() };
    let out = tempfile::tempdir().unwrap();
    let init = AdapterFile::open(&of(method, "")).unwrap();
    let mut trainer = base(2).trainer(config, data(), None, Some(&init), out.path()).unwrap();
    for (i, &loss) in expected["losses"].data.iter().enumerate() {
        let report = trainer.step(&mut Quiet { stop_after: 0 }).unwrap();
        if (report.loss - f64::from(loss)).abs() > 1e-4 {
            return Err(format!("{method}, step {i}: loss {} instead of {loss}", report.loss));
        }
        if i > 0 {
            continue;
        }
        for (tensor, grad) in trainer.gradients().unwrap() {
            let name = match &*tensor {
                "prompt_embeddings" if method == "cartridge" => "grad.prompt_encoder.trainable_embedding".to_owned(),
                "prompt_embeddings" => "grad.prompt_encoder.embedding.weight".to_owned(),
                other if other.ends_with("lora_magnitude_vector") => format!("grad.base_model.model.{other}.weight"),
                other => format!("grad.base_model.model.{other}"),
            };
            // Rows that are not moved have none.
            let fixed = vec![0.0; grad.len() - expected[&name].data.len()];
            let expected = &[&fixed[..], &expected[&name].data].concat();
            let error = norm(grad.iter().zip(expected).map(|(a, e)| f64::from(a - e)));
            let relative = error / norm(expected.iter().map(|&e| f64::from(e)));
            if relative.is_nan() || relative > 1e-3 {
                return Err(format!("{method}: gradient of {tensor} off by {relative:.2e} of its norm, bound 1e-3"));
            }
        }
    }
    Ok(())
}

#[test]
fn losses_and_gradients_are_those_of_peft() {
    let lora = ["lora_bias", "lora_embedding_head", "lora_target_parameters", "lora_trainable_tokens"];
    let trained = METHODS.into_iter().chain(lora);
    let cases = trained.flat_map(|method| [(method, false), (method, true)]);
    check_all(cases, |(method, accumulate)| train_like_peft(method, *accumulate));
}

fn kind(method: &str) -> Kind {
    match method {
        "ia3" => Kind::Ia3,
        "cartridge" => Kind::Cartridge,
        "ln_tuning" => Kind::LnTuning,
        "trainable_tokens" => Kind::TrainableTokens,
        "prompt_tuning" => Kind::PromptTuning,
        _ => Kind::PrefixTuning,
    }
}

/// A fresh adapter's run in the folder `out`.
fn train(method: &str, out: &Path, resume: bool, change: impl Fn(&mut TrainConfig), stop_after: u64) -> bool {
    let mut config = TrainConfig { method: kind(method), ..config() };
    match method {
        "ia3" | "ln_tuning" => config.targets = vec!["auto".to_owned()],
        "trainable_tokens" => config.trainable_token_indices = vec![93, 94, 123, 166, 238],
        _ => config.num_virtual_tokens = Some(5),
    }
    change(&mut config);
    let mut trainer = base(1).trainer(config, data(), None, None, out).unwrap();
    if resume {
        trainer.resume().unwrap();
    }
    trainer.run(&mut Quiet { stop_after }).unwrap().done
}

pub(super) fn json(path: &Path) -> Map<String, Value> {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_fresh_adapter_is_saved_as_peft_saves_it() {
    let dir = tempfile::tempdir().unwrap();
    check_all(METHODS, |method| {
        let out = dir.path().join(method);
        assert!(train(method, &out, false, |_| (), 0));
        let (ours, theirs) = (json(&out.join("adapter_config.json")), json(&of(method, "adapter_config.json")));
        for (key, value) in &theirs {
            let names = |value: &Value| {
                let mut names: Vec<_> = value.as_array().into_iter().flatten().map(Value::to_string).collect();
                names.sort();
                names
            };
            let free = ["peft_version", "base_model_name_or_path"].contains(&key.as_str());
            let same = match ours.get(key) {
                Some(own) if own.is_array() => names(own) == names(value),
                own => own == Some(value),
            };
            // Theirs was given another width for a network that it does not have, and another beginning.
            if !same && !free && !["encoder_hidden_size", "prompt_tuning_init"].contains(&key.as_str()) {
                return Err(format!("{method}: `{key}` is {:?} instead of {value}", ours.get(key)));
            }
        }
        let shapes = |path: PathBuf| -> Vec<(String, Vec<usize>)> {
            tensors(&path).into_iter().map(|(name, tensor)| (name, tensor.shape)).collect()
        };
        let [own, their] = [out, of(method, "")].map(|dir| shapes(dir.join("adapter_model.safetensors")));
        if own != their { Err(format!("{method}: {own:?}")) } else { Ok(()) }
    });
}

#[test]
fn a_resumed_run_ends_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = |out: &Path| fs::read(out.join("adapter_model.safetensors")).unwrap();
    check_all(METHODS, |method| {
        let [whole, cut, small] = ["whole", "cut", "small"].map(|name| dir.path().join(format!("{method}-{name}")));
        assert!(train(method, &whole, false, |_| (), 0));
        assert!(!train(method, &cut, false, |_| (), 2));
        assert!(train(method, &cut, true, |_| (), 0));
        if bytes(&whole) != bytes(&cut) {
            return Err(format!("{method}: other bytes"));
        }
        // With parts of the tokens at a time, too: sums change their order.
        let budget = |c: &mut TrainConfig| (c.batch, c.accumulate) = (1, 2);
        assert!(train(method, &small, false, budget, 0));
        let [a, b] = [&whole, &small].map(|out| tensors(&out.join("adapter_model.safetensors")));
        for (name, tensor) in &a {
            let (diff, _) = max_diff(&tensor.data, &b[name].data);
            if diff > 1e-4 {
                return Err(format!("{method}: {name} is off by {diff}"));
            }
        }
        Ok(())
    });
}

/// Begins with scales of zero, where what a layer gives tells nothing of its gradient.
#[test]
fn a_scale_of_zero_learns() {
    let out = tempfile::tempdir().unwrap();
    let init = ia3(0.0);
    let config = TrainConfig { weight_decay: 0.0, ..config() };
    let mut trainer = base(1).trainer(config, data(), None, Some(&init), out.path()).unwrap();
    trainer.step(&mut Quiet { stop_after: 0 }).unwrap();
    for (name, grad) in trainer.gradients().unwrap() {
        assert!(grad.iter().step_by(2).all(|g| *g != 0.0 && g.is_finite()), "{name}");
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    // Changes of a golden's config, with what must be said.
    let changed = |method: &str, name: &str, changes: &[(&str, Value)]| -> PathBuf {
        let out = dir.path().join(name);
        fs::create_dir(&out).unwrap();
        let mut config = json(&of(method, "adapter_config.json"));
        changes.iter().for_each(|(key, value)| drop(config.insert((*key).to_owned(), value.clone())));
        fs::write(out.join("adapter_config.json"), Value::from(config).to_string()).unwrap();
        fs::copy(of(method, "adapter_model.safetensors"), out.join("adapter_model.safetensors")).unwrap();
        out
    };
    let open = |path: PathBuf| AdapterFile::open(&path).map(|_| ()).unwrap_err().to_string();
    let ff = "feedforward_modules";
    for (method, key, value, said) in [
        ("ia3", ff, serde_json::json!([]), "[out, 1]"),
        ("ia3", ff, serde_json::json!(["o_proj"]), "target_modules"),
        ("ia3", "target_modules", serde_json::json!(".*(k|v)_proj"), "target_modules"),
        ("ia3", "r", serde_json::json!(8), "`r`"),
        ("ia3", "fan_in_fan_out", serde_json::json!(true), "fan_in_fan_out"),
        ("prefix_tuning", "token_dim", serde_json::json!(33), "token_dim"),
        ("prefix_tuning", "num_virtual_tokens", serde_json::json!(0), "num_virtual_tokens"),
        ("prefix_tuning", "num_transformer_submodules", serde_json::json!(2), "num_transformer_submodules"),
        ("prefix_tuning", "init_weights", serde_json::json!("ones"), "init_weights"),
    ] {
        let error = open(changed(method, &format!("{method}-{key}-{said}").replace(['`', '/'], "_"), &[(key, value)]));
        assert!(error.contains(said), "{method}, {key}: {error}");
    }
    // An expression says the same as a list.
    let expressions = [("target_modules", ".*_proj".into()), (ff, ".*mlp\\.down_proj".into())];
    let file = AdapterFile::open(&changed("ia3", "expressions", &expressions)).unwrap();
    let engine = base(1);
    let mut sequence = Sequence::new(internals::base(&engine), internals::numbers(&engine).cache).unwrap();
    let got = run(&engine, &attached(&engine, &[file]), &mut sequence, &[&inputs()]);
    close("expressions", &got, &tensors(&of("ia3", "logits.safetensors"))["logits"].data, 1e-4).unwrap();

    let attach = |engine: &Engine, path: &Path, scale: f32| engine.attach(path, scale).unwrap_err().to_string();
    let all = METHODS.map(|method| of(method, ""));
    let [scales, prefix, cartridge, .., prompt] = &all;
    let engine = base(1);
    for path in &all {
        assert!(attach(&engine, path, 0.5).contains("scale of 1"));
        assert!(attach(&mut open_exact(&golden("tiny-llama"), 1), path, 1.0).contains("the adapter was trained on"));
    }
    engine.attach(prefix, 1.0).unwrap();
    assert!(attach(&engine, prefix, 1.0).contains("second"));
    assert!(attach(&engine, prompt, 1.0).contains("virtual tokens"));
    assert!(attach(&engine, cartridge, 1.0).contains("virtual tokens"));
    engine.attach(scales, 1.0).unwrap();

    // In training.
    let begin = |config: TrainConfig, init: Option<&AdapterFile>| {
        let out = tempfile::tempdir().unwrap();
        base(1).trainer(config, data(), None, init, out.path()).map(|_| ()).unwrap_err().to_string()
    };
    let of_kind = |kind| TrainConfig { method: kind, targets: vec!["auto".to_owned()], ..config() };
    let projected = changed("prefix_tuning", "projected", &[("prefix_projection", true.into())]);
    let projected = AdapterFile::open(&projected).unwrap();
    assert!(begin(config(), Some(&projected)).contains("prefix_projection"));
    let idle = TrainConfig { rank: 4, ..of_kind(Kind::Ia3) };
    assert!(begin(idle, None).contains("`rank`"));
    let foreign = TrainConfig { feedforward_modules: vec!["o_proj".to_owned()], ..of_kind(Kind::Ia3) };
    assert!(begin(foreign, None).contains("feedforward-modules"));
    let more = TrainConfig { num_virtual_tokens: Some(9), ..config() };
    assert!(begin(more, Some(&AdapterFile::open(prefix).unwrap())).contains("num-virtual-tokens"));
    let lstm = AdapterFile::open(&of("p_tuning_lstm", "")).unwrap();
    assert!(begin(config(), Some(&lstm)).contains("not in its file"));
    let frozen = TrainConfig { method: Kind::Cartridge, num_frozen_tokens: Some(20), ..config() };
    assert!(begin(frozen, None).contains("num-frozen-tokens"));
    let long = TrainConfig { method: Kind::Cartridge, num_virtual_tokens: Some(99), ..config() };
    assert!(begin(long, None).contains("as many tokens as its text has"));
    let invoked = TrainConfig {
        alora_invocation_tokens: vec![7],
        targets: vec!["q_proj".to_owned(), "lm_head".to_owned()],
        ..config()
    };
    assert!(begin(invoked, None).contains("invocation"));
    let named = |targets: &str| TrainConfig { targets: vec![targets.to_owned()], ..of_kind(Kind::LnTuning) };
    assert!(begin(named("q_proj"), None).contains("input_layernorm"));
    let ids = |ids: Vec<u32>| TrainConfig { method: Kind::TrainableTokens, trainable_token_indices: ids, ..config() };
    assert!(begin(ids(vec![]), None).contains("trainable-token-indices"));
    assert!(begin(ids(vec![256]), None).contains("below the vocabulary's 256"));
    assert!(begin(ids(vec![5, 5]), None).contains("each id once"));
    let lora = |change: &dyn Fn(&mut TrainConfig)| {
        let mut config = config();
        change(&mut config);
        config
    };
    assert!(begin(lora(&|c| c.bias = Some("all".to_owned())), None).contains("no biases"));
    assert!(begin(lora(&|c| c.bias = Some("some".to_owned())), None).contains("lora_only"));
    assert!(begin(lora(&|c| c.targets = vec!["wte".to_owned()]), None).contains("targets"));
}

/// Virtual tokens take places of the context, in training and in answers.
#[test]
fn an_answer_behind_a_prefix_ends_where_the_context_does() {
    let engine = base(1);
    engine.attach(&of("prefix_tuning", ""), 1.0).unwrap();
    let mut chat = engine.chat().unwrap();
    chat.max_tokens = usize::MAX;
    let own = chat.context_tokens().unwrap();
    let places = engine.context_tokens();
    assert!(own < places);
    let mut decoder = chat.decoder(inputs()[..4].to_vec()).unwrap();
    while decoder.next_token().unwrap().is_some() {}
    assert_eq!((decoder.finished(), decoder.into_generated().ids.len()), (Some(Finish::Context), own - 4));

    let out = tempfile::tempdir().unwrap();
    let begin = |tokens| {
        let config = TrainConfig { method: Kind::PrefixTuning, num_virtual_tokens: Some(tokens), ..config() };
        engine.trainer(config, data(), None, None, out.path()).map(|_| ())
    };
    let error = begin(places).unwrap_err();
    assert!(error.code() == ErrorCode::Config && error.to_string().contains("num-virtual-tokens"), "{error}");
    begin(places - data().longest()).unwrap();
}

/// PEFT's golden is of the second task of three; the config says which one, and the first is used without that.
#[test]
fn a_prompt_of_several_tasks_is_that_of_the_named_one() {
    let dir = tempfile::tempdir().unwrap();
    let [config, weights] = ["adapter_config.json", "adapter_model.safetensors"];
    fs::copy(of("multitask_prompt_tuning", weights), dir.path().join(weights)).unwrap();
    let expected = &tensors(&of("multitask_prompt_tuning", "logits.safetensors"))["logits"].data;
    let of_task = |task: Option<u32>| {
        let mut keys = json(&of("multitask_prompt_tuning", config));
        task.map(|task| keys.insert("task_id".to_owned(), task.into()));
        fs::write(dir.path().join(config), Value::from(keys).to_string()).unwrap();
        let engine = base(1);
        engine.attach(dir.path(), 1.0).map(|_| logits(&engine, &inputs()))
    };
    close("the second task", &of_task(Some(1)).unwrap(), expected, 1e-4).unwrap();
    close("the first task", &of_task(None).unwrap(), &of_task(Some(0)).unwrap(), 0.0).unwrap();
    assert!(close("they differ", &of_task(None).unwrap(), expected, 1e-2).is_err());
    let error = of_task(Some(3)).unwrap_err().to_string();
    assert!(error.contains("task_id") && error.contains('3'), "{error}");
    let file = AdapterFile::open(&of("multitask_prompt_tuning", "")).unwrap();
    let trained = base(1).trainer(self::config(), data(), None, Some(&file), dir.path()).map(|_| ()).unwrap_err();
    assert!(trained.to_string().contains("several tasks"), "{trained}");
}
