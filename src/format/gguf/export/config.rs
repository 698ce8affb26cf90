//! `config.json` as the metadata of llama.cpp.

use super::super::config::FACTORS;
use super::super::families::{Family, NO_ROPE_EVERY};
use super::super::writer::Pairs;
use crate::error::{Error, Result};
use pocketlora_models::Model;
use serde_json::{Map, Value};
use std::f64::consts::TAU;
use std::path::Path;

/// Families that are written.
const WRITTEN: &[&str] = &[
    "arcee",
    "ernie4_5",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
];

/// What the metadata say of the model, and the divisors of its frequencies where it has such a tensor.
pub(super) struct Hyper {
    pub family: &'static Family,
    pub divisors: Option<Vec<f32>>,
}

/// A model's config, for messages.
struct Config<'a> {
    json: &'a Map<String, Value>,
    place: &'a Path,
}

impl Config<'_> {
    fn refuse<T>(&self, what: impl std::fmt::Display) -> Result<T> {
        let next = "use llama.cpp's own converter";
        Err(Error::unsupported(self.place, format!("to write {what} as GGUF"), next))
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.json.get(key).and_then(Value::as_f64)
    }

    fn is_on(&self, key: &str) -> bool {
        self.json.get(key) == Some(&Value::Bool(true))
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.json.get(key).and_then(Value::as_str)
    }
}

/// Writes the hyperparameters of `model`, whose config is `json`, to `pairs`; the model lies at `place`.
///
/// # Errors
/// llama.cpp has no such model.
pub(super) fn write(model: &dyn Model, json: &Map<String, Value>, place: &Path, pairs: &mut Pairs) -> Result<Hyper> {
    let (config, sizes) = (Config { json, place }, model.config());
    let model_type = sizes.model_type.as_str();
    let Some(family) = Family::of_model(model_type).filter(|_| WRITTEN.contains(&model_type)) else {
        return config.refuse(format!("a model of the family `{model_type}`"));
    };
    let activation = config.text("hidden_activation").or(config.text("hidden_act"));
    let usual = match model_type {
        "arcee" => "relu2",
        "gemma3_text" => "gelu_pytorch_tanh",
        _ => "silu",
    };
    if activation.is_some_and(|activation| activation != usual) {
        return config.refuse(format!("the activation `{}`", activation.unwrap_or_default()));
    }
    let plain = matches!(model_type, "smollm3" | "granite");
    if let Some(key) = ["attention_bias", "mlp_bias"].into_iter().find(|key| plain && config.is_on(key)) {
        return config.refuse(format!("a {} with `{key}`", sizes.model_type));
    }
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if config.number(key).is_some() {
            return config.refuse(format!("a model with `{key}`"));
        }
    }
    let name = |key: &str| format!("{}.{key}", family.name);
    pairs.text("general.architecture", family.name);
    pairs.text("general.type", "model");
    let ffn = config.number("intermediate_size").unwrap_or_default();
    for (key, size) in [
        ("block_count", sizes.layers),
        ("context_length", sizes.max_positions),
        ("embedding_length", sizes.hidden_size),
        ("feed_forward_length", ffn as usize),
        ("attention.head_count", sizes.heads),
        ("attention.head_count_kv", sizes.kv_heads),
        ("attention.key_length", sizes.head_dim),
        ("attention.value_length", sizes.head_dim),
        ("rope.dimension_count", sizes.head_dim),
        ("vocab_size", sizes.vocab_size),
    ] {
        pairs.u32(&name(key), size as u32);
    }
    // transformers' defaults.
    let usual = if matches!(model_type, "arcee" | "ernie4_5" | "olmo2") { 1e-5 } else { 1e-6 };
    let epsilon = config.number("rms_norm_eps").unwrap_or(usual);
    pairs.f32(&name("attention.layer_norm_rms_epsilon"), epsilon as f32);
    if model_type == "granite" {
        FACTORS.iter().for_each(|(key, hf)| pairs.f32(&name(key), config.number(hf).unwrap_or(1.0) as f32));
    }
    window(&config, model, &name, pairs)?;
    let divisors = rope(&config, model_type, sizes.head_dim, &name, pairs)?;
    Ok(Hyper { family, divisors })
}

