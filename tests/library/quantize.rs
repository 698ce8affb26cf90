//! `quantize`: the same bytes as bitsandbytes writes, and nothing left behind when it fails.

use pocketlora::ErrorCode;
use pocketlora::Result;
use pocketlora::format::safetensors::{Dtype, TensorFile};
use pocketlora::format::{
    Checkpoint, Existing, HfSource, Progress, Recipe, Sidecars, Source, Summary, Target, TensorMeta, quantize,
};
use pocketlora_kernels::MatrixData;
use pocketlora_kernels::quant::encode;
use serde_json::{Map, Value};
use std::fs;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};

fn oracle(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles").join(name)
}

fn run(source: &dyn Source, out: &Path, to: Target) -> Result<Summary> {
    quantize(source, out, to, Existing::Keep, &mut |_| ControlFlow::Continue(()))
}

fn replace(source: &dyn Source, out: &Path) -> Result<Summary> {
    quantize(source, out, Target::Nf4, Existing::Replace, &mut |_| ControlFlow::Continue(()))
}

fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn all_values(source: &dyn Source) -> Vec<(String, Vec<f32>)> {
    let read = |(i, meta): (usize, &TensorMeta)| {
        let rows = if meta.shape.len() < 2 { 1 } else { meta.shape[0] };
        let mut values = vec![f32::NAN; meta.shape.iter().product()];
        source.read_rows(i, 0..rows, &mut values).unwrap();
        (meta.name.clone(), values)
    };
    let mut all: Vec<_> = source.tensors().iter().enumerate().map(read).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// What is left out is 16-bit, and the config names it as transformers looks for it: the head, too, and whole paths.
#[test]
fn skipped_layers_stay_in_16_bits() {
    let dir = tempfile::tempdir().unwrap();
    let source = HfSource::open(&oracle("tiny-mistral")).unwrap();
    let made = |name: &str, skip: &[&str]| -> Result<Checkpoint> {
        let recipe = Recipe { to: Target::Nf4, skip: skip.iter().map(|s| (*s).to_owned()).collect() };
        let out = dir.path().join(name);
        quantize(&source, &out, recipe, Existing::Keep, &mut |_| ControlFlow::Continue(()))?;
        Checkpoint::open(&out)
    };
    let skipped = made("skipped", &["down_proj", "layers.1.self_attn"]).unwrap();
    let expected = [
        "lm_head",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ];
    assert_eq!(skipped.config()["quantization_config"]["llm_int8_skip_modules"], Value::from(expected.to_vec()));
    let whole = made("whole", &[]).unwrap();
    for name in whole.weights().filter(|name| whole.is_quantized(name)) {
        let left_out = expected.contains(&name.trim_end_matches(".weight"));
        assert_eq!(skipped.is_quantized(name), !left_out, "{name}");
        if !left_out {
            assert_eq!(skipped.tensor(name).unwrap().bytes, whole.tensor(name).unwrap().bytes, "{name}");
        }
    }
    let error = made("none", &["dwon_proj"]).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("dwon_proj") && !dir.path().join("none").exists(), "{error}");
}

