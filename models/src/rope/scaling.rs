//! How `config.json` stretches the frequencies of a rotary embedding for long contexts.

use super::RopeKeys;
use crate::config::ConfigError;
use crate::keys::Keys;
use serde_json::Value;
use std::f64::consts::TAU;

/// Kinds of scaling, as `rope_type` spells them, and the keys that each reads beside [`COMMON`].
const KINDS: &[(&str, &[&str])] = &[
    ("default", &[]),
    ("linear", &["factor"]),
    ("dynamic", &["factor"]),
    (
        "yarn",
        &[
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ],
    ),
    ("llama3", &["factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"]),
    ("proportional", &["factor"]),
    ("longrope", LONGROPE),
    ("su", LONGROPE),
];
const LONGROPE: &[&str] =
    &["short_factor", "long_factor", "factor", "original_max_position_embeddings", "attention_factor"];
/// Keys of every kind. Only `finetuned`, a remark of early YaRN files, has no effect.
const COMMON: &[&str] = &["rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"];

/// A kind of scaling with its numbers.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scaling {
    Default,
    /// All angles divided by the factor.
    Linear(f64),
    /// Long waves divided, short ones kept, a smooth step between (Llama 3.1).
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: f64,
    },
    /// Pairs of many turns kept, of few turns divided, a ramp over the pairs between (Peng et al. 2023).
    Yarn {
        factor: f64,
        /// First pair and end of the ramp.
        ramp: (f64, f64),
        attention_factor: f64,
    },
    /// So many pairs turn, by angles divided by the factor; the others of the head do not (Gemma 4).
    Proportional {
        pairs: usize,
        factor: f64,
    },
    /// A base of its own for so many dimensions (HunYuan's dynamic NTK, which depends on no length).
    Base(f64, usize),
    /// Each pair divided by a factor of its own, in long texts by another (Ding et al. 2024).
    LongRope {
        short: Vec<f32>,
        long: Vec<f32>,
        /// Tokens of the longest text that is short.
        original: usize,
        attention_factor: f64,
    },
}

/// The scaling's keys and what their meaning depends on.
pub(super) struct Parameters<'a> {
    /// The object that describes the scaling.
    pub(super) rope: Keys<'a>,
    /// The whole config.
    pub(super) config: &'a Keys<'a>,
    /// What the family says of its rotary keys.
    pub(super) family: &'a RopeKeys,
    pub(super) theta: f64,
    /// Dimensions of a head that turn.
    pub(super) turned: usize,
}

impl Parameters<'_> {
    /// A number that must be there, unless there is a default.
    fn positive(&self, key: &str, default: Option<f64>) -> Result<f64, ConfigError> {
        let value = match default {
            Some(default) => self.rope.number(key, default)?,
            None => self.rope.required_number(key)?,
        };
        if (1e-6..1e12).contains(&value) {
            Ok(value)
        } else {
            Err(ConfigError::new(key, "a number from 1e-6 to 1e12", value))
        }
    }

    /// The kind, once every key is known to have a meaning in it.
    fn kind(&self) -> Result<&str, ConfigError> {
        let (new, old) = (self.rope.text("rope_type")?, self.rope.text("type")?);
        if let (Some(new), Some(old)) = (new, old)
            && new != old
        {
            return Err(ConfigError::new("type", format!("`{new}`, as `rope_type` says"), old));
        }
        let kind = new.or(old).unwrap_or("default");
        let Some((_, keys)) = KINDS.iter().find(|(name, _)| *name == kind) else {
            let known: Vec<_> = KINDS.iter().map(|(name, _)| format!("`{name}`")).collect();
            return Err(ConfigError::unsupported("rope_type", format!("one of {}", known.join(", ")), kind));
        };
        let unknown = |key: &&str| ![COMMON, keys, self.family.more].iter().any(|known| known.contains(key));
        if let Some(key) = self.rope.names().find(unknown) {
            return Err(ConfigError::unsupported(
                key,
                format!("no such key in `{kind}` RoPE scaling"),
                &self.rope.0[key],
            ));
        }
        Ok(kind)
    }

    /// A factor for each pair.
    fn factors(&self, key: &str) -> Result<Vec<f32>, ConfigError> {
        let pairs = self.turned / 2;
        let factor = |value: &Value| value.as_f64().filter(|f| (1e-6..1e12).contains(f)).map(|f| f as f32);
        let list = self.rope.get(key).and_then(Value::as_array).filter(|list| list.len() == pairs);
        let list = list.and_then(|list| list.iter().map(factor).collect());
        list.ok_or_else(|| {
            let got = self.rope.get(key).map_or_else(|| "nothing".to_owned(), ToString::to_string);
            ConfigError::new(key, format!("{pairs} numbers from 1e-6 to 1e12"), got)
        })
    }

    /// Context before the scaling. As in transformers, a key beside the scaling's object goes first.
    fn original(&self) -> Result<f64, ConfigError> {
        let key = "original_max_position_embeddings";
        match self.config.optional_size(key)? {
            Some(outside) => Ok(outside as f64),
            None => self.positive(key, Some(self.family.positions as f64)),
        }
    }
}

