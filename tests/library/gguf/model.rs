//! The model side: names, row order, `config.json`; on small files and on the real one.

use super::writer::{Writer, small_llama, small_qwen2};
use crate::common::real_gguf;
use bytes::Bytes;
use pocketlora::format::gguf::{Gguf, GgufTarget, export_model};
use pocketlora::format::{Source, open_source};
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::path::Path;

pub fn open(w: &Writer) -> Gguf {
    Gguf::from_bytes(Bytes::from(w.build()), Path::new("small.gguf")).unwrap()
}

pub fn read(gguf: &Gguf, name: &str) -> Vec<f32> {
    let index = gguf.tensors().iter().position(|t| t.name == name).unwrap_or_else(|| panic!("no {name}"));
    let shape = &gguf.tensors()[index].shape;
    let mut out = vec![f32::NAN; shape.iter().product()];
    gguf.read_rows(index, 0..if shape.len() > 1 { shape[0] } else { 1 }, &mut out).unwrap();
    out
}

/// The rows `order` of a matrix of 8 columns whose values count up from zero.
pub fn counted(order: &[usize]) -> Vec<f32> {
    order.iter().flat_map(|r| (r * 8..r * 8 + 8).map(|x| x as f32)).collect()
}

#[test]
fn llama_heads_are_put_back_in_half_split_order() {
    let mut w = small_llama();
    for (name, len) in [("q", 8), ("k", 4), ("v", 4), ("output", 8)] {
        let values: Vec<f32> = (0..len).map(|i| i as f32).collect();
        w.tensor(&format!("blk.0.attn_{name}.bias"), &[len], &values);
    }
    let gguf = open(&w);
    assert_eq!(read(&gguf, "model.layers.0.self_attn.q_proj.weight"), counted(&[0, 2, 1, 3, 4, 6, 5, 7]));
    assert_eq!(read(&gguf, "model.layers.0.self_attn.k_proj.weight"), counted(&[0, 2, 1, 3]));
    assert_eq!(read(&gguf, "model.layers.0.self_attn.v_proj.weight"), counted(&[0, 1, 2, 3]));
    assert_eq!(read(&gguf, "model.layers.0.self_attn.q_proj.bias"), [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    assert_eq!(read(&gguf, "model.layers.0.self_attn.k_proj.bias"), [0.0, 2.0, 1.0, 3.0]);
    assert_eq!(read(&gguf, "model.layers.0.self_attn.o_proj.bias"), (0..8).map(|x| x as f32).collect::<Vec<_>>());
    // A range of rows is cut after the order is restored.
    let q = gguf.tensors().iter().position(|t| t.name.ends_with("q_proj.weight")).unwrap();
    let mut out = [0.0; 24];
    gguf.read_rows(q, 1..4, &mut out).unwrap();
    assert_eq!(out[..], counted(&[2, 1, 3]));
    assert_eq!(gguf.config()["attention_bias"], true);
}

#[test]
fn qwen2_heads_stay_as_they_are() {
    let gguf = open(&small_qwen2());
    assert_eq!(read(&gguf, "model.layers.0.self_attn.q_proj.weight"), counted(&[0, 1, 2, 3, 4, 5, 6, 7]));
    assert_eq!(read(&gguf, "model.layers.0.self_attn.k_proj.bias"), [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(gguf.config()["model_type"], "qwen2");
    assert_eq!(gguf.config()["architectures"], json!(["Qwen2ForCausalLM"]));
}

#[test]
fn names_and_shapes_are_hugging_faces() {
    let mut w = small_llama();
    w.tensor("output.weight", &[267, 8], &[0.5; 267 * 8]);
    let gguf = open(&w);
    let mut names: Vec<_> = gguf.tensors().iter().map(|t| (t.name.as_str(), t.shape.as_slice())).collect();
    names.sort_unstable();
    let layer = "model.layers.0.";
    let mut want = vec![
        ("lm_head.weight".to_owned(), vec![267, 8]),
        ("model.embed_tokens.weight".to_owned(), vec![267, 8]),
        ("model.norm.weight".to_owned(), vec![8]),
        (format!("{layer}input_layernorm.weight"), vec![8]),
        (format!("{layer}post_attention_layernorm.weight"), vec![8]),
        (format!("{layer}self_attn.q_proj.weight"), vec![8, 8]),
        (format!("{layer}self_attn.k_proj.weight"), vec![4, 8]),
        (format!("{layer}self_attn.v_proj.weight"), vec![4, 8]),
        (format!("{layer}self_attn.o_proj.weight"), vec![8, 8]),
        (format!("{layer}mlp.gate_proj.weight"), vec![16, 8]),
        (format!("{layer}mlp.up_proj.weight"), vec![16, 8]),
        (format!("{layer}mlp.down_proj.weight"), vec![8, 16]),
    ];
    want.sort_unstable();
    assert_eq!(names, want.iter().map(|(n, s)| (n.as_str(), s.as_slice())).collect::<Vec<_>>());
    assert_eq!(gguf.config()["tie_word_embeddings"], false);
}

#[test]
fn a_sliding_window_makes_a_mistral() {
    let gguf = open(small_llama().u32("llama.attention.sliding_window", 32));
    assert_eq!((&gguf.config()["model_type"], &gguf.config()["sliding_window"]), (&json!("mistral"), &json!(32)));
    assert_eq!(read(&gguf, "model.layers.0.self_attn.k_proj.weight"), counted(&[0, 2, 1, 3]));
}

#[test]
fn linear_rope_scaling_is_kept() {
    for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
        let gguf = open(small_llama().f32(key, 4.0));
        assert_eq!(gguf.config()["rope_scaling"], json!({"rope_type": "linear", "factor": 4.0}));
    }
    let gguf = open(small_llama().string("llama.rope.scaling.type", "none"));
    assert!(!gguf.config().contains_key("rope_scaling"));
}

#[test]
fn yarn_is_kept_in_hugging_faces_terms() {
    let mut w = small_llama();
    w.string("llama.rope.scaling.type", "yarn").f32("llama.rope.scaling.factor", 4.0);
    w.u32("llama.rope.scaling.original_context_length", 16).f32("llama.rope.scaling.yarn_beta_fast", 16.0);
    w.f32("llama.rope.scaling.yarn_ext_factor", 1.0).bool("llama.rope.scaling.finetuned", true);
    let want = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0});
    assert_eq!(open(&w).config()["rope_scaling"], want);
    w.f32("llama.rope.scaling.yarn_log_multiplier", 0.5);
    let rope = &open(&w).config()["rope_scaling"].clone();
    assert_eq!((&rope["mscale"], &rope["mscale_all_dim"]), (&json!(1.0), &json!(0.5)));
    pocketlora_models::build(open(&w).config()).unwrap();
}

/// The converter's loop (`LlamaModel.generate_extra_tensors` in llama.cpp), in f32 as there.
fn llama3_divisors(head_dim: usize, base: f32, factor: f32) -> Vec<f32> {
    let divisor = |i: usize| {
        let wavelength = std::f32::consts::TAU * base.powf(2.0 * i as f32 / head_dim as f32);
        if wavelength < 8192.0 / 4.0 {
            return 1.0;
        }
        if wavelength > 8192.0 {
            return factor;
        }
        let smooth = (8192.0 / wavelength - 1.0) / 3.0;
        1.0 / ((1.0 - smooth) / factor + smooth)
    };
    (0..head_dim / 2).map(divisor).collect()
}

#[test]
fn llama3_rope_is_recognized_from_its_divisors() {
    // The real models: head size 64 with factor 32 (1B), 128 with factor 8 (8B).
    for (head_dim, factor) in [(64, 32.0), (128, 8.0)] {
        let mut w = small_llama();
        w.u32("llama.attention.head_count", 1).u32("llama.attention.key_length", head_dim as u32);
        w.f32("llama.rope.freq_base", 500_000.0);
        for (name, dims) in
            [("q", [8, head_dim]), ("k", [8, head_dim]), ("v", [8, head_dim]), ("output", [head_dim, 8])]
        {
            let t = w.find(&format!("blk.0.attn_{name}.weight"));
            t.dims = dims.map(|n| n as u64).to_vec();
            t.data = vec![0; 8 * head_dim * 4];
        }
        w.tensor("rope_freqs.weight", &[head_dim / 2], &llama3_divisors(head_dim, 500_000.0, factor));
        let gguf = open(&w);
        let want = json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192});
        assert_eq!(gguf.config()["rope_scaling"], want);
        assert_eq!(gguf.config()["rope_parameters"]["rope_theta"], 500_000.0);
        assert!(gguf.tensors().iter().all(|t| !t.name.contains("rope")));
    }
}

