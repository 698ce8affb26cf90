//! Names of tensors in adapter files: what wrappers of a training program left in them, and what the rest means.

use crate::adapter::kinds::Kind;
use crate::error::{Error, Result};
use std::path::Path;

/// What PEFT puts before the base model's module paths.
pub(super) const PREFIX: &str = "base_model.model.";
/// Segments that `torch.compile`, FSDP, activation checkpointing and data parallelism put anywhere into a path.
const WRAPPERS: &[&str] =
    &["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "module"];
/// Segments before `layers` that name the text part of a model and nothing else.
const TEXT_PARTS: &[&str] = &["base_model", "model", "language_model", "text_model"];
/// What the decoder's parts are called below them.
const PARTS: &[&str] = &["layers", "embed_tokens", "norm", "per_layer_model_projection"];

/// What a tensor is to its module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// One of the method's own, by its place among the method's parts.
    Own(usize),
    /// One of the method's own that belongs to no module.
    Shared(&'static str),
    /// A whole `weight` or `bias` that PEFT loads into the base, where tied layers see it, too.
    InPlace(&'static str),
    /// A whole `weight` or `bias` of a copy of the module, which tied layers do not see (`modules_to_save`).
    Copy(&'static str),
    /// `token_adapter.trainable_tokens_delta`: new rows of an embedding.
    Rows,
}

/// A tensor's name, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Key {
    /// Path of the module in the base model.
    pub module: String,
    /// The path as the training program had it, where PEFT's patterns are matched against that.
    pub written: String,
    /// What the tensor is to it.
    pub part: Part,
    /// How many adapters are around it: PEFT wraps the weights of a module one around the other.
    pub depth: usize,
    /// The adapter's name, where the file still has it.
    pub adapter: Option<String>,
}

/// Takes `name` of the file at `path`, an adapter of the method `kind`, apart.
///
/// # Errors
/// It is of another method, another program or another part of a model.
pub(super) fn parse(path: &Path, name: &str, kind: Kind) -> Result<Key> {
    if let Some(shared) = kind.shared().iter().find(|shared| **shared == name) {
        return Ok(Key {
            module: String::new(),
            written: String::new(),
            part: Part::Shared(shared),
            depth: 0,
            adapter: None,
        });
    }
    let mut segments: Vec<&str> = name.split('.').filter(|s| !WRAPPERS.contains(s)).collect();
    while segments.starts_with(&["base_model", "model"]) {
        segments.drain(..2);
    }
    let begins = |s: &str| kind.parts().iter().any(|part| part.split('.').next() == Some(s));
    let split = segments.iter().position(|s| s.starts_with("lora_") || OWN.contains(s) || begins(s));
    let (module, mut rest) = segments.split_at(split.unwrap_or(segments.len().saturating_sub(1)));
    let depth = rest.iter().take_while(|s| **s == "base_layer").count();
    let depth = if rest.get(depth).is_some_and(|s| begins(s)) { depth } else { 0 };
    rest = &rest[depth..];
    let own = kind.parts().iter().enumerate().find_map(|(i, part)| Some((Part::Own(i), is_part(rest, part)?)));
    let (part, adapter) = match *rest {
        _ if own.is_some() => own.expect("asked just now"),
        ["weight"] => (Part::InPlace("weight"), None),
        ["bias"] => (Part::InPlace("bias"), None),
        ["base_layer" | "original_module", "weight"] => (Part::InPlace("weight"), None),
        ["base_layer" | "original_module", "bias"] => (Part::InPlace("bias"), None),
        ["modules_to_save", "weight"] => (Part::Copy("weight"), None),
        ["modules_to_save", "bias"] => (Part::Copy("bias"), None),
        ["modules_to_save", adapter, "weight"] => (Part::Copy("weight"), Some(adapter)),
        ["modules_to_save", adapter, "bias"] => (Part::Copy("bias"), Some(adapter)),
        ["ln_tuning_layers", "weight"] if kind == Kind::LnTuning => (Part::InPlace("weight"), None),
        ["ln_tuning_layers", "bias"] if kind == Kind::LnTuning => (Part::InPlace("bias"), None),
        ["ln_tuning_layers", adapter, "weight"] if kind == Kind::LnTuning => (Part::InPlace("weight"), Some(adapter)),
        ["ln_tuning_layers", adapter, "bias"] if kind == Kind::LnTuning => (Part::InPlace("bias"), Some(adapter)),
        ["trainable_tokens_delta"] if kind == Kind::TrainableTokens => (Part::Rows, None),
        ["trainable_tokens_delta", adapter] if kind == Kind::TrainableTokens => (Part::Rows, Some(adapter)),
        ["token_adapter", "trainable_tokens_delta"] => (Part::Rows, None),
        ["token_adapter", "trainable_tokens_delta", adapter] => (Part::Rows, Some(adapter)),
        _ => return Err(unknown(path, name, rest)),
    };
    if module.is_empty() {
        return Err(unknown(path, name, rest));
    }
    let written = module.join(".");
    Ok(Key { module: canonical(module), written, part, depth, adapter: adapter.map(str::to_owned) })
}

/// Whether the tensor `name` serves PEFT's training alone, and an adapter works without it: VeLoRA's projections of gradients,
/// MonteCLoRA's distributions.
pub(super) fn is_of_training(name: &str) -> bool {
    name.split('.').any(|segment| ["lora_velora_embed", "lora_monteclora_sampler"].contains(&segment))
}

/// Whether the end `rest` of a name is `part`, and the adapter's name in it: it stands behind the first segment.
fn is_part<'n>(rest: &[&'n str], part: &str) -> Option<Option<&'n str>> {
    let part: Vec<&str> = part.split('.').collect();
    match rest {
        rest if *rest == part => Some(None),
        [first, adapter, tail @ ..] if *first == part[0] && *tail == part[1..] => Some(Some(adapter)),
        _ => None,
    }
}

