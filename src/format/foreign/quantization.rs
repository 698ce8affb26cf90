//! Ways to store weights in few bits that are not bitsandbytes' four: by what `config.json` says of them, and by the
//! tensors that they leave in a file.

use crate::error::{Error, ErrorCode, Result};
use crate::format::safetensors::Tensor;
use safetensors::Dtype;
use serde_json::{Map, Value};
use std::path::Path;

/// `quant_method` in lower case, and what people call it. Of bitsandbytes, what is not in four bits is below.
const METHODS: &[(&str, &str)] = &[
    ("gptq", "GPTQ"),
    ("gptqmodel", "GPTQ"),
    ("marlin", "GPTQ (Marlin)"),
    ("awq", "AWQ"),
    ("auto-round", "AutoRound"),
    ("intel/auto-round", "AutoRound"),
    ("exl2", "EXL2"),
    ("exl3", "EXL3"),
    ("fp8", "FP8"),
    ("fbgemm_fp8", "FP8 (FBGEMM)"),
    ("deepspeedfp", "FP8 (DeepSpeed)"),
    ("modelopt", MODELOPT),
    ("compressed-tensors", "compressed-tensors"),
    ("sparseml", "compressed-tensors"),
    ("mxfp4", "MXFP4"),
    ("fp_quant", "FP-Quant"),
    ("hqq", "HQQ"),
    ("aqlm", "AQLM"),
    ("vptq", "VPTQ"),
    ("spqr", "SpQR"),
    ("higgs", "HIGGS"),
    ("quip", "QuIP#"),
    ("eetq", "EETQ"),
    ("quanto", "Quanto"),
    ("torchao", "torchao"),
    ("quark", "Quark"),
    ("bitnet", "BitNet"),
    ("mlx", "MLX"),
    ("bitsandbytes_8bit", EIGHT_BIT),
];

/// ModelOpt has several ways; these are read, by their `quant_algo`.
const MODELOPT: &str = "ModelOpt";
const NVFP4: &str = "NVFP4 (ModelOpt)";

const EIGHT_BIT: &str = "bitsandbytes in 8 bits";

/// What is read as a source of `quantize`, though it is not run as it is.
const SOURCES: &[&str] = &["GPTQ", "AWQ", "AWQ or GPTQ", "FP8", "MXFP4", "MLX", NVFP4, EIGHT_BIT];

/// Which models are let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Those that run as they are.
    ToRun,
    /// Those that can be quantized, too.
    Source,
}

impl Wanted {
    fn lets(self, name: &str) -> bool {
        self == Self::Source && SOURCES.contains(&name)
    }
}

/// Endings of tensors that give a method away, in the order in which they are tried. `with` must end another tensor.
const TENSORS: &[Traces] = &[
    Traces { ending: ".g_idx", with: None, name: "GPTQ" },
    Traces { ending: ".qweight", with: None, name: "AWQ or GPTQ" },
    Traces { ending: ".q_weight", with: None, name: "EXL2" },
    Traces { ending: ".trellis", with: None, name: "EXL3" },
    Traces { ending: ".weight_packed", with: None, name: "compressed-tensors" },
    Traces { ending: "_blocks", with: Some("_scales"), name: "MXFP4" },
    Traces { ending: ".SCB", with: None, name: EIGHT_BIT },
    Traces { ending: ".W_q", with: None, name: "HQQ" },
    Traces { ending: ".codebooks", with: None, name: "AQLM" },
    Traces { ending: ".Qidxs", with: None, name: "QuIP#" },
    Traces { ending: ".weight._data", with: None, name: "Quanto" },
    Traces { ending: ".weight_scales", with: None, name: "EETQ" },
    Traces { ending: ".weight_scale_2", with: None, name: NVFP4 },
    Traces { ending: ".weight_scale_inv", with: None, name: "FP8" },
    Traces { ending: ".weight_scale", with: None, name: "FP8" },
    Traces { ending: ".biases", with: Some(".scales"), name: "MLX" },
];

struct Traces {
    ending: &'static str,
    with: Option<&'static str>,
    name: &'static str,
}

/// Refuses a model whose `config`, read from `path`, says that its weights are in another form than NF4, FP4 or floats.
///
/// # Errors
/// It does.
pub(crate) fn check_config(path: &Path, config: &Map<String, Value>, wanted: Wanted) -> Result<()> {
    match method(config).filter(|name| !wanted.lets(name)) {
        None => Ok(()),
        Some(name) => Err(refusal(path, &name)),
    }
}