#[test]
fn divisors_of_one_scale_nothing() {
    let gguf = open(small_llama().tensor("rope_freqs.weight", &[2], &[1.0, 1.0]));
    assert_eq!(gguf.config()["rope_parameters"], json!({"rope_type": "default", "rope_theta": 100_000.0}));
}

#[test]
fn the_real_model_has_its_config() {
    let Some(path) = real_gguf() else { return };
    let gguf = Gguf::open(&path).unwrap();
    let want = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "hidden_act": "silu", "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false, "rope_theta": 100_000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "torch_dtype": "float16",
    });
    assert_eq!(Value::Object(gguf.config().clone()), want);
    assert_eq!(gguf.tensors().len(), 272);
}

/// Against gguf-py's dequantization, put in Hugging Face's row order by NumPy (`gguf_goldens.py`).
#[test]
fn the_real_models_weights_have_the_same_bits() {
    let Some(path) = real_gguf() else { return };
    let gguf = Gguf::open(&path).unwrap();
    let goldens: Vec<Value> = serde_json::from_str(include_str!("../../data/gguf_smollm2_rows.json")).unwrap();
    assert_eq!(goldens.len(), 6);
    for golden in goldens {
        let name = golden["name"].as_str().unwrap();
        let values = read(&gguf, name);
        let columns = golden["shape"].as_array().unwrap().last().unwrap().as_u64().unwrap() as usize;
        for (row, want) in golden["rows"].as_object().unwrap() {
            let at = row.parse::<usize>().unwrap() * columns;
            let got: Vec<u32> = values[at..at + 8].iter().map(|v| v.to_bits()).collect();
            assert_eq!(json!(got), *want, "row {row} of {name}");
        }
        let bits = || values.iter().map(|v| u64::from(v.to_bits()));
        let weighted = bits().zip(0u64..).fold(0u64, |sum, (b, i)| sum.wrapping_add(b * (i % 65_521)));
        assert_eq!(golden["sum_of_bits"], bits().sum::<u64>() % (1 << 53), "{name}");
        assert_eq!(golden["weighted_sum_of_bits"], weighted % (1 << 53), "{name}");
    }
}