/// First segments of what PEFT keeps below a module, beside those that begin with `lora_`.
const OWN: &[&str] = &[
    "base_layer",
    "original_module",
    "modules_to_save",
    "token_adapter",
    "trainable_tokens_delta",
    "ln_tuning_layers",
    "lora",
];

/// The module path `path`, which another program wrote, under the names that a text model on its own has.
pub(in crate::adapter) fn canonical_path(path: &str) -> String {
    canonical(&path.split('.').filter(|s| !WRAPPERS.contains(s)).collect::<Vec<_>>())
}

/// The path under the names that a text model on its own has: `model.language_model.layers.0..` is its `model.layers.0..`.
fn canonical(module: &[&str]) -> String {
    let first = module.iter().position(|s| !TEXT_PARTS.contains(s)).unwrap_or(module.len());
    match &module[first..] {
        rest @ [part, ..] if PARTS.contains(part) => format!("model.{}", rest.join(".")),
        rest @ ["lm_head", ..] => rest.join("."),
        _ => module.join("."),
    }
}

/// What is said of a tensor that is none of the above, whose name ends in `rest`.
fn unknown(path: &Path, name: &str, rest: &[&str]) -> Error {
    let merge = "merge the adapter into its base with PEFT's `merge_and_unload`, and use the result as the model";
    let (what, next) = match rest.first().copied().unwrap_or_default() {
        "lora_magnitude_vector" => ("DoRA", merge),
        "lora_down" | "lora_up" | "lora" => {
            ("a LoRA of an image model", "use an adapter of a language model, in PEFT's format")
        }
        "lora_a" | "lora_b" => (
            "an adapter of mlx or GGUF under PEFT's file name",
            "keep the names and the config that its program gave it",
        ),
        _ if name.starts_with("lora_unet_") || name.starts_with("lora_te") || name.starts_with("unet.") => {
            ("a LoRA of an image model", "use an adapter of a language model, in PEFT's format")
        }
        _ => ("", "export the adapter as plain LoRA on linear layers"),
    };
    let what = if what.is_empty() { format!("tensor `{name}`") } else { format!("tensor `{name}` of {what}") };
    Error::unsupported(path, what, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_leave_no_trace() {
        let q = "model.layers.0.self_attn.q_proj";
        let a = |prefix: &str, suffix: &str| format!("{prefix}{q}.lora_A{suffix}");
        let cases = [
            (a("base_model.model.", ".weight"), None),
            (a("base_model.model.", ".default.weight"), Some("default")),
            (a("base_model.model._orig_mod.", ".weight"), None),
            (a("_orig_mod.base_model.model.", ".weight"), None),
            (a("module.base_model.model.", ".weight"), None),
            (a("base_model.model.base_model.model.", ".sql.weight"), Some("sql")),
            (a("_fsdp_wrapped_module.base_model.model.", "._fsdp_wrapped_module.weight"), None),
            (a("", ".weight"), None),
            ("base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight".into(), None),
            (a("base_model.model.language_model.", ".weight"), None),
            ("base_model.model.layers.0.self_attn.q_proj.lora_A.weight".into(), None),
            (
                "base_model.model.model._orig_mod.layers.0._orig_mod.self_attn.q_proj.lora_A.default.weight".into(),
                Some("default"),
            ),
        ];
        for (name, adapter) in cases {
            let key = parse(Path::new("x"), &name, Kind::Lora).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!((key.module.as_str(), key.part, key.adapter.as_deref()), (q, Part::Own(0), adapter), "{name}");
        }
    }

    #[test]
    fn whole_weights_are_told_from_copies() {
        for (name, module, part) in [
            ("base_model.model.lm_head.weight", "lm_head", Part::InPlace("weight")),
            ("base_model.model.lm_head.base_layer.weight", "lm_head", Part::InPlace("weight")),
            (
                "base_model.model.model.embed_tokens.modules_to_save.default.weight",
                "model.embed_tokens",
                Part::Copy("weight"),
            ),
            (
                "base_model.model.model.embed_tokens.original_module.weight",
                "model.embed_tokens",
                Part::InPlace("weight"),
            ),
            (
                "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
                "model.embed_tokens",
                Part::Rows,
            ),
            ("base_model.model.model.norm.weight", "model.norm", Part::InPlace("weight")),
            ("base_model.model.score.weight", "score", Part::InPlace("weight")),
            (
                "base_model.model.model.vision_tower.layers.0.q_proj.lora_A.weight",
                "model.vision_tower.layers.0.q_proj",
                Part::Own(0),
            ),
        ] {
            let key = parse(Path::new("x"), name, Kind::Lora).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!((key.module.as_str(), key.part), (module, part), "{name}");
        }
    }

    #[test]
    fn other_methods_and_programs_are_named() {
        for (name, said) in [
            ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
            ("lora_unet_down_blocks_0.lora_down.weight", "image model"),
            ("unet.down_blocks.0.attn.to_q.lora.down.weight", "image model"),
            ("model.layers.0.self_attn.q_proj.lora_a", "mlx"),
            ("base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a", "hada_w1_a"),
        ] {
            let error = parse(Path::new("x"), name, Kind::Lora).unwrap_err().to_string();
            assert!(error.contains(said), "{name}: {error}");
        }
    }
}