fn method(config: &Map<String, Value>) -> Option<String> {
    let object = |key: &str| config.get(key).and_then(Value::as_object);
    let groups = |q: &Map<String, Value>| q.contains_key("group_size") && q.contains_key("bits");
    if object("quantization").is_some_and(groups) {
        return Some("MLX".to_owned());
    }
    if object("compression_config").is_some() {
        return Some("compressed-tensors".to_owned());
    }
    let quantization = object("quantization_config")?;
    let is = |key: &str| quantization.get(key).and_then(Value::as_bool) == Some(true);
    let Some(method) = quantization.get("quant_method").and_then(Value::as_str) else {
        return match () {
            () if is("load_in_8bit") || is("_load_in_8bit") => Some(EIGHT_BIT.to_owned()),
            // As bitsandbytes' first configs were, before methods had names.
            () if is("load_in_4bit") || is("_load_in_4bit") => None,
            // Keys of GPTQ's and AWQ's own configs, from before those had a method's name.
            () if ["desc_act", "damp_percent", "static_groups", "sym"]
                .iter()
                .any(|key| quantization.contains_key(*key)) =>
            {
                Some("GPTQ".to_owned())
            }
            () if ["zero_point", "q_group_size", "w_bit"].iter().any(|key| quantization.contains_key(*key)) => {
                Some("AWQ".to_owned())
            }
            () if groups(quantization) => Some("MLX".to_owned()),
            () if quantization.is_empty() => None,
            () => Some("a kind that `quantization_config` does not name".to_owned()),
        };
    };
    let method = method.to_lowercase();
    let way = quantization.get("quant_algo").and_then(Value::as_str).unwrap_or_default();
    match way.to_ascii_uppercase().as_str() {
        _ if method != "modelopt" => {}
        "FP8" => return Some("FP8".to_owned()),
        "NVFP4" | "W4A16_NVFP4" | "MIXED_PRECISION" => return Some(NVFP4.to_owned()),
        _ => {}
    }
    if matches!(&method[..], "bitsandbytes" | "bitsandbytes_4bit") {
        return (is("load_in_8bit") || is("_load_in_8bit")).then(|| EIGHT_BIT.to_owned());
    }
    let known = METHODS.iter().find(|(key, _)| *key == method);
    Some(known.map_or_else(|| method.chars().take(100).collect(), |(_, name)| (*name).to_owned()))
}

/// Refuses a file at `path` whose tensors are in another form than NF4, FP4 or floats.
///
/// # Errors
/// They are.
pub(crate) fn check_tensors(path: &Path, tensors: &[(&str, &Tensor)], wanted: Wanted) -> Result<()> {
    let ends = |ending: &str| tensors.iter().any(|(name, _)| name.ends_with(ending));
    let scaled = |(name, tensor): &(&str, &Tensor)| name.ends_with(".weight") && tensor.dtype == Dtype::I8;
    if ends(".weight_scale") && tensors.iter().any(scaled) {
        return Err(refusal(path, "whole numbers of 8 bits with scales (W8A8, as compressed-tensors writes it)"));
    }
    if let Some(found) = TENSORS.iter().find(|t| ends(t.ending) && t.with.is_none_or(ends)) {
        return if wanted.lets(found.name) { Ok(()) } else { Err(refusal(path, found.name)) };
    }
    if tensors.iter().any(|(_, tensor)| format!("{:?}", tensor.dtype).starts_with("F8_")) {
        return Err(refusal(path, "FP8"));
    }
    Ok(())
}

fn refusal(path: &Path, name: &str) -> Error {
    if SOURCES.contains(&name) {
        let next = "quantize it to bitsandbytes' 4 bits (`pocketlora quantize`), or better the 16-bit model that it was made from";
        return Error::unsupported(path, format_args!("to run quantization by {name} as it is"), next);
    }
    let next = "use the 16-bit model that it was made from (`pocketlora pull OWNER/REPO` fetches one; it is quantized to NF4 \
                at first use), or one in bitsandbytes' 4 bits";
    Error::unsupported(path, format_args!("quantization by {name}"), next)
}

/// Parts of tensor names that say where a checkpoint comes from, where it is no plain one.
const ORIGINS: &[(&str, &str)] = &[
    (".lora_A.", MERGE),
    (".base_layer.", MERGE),
    ("base_model.model.", MERGE),
    ("_orig_mod.", "it was saved from a compiled model; save `model._orig_mod` with `save_pretrained`"),
    ("vision_tower.", PICTURES),
    ("visual.", PICTURES),
    ("vision_model.", PICTURES),
    ("multi_modal_projector.", PICTURES),
    ("language_model.", PICTURES),
    ("audio_tower.", PICTURES),
    ("score.weight", CLASSIFIER),
    ("classifier.", CLASSIFIER),
    ("qa_outputs.", CLASSIFIER),
    ("v_head.", "it has a value head, as reinforcement learning leaves one; save the language model alone"),
    (".experts.", "it is a mixture of experts; use a dense model"),
    (".attention.wq.", "it has the names of the authors' own files; use the Hugging Face form of the model"),
    ("tok_embeddings.", "it has the names of the authors' own files; use the Hugging Face form of the model"),
    ("transformer.h.", "it has the names of another family"),
    ("medusa_head", "it has heads for speculative decoding; use the plain model"),
];

const MERGE: &str = "it was saved with an adapter in it; in PEFT, save `model.merge_and_unload()` instead, or the adapter by \
                     itself and give it with `-a`";
const PICTURES: &str = "it is part of a model for more than text; use a model for text alone";
const CLASSIFIER: &str = "it is a classifier's; use a language model (`..ForCausalLM`)";

