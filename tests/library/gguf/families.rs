//! What architectures differ in, and the head that is a copy of the embedding.

use super::model::{counted, open, read};
use super::writer::{Writer, small_gemma3, small_llama, small_plain, small_qwen2, small_qwen3};
use half::f16;
use pocketlora::format::Source;
use serde_json::json;

fn names(w: &Writer) -> Vec<String> {
    open(w).tensors().iter().map(|t| t.name.clone()).collect()
}

#[test]
fn gemmas_norms_are_one_less_than_in_the_file() {
    let gguf = open(&small_gemma3());
    let less: Vec<f32> = (0..8).map(|i| i as f32 - 1.0).collect();
    let layer = "model.layers.0.";
    for name in
        ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    {
        assert_eq!(read(&gguf, &format!("{layer}{name}.weight")), less, "{name}");
    }
    for name in ["self_attn.q_norm", "self_attn.k_norm"] {
        assert_eq!(read(&gguf, &format!("{layer}{name}.weight")), less[..4], "{name}");
    }
    assert_eq!(read(&gguf, "model.norm.weight"), less);
    assert_eq!(read(&gguf, &format!("{layer}self_attn.q_proj.weight")), counted(&[0, 1, 2, 3, 4, 5, 6, 7]));
}

#[test]
fn gemmas_layers_have_windows_and_bases_as_llama_cpp_has_them() {
    let config = open(&small_gemma3()).config().clone();
    assert_eq!((&config["model_type"], &config["sliding_window"]), (&json!("gemma3_text"), &json!(16)));
    assert_eq!(config["query_pre_attn_scalar"], 4);
    assert_eq!(config["layer_types"], json!(["sliding_attention"]));
    let (full, local) = (&config["rope_parameters"]["full_attention"], &config["rope_parameters"]["sliding_attention"]);
    assert_eq!((&full["rope_theta"], &local["rope_theta"]), (&json!(100_000.0), &json!(10_000.0)));
    let model = pocketlora_models::build(&config).unwrap();
    let mut wanted: Vec<_> = model.params().iter().map(|p| p.name.clone()).collect();
    let mut got = names(&small_gemma3());
    wanted.sort();
    got.sort();
    assert_eq!(got, wanted);
    // Each of these is said in the file, or left out.
    let config = open(small_gemma3().u32("gemma3.attention.sliding_window_pattern", 1)).config().clone();
    assert_eq!(config["layer_types"], json!(["full_attention"]));
    let config = open(small_gemma3().f32("gemma3.rope.freq_base_swa", 500.0)).config().clone();
    assert_eq!(config["rope_local_base_freq"], 500.0);
    let config = open(small_gemma3().remove("gemma3.attention.sliding_window")).config().clone();
    assert_eq!(config["layer_types"], json!(["full_attention"]));
    pocketlora_models::build(&config).unwrap();
    let config = open(small_gemma3().f32("gemma3.rope.scaling.factor", 8.0)).config().clone();
    assert_eq!(config["rope_parameters"]["full_attention"]["factor"], 8.0);
    pocketlora_models::build(&config).unwrap();
}

#[test]
fn granite_and_smollm3_are_llamas_with_factors_or_without_some_positions() {
    for arch in ["granite", "smollm3"] {
        let w = small_plain(arch);
        let (gguf, llama) = (open(&w), open(&small_llama()));
        assert_eq!(gguf.config()["model_type"], arch);
        let q = "model.layers.0.self_attn.q_proj.weight";
        assert_eq!(read(&gguf, q), read(&llama, q), "{arch}: rows in llama's order");
        let model = pocketlora_models::build(gguf.config()).unwrap();
        let mut wanted: Vec<_> = model.params().iter().map(|p| p.name.clone()).collect();
        let mut got = names(&w);
        wanted.sort();
        got.sort();
        assert_eq!(got, wanted, "{arch}");
    }
    assert_eq!(open(&small_plain("smollm3")).config()["no_rope_layers"], json!([1]));
    // 0 is llama.cpp's word for none.
    let mut w = small_plain("granite");
    w.f32("granite.embedding_scale", 12.0).f32("granite.residual_scale", 0.5).f32("granite.logit_scale", 0.0);
    let config = open(&w).config().clone();
    let factors = ["embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"];
    assert_eq!(factors.map(|key| config[key].as_f64().unwrap()), [12.0, 0.5, 0.5, 1.0], "heads of 4");
    w.f32("granite.attention.scale", 0.25);
    assert_eq!(open(&w).config()["attention_multiplier"], 0.25);
    // What another family does not have, and a Granite without positions, are refused.
    let refused = |w: &Writer, what: &str| {
        let bytes = bytes::Bytes::from(w.build());
        let error = pocketlora::format::gguf::Gguf::from_bytes(bytes, std::path::Path::new("small.gguf")).unwrap_err();
        assert!(error.to_string().contains(what), "{what}: {error}");
    };
    refused(w.bool("granite.rope.scaling.finetuned", false), "without positions");
    refused(small_plain("smollm3").f32("smollm3.attention.scale", 0.25), "smollm3.attention.scale");
    refused(small_plain("granite").f32("granite.logit_scale", -1.0), "a positive number");
}

