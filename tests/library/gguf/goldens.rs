//! Models of the reference stack, written as llama.cpp's converter does: read back, they give the same logits.

use super::writer::Writer;
use crate::common::{Tensor, golden, ids, logits, max_diff, open_exact, tensors};
use bytes::Bytes;
use pocketlora::ErrorCode;
use pocketlora::format::Source;
use pocketlora::format::gguf::Gguf;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

type Tensors = BTreeMap<String, Tensor>;

fn folder(name: &str) -> PathBuf {
    golden("families").join(name)
}

fn write(dir: &Path, config: &Value, all: &BTreeMap<String, (Vec<usize>, Vec<f32>)>) {
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let bytes: Vec<Vec<u8>> = all.values().map(|(_, v)| v.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let views = all
        .iter()
        .zip(&bytes)
        .map(|((name, (shape, _)), bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

/// What the model that `w` is says, run from what the reader makes of it.
fn answers(w: &Writer, ids: &[u32]) -> Vec<f32> {
    let gguf = Gguf::from_bytes(Bytes::from(w.build()), Path::new("golden.gguf")).unwrap();
    let mut all = BTreeMap::new();
    for (index, meta) in gguf.tensors().iter().enumerate() {
        let mut values = vec![f32::NAN; meta.shape.iter().product()];
        let rows = if meta.shape.len() > 1 { meta.shape[0] } else { 1 };
        // In pieces, as readers do.
        let cols = values.len() / rows;
        for row in 0..rows {
            gguf.read_rows(index, row..row + 1, &mut values[row * cols..][..cols]).unwrap();
        }
        all.insert(meta.name.clone(), (meta.shape.clone(), values));
    }
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &Value::Object(gguf.config().clone()), &all);
    logits(&open_exact(dir.path(), 1), ids)
}

fn head(w: &mut Writer, arch: &str, config: &Value, layers: u32) {
    w.string("general.architecture", arch).u32(&format!("{arch}.block_count"), layers);
    for (key, name) in [
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("attention.head_count", "num_attention_heads"),
    ] {
        w.u32(&format!("{arch}.{key}"), config[name].as_u64().unwrap() as u32);
    }
    let theta = config["rope_parameters"]["rope_theta"].as_f64().unwrap() as f32;
    w.f32(&format!("{arch}.rope.freq_base"), theta);
}

fn config_of(name: &str) -> Value {
    serde_json::from_slice(&fs::read(folder(name).join("config.json")).unwrap()).unwrap()
}

fn lfm2() -> Writer {
    let (config, all) = (config_of("lfm2"), tensors(&folder("lfm2").join("model.safetensors")));
    let mut w = Writer::new();
    head(&mut w, "lfm2", &config, 3);
    w.f32("lfm2.attention.layer_norm_rms_epsilon", 1e-5).u32("lfm2.shortconv.l_cache", 3);
    w.i32s("lfm2.attention.head_count_kv", &[0, 2, 0]);
    w.u32("lfm2.feed_forward_length", all["model.layers.0.feed_forward.w1.weight"].shape[0] as u32);
    let names = [
        ("model.layers.", "blk."),
        ("model.embed_tokens.", "token_embd."),
        ("model.embedding_norm.", "token_embd_norm."),
        (".operator_norm.", ".attn_norm."),
        (".conv.conv.", ".shortconv.conv."),
        (".conv.in_proj.", ".shortconv.in_proj."),
        (".conv.out_proj.", ".shortconv.out_proj."),
        (".self_attn.out_proj.", ".attn_output."),
        (".self_attn.q_layernorm.", ".attn_q_norm."),
        (".self_attn.k_layernorm.", ".attn_k_norm."),
        (".self_attn.q_proj.", ".attn_q."),
        (".self_attn.k_proj.", ".attn_k."),
        (".self_attn.v_proj.", ".attn_v."),
        (".feed_forward.w1.", ".ffn_gate."),
        (".feed_forward.w2.", ".ffn_down."),
        (".feed_forward.w3.", ".ffn_up."),
    ];
    for (name, tensor) in &all {
        let gguf = names.iter().fold(name.clone(), |name, (hf, gguf)| name.replacen(hf, gguf, 1));
        let shape: Vec<usize> = tensor.shape.iter().copied().filter(|n| *n != 1).collect();
        w.tensor(&gguf, &shape, &tensor.data);
    }
    w
}

#[test]
fn lfm2_is_read_by_llama_cpps_names() {
    let expected = tensors(&folder("lfm2").join("logits.safetensors"));
    let got = answers(&lfm2(), &ids(&expected["ids"]));
    let (diff, at) = max_diff(&got, &expected["logits"].data);
    assert!(diff < 1e-4, "off by {diff} at {at}");

    let refused = |w: &mut Writer| {
        let error = Gguf::from_bytes(Bytes::from(w.build()), Path::new("golden.gguf")).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Format, "{error}");
        error.to_string()
    };
    let two = refused(lfm2().i32s("lfm2.attention.head_count_kv", &[0, 2]));
    assert!(two.contains("lfm2.attention.head_count_kv") && two.contains("3 layers"), "{two}");
    let mixed = refused(lfm2().i32s("lfm2.attention.head_count_kv", &[1, 2, 0]));
    assert!(mixed.contains("lfm2.attention.head_count_kv"), "{mixed}");
}

/// The layers of the golden that have experts; its dense one is not known to llama.cpp.
fn qwen3_moe() -> (Value, Tensors, Writer) {
    let mut config = config_of("qwen3_moe");
    config["mlp_only_layers"] = Value::Array(Vec::new());
    config["num_hidden_layers"] = 2.into();
    let file = tensors(&folder("qwen3_moe").join("model.safetensors"));
    let kept = file.into_iter().filter(|(name, _)| !name.contains("layers.1."));
    let all: Tensors = kept.map(|(name, tensor)| (name.replace("layers.2.", "layers.1."), tensor)).collect();

    let mut w = Writer::new();
    head(&mut w, "qwen3moe", &config, 2);
    w.u32("qwen3moe.attention.head_count_kv", 2).u32("qwen3moe.attention.key_length", 24);
    w.u32("qwen3moe.attention.value_length", 24).f32("qwen3moe.attention.layer_norm_rms_epsilon", 1e-6);
    w.u32("qwen3moe.feed_forward_length", 96).u32("qwen3moe.expert_feed_forward_length", 40);
    w.u32("qwen3moe.expert_count", 4).u32("qwen3moe.expert_used_count", 2);
    let names = [
        ("model.layers.", "blk."),
        ("model.embed_tokens.", "token_embd."),
        ("model.norm.", "output_norm."),
        ("lm_head.", "output."),
        (".input_layernorm.", ".attn_norm."),
        (".post_attention_layernorm.", ".ffn_norm."),
        (".self_attn.o_proj.", ".attn_output."),
        (".self_attn.q_norm.", ".attn_q_norm."),
        (".self_attn.k_norm.", ".attn_k_norm."),
        (".self_attn.q_proj.", ".attn_q."),
        (".self_attn.k_proj.", ".attn_k."),
        (".self_attn.v_proj.", ".attn_v."),
        (".mlp.gate.", ".ffn_gate_inp."),
    ];
    for (name, tensor) in all.iter().filter(|(name, _)| !name.contains(".experts.")) {
        let gguf = names.iter().fold(name.clone(), |name, (hf, gguf)| name.replacen(hf, gguf, 1));
        w.tensor(&gguf, &tensor.shape, &tensor.data);
    }
    for layer in 0..2 {
        for (hf, gguf) in [("gate_proj", "ffn_gate_exps"), ("up_proj", "ffn_up_exps"), ("down_proj", "ffn_down_exps")] {
            let expert = |e| &all[&format!("model.layers.{layer}.mlp.experts.{e}.{hf}.weight")];
            let shape = [&[4], &expert(0).shape[..]].concat();
            let data: Vec<f32> = (0..4).flat_map(|e| expert(e).data.clone()).collect();
            w.tensor(&format!("blk.{layer}.{gguf}.weight"), &shape, &data);
        }
    }
    (config, all, w)
}

#[test]
fn qwen3_with_experts_is_read_by_llama_cpps_names() {
    let (config, all, mut w) = qwen3_moe();
    let text: Vec<u32> = (0..30).map(|i| (i * 37 + 5) % 96).collect();
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &config, &all.into_iter().map(|(name, t)| (name, (t.shape, t.data))).collect());
    let expected = logits(&open_exact(dir.path(), 1), &text);
    let (diff, at) = max_diff(&answers(&w, &text), &expected);
    assert!(diff < 1e-6, "off by {diff} at {at}");

    w.u32("qwen3moe.expert_feed_forward_length", 41);
    let error = Gguf::from_bytes(Bytes::from(w.build()), Path::new("golden.gguf")).unwrap_err();
    assert!(error.code() == ErrorCode::Format && error.to_string().contains("_exps.weight"), "{error}");
}