/// The small model's tensors in three files, under names that `gguf-split` gives.
fn split(dir: &Path, change: impl Fn(usize, &mut Writer)) -> Vec<std::path::PathBuf> {
    let whole = small_llama();
    let count = whole.tensors.len();
    (0..3)
        .map(|number| {
            let mut part = if number == 0 { whole.clone() } else { Writer::new() };
            part.tensors =
                whole.tensors.iter().enumerate().filter(|(i, _)| i % 3 == number).map(|(_, t)| t.clone()).collect();
            part.u32("split.no", number as u32).u32("split.count", 3).u32("split.tensors.count", count as u32);
            change(number, &mut part);
            let path = dir.join(format!("small-{:05}-of-00003.gguf", number + 1));
            std::fs::write(&path, part.build()).unwrap();
            path
        })
        .collect()
}

#[test]
fn a_model_in_several_files_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let paths = split(dir.path(), |_, _| ());
    let whole = open(&small_llama());
    for path in &paths {
        let found = pocketlora::format::model_of(path);
        assert_eq!(found, paths[0], "any part stands for the first");
        let parts = Gguf::open(&found).unwrap();
        assert_eq!(parts.files(), paths);
        assert_eq!(parts.config(), whole.config());
        for tensor in whole.tensors() {
            assert_eq!(read(&parts, &tensor.name), read(&whole, &tensor.name), "{}", tensor.name);
        }
    }
    let refused = |name: &str, change: &dyn Fn(usize, &mut Writer), said: &str| {
        let dir = tempfile::tempdir().unwrap();
        let paths = split(dir.path(), change);
        let error = Gguf::open(&paths[0]).unwrap_err().to_string();
        assert!(error.contains(said), "{name}: expected `{said}` in: {error}");
    };
    let of = |number: usize, change: fn(&mut Writer)| {
        move |n: usize, w: &mut Writer| {
            if n == number {
                change(w)
            }
        }
    };
    refused("another part", &of(2, |w| _ = w.u32("split.no", 1)), "split.no");
    refused("another count", &of(1, |w| _ = w.u32("split.count", 4)), "split.count");
    refused("no part", &of(1, |w| _ = w.remove("split.no")), "split.no");
    refused("a tensor is missing", &of(1, |w| drop(w.tensors.pop())), "split.tensors.count");
    let again = |w: &mut Writer| w.tensors.push(small_llama().tensors.swap_remove(0));
    refused("a tensor twice", &of(2, again), "token_embd.weight");
    std::fs::remove_file(&paths[1]).unwrap();
    let error = Gguf::open(&paths[2]).unwrap_err().to_string();
    assert!(error.contains("small-00002-of-00003.gguf"), "{error}");
    let renamed = dir.path().join("renamed.gguf");
    std::fs::rename(&paths[0], &renamed).unwrap();
    let error = Gguf::open(&renamed).unwrap_err().to_string();
    assert!(error.contains("-00001-of-00003.gguf"), "{error}");
}