#[test]
fn qwen3_has_norms_of_heads() {
    let gguf = open(&small_qwen3());
    assert_eq!(gguf.config()["model_type"], "qwen3");
    assert_eq!(read(&gguf, "model.layers.0.self_attn.k_norm.weight"), [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(read(&gguf, "model.layers.0.self_attn.q_proj.weight"), counted(&[0, 1, 2, 3, 4, 5, 6, 7]));
    let model = pocketlora_models::build(gguf.config()).unwrap();
    let mut wanted: Vec<_> = model.params().iter().map(|p| p.name.clone()).collect();
    let mut got = names(&small_qwen3());
    wanted.sort();
    got.sort();
    assert_eq!(got, wanted);
}

#[test]
fn norms_that_a_family_has_not_are_refused() {
    for (mut w, name) in [(small_llama(), "attn_q_norm"), (small_qwen3(), "post_ffw_norm")] {
        w.tensor(&format!("blk.0.{name}.weight"), &[4], &[0.0; 4]);
        let bytes = bytes::Bytes::from(w.build());
        let error = pocketlora::format::gguf::Gguf::from_bytes(bytes, std::path::Path::new("small.gguf")).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}

/// Puts `values` into the tensor `name` [267, 8], in binary16 or binary32.
fn fill(w: &mut Writer, name: &str, values: &[f32], half: bool) {
    if w.tensors.iter().all(|t| t.name != name) {
        w.tensor(name, &[267, 8], values);
    }
    let tensor = w.find(name);
    tensor.dtype = u32::from(half);
    tensor.data = match half {
        true => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        false => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    };
}

#[test]
fn a_head_that_is_the_embedding_rounded_otherwise_is_tied_by_the_better_one() {
    let exact: Vec<f32> = (0..267 * 8).map(|i| (i as f32).sin()).collect();
    let other: Vec<f32> = (0..267 * 8).map(|i| (i as f32).cos()).collect();
    let (embedding, head) = ("token_embd.weight", "output.weight");
    for (half_embedding, half_head) in [(true, false), (false, true)] {
        let mut w = small_qwen2();
        fill(&mut w, embedding, &exact, half_embedding);
        fill(&mut w, head, &exact, half_head);
        assert!(!names(&w).contains(&"lm_head.weight".to_owned()));
        assert_eq!(open(&w).config()["tie_word_embeddings"], true);
        assert_eq!(read(&open(&w), "model.embed_tokens.weight"), exact);
        pocketlora_models::build(open(&w).config()).unwrap();
        // One row of another matrix is enough.
        let mut apart = exact.clone();
        apart[..8].copy_from_slice(&other[..8]);
        fill(&mut w, head, &apart, half_head);
        assert!(names(&w).contains(&"lm_head.weight".to_owned()));
        assert_eq!(open(&w).config()["tie_word_embeddings"], false);
    }
    // In one type, what differs at all was not tied.
    let mut w = small_qwen2();
    let mut close = exact.clone();
    fill(&mut w, embedding, &exact, false);
    fill(&mut w, head, &close, false);
    assert_eq!(open(&w).config()["tie_word_embeddings"], true);
    close[3] += 1e-3;
    fill(&mut w, head, &close, false);
    assert_eq!(open(&w).config()["tie_word_embeddings"], false);
}