#[test]
fn the_output_is_what_bitsandbytes_saves() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("nf4");
    let summary = run(&HfSource::open(&oracle("tiny-mistral")).unwrap(), &out, Target::Nf4).unwrap();
    assert_eq!((summary.quantized, summary.dense, summary.dtype), (14, 7, "bfloat16"));

    let ours = TensorFile::open(&out.join("model.safetensors")).unwrap();
    let theirs = TensorFile::open(&oracle("tiny-mistral-bnb4").join("model.safetensors")).unwrap();
    assert_eq!(ours.metadata()["format"], "pt");
    let names = |file: &TensorFile| file.tensors().map(|(name, _)| name.to_owned()).collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&theirs));
    let (mut blocks, mut moved) = (0, 0);
    for (name, theirs) in theirs.tensors() {
        let ours = ours.get(name).unwrap();
        if name.contains("quant_state") {
            // Theirs was loaded in f32, ours keeps the source's bf16; nothing else may differ.
            let theirs =
                String::from_utf8(theirs.bytes.to_vec()).unwrap().replace("float32\", \"shape", "bfloat16\", \"shape");
            assert_eq!(String::from_utf8(ours.bytes.to_vec()).unwrap(), theirs, "{name}");
        } else if theirs.dtype == Dtype::F32 && !name.contains("_proj.weight") {
            assert_eq!((ours.dtype, &ours.shape), (Dtype::BF16, &theirs.shape), "{name}");
        } else if name.ends_with(".absmax") {
            // bitsandbytes picks a neighbour of the nearest code for about one block in 600; see `double_quantize`.
            let pairs = || ours.bytes.iter().zip(&theirs.bytes);
            assert!(ours.shape == theirs.shape && pairs().all(|(a, b)| a.abs_diff(*b) <= 1), "{name}");
            blocks += pairs().count();
            moved += pairs().filter(|(a, b)| a != b).count();
        } else {
            assert_eq!((ours.dtype, &ours.shape, &ours.bytes), (theirs.dtype, &theirs.shape, &theirs.bytes), "{name}");
        }
    }
    assert!(moved * 200 <= blocks, "{moved} of {blocks} absmax codes moved by one");

    let read = |dir: &Path| -> Map<String, Value> {
        serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
    };
    let (mut ours, mut theirs) = (read(&out), read(&oracle("tiny-mistral-bnb4")));
    assert_eq!(ours["quantization_config"]["bnb_4bit_compute_dtype"], "bfloat16");
    theirs["quantization_config"]["bnb_4bit_compute_dtype"] = "bfloat16".into();
    theirs["dtype"] = "bfloat16".into();
    assert_eq!(ours.shift_remove("torch_dtype"), Some("bfloat16".into()));
    assert_eq!(Value::from(ours), Value::from(theirs));
}

#[test]
fn packed_bytes_are_the_codec_s() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("nf4");
    let source = HfSource::open(&oracle("tiny-llama")).unwrap();
    run(&source, &out, Target::Nf4).unwrap();
    let model = Checkpoint::open(&out).unwrap();
    let mut quantized = 0;
    for (name, values) in all_values(&source) {
        if model.is_quantized(&name) {
            let MatrixData::Nf4(data) = model.matrix(&name).unwrap().data else { panic!("{name}") };
            assert!(data.packed == encode(&values).unwrap().0, "{name}");
            quantized += 1;
        }
    }
    assert_eq!(quantized, 14);
}

#[test]
fn float_targets_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    let source = HfSource::open(&oracle("tiny-llama")).unwrap();
    let original = all_values(&source);
    for (name, to) in [("f32", Target::F32), ("bf16", Target::BF16), ("f16", Target::F16)] {
        let out = dir.path().join(name);
        let summary = run(&source, &out, to).unwrap();
        assert_eq!((summary.quantized, summary.dense), (0, original.len()));
        let back = HfSource::open(&out).unwrap();
        assert_eq!(back.config()["dtype"], summary.dtype);
        assert!(!back.config().contains_key("quantization_config"));
        for ((name, a), (_, b)) in original.iter().zip(all_values(&back)) {
            // The weights are bf16 to begin with; binary16 has more digits but flushes the smallest to its grid.
            let bound = |x: f32| if to == Target::F16 { (x.abs() * 4.9e-4).max(3e-8) } else { 0.0 };
            assert!(a.iter().zip(&b).all(|(x, y)| (x - y).abs() <= bound(*x)), "{name}");
        }
    }
}

#[test]
fn a_four_bit_model_expands_but_is_not_quantized_again() {
    let dir = tempfile::tempdir().unwrap();
    let four_bit = HfSource::open(&oracle("tiny-mistral-bnb4")).unwrap();
    let error = run(&four_bit, &dir.path().join("again"), Target::Nf4).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unsupported);
    run(&four_bit, &dir.path().join("f32"), Target::F32).unwrap();
    let expanded = HfSource::open(&dir.path().join("f32")).unwrap();
    assert_eq!(all_values(&four_bit), all_values(&expanded));
    assert!(!expanded.config().contains_key("quantization_config"));
    assert_eq!(entries(dir.path()), ["f32"]);
}