impl Scaling {
    /// Reads the scaling.
    pub(super) fn read(p: &Parameters<'_>) -> Result<Self, ConfigError> {
        match p.kind()? {
            "linear" => Ok(Self::Linear(p.positive("factor", None)?)),
            // Dynamic NTK changes the base only past the trained context, where our context ends.
            "dynamic" if p.rope.get("alpha").is_some() => Self::ntk(p),
            "dynamic" => p.positive("factor", None).map(|_| Self::Default),
            "llama3" => {
                let (low, high) = (p.positive("low_freq_factor", None)?, p.positive("high_freq_factor", None)?);
                if low >= high {
                    return Err(ConfigError::new("high_freq_factor", format!("more than low_freq_factor {low}"), high));
                }
                Ok(Self::Llama3 { factor: p.positive("factor", None)?, low, high, original: p.original()? })
            }
            "yarn" => Self::yarn(p),
            "proportional" => {
                let share = p.rope.number("partial_rotary_factor", 1.0)?;
                if !(share > 0.0 && share <= 1.0) {
                    return Err(ConfigError::new("partial_rotary_factor", "a share of a head from 0 to 1", share));
                }
                let pairs = (share * (p.turned as f64 / 2.0)) as usize;
                Ok(Self::Proportional { pairs, factor: p.positive("factor", Some(1.0))? })
            }
            "longrope" | "su" => Self::longrope(p),
            _ => Ok(Self::Default),
        }
    }

    /// Of families that have `alpha`.
    fn ntk(p: &Parameters<'_>) -> Result<Self, ConfigError> {
        let (alpha, dim) = (p.positive("alpha", None)?, p.turned as f64);
        let base = p.theta * alpha.powf(dim / (dim - 2.0));
        if base > 1.0 && base < 1e30 {
            return Ok(Self::Base(base, p.turned));
        }
        Err(ConfigError::new("alpha", "a number that makes a base from 1 to 1e30", alpha))
    }

    /// transformers' `_compute_longrope_parameters`.
    fn longrope(p: &Parameters<'_>) -> Result<Self, ConfigError> {
        let original = p.original()?;
        let factor = p.positive("factor", Some(p.family.positions as f64 / original))?;
        let usual = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
        let attention_factor = p.positive("attention_factor", Some(usual))?;
        if !(1e-6..1e6).contains(&attention_factor) {
            return Err(ConfigError::new("attention_factor", "a number from 1e-6 to 1e6", attention_factor));
        }
        let (short, long) = (p.factors("short_factor")?, p.factors("long_factor")?);
        Ok(Self::LongRope { short, long, original: original as usize, attention_factor })
    }

    /// What long texts are: of more than so many tokens, and their factors.
    pub(super) fn long(&self) -> Option<(usize, &[f32])> {
        match self {
            Self::LongRope { long, original, .. } => Some((*original, long)),
            _ => None,
        }
    }

    /// The factor on cosines and sines.
    pub(super) fn attention_factor(&self) -> f32 {
        match self {
            Self::Yarn { attention_factor, .. } | Self::LongRope { attention_factor, .. } => *attention_factor as f32,
            _ => 1.0,
        }
    }

    /// transformers' `_compute_yarn_parameters`, line by line.
    fn yarn(p: &Parameters<'_>) -> Result<Self, ConfigError> {
        let original = p.original()?;
        let factor = p.positive("factor", Some(p.family.positions as f64 / original))?;
        let (fast, slow) = (p.positive("beta_fast", Some(32.0))?, p.positive("beta_slow", Some(1.0))?);
        if fast < slow {
            return Err(ConfigError::new("beta_fast", format!("at least beta_slow {slow}"), fast));
        }
        let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
        let given = |key: &str| p.rope.number(key, 0.0);
        let attention_factor = match (given("mscale")?, given("mscale_all_dim")?) {
            _ if p.rope.get("attention_factor").is_some() => p.positive("attention_factor", None)?,
            (0.0, 0.0) => scale(1.0),
            (0.0, _) => return Err(ConfigError::new("mscale", "a number beside `mscale_all_dim`", "nothing")),
            (_, 0.0) => return Err(ConfigError::new("mscale_all_dim", "a number beside `mscale`", "nothing")),
            (m, all) => scale(m) / scale(all),
        };
        // Too small or too large a product overflows where angles are multiplied.
        if !(1e-6..1e6).contains(&attention_factor) {
            return Err(ConfigError::new("attention_factor", "a number from 1e-6 to 1e6", attention_factor));
        }
        let dim = p.turned as f64;
        let pair_of = |turns: f64| dim * (original / (turns * TAU)).ln() / (2.0 * p.theta.ln());
        let (mut low, mut high) = (pair_of(fast), pair_of(slow));
        if p.rope.flag("truncate", true)? {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        // A ramp without length would be a division by zero.
        let ramp = (low, if low == high { high + 0.001 } else { high });
        Ok(Self::Yarn { factor, ramp, attention_factor })
    }

    /// Angle per position of pair `i`, whose unscaled one is `1 / period`.
    pub(super) fn apply(&self, i: usize, period: f32) -> f32 {
        let freq = f64::from(1.0 / period);
        match *self {
            Self::Default => freq as f32,
            Self::Linear(factor) => (freq / factor) as f32,
            Self::Llama3 { factor, low, high, original } => {
                let waves = original * freq / TAU; // full turns within the original context
                let keep = ((waves - low) / (high - low)).clamp(0.0, 1.0);
                (freq * keep + freq / factor * (1.0 - keep)) as f32
            }
            Self::Yarn { factor, ramp: (low, high), .. } => {
                // In f32, as transformers has it.
                let keep = 1.0 - ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                1.0 / (factor as f32 * period) * (1.0 - keep) + 1.0 / period * keep
            }
            Self::Proportional { pairs, factor } => {
                if i < pairs {
                    (freq / factor) as f32
                } else {
                    0.0
                }
            }
            Self::Base(base, dim) => 1.0 / (base as f32).powf((2 * i) as f32 / dim as f32),
            Self::LongRope { ref short, .. } => 1.0 / (short[i] * period),
        }
    }
}