/// Writes the model at `base` as a GGUF file and opens that.
pub fn exported(base: &Path, out: &Path, to: GgufTarget) -> Gguf {
    let source = open_source(base).unwrap();
    export_model(source.as_ref(), base, out, to, &mut |_| ControlFlow::Continue(())).unwrap();
    Gguf::open(out).unwrap()
}

#[test]
fn what_is_exported_is_read_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let golden = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles").join(name);
    let scaled = dir.path().join("llama3");
    std::fs::create_dir(&scaled).unwrap();
    std::fs::copy(golden("tiny-llama/config_llama3_rope.json"), scaled.join("config.json")).unwrap();
    std::fs::copy(golden("tiny-llama/model.safetensors"), scaled.join("model.safetensors")).unwrap();
    // As it is published: without windows.
    let smollm3 = dir.path().join("smollm3");
    std::fs::create_dir(&smollm3).unwrap();
    let text = std::fs::read(golden("families/smollm3/config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    (config["use_sliding_window"], config["layer_types"]) = (false.into(), Value::Null);
    std::fs::write(smollm3.join("config.json"), config.to_string()).unwrap();
    std::fs::copy(golden("families/smollm3/model.safetensors"), smollm3.join("model.safetensors")).unwrap();
    let models = [
        ("arcee", golden("families/arcee")),
        ("ernie4_5", golden("families/ernie4_5")),
        ("olmo2", golden("families/olmo2")),
        ("seed_oss", golden("families/seed_oss")),
        ("granite", golden("families/granite")),
        ("smollm3", smollm3),
        ("tiny-llama", golden("tiny-llama")),
        ("llama3", scaled),
        ("tiny-qwen2", golden("tiny-qwen2")),
        ("tiny-mistral", golden("tiny-mistral")),
        ("qwen3", golden("families/qwen3")),
    ];
    for (name, base) in models {
        let source = open_source(&base).unwrap();
        // f16 keeps 11 bits, Q8_0 7 of the largest of a block, Q4_0 3, and an eighth of it at the other end.
        for (to, bound) in [(GgufTarget::F16, 1e-3), (GgufTarget::Q8_0, 5e-3), (GgufTarget::Q4_0, 0.13)] {
            let gguf = exported(&base, &dir.path().join(format!("{name}-{to:?}.gguf")), to);
            let build = |config| pocketlora_models::build(config).unwrap();
            let (was, is) = (build(source.config()), build(gguf.config()));
            assert_eq!(is.params(), was.params(), "{name}");
            let ropes = |model: &dyn pocketlora_models::Model| -> Vec<Vec<f32>> {
                model.ropes().iter().map(|rope| rope.frequencies(64).to_vec()).collect()
            };
            for (is, was) in ropes(is.as_ref()).iter().flatten().zip(ropes(was.as_ref()).iter().flatten()) {
                assert!((is - was).abs() <= 1e-5 * was.abs(), "{name}: a frequency of {is} instead of {was}");
            }
            for (i, tensor) in source.tensors().iter().enumerate() {
                let mut was = vec![0.0; tensor.shape.iter().product()];
                source.read_rows(i, 0..if tensor.shape.len() > 1 { tensor.shape[0] } else { 1 }, &mut was).unwrap();
                let is = read(&gguf, &tensor.name);
                let most = was.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                let off = is.iter().zip(&was).fold(0.0f32, |off, (is, was)| off.max((is - was).abs()));
                let exact = tensor.shape.len() == 1;
                assert!(
                    off <= if exact { 0.0 } else { bound * most },
                    "{name} {to:?} {}: {off} of {most}",
                    tensor.name
                );
            }
        }
    }
}

/// Blocks by hand, as ggml's definitions have them.
#[test]
fn blocks_are_those_of_ggml() {
    let dir = tempfile::tempdir().unwrap();
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles/tiny-llama");
    let source = open_source(&base).unwrap();
    let at = source.tensors().iter().position(|t| t.name.ends_with("0.mlp.down_proj.weight")).unwrap();
    let mut row = vec![0.0; 256];
    source.read_rows(at, 0..1, &mut row).unwrap();
    let block = &row[..32];
    let [q8, q4] = [GgufTarget::Q8_0, GgufTarget::Q4_0].map(|to| {
        let gguf = exported(&base, &dir.path().join(format!("{to:?}.gguf")), to);
        read(&gguf, "model.layers.0.mlp.down_proj.weight")[..32].to_vec()
    });
    let half = |v: f32| half::f16::from_f32(v).to_f32();
    let most = block.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
    for (i, v) in block.iter().enumerate() {
        assert_eq!(q8[i], (v / (most.abs() / 127.0)).round() * half(most.abs() / 127.0), "{i} in 8 bits");
        let code = (v / (most / -8.0) + 8.5).floor().min(15.0);
        assert_eq!(q4[i], (code - 8.0) * half(most / -8.0), "{i} in 4 bits");
    }
}

#[test]
fn what_llama_cpp_has_not_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles/families");
    let cases = [("lfm2", "`lfm2`"), ("gemma3_text", "query_pre_attn_scalar"), ("smollm3", "sliding window")];
    for (family, said) in cases {
        let base = families.join(family);
        let source = open_source(&base).unwrap();
        let go_on = &mut |_: pocketlora::format::Progress<'_>| ControlFlow::Continue(());
        let error = export_model(source.as_ref(), &base, &out, GgufTarget::F16, go_on).unwrap_err().to_string();
        assert!(error.contains(said), "{family}: {error}");
    }
    let base = families.join("qwen3");
    let source = open_source(&base).unwrap();
    let stop = &mut |_: pocketlora::format::Progress<'_>| ControlFlow::Break(());
    let error = export_model(source.as_ref(), &base, &out, GgufTarget::F16, stop).unwrap_err();
    assert_eq!(error.code(), pocketlora::ErrorCode::Cancelled);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// Tokens, their kinds, merges, marks and the template come back as they were.
#[test]
fn a_tokenizer_is_exported_as_it_was_read() {
    let dir = tempfile::tempdir().unwrap();
    for (name, mut w) in [("llama", small_llama()), ("qwen2", small_qwen2())] {
        w.bool("tokenizer.ggml.add_bos_token", name == "llama");
        w.u32("tokenizer.ggml.padding_token_id", 3);
        let path = dir.path().join(format!("{name}.gguf"));
        std::fs::write(&path, w.build()).unwrap();
        let (was, is) = (Gguf::open(&path).unwrap(), exported(&path, &dir.path().join("out.gguf"), GgufTarget::F16));
        let (was, is) = (was.sidecars().unwrap(), is.sidecars().unwrap());
        assert_eq!(was.files.len(), 3);
        for ((file, was), (other, is)) in was.files.iter().zip(&is.files) {
            let json = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
            assert_eq!((file, json(was)), (other, json(is)), "{name}");
        }
    }
}