/// A source in memory: one layer that is quantized and one vector that is not.
struct Made {
    config: Map<String, Value>,
    tensors: Vec<TensorMeta>,
    values: Vec<Vec<f32>>,
}

const LAYER: &str = "model.layers.0.mlp.up_proj.weight";

impl Made {
    fn new(dtype: &str, rows: usize, cols: usize) -> Self {
        let meta = |name: &str, shape| TensorMeta { name: name.into(), shape, dtype: dtype.into() };
        let values = |n: usize| (0..n).map(|i| ((i * 31) % 97) as f32 / 97.0 - 0.5).collect();
        Self {
            config: Map::new(),
            tensors: vec![meta(LAYER, vec![rows, cols]), meta("model.norm.weight", vec![cols])],
            values: vec![values(rows * cols), values(cols)],
        }
    }
}

impl Source for Made {
    fn config(&self) -> &Map<String, Value> {
        &self.config
    }
    fn tensors(&self) -> &[TensorMeta] {
        &self.tensors
    }
    fn read_rows(&self, index: usize, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let cols = *self.tensors[index].shape.last().unwrap();
        out.copy_from_slice(&self.values[index][rows.start * cols..rows.end * cols]);
        Ok(())
    }
    fn sidecars(&self) -> Result<Sidecars> {
        Ok(Sidecars { files: vec![("tokenizer.json".into(), b"{}".to_vec())] })
    }
}

#[test]
fn pieces_meet_at_any_shape() {
    // More than one piece, with rows that are whole blocks, parts of blocks and odd.
    let dir = tempfile::tempdir().unwrap();
    for (rows, cols) in [(1, 1), (5, 7), (700, 1024), (900, 992), (2000, 333)] {
        let source = Made::new("F32", rows, cols);
        let out = dir.path().join(format!("{rows}x{cols}"));
        run(&source, &out, Target::Nf4).unwrap();
        let model = Checkpoint::open(&out).unwrap();
        let MatrixData::Nf4(data) = model.matrix(LAYER).unwrap().data else { panic!() };
        let (packed, _) = encode(&source.values[0]).unwrap();
        assert!(data.packed == packed, "{rows}x{cols}");
        assert_eq!(fs::read(out.join("tokenizer.json")).unwrap(), b"{}");
    }
}

#[test]
fn the_sixteen_bit_type_follows_the_source() {
    let dir = tempfile::tempdir().unwrap();
    for (i, (dtype, largest, expected)) in [
        ("BF16", 1.0, "bfloat16"),
        ("F16", 1.0, "float16"),
        ("F32", 65_000.0, "float16"),
        ("Q4_K", 1.0, "float16"),
        ("F32", 65_400.0, "bfloat16"),
    ]
    .into_iter()
    .enumerate()
    {
        for tensor in 0..2 {
            let mut source = Made::new(dtype, 4, 64);
            source.values[tensor][9] = -largest;
            let out = dir.path().join(format!("{i}-{tensor}"));
            assert_eq!(run(&source, &out, Target::Nf4).unwrap().dtype, expected, "{dtype} {largest}");
        }
    }
    let mut source = Made::new("F32", 4, 64);
    source.values[0][9] = 65_520.0;
    let error = run(&source, &dir.path().join("f16"), Target::F16).unwrap_err().to_string();
    assert!(error.contains(LAYER) && error.contains("element `9`") && error.contains("bf16"), "{error}");
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let dir = tempfile::tempdir().unwrap();
    for (bad, to) in [(f32::NAN, Target::Nf4), (f32::INFINITY, Target::BF16), (f32::NEG_INFINITY, Target::F16)] {
        for (tensor, name, at) in [(0, LAYER, 600_001), (1, "model.norm.weight", 3)] {
            let mut source = Made::new("BF16", 700, 1024);
            source.values[tensor][at] = bad;
            *source.values[tensor].last_mut().unwrap() = bad; // a later one, which is not the one to name
            let error = run(&source, &dir.path().join("out"), to).unwrap_err();
            assert!(error.to_string().contains(&format!("got `{bad}` at element `{at}`")), "{error}");
            assert!(error.code() == ErrorCode::Format && error.place().contains(name), "{error}");
            assert!(error.to_string().contains("another copy"), "{error}");
        }
    }
    assert!(entries(dir.path()).is_empty());
}

