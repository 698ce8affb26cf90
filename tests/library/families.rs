//! A tiny random model of each family against transformers and PEFT: logits, with a LoRA adapter and without, its
//! gradients, text in pieces, and NF4.

use crate::common::{Tensor, check_all, convert, golden, ids, logits, max_diff, open_exact, tensors};
use pocketlora::adapter::AdapterFile;
use pocketlora::format::{LeftOut, Target, open_source};
use pocketlora::internals::Adapters;
use pocketlora::internals::{Logits, Sequence, Step, Workspace};
use pocketlora::train::{Dataset, Observer, Sample, StepReport, TrainConfig, TrainPrecision};
use pocketlora::{Engine, internals};
use pocketlora_kernels::WorkType;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Folders of goldens, with how far logits may be off. Of a recurrence rounding grows along the text: transformers itself
/// is 6e-5 away from itself there.
const FAMILIES: [(&str, f32); 46] = [
    ("apertus", 1e-4),
    ("arcee", 1e-4),
    ("bitnet", 1e-4),
    ("cohere2", 1e-4),
    ("ernie4_5", 1e-4),
    ("exaone4", 1e-4),
    ("falcon_h1", 1e-4),
    ("gemma2", 1e-4),
    ("gemma3_text", 1e-4),
    ("gemma4_text", 1e-4),
    ("gemma4_text_moe", 1e-4),
    ("glm4", 1e-4),
    ("gpt2", 1e-4),
    ("gpt_oss", 1e-4),
    ("granite", 1e-4),
    ("granite_swa", 1e-4),
    ("granitemoehybrid", 1e-4),
    ("granitemoehybrid_moe", 1e-4),
    ("helium", 1e-4),
    ("hunyuan_v1_dense", 1e-4),
    ("internlm3", 1e-4),
    ("lfm2", 1e-4),
    ("lfm2_moe", 1e-4),
    ("lfm3", 1e-4),
    ("llama", 1e-4),
    ("mamba2", 1e-4),
    ("minicpm3", 1e-4),
    ("ministral", 1e-4),
    ("ministral3", 1e-4),
    ("mistral", 1e-4),
    ("nanochat", 1e-4),
    ("olmo2", 1e-4),
    ("olmo3", 1e-4),
    ("olmo_hybrid", 1e-4),
    ("phi3", 1e-4),
    ("phi4_mini", 1e-4),
    ("qwen2", 1e-4),
    ("qwen2_yarn", 1e-4),
    ("qwen3", 1e-4),
    ("qwen3_5_text", 3e-4),
    ("qwen3_moe", 1e-4),
    ("qwen3_next", 3e-4),
    ("seed_oss", 1e-4),
    ("smollm3", 1e-4),
    ("starcoder2", 1e-4),
    ("youtu", 1e-4),
];

/// Rank of every module of an adapter from [`adapter_of`] that has experts; others keep the goldens'.
const EXPERT_RANK: usize = 8;

fn folder(name: &str) -> PathBuf {
    golden("families").join(name)
}

fn close(what: &str, actual: &[f32], expected: &[f32], bound: f32) -> Result<(), String> {
    let (diff, at) = max_diff(actual, expected);
    if diff <= bound {
        return Ok(());
    }
    Err(format!("{what}: index {at}: expected {}, got {}, bound {bound}", expected[at], actual[at]))
}