/// Buffers that versions of transformers have saved and that are computed again from the config.
const HARMLESS: &[&str] = &[".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached", ".masked_bias"];

/// Whether the tensor `name` is such a buffer.
pub(crate) fn is_harmless(name: &str) -> bool {
    HARMLESS.iter().any(|ending| name.ends_with(ending))
}

/// Checks that the model has a use for each of the weights `names`: what is left out would change its answers without
/// a word. `known` tells which it reads, `place` is for messages.
///
/// # Errors
/// It has none for one of them.
pub(crate) fn check_names<'a>(
    place: &Path,
    names: impl Iterator<Item = &'a str>,
    layers: usize,
    known: impl Fn(&str) -> bool,
) -> Result<()> {
    let Some(name) = names.into_iter().find(|n| !known(n) && !is_harmless(n)) else {
        return Ok(());
    };
    let at = format!("`{}`: tensor `{name}`", place.display());
    if layer_of(name).is_some_and(|layer| layer >= layers) {
        let message = format!(
            "expected {layers} layers from config.json, got one more; config and weights belong to different models"
        );
        return Err(Error::new(ErrorCode::Format, at, message));
    }
    let origin = ORIGINS.iter().find(|(part, _)| name.contains(part)).map(|(_, origin)| *origin);
    let bias = "config.json says that there are no biases; correct `attention_bias` or `mlp_bias`, where the family has \
                them, or use the model's own config.json";
    let other = "config and weights belong to different models, or the weights to a variant of the family that this version \
                 does not know";
    let why = origin.unwrap_or(if name.ends_with(".bias") { bias } else { other });
    Err(Error::new(
        ErrorCode::Unsupported,
        at,
        format!("expected the model's tensors and no other, got this one; {why}"),
    ))
}

/// The number in `model.layers.N.`, where a tensor's name has one.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn methods_are_known_by_the_config() {
        let cases = [
            (json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}), Some("GPTQ")),
            (json!({"quantization_config": {"quant_method": "AWQ"}}), Some("AWQ")),
            (json!({"quantization_config": {"quant_method": "new-method"}}), Some("new-method")),
            (json!({"quantization": {"group_size": 64, "bits": 4}}), Some("MLX")),
            (json!({"quantization_config": {"group_size": 64, "bits": 4}}), Some("MLX")),
            (json!({"quantization_config": {"bits": 4, "group_size": 128, "desc_act": false}}), Some("GPTQ")),
            (json!({"quantization_config": {"w_bit": 4, "q_group_size": 128, "zero_point": true}}), Some("AWQ")),
            (json!({"compression_config": {"format": "pack-quantized"}}), Some("compressed-tensors")),
            (json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}}), Some(EIGHT_BIT)),
            (json!({"quantization_config": {"load_in_8bit": true}}), Some(EIGHT_BIT)),
            (json!({"quantization_config": {"bits": 3}}), Some("a kind that `quantization_config` does not name")),
            (json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}}), None),
            (json!({"quantization_config": {"load_in_4bit": true}}), None),
            (json!({"quantization_config": null}), None),
            (json!({"model_type": "llama"}), None),
        ];
        for (config, name) in cases {
            assert_eq!(method(config.as_object().unwrap()).as_deref(), name, "{config}");
        }
        for (key, name) in METHODS {
            let config = json!({"quantization_config": {"quant_method": key}});
            let error = check_config(Path::new("config.json"), config.as_object().unwrap(), Wanted::ToRun).unwrap_err();
            assert!(error.code() == ErrorCode::Unsupported && error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn methods_are_known_by_the_tensors() {
        let tensor = |dtype| Tensor { dtype, shape: vec![1], bytes: bytes::Bytes::new() };
        let (plain, eight) = (tensor(Dtype::U8), tensor(Dtype::F8_E4M3));
        for Traces { ending, with, name } in TENSORS {
            let names: Vec<String> =
                [*ending, with.unwrap_or(".weight")].map(|e| format!("model.layers.0.q_proj{e}")).into();
            let all: Vec<_> = names.iter().map(|n| (n.as_str(), &plain)).collect();
            let error = check_tensors(Path::new("x"), &all, Wanted::ToRun).unwrap_err().to_string();
            assert!(error.contains(name), "{ending}: {error}");
        }
        let error = check_tensors(Path::new("x"), &[("a.weight", &eight)], Wanted::ToRun).unwrap_err();
        assert!(error.to_string().contains("FP8"), "{error}");
        let whole = tensor(Dtype::I8);
        let error = check_tensors(Path::new("x"), &[("a.weight", &whole), ("a.weight_scale", &plain)], Wanted::ToRun)
            .unwrap_err();
        assert!(error.to_string().contains("8 bits"), "{error}");
        // bitsandbytes' own companions, and names that only look like them.
        let ours = [".weight", ".weight.absmax", ".weight.quant_map", ".bias", ".weight.nested_absmax"];
        check_tensors(Path::new("x"), &ours.map(|n| (n, &plain)), Wanted::ToRun).unwrap();
    }
}