#[test]
fn malformed_sources_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refuse = |change: fn(&mut Made)| {
        let mut source = Made::new("F16", 4, 64);
        change(&mut source);
        assert_eq!(run(&source, &dir.path().join("out"), Target::Nf4).unwrap_err().code(), ErrorCode::Format);
    };
    refuse(|s| s.tensors[0].shape = vec![0, 64]);
    refuse(|s| s.tensors[0].shape = vec![usize::MAX, usize::MAX]);
    refuse(|s| s.tensors[1].name = LAYER.into());
    refuse(|s| s.tensors[1].name = format!("{LAYER}.absmax"));
    assert!(entries(dir.path()).is_empty());
}

#[test]
fn stopping_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let source = HfSource::open(&oracle("tiny-llama")).unwrap();
    let (mut calls, mut last) = (0, 0);
    quantize(&source, &dir.path().join("whole"), Target::Nf4, Existing::Keep, &mut |p: Progress<'_>| {
        assert!(p.done >= last && p.done <= p.total);
        (calls, last) = (calls + 1, p.done);
        ControlFlow::Continue(())
    })
    .unwrap();
    for stop in 0..calls {
        let mut call = 0;
        let error = quantize(&source, &dir.path().join("stopped"), Target::Nf4, Existing::Keep, &mut |_| {
            call += 1;
            if call > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(error.unwrap_err().code(), ErrorCode::Cancelled);
        assert_eq!(entries(dir.path()), ["whole"]);
    }
}

#[test]
fn only_older_outputs_are_replaced_and_only_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (source, other) = (Made::new("F16", 4, 64), Made::new("F16", 8, 64));
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    run(&source, &out, Target::Nf4).unwrap(); // over an empty directory
    let before = fs::read(out.join("model.safetensors")).unwrap();
    let message = run(&other, &out, Target::Nf4).unwrap_err().to_string();
    assert!(message.contains("`Existing::Replace`"), "{message}");

    // A failing run keeps the old output, a good one replaces it.
    let mut bad = Made::new("F16", 8, 64);
    bad.values[0][5] = f32::NAN;
    replace(&bad, &out).unwrap_err();
    assert_eq!(fs::read(out.join("model.safetensors")).unwrap(), before);
    replace(&other, &out).unwrap();
    assert_eq!(Checkpoint::open(&out).unwrap().matrix(LAYER).unwrap().rows, 8);
    assert_eq!(entries(dir.path()), ["out"]);

    // A kill between the two renames: the old one is found again.
    fs::rename(&out, dir.path().join(".out.previous")).unwrap();
    replace(&bad, &out).unwrap_err();
    assert_eq!(entries(dir.path()), ["out"]);
    assert!(Checkpoint::open(&out).is_ok());

    // A foreign file in it or in a folder of it, a foreign model, a file, a missing parent, a file as parent, no name.
    fs::write(out.join("notes.txt"), "mine").unwrap();
    let foreign = dir.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(oracle("tiny-mistral").join(file), foreign.join(file)).unwrap();
    }
    let nested = dir.path().join("nested");
    run(&source, &nested, Target::Nf4).unwrap();
    fs::create_dir(nested.join("additional_chat_templates")).unwrap();
    fs::write(nested.join("additional_chat_templates/tools.jinja"), "").unwrap();
    replace(&source, &nested).unwrap();
    fs::create_dir(nested.join("runs")).unwrap();
    fs::write(nested.join("runs/adapter"), "mine").unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "text").unwrap();
    let listing = entries(dir.path());
    for (path, code, named) in [
        (out.clone(), ErrorCode::Config, "`notes.txt`"),
        (nested, ErrorCode::Config, "`runs/adapter`"),
        (foreign, ErrorCode::Config, "a model that this program did not write there"),
        (file.clone(), ErrorCode::Config, "a file"),
        (dir.path().join("missing/out"), ErrorCode::Io, "missing/out"),
        (file.join("out"), ErrorCode::Io, "file/out"),
        (PathBuf::from("/"), ErrorCode::Config, "`/`"),
    ] {
        let error = replace(&source, &path).unwrap_err();
        assert!(error.code() == code && error.to_string().contains(named), "{}: {error}", path.display());
        run(&source, &path, Target::Nf4).unwrap_err();
    }
    assert_eq!(entries(dir.path()), listing);
    assert_eq!(fs::read(out.join("notes.txt")).unwrap(), b"mine");
}