/// The adapter of a family. PEFT keeps those of all experts in one tensor; here each expert has its own.
fn adapter_of(name: &str, dir: &Path) -> PathBuf {
    let path = folder(name).join("adapter");
    let all = tensors(&path.join("adapter_model.safetensors"));
    if !all.keys().any(|name| name.contains(".experts.")) {
        return path;
    }
    let mut out = BTreeMap::new();
    for (name, tensor) in &all {
        for (name, tensor) in unfold(name, tensor) {
            // Ranks differ; rows and columns of zeros make them equal without an effect.
            out.insert(name.clone(), pad(&tensor, name.contains("lora_A")));
        }
    }
    let bytes: Vec<Vec<u8>> = out.values().map(|t| t.data.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = out
        .iter()
        .zip(&bytes)
        .map(|((name, t), bytes)| (name.as_str(), TensorView::new(Dtype::F32, t.shape.clone(), bytes).unwrap()));
    fs::write(dir.join("adapter_model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let targets = all.keys().filter(|name| !name.contains(".experts.")).filter_map(|name| name.rsplit('.').nth(2));
    let targets: BTreeSet<&str> = targets.chain(["gate_proj", "up_proj", "down_proj"]).collect();
    let config = json!({"peft_type": "LORA", "r": EXPERT_RANK, "lora_alpha": 2 * EXPERT_RANK, "target_modules": targets,
                        "task_type": "CAUSAL_LM"});
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    dir.to_owned()
}

/// The tensors that an adapter's tensor becomes where each expert has its own: `lora_A` is `[experts * rank, in]`,
/// `lora_B` `[out, rank * experts]` with the number of the expert varying fastest; gate and up share both.
fn unfold(name: &str, tensor: &Tensor) -> Vec<(String, Tensor)> {
    let experts = 4;
    let copy = |rows: std::ops::Range<usize>| {
        let width = tensor.shape[1];
        Tensor { shape: vec![rows.len(), width], data: tensor.data[rows.start * width..rows.end * width].to_vec() }
    };
    let Some((at, end)) = name.split_once(".experts.") else {
        return vec![(name.to_owned(), copy(0..tensor.shape[0]))];
    };
    let (half, end) = match end.strip_prefix("base_layer.") {
        Some(end) => (tensor.shape[0] / 2, end),
        None => (tensor.shape[0], end),
    };
    let projections: &[&str] = if half < tensor.shape[0] { &["gate_proj", "up_proj"] } else { &["down_proj"] };
    let mut out = Vec::new();
    for e in 0..experts {
        for (i, projection) in projections.iter().enumerate() {
            let own = if end.starts_with("lora_A") {
                let rank = tensor.shape[0] / experts;
                copy(e * rank..(e + 1) * rank)
            } else {
                let rows = copy(i * half..(i + 1) * half);
                let rank = rows.shape[1] / experts;
                let row = |row: &[f32]| (0..rank).map(|j| row[j * experts + e]).collect::<Vec<_>>();
                Tensor { shape: vec![half, rank], data: rows.data.chunks(rows.shape[1]).flat_map(row).collect() }
            };
            out.push((format!("{at}.experts.{e}.{projection}.{end}"), own));
        }
    }
    out
}

/// With rows (or columns) of zeros up to [`EXPERT_RANK`].
fn pad(tensor: &Tensor, rows: bool) -> Tensor {
    let [old, width] = tensor.shape[..] else { panic!("a matrix") };
    if rows {
        let mut data = tensor.data.clone();
        data.resize(EXPERT_RANK * width, 0.0);
        return Tensor { shape: vec![EXPERT_RANK, width], data };
    }
    let row = |row: &[f32]| (0..EXPERT_RANK).map(|j| row.get(j).copied().unwrap_or(0.0)).collect::<Vec<_>>();
    Tensor { shape: vec![old, EXPERT_RANK], data: tensor.data.chunks(width).flat_map(row).collect() }
}

/// A config in the form of transformers before version 5, beside the same weights; of a younger family its only one.
fn older(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = ["config_v4.json", "config.json"].map(|file| folder(name).join(file)).into_iter().find(|f| f.exists());
    fs::copy(config.unwrap(), dir.path().join("config.json")).unwrap();
    fs::copy(folder(name).join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    dir
}

#[test]
fn every_family_gives_the_logits_of_transformers_and_peft() {
    check_all(FAMILIES, |(name, bound)| {
        let expected = tensors(&folder(name).join("logits.safetensors"));
        let (ids, dir) = (ids(&expected["ids"]), tempfile::tempdir().unwrap());
        let engine = open_exact(&folder(name), 1);
        close(name, &logits(&engine, &ids), &expected["logits"].data, *bound)?;
        engine.attach(&adapter_of(name, dir.path()), 1.0).unwrap();
        close(&format!("{name} with LoRA"), &logits(&engine, &ids), &expected["lora_logits"].data, 2.0 * bound)?;
        engine.detach_all();
        engine.attach(&folder(name).join("adapter"), 1.0).unwrap();
        close(&format!("{name} with PEFT's"), &logits(&engine, &ids), &expected["lora_logits"].data, 2.0 * bound)?;
        let older = older(name);
        let older = open_exact(older.path(), 1);
        close(&format!("{name} of an older config"), &logits(&older, &ids), &expected["logits"].data, *bound)
    });
}

#[test]
fn a_text_in_pieces_has_the_logits_of_the_whole() {
    check_all(FAMILIES, |(name, bound)| {
        let expected = tensors(&folder(name).join("logits.safetensors"));
        let (ids, engine) = (ids(&expected["ids"]), open_exact(&folder(name), 1));
        for piece in [1, 2, 7, 39] {
            let got = in_pieces(&engine, &ids, piece);
            close(&format!("{name} in pieces of {piece}"), &got, &expected["logits"].data, *bound)?;
        }
        Ok(())
    });
}

fn in_pieces(engine: &Engine, ids: &[u32], piece: usize) -> Vec<f32> {
    let base = internals::base(engine);
    let adapters = Adapters::none(base);
    let mut sequence = Sequence::new(base, internals::numbers(engine).cache).unwrap();
    sequence.expect(ids.len());
    let mut work = Workspace::new(internals::numbers(engine).arithmetic);
    let mut all = Vec::new();
    for ids in ids.chunks(piece) {
        let step = Step { sequence: &mut sequence, ids, adapters: &adapters, logits: 0..ids.len() };
        let mut take = |logits: &Logits| {
            all.extend(&logits.values);
            Ok(())
        };
        base.forward(&mut work, &mut [step], &mut || true, &mut take).unwrap();
    }
    all
}

#[test]
fn a_batch_gives_each_text_what_it_gets_apart() {
    check_all(FAMILIES, |(name, bound)| {
        let expected = tensors(&folder(name).join("logits.safetensors"));
        let (ids, dir) = (ids(&expected["ids"]), tempfile::tempdir().unwrap());
        let engine = open_exact(&folder(name), 2);
        let base = internals::base(&engine);
        let (plain, mut adapted) = (Adapters::none(base), Adapters::none(base));
        let file = AdapterFile::open(&adapter_of(name, dir.path())).unwrap();
        adapted.attach(base, &file, 1.0, WorkType::F32).unwrap();
        let mut sequences = [0, 1].map(|_| Sequence::new(base, internals::numbers(&engine).cache).unwrap());
        sequences.iter_mut().for_each(|sequence| sequence.expect(ids.len()));
        let mut work = Workspace::new(internals::numbers(&engine).arithmetic);
        let mut found = [Vec::new(), Vec::new()];
        for _ in 0..5 {
            let mut steps: Vec<_> = sequences
                .iter_mut()
                .zip([&plain, &adapted])
                .zip([8, 3])
                .map(|((sequence, adapters), tokens)| {
                    let ids = &ids[sequence.len()..][..tokens];
                    Step { sequence, ids, adapters, logits: 0..tokens }
                })
                .collect();
            let mut take = |logits: &Logits| {
                let rows = logits.values.chunks_exact(base.model.config().vocab_size);
                logits.places.iter().zip(rows).for_each(|((step, _), row)| found[*step].extend_from_slice(row));
                Ok(())
            };
            base.forward(&mut work, &mut steps, &mut || true, &mut take).unwrap();
        }
        let half = &expected["lora_logits"].data[..found[1].len()];
        close(&format!("{name} in a batch"), &found[0], &expected["logits"].data, *bound)?;
        close(&format!("{name} with LoRA in a batch"), &found[1], half, 2.0 * bound)
    });
}

/// Phi-3 turns the tokens of a long text by other angles: a text that grows to such a length is as if it had always been
/// long, and a short one is as if it never became longer.
#[test]
fn a_text_that_becomes_long_is_read_anew() {
    let expected = tensors(&folder("phi3").join("logits.safetensors"));
    let (ids, engine) = (ids(&expected["ids"]), open_exact(&folder("phi3"), 1));
    let (short, long) = (&expected["logits_short"].data, &expected["logits"].data);
    let base = internals::base(&engine);
    let adapters = Adapters::none(base);
    for piece in [1, 3, 20] {
        let mut sequence = Sequence::new(base, internals::numbers(&engine).cache).unwrap();
        let mut work = Workspace::new(internals::numbers(&engine).arithmetic);
        let mut read = |sequence: &mut Sequence<_>, ids: &[u32]| {
            let mut all = Vec::new();
            let mut take = |logits: &Logits| {
                all.extend(&logits.values);
                Ok(())
            };
            for ids in ids.chunks(piece) {
                let step = Step { sequence: &mut *sequence, ids, adapters: &adapters, logits: 0..ids.len() };
                base.forward(&mut work, &mut [step], &mut || true, &mut take).unwrap();
            }
            all
        };
        for _ in 0..2 {
            close(&format!("short, by {piece}"), &read(&mut sequence, &ids[..20]), short, 1e-4).unwrap();
            let all = read(&mut sequence, &ids[20..]);
            // Of 24 tokens a text is still short.
            let rows = long.len() / 40 * if piece == 20 { 20 } else { 16 - 24 % piece };
            let (got, want) = (&all[all.len() - rows..], &long[long.len() - rows..]);
            close(&format!("long, by {piece}"), got, want, 1e-4).unwrap();
            assert_eq!(sequence.rewind(base, 20), 0, "of a long text no beginning is a short one");
        }
    }
}

/// Longer than a block of a cache, so that layers with a window drop some of it.
#[test]
fn a_window_that_moves_on_hides_what_it_hid() {
    check_all(["gemma2", "gemma3_text", "mistral", "phi3", "qwen2"], |name| {
        let engine = open_exact(&folder(name), 1);
        let ids: Vec<u32> = (0..250).map(|i| (i * 37 + i / 7) % 96).collect();
        let whole = in_pieces(&engine, &ids, 250);
        close("in pieces of 3", &in_pieces(&engine, &ids, 3), &whole, 1e-4)
            .map_err(|difference| format!("{name} {difference}"))
    });
}

/// A text may be taken up again at an earlier place: at once, at a snapshot, or from its beginning.
#[test]
fn a_text_that_is_cut_back_goes_on_as_if_it_had_never_been_longer() {
    check_all(FAMILIES, |(name, bound)| {
        let expected = tensors(&folder(name).join("logits.safetensors"));
        let (ids, engine) = (ids(&expected["ids"]), open_exact(&folder(name), 1));
        let base = internals::base(&engine);
        let adapters = Adapters::none(base);
        let mut sequence = Sequence::new(base, internals::numbers(&engine).cache).unwrap();
        let mut work = Workspace::new(internals::numbers(&engine).arithmetic);
        let mut run = |sequence: &mut Sequence<_>, ids: &[u32]| {
            let step = Step { sequence, ids, adapters: &adapters, logits: ids.len() - 1..ids.len() };
            let mut last = Vec::new();
            let mut take = |logits: &Logits| {
                last.clone_from(&logits.values);
                Ok(())
            };
            base.forward(&mut work, &mut [step], &mut || true, &mut take).unwrap();
            last
        };
        run(&mut sequence, &ids[..10]);
        sequence.snapshot(base).unwrap();
        run(&mut sequence, &[&ids[10..20], &[1; 15]].concat());
        let reached = sequence.rewind(base, 20);
        let last = run(&mut sequence, &ids[reached..]);
        let all = &expected["logits"].data;
        close(&format!("{name} from {reached} on"), &last, &all[all.len() - last.len()..], *bound)
    });
}

struct Quiet;

impl Observer for Quiet {
    fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// The one text of the gradients' goldens.
fn training_data(grads: &BTreeMap<String, Tensor>) -> Dataset {
    let trained = grads["labels"].data.iter().enumerate().map(|(i, &label)| i > 0 && label >= 0.0).collect();
    Dataset::new("golden", vec![Sample::new(ids(&grads["ids"]), trained)])
}

fn config() -> TrainConfig {
    TrainConfig {
        batch: 1,
        steps: Some(2),
        warmup: 0.0,
        clip: 0.0,
        dropout: 0.0,
        precision: TrainPrecision::Exact,
        ..TrainConfig::default()
    }
}

#[test]
fn gradients_are_those_of_peft() {
    check_all(FAMILIES, |(name, _)| {
        let golden = tensors(&folder(name).join("grads.safetensors"));
        let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let adapter = adapter_of(name, dir.path());
        let init = AdapterFile::open(&adapter).unwrap();
        let engine = open_exact(&folder(name), 2);
        let rank = if adapter == folder(name).join("adapter") { 4 } else { EXPERT_RANK };
        let config = TrainConfig { rank, alpha: Some(2.0 * rank as f64), ..config() };
        let mut trainer = engine.trainer(config, training_data(&golden), None, Some(&init), out.path()).unwrap();
        let report = trainer.step(&mut Quiet).unwrap();
        let loss = f64::from(golden["loss"].data[0]);
        if (report.loss - loss).abs() > 1e-4 {
            return Err(format!("{name}: loss {} instead of {loss}", report.loss));
        }
        let mut got: BTreeMap<String, Vec<f32>> = trainer.gradients().unwrap().into_iter().collect();
        for (tensor, expected) in golden.iter().filter_map(|(name, t)| Some((name.strip_prefix("grad.")?, t))) {
            let tensor = tensor.strip_prefix("base_model.model.").unwrap();
            check_gradient(name, tensor, expected, &mut got)?;
        }
        if got.is_empty() { Ok(()) } else { Err(format!("{name}: unexpected gradients of {:?}", got.keys())) }
    });
}

/// Compares what `got` has of an adapter's tensor, and takes it.
fn check_gradient(
    name: &str,
    tensor: &str,
    expected: &Tensor,
    got: &mut BTreeMap<String, Vec<f32>>,
) -> Result<(), String> {
    // Gate and up of an expert share a way down, whose gradient is the sum of theirs.
    let mut sums: BTreeMap<String, (Vec<f32>, Vec<f32>)> = BTreeMap::new();
    for (part, expected) in unfold(tensor, expected) {
        let mut grad = got.remove(&part).ok_or_else(|| format!("{name}: no gradient of {part}"))?;
        let (rows, width) = (expected.shape[0], expected.shape[1]);
        let down = part.contains("lora_A");
        if grad.len() > rows * width {
            let padded = if down { width } else { EXPERT_RANK };
            grad = grad.chunks(padded).take(rows).flat_map(|row| row[..width].to_vec()).collect();
        }
        let key = if down { part.replace("up_proj", "gate_proj") } else { part };
        let (sum, _) = sums.entry(key).or_insert_with(|| (vec![0.0; grad.len()], expected.data));
        sum.iter_mut().zip(grad).for_each(|(sum, g)| *sum += g);
    }
    for (part, (grad, expected)) in sums {
        let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
        let error = norm(&mut grad.iter().zip(&expected).map(|(a, e)| f64::from(a - e)));
        let relative = error / norm(&mut expected.iter().map(|&e| f64::from(e)));
        if relative.is_nan() || relative > 1e-3 {
            return Err(format!("{name}: gradient of {part} off by {relative:.2e} of its norm, bound 1e-3"));
        }
    }
    Ok(())
}

#[test]
fn every_family_runs_and_trains_in_four_bits() {
    check_all(FAMILIES, |(name, _)| {
        let golden = tensors(&folder(name).join("grads.safetensors"));
        let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let quantized = dir.path().join("nf4");
        convert(&folder(name), &quantized, Target::Nf4);
        let engine = open_exact(&quantized, 2);
        let ids = ids(&golden["ids"]);
        let (whole, step_by_step) = (logits(&engine, &ids), in_pieces(&engine, &ids, 1));
        close(&format!("{name} in NF4, token by token"), &step_by_step, &whole, 3e-4)?;
        let config = TrainConfig { lr: 1e-2, targets: vec!["all".to_owned()], ..config() };
        let mut trainer = engine.trainer(config, training_data(&golden), None, None, out.path()).unwrap();
        let losses = [0, 1].map(|_| trainer.step(&mut Quiet).unwrap().loss);
        if losses[1] < losses[0] { Ok(()) } else { Err(format!("{name}: losses {losses:?} do not fall")) }
    });
}

/// Nothing before the first layer's experts needs a gradient then.
#[test]
fn adapters_on_experts_alone_are_trained() {
    let golden = tensors(&folder("qwen3_moe").join("grads.safetensors"));
    let (engine, out) = (open_exact(&folder("qwen3_moe"), 2), tempfile::tempdir().unwrap());
    let targets = (0..4).map(|e| format!("experts.{e}.up_proj")).collect();
    let config = TrainConfig { lr: 1e-2, dropout: 0.1, targets, ..config() };
    let mut trainer = engine.trainer(config, training_data(&golden), None, None, out.path()).unwrap();
    let losses = [0, 1].map(|_| trainer.step(&mut Quiet).unwrap().loss);
    assert!(losses[1] < losses[0], "{losses:?}");
}

/// Writes a golden as the text model of a model for more than text, with a tower beside it; `prefix` stands where the text
/// model's names begin with `model.`.
fn wrap(name: &str, outer: &str, prefix: &str, dir: &Path) {
    let read = |path: &Path| serde_json::from_slice::<serde_json::Value>(&fs::read(path).unwrap()).unwrap();
    let mut text = read(&folder(name).join("config.json"));
    let dtype = text.as_object_mut().unwrap().remove("dtype");
    let class = "SomethingForConditionalGeneration";
    let config = json!({"model_type": outer, "architectures": [class], "dtype": dtype, "text_config": text,
        "vision_config": {"hidden_size": 8}});
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let bytes = fs::read(folder(name).join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let renamed = |name: &str| name.strip_prefix("model.").map_or_else(|| name.to_owned(), |n| format!("{prefix}{n}"));
    let tower = [0; 24];
    let tower =
        ("model.vision_tower.patch.weight".to_owned(), TensorView::new(Dtype::BF16, vec![3, 4], &tower).unwrap());
    let views = file.tensors().into_iter().map(|(name, view)| (renamed(&name), view)).chain([tower]);
    fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn the_text_model_in_a_model_for_more_than_text_is_that_model() {
    let cases = [
        ("gemma3_text", "gemma3", "language_model.model."),
        ("gemma3_text", "gemma3", "model.language_model."),
        ("gemma4_text", "gemma4", "model.language_model."),
        ("ministral3", "mistral3", "language_model.model."),
        ("qwen3_5_text", "qwen3_5", "model.language_model."),
    ];
    check_all(cases, |(name, outer, prefix)| {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        wrap(name, outer, prefix, dir.path());
        let source = open_source(dir.path()).unwrap();
        let part = LeftOut { part: "vision_tower".to_owned(), tensors: 1, bytes: 24 };
        assert_eq!(source.left_out(), [part], "{outer}");
        let expected = tensors(&folder(name).join("logits.safetensors"));
        let ids = ids(&expected["ids"]);
        let engine = open_exact(dir.path(), 1);
        close(outer, &logits(&engine, &ids), &expected["logits"].data, 3e-4)?;
        // An adapter with the names of the text model, and one with those of the whole.
        let adapter = folder(name).join("adapter");
        fs::copy(adapter.join("adapter_config.json"), other.path().join("adapter_config.json")).unwrap();
        let bytes = fs::read(adapter.join("adapter_model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let views = file
            .tensors()
            .into_iter()
            .map(|(n, view)| (n.replace("base_model.model.model.", &format!("base_model.model.{prefix}")), view));
        fs::write(other.path().join("adapter_model.safetensors"), safetensors::serialize(views, None).unwrap())
            .unwrap();
        for adapter in [&adapter, other.path()] {
            let engine = open_exact(dir.path(), 1);
            engine.attach(adapter, 1.0).unwrap();
            close(&format!("{outer} with LoRA"), &logits(&engine, &ids), &expected["lora_logits"].data, 6e-4)?;
        }
        // What is made of it is the text model by itself.
        let (copy, plain) = (other.path().join("copy"), other.path().join("plain"));
        convert(dir.path(), &copy, Target::Nf4);
        convert(&folder(name), &plain, Target::Nf4);
        let [copy, plain] = [copy, plain].map(|dir| logits(&open_exact(&dir, 1), &ids));
        close(&format!("{outer} in NF4"), &copy, &plain, 1e-6)
    });
}

/// The first files of GPT-2 lack what all names begin with and have masks among their weights; a copy in four bits has rows
/// where the file has columns.
#[test]
fn the_matrices_of_gpt2_are_rows_whatever_files_hold() {
    let expected = tensors(&folder("gpt2").join("logits.safetensors"));
    let (ids, dir) = (ids(&expected["ids"]), tempfile::tempdir().unwrap());
    fs::copy(folder("gpt2").join("config.json"), dir.path().join("config.json")).unwrap();
    let bytes = fs::read(folder("gpt2").join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mask = [0; 8];
    let mask = ("h.0.attn.bias".to_owned(), TensorView::new(Dtype::BF16, vec![1, 1, 2, 2], &mask).unwrap());
    let bare = |name: String| name.strip_prefix("transformer.").map(str::to_owned).unwrap();
    let views = file.tensors().into_iter().map(|(name, view)| (bare(name), view)).chain([mask]);
    fs::write(dir.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let whole = logits(&open_exact(dir.path(), 1), &ids);
    close("without the names' beginning", &whole, &expected["logits"].data, 1e-4).unwrap();

    let out = tempfile::tempdir().unwrap();
    let copy = out.path().join("nf4");
    convert(dir.path(), &copy, Target::Nf4);
    let four_bit = logits(&open_exact(&copy, 1), &ids);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    let alike = dot(&whole, &four_bit) / (dot(&whole, &whole) * dot(&four_bit, &four_bit)).sqrt();
    assert!(alike > 0.95, "the cosine between logits is {alike}");
}

/// What a model is stored as: linear layers in 4 bits, as bitsandbytes has them, and nothing else.
#[test]
fn what_is_no_linear_layer_stays_as_it_is() {
    let dense = [
        ("lfm2", "model.layers.0.conv.conv.weight"),
        ("qwen3_5_text", "model.layers.0.linear_attn.conv1d.weight"),
        ("qwen3_5_text", "model.layers.0.linear_attn.A_log"),
        ("qwen3_moe", "model.layers.0.mlp.gate.weight"),
    ];
    let four_bit = [
        ("lfm2", "model.layers.0.feed_forward.w1.weight"),
        ("lfm2", "model.layers.0.conv.in_proj.weight"),
        ("qwen3_5_text", "model.layers.0.linear_attn.in_proj_a.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.down_proj.weight"),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight"),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight"),
    ];
    for name in ["lfm2", "phi3", "qwen3_5_text", "qwen3_moe"] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("nf4");
        convert(&folder(name), &out, Target::Nf4);
        let bytes = fs::read(out.join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let of = |cases: &[(&str, &'static str)]| -> Vec<&'static str> {
            cases.iter().filter(|(family, _)| *family == name).map(|(_, tensor)| *tensor).collect()
        };
        for tensor in of(&dense) {
            assert_eq!(file.tensor(tensor).unwrap().dtype(), Dtype::BF16, "{tensor}");
        }
        for tensor in of(&four_bit) {
            assert_eq!(file.tensor(tensor).unwrap().dtype(), Dtype::U8, "{tensor}");
        }
    }
}
