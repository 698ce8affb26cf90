//! Models of known shapes with random weights: what they say is noise, how fast they say it is not.

use super::shapes::SHAPES;
use crate::error::{Error, ErrorCode, Result};
use crate::format::{Checkpoint, Existing, Progress, Sidecars, Source, Summary, Target, TensorMeta, quantize};
use crate::rng::mix;
use pocketlora_models::Role;
use serde_json::{Map, Value, json};
use std::ops::{ControlFlow, Range};
use std::path::Path;

/// Plain shapes; [`SHAPES`] has those of other families.
const PLAIN: [&str; 5] = ["smollm2-135m", "qwen2.5-0.5b", "llama-1b", "qwen2.5-1.5b", "qwen2.5-3b"];

/// The shapes that have names here.
pub fn names() -> impl Iterator<Item = &'static str> {
    PLAIN.into_iter().chain(SHAPES.iter().map(|(name, _)| *name))
}

/// Key of `config.json` by which a folder is known to hold a shape.
const MARK: &str = "_name_or_path";

/// `config.json` of the shape `name`: the real model's, or for `llama-1b` a plain Llama of about a billion weights.
///
/// # Errors
/// There is no shape of that name.
pub fn config(name: &str) -> Result<Map<String, Value>> {
    let mut config = match SHAPES.iter().find(|(known, _)| *known == name) {
        Some((_, config)) => {
            let mut config = config();
            config["tie_word_embeddings"] = true.into();
            config["torch_dtype"] = "bfloat16".into();
            config["bos_token_id"] = 1.into();
            config["eos_token_id"] = 2.into();
            config
        }
        None => plain(name)?,
    };
    config[MARK] = format!("synthetic/{name}").into();
    match config {
        Value::Object(config) => Ok(config),
        _ => unreachable!("`json!` made an object"),
    }
}

/// The same of a plain shape.
fn plain(name: &str) -> Result<Value> {
    let family = |family: &str, theta: f64| {
        json!({
            "model_type": family, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": theta,
            "tie_word_embeddings": true, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
        })
    };
    // Hidden, layers, feed-forward, query heads, key/value heads, vocabulary, context.
    let (mut config, sizes) = match name {
        "smollm2-135m" => (family("llama", 1e5), [576, 30, 1536, 9, 3, 49152, 8192]),
        "llama-1b" => (family("llama", 1e4), [2048, 16, 8192, 32, 8, 32000, 4096]),
        "qwen2.5-0.5b" => (family("qwen2", 1e6), [896, 24, 4864, 14, 2, 151_936, 32768]),
        "qwen2.5-1.5b" => (family("qwen2", 1e6), [1536, 28, 8960, 12, 2, 151_936, 32768]),
        "qwen2.5-3b" => (family("qwen2", 1e6), [2048, 36, 11008, 16, 2, 151_936, 32768]),
        _ => {
            let known: Vec<&str> = names().collect();
            return Err(Error::config("shape", format!("one of `{}`", known.join("`, `")), name));
        }
    };
    let keys = [
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    ];
    for (key, size) in keys.into_iter().zip(sizes) {
        config[key] = size.into();
    }
    Ok(config)
}

/// Writes the shape `name` as a bitsandbytes-NF4 checkpoint to `out`, or takes what is there already. Weights stream
/// through, so that memory stays small. `progress` hears of elements done and in all, and stops the work with `false`.
///
/// # Errors
/// An unknown name, `out` holds something else, the disk refuses, stopped.
pub fn write(name: &str, out: &Path, progress: &mut dyn FnMut(u64, u64) -> bool) -> Result<()> {
    let source = Synthetic::new(config(name)?)?;
    if Checkpoint::open(out).is_ok_and(|found| found.config().get(MARK) == source.config.get(MARK)) {
        return Ok(());
    }
    let mut tell = |p: Progress<'_>| match progress(p.done, p.total) {
        true => ControlFlow::Continue(()),
        false => ControlFlow::Break(()),
    };
    let _: Summary = quantize(&source, out, Target::Nf4, Existing::Replace, &mut tell)?;
    Ok(())
}

/// A checkpoint that is made while it is read.
pub(super) struct Synthetic {
    config: Map<String, Value>,
    tensors: Vec<TensorMeta>,
    roles: Vec<Role>,
}