#[test]
fn the_source_is_never_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("all/model");
    fs::create_dir_all(model.parent().unwrap()).unwrap();
    run(&HfSource::open(&oracle("tiny-llama")).unwrap(), &model, Target::F32).unwrap();
    let mut places = vec![model.clone(), model.join("nf4"), dir.path().join("all"), model.join("../model/.")];
    #[cfg(unix)]
    {
        use std::os::unix::fs::symlink;
        symlink(&model, dir.path().join("link")).unwrap();
        // A model whose weights lie in what looks like an older output.
        let linked = dir.path().join("linked");
        fs::create_dir(&linked).unwrap();
        fs::copy(model.join("config.json"), linked.join("config.json")).unwrap();
        symlink(model.join("model.safetensors"), linked.join("model.safetensors")).unwrap();
        let source = HfSource::open(&linked).unwrap();
        assert!(replace(&source, &model).unwrap_err().to_string().contains("apart from the source"));
        places.extend([dir.path().join("link"), dir.path().join("link/nf4")]);
    }
    let before = fs::read(model.join("model.safetensors")).unwrap();
    for opened in [model.clone(), model.join("model.safetensors")] {
        for place in &places {
            let error = replace(&HfSource::open(&opened).unwrap(), place).unwrap_err();
            assert!(error.to_string().contains("apart from the source"), "{}: {error}", place.display());
        }
    }
    assert_eq!(fs::read(model.join("model.safetensors")).unwrap(), before);
    assert_eq!(entries(&model), ["config.json", "model.safetensors"]);
}

#[test]
fn all_templates_travel_with_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("nf4"));
    fs::create_dir_all(model.join("additional_chat_templates")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(oracle("tiny-llama").join(file), model.join(file)).unwrap();
    }
    let texts = ["chat_template.json", "added_tokens.json", "additional_chat_templates/rag.jinja"];
    for file in texts {
        fs::write(model.join(file), file).unwrap();
    }
    fs::write(model.join("additional_chat_templates/README.md"), "no template").unwrap();
    run(&HfSource::open(&model).unwrap(), &out, Target::Nf4).unwrap();
    assert!(texts.iter().all(|file| fs::read(out.join(file)).unwrap() == file.as_bytes()));
    assert_eq!(entries(&out.join("additional_chat_templates")), ["rag.jinja"]);
}

#[test]
fn files_appear_whole_or_not_at_all() {
    use pocketlora::format::atomic::write_file;
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter.bin");
    let write = |text: &'static str, fail: bool| {
        write_file(&path, |file| {
            file.write_all(text.as_bytes()).unwrap();
            if fail { Err(pocketlora::Error::config("x", "y", "z")) } else { Ok(()) }
        })
    };
    write("first", true).unwrap_err();
    assert!(entries(dir.path()).is_empty());
    write("first", false).unwrap();
    write("second, longer", true).unwrap_err();
    assert_eq!(fs::read(&path).unwrap(), b"first");
    write("second", false).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"second");
    assert_eq!(entries(dir.path()), ["adapter.bin"]);
}
