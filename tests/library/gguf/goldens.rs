//! Models of the reference stack as llama.cpp's own converter writes them: read back, they give the same logits.
//!
//! `gguf_manifests.json` has, for each family, the metadata that the converter (llama.cpp as in llama-cpp-python 0.3.36) wrote
//! for its golden, and what each tensor is made of: `tests/interop/manifests.py` found it by comparing the file with the golden.
//! From both, the file is made again here, with a checksum of each tensor.

use super::writer::{Random, TensorSpec, Writer};
use crate::common::{Tensor, golden, ids, logits, max_diff, open_exact, tensors};
use bytes::Bytes;
use pocketlora::ErrorCode;
use pocketlora::format::gguf::Gguf;
use pocketlora::format::{Existing, Source, Target, quantize};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

type Tensors = BTreeMap<String, Tensor>;

fn folder(name: &str) -> PathBuf {
    golden("families").join(name)
}

fn write(dir: &Path, config: &Value, all: &Tensors) {
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let bytes: Vec<Vec<u8>> = all.values().map(|t| t.data.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let views = all
        .iter()
        .zip(&bytes)
        .map(|((name, t), bytes)| (name, TensorView::new(Dtype::F32, t.shape.clone(), bytes).unwrap()));
    fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

fn transposed(data: &[f32], width: usize) -> Vec<f32> {
    let rows = data.len() / width;
    (0..data.len()).map(|i| data[i % rows * width + i / rows]).collect()
}

/// What the reader makes of the file, as a checkpoint.
fn read(gguf: &Gguf) -> Tensors {
    let mut all = Tensors::new();
    for (index, meta) in gguf.tensors().iter().enumerate() {
        let mut shape = meta.shape.clone();
        let mut data = vec![f32::NAN; shape.iter().product()];
        let rows = if shape.len() > 1 { shape[0] } else { 1 };
        // In pieces, as readers do.
        let cols = data.len() / rows;
        for row in 0..rows {
            gguf.read_rows(index, row..row + 1, &mut data[row * cols..][..cols]).unwrap();
        }
        if gguf.by_rows(index) {
            data = transposed(&data, shape[1]);
            shape.reverse();
        }
        all.insert(meta.name.clone(), Tensor { shape, data });
    }
    all
}

fn answers(config: &Value, all: &Tensors, text: &[u32]) -> Vec<f32> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), config, all);
    logits(&open_exact(dir.path(), 1), text)
}

/// A golden as the converter saw it, and what it made of it.
struct Case {
    name: String,
    config: Value,
    tensors: Tensors,
    manifest: Value,
}

fn manifests() -> Map<String, Value> {
    serde_json::from_str(include_str!("../../data/gguf_manifests.json")).unwrap()
}

impl Case {
    fn named(name: &str) -> Self {
        Self::of(name, manifests().remove(name).unwrap())
    }