/// The attention's window.
fn window(config: &Config<'_>, model: &dyn Model, name: &dyn Fn(&str) -> String, pairs: &mut Pairs) -> Result<()> {
    let size = config.number("sliding_window");
    match model.config().model_type.as_str() {
        "qwen2" | "qwen3" if config.is_on("use_sliding_window") => {
            return config.refuse("a Qwen model with a sliding window");
        }
        "mistral" => {
            if let Some(size) = size {
                pairs.u32(&name("attention.sliding_window"), size as u32);
            }
        }
        "gemma3_text" => {
            let sizes = model.config();
            let scalar = config.number("query_pre_attn_scalar").unwrap_or(256.0);
            let expected = if sizes.layers == 62 { sizes.hidden_size / sizes.heads } else { sizes.head_dim };
            if scalar != expected as f64 {
                return config.refuse(format!("a Gemma 3 with a `query_pre_attn_scalar` of {scalar}"));
            }
            // llama.cpp takes every sixth layer for one that sees all.
            let full = |i: usize| (i + 1).is_multiple_of(6);
            let kinds = config.json.get("layer_types").and_then(Value::as_array);
            let usual = kinds
                .is_none_or(|kinds| kinds.iter().enumerate().all(|(i, kind)| (kind == "full_attention") == full(i)));
            let every = config.number("sliding_window_pattern").is_none_or(|every| every == 6.0);
            if !usual || !every {
                return config.refuse("a Gemma 3 in which other layers than every sixth see all");
            }
            if let Some(size) = size {
                pairs.u32(&name("attention.sliding_window"), size as u32);
            }
        }
        "smollm3" => {
            let kinds = config.json.get("layer_types").and_then(Value::as_array);
            let slides = kinds.is_some_and(|kinds| kinds.iter().any(|kind| kind != "full_attention"));
            if slides || config.is_on("use_sliding_window") {
                return config.refuse("a SmolLM3 with a sliding window");
            }
            let list = config.json.get("no_rope_layers").and_then(Value::as_array);
            let usual =
                |(i, turned): (usize, &Value)| (turned.as_u64() == Some(0)) == (i + 1).is_multiple_of(NO_ROPE_EVERY);
            let every = config.number("no_rope_layer_interval").is_none_or(|every| every == NO_ROPE_EVERY as f64);
            let listed = list.map(|list| list.iter().take(model.config().layers).enumerate().all(usual));
            if !listed.unwrap_or(every) {
                return config.refuse("a SmolLM3 in which other layers than every fourth have no positions");
            }
        }
        _ => {}
    }
    Ok(())
}

/// Base and scaling of positions. Llama 3's scaling is a tensor of divisors.
fn rope(
    config: &Config<'_>,
    model_type: &str,
    head_dim: usize,
    name: &dyn Fn(&str) -> String,
    pairs: &mut Pairs,
) -> Result<Option<Vec<f32>>> {
    let object = |value: Option<&Value>| value.and_then(Value::as_object).cloned();
    let mut given = object(config.json.get("rope_parameters")).or(object(config.json.get("rope_scaling")));
    let mut local = config.number("rope_local_base_freq").unwrap_or(10_000.0);
    // Gemma's kinds of layers have each their own.
    if let Some(kinds) = given.clone().filter(|given| given.contains_key("full_attention")) {
        let theta = kinds.get("sliding_attention").and_then(|own| own.get("rope_theta")).and_then(Value::as_f64);
        local = theta.unwrap_or(local);
        given = object(kinds.get("full_attention"));
    }
    let given = given.unwrap_or_default();
    let number = |key: &str| given.get(key).and_then(Value::as_f64);
    let usual = match model_type {
        "gemma3_text" => 1_000_000.0,
        "smollm3" => 2_000_000.0,
        "ernie4_5" => 500_000.0,
        _ => 10_000.0,
    };
    let theta = number("rope_theta").or(config.number("rope_theta")).unwrap_or(usual);
    pairs.f32(&name("rope.freq_base"), theta as f32);
    if model_type == "gemma3_text" {
        pairs.f32(&name("rope.freq_base_swa"), local as f32);
    }
    let kind = given.get("rope_type").or(given.get("type")).and_then(Value::as_str).unwrap_or("default");
    if number("partial_rotary_factor").or(config.number("partial_rotary_factor")).is_some_and(|part| part != 1.0) {
        return config.refuse("heads of which only a part is turned");
    }
    let required = |key: &str| match number(key) {
        Some(value) => Ok(value),
        None => config.refuse(format!("the RoPE scaling `{kind}` without `{key}`")),
    };
    match kind {
        "default" => Ok(None),
        "linear" => {
            pairs.text(&name("rope.scaling.type"), "linear");
            pairs.f32(&name("rope.scaling.factor"), required("factor")? as f32);
            Ok(None)
        }
        "yarn" => {
            if let Some(other) =
                ["attention_factor", "mscale", "mscale_all_dim"].into_iter().find(|k| number(k).is_some())
            {
                return config.refuse(format!("YaRN with `{other}`"));
            }
            pairs.text(&name("rope.scaling.type"), "yarn");
            pairs.f32(&name("rope.scaling.factor"), required("factor")? as f32);
            let original = required("original_max_position_embeddings")?;
            pairs.u32(&name("rope.scaling.original_context_length"), original as u32);
            for (key, hf) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                if let Some(beta) = number(hf) {
                    pairs.f32(&name(&format!("rope.scaling.{key}")), beta as f32);
                }
            }
            Ok(None)
        }
        "llama3" => {
            let [factor, low, high, original] = [
                required("factor")?,
                required("low_freq_factor")?,
                required("high_freq_factor")?,
                required("original_max_position_embeddings")?,
            ];
            // Longer waves are divided by the factor, shorter ones not, with a smooth band between.
            let divisor = |i: usize| {
                let wave = TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
                let smooth = ((original / wave - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
            };
            pairs.u32(&name("rope.scaling.original_context_length"), original as u32);
            Ok(Some((0..head_dim / 2).map(divisor).collect()))
        }
        other => config.refuse(format!("the RoPE scaling `{other}`")),
    }
}
