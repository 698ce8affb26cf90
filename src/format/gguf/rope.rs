//! RoPE scaling: what GGUF metadata and the `rope_freqs.weight` tensor say, in Hugging Face's terms.

use super::container::{Container, GgufTensor};
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::f64::consts::TAU;

/// The tensor that holds one frequency divisor for each pair of a head's dimensions, shape [head_dim / 2].
pub(super) const FREQS: &str = "rope_freqs.weight";
/// LongRoPE's divisors of long texts and of short ones, in such shapes.
pub(super) const LONG: &str = "rope_factors_long.weight";
pub(super) const SHORT: &str = "rope_factors_short.weight";

// The converter bakes Llama 3's scaling into `rope_freqs.weight` and drops its parameters. These are the ones of
// every released Llama 3.1, 3.2 and 3.3; the factor (8 or 32) is the tensor's largest value.
const LOW_FREQ_FACTOR: f64 = 1.0;
const HIGH_FREQ_FACTOR: f64 = 4.0;
const ORIGINAL_CONTEXT: usize = 8192;

/// Relative difference allowed between stored and recomputed divisors: the converter computes in f32, and the middle
/// band amplifies a frequency's rounding error by up to the factor.
const TOLERANCE: f64 = 1e-3;

/// How positions or frequencies are scaled beyond the base frequency.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scaling {
    None,
    /// Positions divided by `factor`.
    Linear {
        factor: f64,
    },
    /// YaRN, as transformers has it, too; none is the default.
    Yarn {
        factor: f64,
        original_context: Option<usize>,
        beta_fast: Option<f64>,
        beta_slow: Option<f64>,
        /// `mscale_all_dim` beside an `mscale` of 1.
        log_multiplier: Option<f64>,
    },
    /// Low frequencies divided by `factor`, high ones kept, a smooth band between.
    Llama3 {
        factor: f64,
        original_context: usize,
    },
    /// A divisor for each pair, in texts longer than the original context another one.
    LongRope {
        short: Vec<f32>,
        long: Vec<f32>,
        original_context: usize,
        /// Factor on cosines and sines, where the file has it.
        attention: Option<f64>,
    },
}

impl Scaling {
    /// Reads the scaling of `arch`, whose model has this context and heads of which `head_dim` dimensions turn; these and
    /// `theta` are needed to recognize `rope_freqs.weight`.
    pub(super) fn read(file: &Container, arch: &str, head_dim: usize, theta: f64, context: usize) -> Result<Self> {
        let meta = &file.metadata;
        let has = |name: &str| file.tensors.iter().any(|t| t.name == name);
        if meta.string(&format!("{arch}.rope.scaling.type"))? == Some("longrope") || has(LONG) || has(SHORT) {
            return Self::longrope(file, arch, head_dim, context);
        }
        let type_key = format!("{arch}.rope.scaling.type");
        let factor_key = format!("{arch}.rope.scaling.factor");
        // Files from before the scaling had a type carry only a factor under an older name.
        let old_key = format!("{arch}.rope.scale_linear");
        let (key, factor) = match (meta.float(&factor_key)?, meta.float(&old_key)?) {
            (None, Some(factor)) => (old_key, Some(factor)),
            (factor, _) => (factor_key, factor),
        };
        let declared = match (meta.string(&type_key)?, factor) {
            (None, None) | (Some("none"), _) => Self::None,
            (Some("linear") | None, Some(factor)) if factor > 0.0 => Self::Linear { factor },
            (Some("linear") | None, Some(factor)) => return Err(meta.fail(&key, "a positive factor", factor)),
            (Some("yarn"), Some(factor)) if factor > 0.0 => {
                let number = |name: &str| meta.float(&format!("{arch}.rope.scaling.{name}"));
                Self::Yarn {
                    factor,
                    original_context: meta.uint(&format!("{arch}.rope.scaling.original_context_length"))?,
                    beta_fast: number("yarn_beta_fast")?,
                    beta_slow: number("yarn_beta_slow")?,
                    log_multiplier: number("yarn_log_multiplier")?.filter(|&m| m != 0.0),
                }
            }
            (Some("yarn"), Some(factor)) => return Err(meta.fail(&key, "a positive factor", factor)),
            (Some(kind @ ("linear" | "yarn")), None) => {
                return Err(meta.fail(&key, format_args!("a factor for {kind} scaling"), "none"));
            }
            (Some(other), _) => {
                return Err(Error::unsupported(
                    meta.path(),
                    format_args!("RoPE scaling `{other}`"),
                    "`none`, `linear`, `yarn`, `longrope` and Llama 3's can be read; use the model's safetensors files",
                ));
            }
        };
        let declared = if declared == (Self::Linear { factor: 1.0 }) { Self::None } else { declared };
        let Some(freqs) = file.tensors.iter().find(|t| t.name == FREQS) else { return Ok(declared) };
        let original_context =
            meta.uint(&format!("{arch}.rope.scaling.original_context_length"))?.unwrap_or(ORIGINAL_CONTEXT);
        match (declared, Self::from_divisors(file, freqs, head_dim, theta, original_context)?) {
            (declared, Self::None) => Ok(declared),
            (Self::None, baked) => Ok(baked),
            _ => Err(meta.fail(&type_key, format_args!("no scaling beside the tensor `{FREQS}`"), "another one")),
        }
    }