    fn of(name: &str, manifest: Value) -> Self {
        let text = fs::read(folder(name).join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        let mut tensors = tensors(&folder(name).join("model.safetensors"));
        // What llama.cpp has no such models of: other constants, or a layer without experts among those with some.
        for (key, value) in manifest.get("change").and_then(Value::as_object).into_iter().flatten() {
            config[key] = value.clone();
        }
        if let Some([dropped, last]) = manifest.get("drop").and_then(Value::as_array).map(Vec::as_slice) {
            let (dropped, last) = (dropped.as_str().unwrap(), last.as_str().unwrap());
            tensors.retain(|name, _| !name.contains(dropped));
            if !last.is_empty() {
                tensors = tensors.into_iter().map(|(name, t)| (name.replace(last, dropped), t)).collect();
            }
        }
        Self { name: name.to_owned(), config, tensors, manifest }
    }

    /// Its tensors with the factors that the converter puts into them.
    fn scaled(&self) -> Tensors {
        let mut all = self.tensors.clone();
        for (module, factors) in self.manifest.get("scaled").and_then(Value::as_object).into_iter().flatten() {
            for (_, tensor) in all.iter_mut().filter(|(name, _)| name.ends_with(&format!("{module}.weight"))) {
                let columns = tensor.shape[1];
                let mut rest = &mut tensor.data[..];
                for part in factors.as_array().unwrap() {
                    let (mine, others) = rest.split_at_mut(part[0].as_u64().unwrap() as usize * columns);
                    for factor in part[1].as_array().unwrap() {
                        mine.iter_mut().for_each(|x| *x *= factor.as_f64().unwrap() as f32);
                    }
                    rest = others;
                }
            }
        }
        all
    }

    /// The file, tensor by tensor, each with the converter's checksum.
    fn file(&self) -> Writer {
        let (all, mut w) = (self.scaled(), Writer::new());
        for (key, value) in self.manifest["metadata"].as_object().unwrap() {
            put(&mut w, key, value[0].as_str().unwrap(), &value[1]);
        }
        for tensor in self.manifest["tensors"].as_array().unwrap() {
            let name = tensor[0].as_str().unwrap();
            let shape: Vec<usize> = tensor[1].as_array().unwrap().iter().map(size).collect();
            let pieces = tensor[3].as_array().unwrap();
            let values: Vec<f32> = match tensor[2].as_str().unwrap() {
                "given" => floats(&pieces[0]),
                function => {
                    let values = pieces.iter().flat_map(|p| piece(&all, p));
                    let change = |x: f32| match function {
                        "plus1" => x + 1.0,
                        "negexp" => -x.exp(),
                        _ => x,
                    };
                    values.map(change).collect()
                }
            };
            // The exponential of another library may be the next number.
            if tensor[2] != "negexp" {
                let bits = values.iter().map(|x| u64::from(x.to_bits())).zip(0u64..);
                let sum = bits.fold(0u64, |sum, (b, i)| sum.wrapping_add(b * (i % 65_521 + 1)));
                assert_eq!(tensor[4], sum % (1 << 32), "{}: {name}", self.name);
            }
            w.tensor(name, &shape, &values);
        }
        w
    }

    fn gguf(&self) -> pocketlora::Result<Gguf> {
        Gguf::from_bytes(Bytes::from(self.file().build()), Path::new("golden.gguf"))
    }
}

fn size(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

/// A part of a tensor: all of a checkpoint's, or some of its rows, turned before they are chosen or after.
fn piece(all: &Tensors, piece: &Value) -> Vec<f32> {
    if let Some(name) = piece.as_str() {
        return all[name].data.clone();
    }
    let tensor = &all[piece[0].as_str().unwrap()];
    let mut width = if tensor.shape.len() > 1 { *tensor.shape.last().unwrap() } else { 1 };
    let (first, count) = (size(&piece[1]), size(&piece[2]));
    let mut block = tensor.data[first * width..][..count * width].to_vec();
    if piece[3] == 1 {
        block = transposed(&block, width);
        width = count;
    }
    let mut chosen = Vec::new();
    for run in piece[4].as_array().unwrap() {
        let [from, number, step] = [&run[0], &run[1], &run[2]].map(size);
        (0..number).for_each(|i| chosen.extend(&block[(from + i * step) * width..][..width]));
    }
    if piece[5] == 1 { transposed(&chosen, width) } else { chosen }
}

fn put(w: &mut Writer, key: &str, kind: &str, value: &Value) {
    match kind {
        "text" => w.string(key, value.as_str().unwrap()),
        "bool" => w.bool(key, value.as_bool().unwrap()),
        "u32" => w.u32(key, value.as_u64().unwrap() as u32),
        "f32" => w.f32(key, value.as_f64().unwrap() as f32),
        "i32s" => {
            w.i32s(key, &value.as_array().unwrap().iter().map(|x| x.as_i64().unwrap() as i32).collect::<Vec<_>>())
        }
        "f32s" => w.f32s(key, &floats(value)),
        "bools" => w.bools(key, &value.as_array().unwrap().iter().map(|x| x.as_bool().unwrap()).collect::<Vec<_>>()),
        other => panic!("{key}: {other}"),
    };
}

/// The families whose golden the converter took as it is give the logits of transformers; all give those of the checkpoint.
#[test]
fn what_llama_cpps_converter_writes_is_read_with_the_same_answers() {
    let mut failed = Vec::new();
    let all = manifests();
    assert_eq!(all.len(), 39);
    for (name, manifest) in all {
        let case = Case::of(&name, manifest);
        let gguf = match case.gguf() {
            Ok(gguf) => gguf,
            Err(error) => {
                failed.push(format!("{name}: {error}"));
                continue;
            }
        };
        let read = read(&gguf);
        let expected = tensors(&folder(&name).join("logits.safetensors"));
        let text = ids(&expected["ids"]);
        let mut names: Vec<_> = read.keys().cloned().collect();
        match pocketlora_models::build(gguf.config()) {
            Ok(model) => model.params().iter().for_each(|p| names.retain(|name| *name != p.name)),
            Err(error) => names.push(error.to_string()),
        }
        if !names.is_empty() {
            failed.push(format!("{name}: {names:?}"));
            continue;
        }
        let Ok([got, own]) = std::panic::catch_unwind(|| {
            let got = answers(&Value::Object(gguf.config().clone()), &read, &text);
            [got, answers(&case.config, &case.tensors, &text)]
        }) else {
            failed.push(format!("{name}: does not open"));
            continue;
        };
        let same = case.manifest.get("change").is_none() && case.manifest.get("drop").is_none();
        for (of, wanted) in
            [("checkpoint", &own)].into_iter().chain(same.then_some(("golden", &expected["logits"].data)))
        {
            let (diff, at) = max_diff(&got, wanted);
            // Recurrences amplify the last bit of a rate.
            if diff.is_nan() || diff > 5e-4 {
                failed.push(format!("{name}: off the {of} by {diff} at {at}"));
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Puts the tensors `parts` of each layer that has them all in one, called `whole`: one behind the other, of stacks in each matrix.
fn fuse(w: &mut Writer, parts: &[&str], whole: &str) {
    for (layer, end) in (0..8).flat_map(|layer| [(layer, "weight"), (layer, "bias")]) {
        let names: Vec<String> = parts.iter().map(|part| format!("blk.{layer}.{part}.{end}")).collect();
        let of = |name: &String| w.tensors.iter().find(|t| t.name == *name).cloned();
        let Some(found) = names.iter().map(of).collect::<Option<Vec<TensorSpec>>>() else { continue };
        let mut fused = TensorSpec { name: format!("blk.{layer}.{whole}.{end}"), data: Vec::new(), ..found[0].clone() };
        let rows = 1.min(fused.dims.len() - 1);
        fused.dims[rows] = found.iter().map(|t| t.dims[rows]).sum();
        let matrices = fused.dims.get(2).map_or(1, |n| *n as usize);
        for matrix in 0..matrices {
            let of = |t: &TensorSpec| t.data.chunks(t.data.len() / matrices).nth(matrix).unwrap().to_vec();
            fused.data.extend(found.iter().flat_map(of));
        }
        w.tensors.retain(|t| !names.contains(&t.name));
        w.tensors.push(fused);
    }
}

/// The converter's `--fuse-qkv` and `--fuse-gate-up-exps`, and what its first version for Qwen3-Next had in one.
#[test]
fn fused_tensors_are_read_as_the_parts_that_they_are_made_of() {
    let mut fused = 0;
    for (name, manifest) in manifests() {
        let case = Case::of(&name, manifest);
        let (plain, mut w) = (case.gguf().unwrap(), case.file());
        fuse(&mut w, &["attn_q", "attn_k", "attn_v"], "attn_qkv");
        if name == "qwen3_next" {
            fuse(&mut w, &["ffn_gate_exps", "ffn_up_exps"], "ffn_gate_up_exps");
            let own = &case.tensors["model.layers.0.linear_attn.in_proj_qkvz.weight"];
            w.tensors.retain(|t| !["blk.0.attn_qkv.weight", "blk.0.attn_gate.weight"].contains(&&t.name[..]));
            w.tensor("blk.0.ssm_in.weight", &own.shape, &own.data);
        }
        fused += usize::from(w.tensors.len() < case.file().tensors.len());
        let gguf = Gguf::from_bytes(Bytes::from(w.build()), Path::new("golden.gguf"));
        let gguf = gguf.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(gguf.config(), plain.config(), "{name}");
        let (got, wanted) = (read(&gguf), read(&plain));
        assert!(got.keys().eq(wanted.keys()), "{name}");
        for (tensor, wanted) in wanted {
            assert!(got[&tensor].shape == wanted.shape && got[&tensor].data == wanted.data, "{name}: {tensor}");
        }
    }
    assert_eq!(fused, 33);
}

/// Where numbers hang on the type that a model was published in, copies are in it, too.
#[test]
fn copies_of_gemma_are_in_bfloat16() {
    let dir = tempfile::tempdir().unwrap();
    let published =
        [("gemma2", "bfloat16"), ("gemma3_text", "bfloat16"), ("gemma4_text", "bfloat16"), ("llama", "float16")];
    for (name, dtype) in published {
        let gguf = Case::named(name).gguf().unwrap();
        let done =
            quantize(&gguf, &dir.path().join(name), Target::Nf4, Existing::Keep, &mut |_| ControlFlow::Continue(()));
        assert_eq!((done.unwrap().dtype, &gguf.config()["torch_dtype"]), (dtype, &Value::from(dtype)), "{name}");
    }
}

fn refused(w: &Writer) -> String {
    let error = Gguf::from_bytes(Bytes::from(w.build()), Path::new("golden.gguf")).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Format, "{error}");
    error.to_string()
}

/// The family, what is wrong, and what the message must name.
type Lie = (&'static str, fn(&mut Writer), &'static [&'static str]);

#[test]
fn lists_of_layers_and_stacks_of_experts_are_checked() {
    let cases: &[Lie] = &[
        (
            "lfm2",
            |w| _ = w.i32s("lfm2.attention.head_count_kv", &[0, 2]),
            &["lfm2.attention.head_count_kv", "3 layers"],
        ),
        ("lfm2", |w| _ = w.i32s("lfm2.attention.head_count_kv", &[1, 2, 0]), &["lfm2.attention.head_count_kv"]),
        ("qwen3_moe", |w| _ = w.u32("qwen3moe.expert_feed_forward_length", 41), &["_exps.weight"]),
        ("qwen3_moe", |w| _ = w.u32("qwen3moe.expert_count", 8), &["ffn_gate_inp.weight"]),
        ("olmo3", |w| _ = w.bools("olmo2.attention.sliding_window_pattern", &[true]), &["sliding_window_pattern"]),
        ("phi3", |w| w.tensors.retain(|t| t.name != "rope_factors_short.weight"), &["rope_factors_short.weight"]),
        ("phi3", |w| w.find("rope_factors_long.weight").dims = vec![4], &["rope_factors_long.weight"]),
        ("apertus", |w| _ = w.f32s("xielu.beta", &[0.5]), &["xielu.beta", "2 layers"]),
        ("apertus", |w| _ = w.remove("xielu.eps"), &["xielu.eps"]),
        ("gemma4_text", |w| _ = w.i32s("gemma4.feed_forward_length", &[48, 48, 48, 50, 96]), &["feed_forward_length"]),
        ("gemma4_text", |w| w.find("rope_freqs.weight").data[4..8].fill(63), &["rope_freqs.weight"]),
        ("mamba2", |w| _ = w.u32("mamba2.ssm.time_step_rank", 7), &["ssm.inner_size"]),
        ("mamba2", |w| _ = w.u32("mamba2.ssm.group_count", 3), &["n_groups"]),
        ("qwen3_5_text", |w| _ = w.u32("qwen35.nextn_predict_layers", 4), &["nextn_predict_layers"]),
        ("youtu", |w| _ = w.u32("deepseek2.rope.dimension_count", 32), &["rope.dimension_count"]),
        ("youtu", |w| w.find("blk.0.attn_k_b.weight").dims = vec![8, 32, 4], &["blk.0.attn_k_b.weight"]),
    ];
    for (name, spoil, said) in cases {
        let mut w = Case::named(name).file();
        spoil(&mut w);
        let error = refused(&w);
        assert!(said.iter().all(|said| error.contains(said)), "{name}: {error}");
    }
}

/// The layers behind the last one, which guess at further tokens, are left out with a word.
#[test]
fn layers_that_predict_further_tokens_are_left_out() {
    let case = Case::named("qwen3_5_text");
    let mut w = case.file();
    w.u32("qwen35.block_count", 5).u32("qwen35.nextn_predict_layers", 1);
    w.tensor("blk.4.nextn.eh_proj.weight", &[64, 128], &[0.0; 64 * 128]);
    let gguf = Gguf::from_bytes(Bytes::from(w.build()), Path::new("golden.gguf")).unwrap();
    assert_eq!(gguf.config()["num_hidden_layers"], 4);
    assert_eq!(gguf.left_out().iter().map(|part| part.tensors).collect::<Vec<_>>(), [1]);
    assert_eq!(gguf.tensors().len(), case.gguf().unwrap().tensors().len());
}

/// Of every family: a header that lies ends in an error, or in a model whose tensors can be read.
#[test]
fn flipped_bits_in_any_family_never_panic() {
    let mut random = Random(0xface);
    for (name, manifest) in manifests() {
        let w = Case::of(&name, manifest).file();
        let whole = w.build();
        let header = whole.len() - w.tensors.iter().map(|t| t.data.len()).sum::<usize>();
        let mut refused = 0;
        for _ in 0..80 {
            let mut bytes = whole.clone();
            for _ in 0..=random.below(3) {
                bytes[random.below(header)] ^= 1 << random.below(8);
            }
            match Gguf::from_bytes(Bytes::from(bytes), Path::new("golden.gguf")) {
                Ok(gguf) => _ = read(&gguf),
                Err(_) => refused += 1,
            }
        }
        assert!(refused > 20, "{name}: only {refused} of 80 refused: the flips miss the header");
    }
}