impl Synthetic {
    pub fn new(config: Map<String, Value>) -> Result<Self> {
        let model = pocketlora_models::build(&config).map_err(|e| {
            Error::new(ErrorCode::Config, "shape", "its config is not one of a known family").caused_by(e)
        })?;
        let meta = |spec: &pocketlora_models::ParamSpec| TensorMeta {
            name: spec.name.clone(),
            shape: spec.shape.clone(),
            dtype: "BF16".to_owned(),
        };
        let tensors = model.params().iter().map(meta).collect();
        Ok(Self { config, tensors, roles: model.params().iter().map(|p| p.role).collect() })
    }
}

impl Source for Synthetic {
    fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    fn tensors(&self) -> &[TensorMeta] {
        &self.tensors
    }

    /// Norms of one; elsewhere nearly normal values with the deviation that models are initialized with, so that codes
    /// and scales are distributed as in real weights.
    fn read_rows(&self, index: usize, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let meta = &self.tensors[index];
        if self.roles[index] == Role::Vector && !meta.name.ends_with(".bias") {
            out.fill(1.0);
            return Ok(());
        }
        let width = if meta.shape.len() > 1 { meta.shape[1] } else { 1 };
        let (key, start) = (mix(0x5eed, index as u64), (rows.start * width) as u64);
        for (i, pair) in (start / 2..).zip(out.chunks_mut(2)) {
            let bits = mix(key, i).to_le_bytes();
            for (x, bytes) in pair.iter_mut().zip(bits.as_chunks::<4>().0) {
                // Four uniform bytes: mean 510, deviation 147.8.
                let sum: u32 = bytes.iter().map(|&b| u32::from(b)).sum();
                *x = (sum as f32 - 510.0) * (0.02 / 147.8);
            }
        }
        Ok(())
    }

    fn sidecars(&self) -> Result<Sidecars> {
        Ok(Sidecars::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_the_sizes_of_their_models() {
        // Parameters as the model cards count them, embeddings included; the plain Llama's by hand.
        let cards = [134_515_008u64, 494_032_768, 1_038_682_112, 1_543_714_304, 3_085_938_688];
        for (name, expected) in PLAIN.iter().zip(cards) {
            assert_eq!(parameters(name), expected, "{name}");
        }
        let error = config("llama-9b").unwrap_err().to_string();
        assert!(error.contains("`gemma4-e2b`"), "{error}");
    }

    fn parameters(name: &str) -> u64 {
        let source = Synthetic::new(config(name).unwrap()).unwrap();
        source.tensors.iter().map(|t| t.shape.iter().map(|&d| d as u64).product::<u64>()).sum()
    }

    #[test]
    fn families_have_about_the_published_sizes() {
        // In millions, of the text model: Qwen3.5, Gemma 4 and Ministral 3 are published with towers for pictures and
        // sound, which are not counted here.
        let published = [
            ("qwen3-0.6b", 596.0),
            ("gemma3-1b", 1000.0),
            ("qwen3.5-0.8b", 752.0),
            ("gemma4-e2b", 4628.0),
            ("lfm2-1.2b", 1170.0),
            ("granite-3.3-2b", 2534.0),
            ("granite-4.0-h-350m", 340.0),
            ("phi4-mini", 3836.0),
            ("smollm3-3b", 3075.0),
            ("ministral3-3b", 3430.0),
        ];
        assert_eq!(published.map(|(name, _)| name), SHAPES.map(|(name, _)| name));
        for (name, millions) in published {
            let count = parameters(name) as f64 / 1e6;
            assert!((count / millions - 1.0).abs() < 0.01, "{name}: {count} million instead of {millions}");
        }
    }

    #[test]
    fn pieces_are_parts_of_the_whole_and_look_normal() {
        let source = Synthetic::new(config("smollm2-135m").unwrap()).unwrap();
        let index = source.tensors.iter().position(|t| t.name.ends_with("q_proj.weight")).unwrap();
        let (mut whole, mut part) = (vec![0.0; 64 * 576], vec![0.0; 8 * 576]);
        source.read_rows(index, 0..64, &mut whole).unwrap();
        source.read_rows(index, 8..16, &mut part).unwrap();
        assert_eq!(whole[8 * 576..16 * 576], part[..]);
        let square: f32 = whole.iter().map(|x| x * x).sum();
        let deviation = (square / whole.len() as f32).sqrt();
        assert!((deviation - 0.02).abs() < 1e-3, "{deviation}");
    }
}