    /// The divisors of LongRoPE, which are tensors.
    fn longrope(file: &Container, arch: &str, head_dim: usize, context: usize) -> Result<Self> {
        let meta = &file.metadata;
        let divisors = |name: &str| {
            let item = format_args!("tensor `{name}`").to_string();
            let Some(tensor) = file.tensors.iter().find(|t| t.name == name) else {
                return Err(Error::format(meta.path(), item, "a tensor, for RoPE scaling `longrope`", "none"));
            };
            if tensor.shape != [head_dim / 2] {
                let (want, got) = (format!("shape [{}]", head_dim / 2), format!("{:?}", tensor.shape));
                return Err(Error::format(meta.path(), item, want, got));
            }
            let mut stored = vec![0.0; head_dim / 2];
            file.read_rows(tensor, 0..1, &mut stored);
            Ok(stored)
        };
        let original = meta.uint(&format!("{arch}.rope.scaling.original_context_length"))?;
        Ok(Self::LongRope {
            short: divisors(SHORT)?,
            long: divisors(LONG)?,
            original_context: original.filter(|n| *n > 0).unwrap_or(context),
            attention: meta.float(&format!("{arch}.rope.scaling.attn_factor"))?,
        })
    }

    /// Recognizes the divisors that the converter computes for Llama 3, or none.
    fn from_divisors(
        file: &Container,
        freqs: &GgufTensor,
        head_dim: usize,
        theta: f64,
        original_context: usize,
    ) -> Result<Self> {
        let path = file.metadata.path();
        if freqs.shape != [head_dim / 2] {
            let item = format_args!("tensor `{FREQS}`");
            return Err(Error::format(
                path,
                item,
                format_args!("shape [{}]", head_dim / 2),
                format_args!("{:?}", freqs.shape),
            ));
        }
        let mut stored = vec![0.0; head_dim / 2];
        file.read_rows(freqs, 0..1, &mut stored);
        if stored.iter().all(|&x| x == 1.0) {
            return Ok(Self::None);
        }
        let factor = stored.iter().copied().fold(0.0, f32::max).into();
        let found = Self::Llama3 { factor, original_context };
        let same = stored.iter().enumerate().all(|(i, &got)| {
            let frequency = theta.powf(-2.0 * i as f64 / head_dim as f64);
            let want = llama3_divisor(frequency, factor, original_context as f64);
            (f64::from(got) - want).abs() <= TOLERANCE * want
        });
        if same {
            return Ok(found);
        }
        Err(Error::unsupported(
            path,
            format_args!("the RoPE scaling in tensor `{FREQS}`"),
            format_args!(
                "only Llama 3's (low_freq_factor {LOW_FREQ_FACTOR}, high_freq_factor {HIGH_FREQ_FACTOR}, \
                 original context {original_context}) can be told from it; use the model's safetensors files"
            ),
        ))
    }

    /// `rope_type` and parameters, as in the `config.json` of a model with this context.
    pub(super) fn into_json(self, context: usize) -> Map<String, Value> {
        let parameters = match self {
            Self::None => json!({"rope_type": "default"}),
            Self::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            Self::Yarn { factor, original_context, beta_fast, beta_slow, log_multiplier } => {
                let mut map =
                    Map::from_iter([("rope_type".to_owned(), json!("yarn")), ("factor".to_owned(), json!(factor))]);
                for (key, value) in [
                    ("original_max_position_embeddings", original_context.map(|n| json!(n))),
                    ("beta_fast", beta_fast.map(|x| json!(x))),
                    ("beta_slow", beta_slow.map(|x| json!(x))),
                    ("mscale", log_multiplier.map(|_| json!(1.0))),
                    ("mscale_all_dim", log_multiplier.map(|x| json!(x))),
                ] {
                    map.extend(value.map(|value| (key.to_owned(), value)));
                }
                Value::Object(map)
            }
            Self::LongRope { short, long, original_context, attention } => {
                let mut map = Map::new();
                map.insert("rope_type".to_owned(), json!("longrope"));
                map.insert("short_factor".to_owned(), json!(short));
                map.insert("long_factor".to_owned(), json!(long));
                map.insert("original_max_position_embeddings".to_owned(), json!(original_context));
                // What transformers takes where no key says it.
                let (factor, original) = (context as f64 / original_context as f64, original_context as f64);
                let usual = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
                let other = attention.filter(|attention| (attention - usual).abs() > TOLERANCE);
                map.extend(other.map(|attention| ("attention_factor".to_owned(), json!(attention))));
                Value::Object(map)
            }
            Self::Llama3 { factor, original_context } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LOW_FREQ_FACTOR,
                "high_freq_factor": HIGH_FREQ_FACTOR,
                "original_max_position_embeddings": original_context,
            }),
        };
        match parameters {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }
}

/// Llama 3's divisor of one `frequency` [radians per position] (transformers `_compute_llama3_parameters`).
fn llama3_divisor(frequency: f64, factor: f64, original_context: f64) -> f64 {
    let wavelength = TAU / frequency;
    if wavelength < original_context / HIGH_FREQ_FACTOR {
        1.0
    } else if wavelength > original_context / LOW_FREQ_FACTOR {
        factor
    } else {
        let smooth = (original_context / wavelength - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR);
        1.0 / ((1.0 - smooth) / factor + smooth)
    }
}
