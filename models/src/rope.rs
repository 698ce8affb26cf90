//! Rotary position embedding: frequencies and their long-context scalings.

use crate::config::ConfigError;
use crate::keys::Keys;
use serde_json::{Map, Value};
use std::f64::consts::TAU;

/// Angles of a rotary embedding (Su et al. 2021): position `p` turns pair `i` by `p * inv_freq[i]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Angle per position of each of the `D / 2` pairs, in radians.
    pub inv_freq: Vec<f32>,
    /// Factor on every cosine and sine (YaRN's); 1 for all others.
    pub attention_factor: f32,
}

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
];
/// Keys of every kind. Only `finetuned`, a remark of early YaRN files, has no effect.
const COMMON: &[&str] = &["rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"];

/// How `config.json` stretches the frequencies.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Scaling {
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
}

impl Rope {
    /// Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before it).
    pub(crate) fn parse(keys: &Keys<'_>, head_dim: usize, max_positions: usize) -> Result<Self, ConfigError> {
        let (new, old) = (keys.object("rope_parameters")?, keys.object("rope_scaling")?);
        if let (Some(new), Some(old)) = (&new, &old)
            && !old.0.is_empty()
            && parameters(new) != parameters(old)
        {
            return Err(ConfigError::new(
                "rope_scaling",
                "the same as in `rope_parameters`",
                Value::from(old.0.clone()),
            ));
        }
        let nested = new.or(old).filter(|n| !n.0.is_empty());
        let theta = match nested.as_ref().filter(|n| n.get("rope_theta").is_some()) {
            Some(nested) => nested.required_number("rope_theta")?,
            None => keys.number("rope_theta", 10_000.0)?,
        };
        // The upper bounds, here and below, keep every angle a finite f32.
        if !(theta > 1.0 && theta < 1e30) {
            return Err(ConfigError::new("rope_theta", "a number from 1 to 1e30", theta));
        }
        if keys.number("rope_theta", theta)? != theta {
            return Err(ConfigError::new(
                "rope_theta",
                format!("{theta}, as in `rope_parameters`"),
                keys.number("rope_theta", theta)?,
            ));
        }
        let scaling = match nested {
            Some(nested) => Scaling::parse(&Parameters { rope: nested, config: keys, theta, head_dim, max_positions })?,
            None => Scaling::Default,
        };
        // transformers computes the exponent and the power in f32; doing so too keeps the angles bit-equal.
        let inv_freq = (0..head_dim / 2)
            .map(|i| (i, (theta as f32).powf((2 * i) as f32 / head_dim as f32)))
            .map(|(i, period)| scaling.apply(i, period))
            .collect();
        let attention_factor =
            if let Scaling::Yarn { attention_factor, .. } = scaling { attention_factor as f32 } else { 1.0 };
        Ok(Self { inv_freq, attention_factor })
    }
}

/// What is compared where a file says it twice: everything but the base, with one spelling of the kind.
fn parameters(rope: &Keys<'_>) -> Map<String, Value> {
    let mut map = rope.0.clone();
    map.remove("rope_theta");
    if let Some(kind) = map.remove("type") {
        map.entry("rope_type").or_insert(kind);
    }
    if map.get("rope_type").is_some_and(|kind| kind == "default") {
        map.remove("rope_type");
    }
    map.retain(|_, value| !value.is_null());
    map
}

/// The scaling's keys and what their meaning depends on.
struct Parameters<'a> {
    rope: Keys<'a>,
    config: &'a Keys<'a>,
    theta: f64,
    head_dim: usize,
    max_positions: usize,
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
        if let Some(key) = self.rope.names().find(|key| !COMMON.contains(key) && !keys.contains(key)) {
            return Err(ConfigError::unsupported(
                key,
                format!("no such key in `{kind}` RoPE scaling"),
                &self.rope.0[key],
            ));
        }
        if self.rope.number("partial_rotary_factor", 1.0)? != 1.0 {
            let got = self.rope.number("partial_rotary_factor", 1.0)?;
            return Err(ConfigError::unsupported(
                "partial_rotary_factor",
                "1, for these families turn whole heads",
                got,
            ));
        }
        Ok(kind)
    }

    /// Context before the scaling. As in transformers, a key beside the scaling's object goes first.
    fn original(&self) -> Result<f64, ConfigError> {
        let key = "original_max_position_embeddings";
        match self.config.optional_size(key)? {
            Some(outside) => Ok(outside as f64),
            None => self.positive(key, Some(self.max_positions as f64)),
        }
    }
}

impl Scaling {
    fn parse(p: &Parameters<'_>) -> Result<Self, ConfigError> {
        match p.kind()? {
            "linear" => Ok(Self::Linear(p.positive("factor", None)?)),
            // Dynamic NTK changes the base only past the trained context, where our context ends.
            "dynamic" => p.positive("factor", None).map(|_| Self::Default),
            "llama3" => {
                let (low, high) = (p.positive("low_freq_factor", None)?, p.positive("high_freq_factor", None)?);
                if low >= high {
                    return Err(ConfigError::new("high_freq_factor", format!("more than low_freq_factor {low}"), high));
                }
                Ok(Self::Llama3 { factor: p.positive("factor", None)?, low, high, original: p.original()? })
            }
            "yarn" => Self::yarn(p),
            _ => Ok(Self::Default),
        }
    }

    /// transformers' `_compute_yarn_parameters`, line by line.
    fn yarn(p: &Parameters<'_>) -> Result<Self, ConfigError> {
        let original = p.original()?;
        let factor = p.positive("factor", Some(p.max_positions as f64 / original))?;
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
        let dim = p.head_dim as f64;
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
    fn apply(self, i: usize, period: f32) -> f32 {
        let freq = f64::from(1.0 / period);
        match self {
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
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Head size 16 and a context of 512, beside the keys of `change`.
    fn parse(change: Value) -> Result<Rope, ConfigError> {
        let Value::Object(map) = change else { unreachable!() };
        Rope::parse(&Keys(&map), 16, 512)
    }

    fn key_of(change: Value) -> String {
        match parse(change.clone()) {
            Err(e) => e.key,
            Ok(rope) => panic!("{change} was accepted: {rope:?}"),
        }
    }

    #[test]
    fn yarn_is_that_of_transformers() {
        // `_compute_yarn_parameters` of transformers 5.24, in f32.
        let cases = [
            (
                json!({"factor": 4.0, "original_max_position_embeddings": 128}),
                1.138_629_4,
                [1.0, 0.237_170_82, 0.049_999_997, 0.007_905_695, 0.0025, 0.000_790_569_5, 0.000_25, 7.905_694e-5],
            ),
            (
                json!({"factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 0.75,
                       "beta_fast": 64, "beta_slow": 0.1}),
                0.75,
                [1.0, 0.2687936, 0.07, 0.017392527, 0.0039999997, 0.00079056947, 0.00025, 7.905695e-05],
            ),
            (
                json!({"factor": 8.0, "original_max_position_embeddings": 64, "mscale": 0.8, "mscale_all_dim": 0.5,
                       "truncate": false}),
                1.056_508,
                [
                    1.0,
                    0.178_976_15,
                    0.013_194_458,
                    0.003_952_847_3,
                    0.001_25,
                    0.000_395_284_73,
                    0.000_125,
                    3.952_847_3e-5,
                ],
            ),
            (
                json!({"original_max_position_embeddings": 100, "rope_theta": 500_000.0}),
                1.163_315_4,
                [
                    1.0,
                    0.115_899_146,
                    0.007_344_928,
                    0.001_424_348_6,
                    0.000_276_213_6,
                    5.356_41e-5,
                    1.038_729_7e-5,
                    2.014_333_2e-6,
                ],
            ),
        ];
        for (change, attention_factor, want) in cases {
            // Both spellings of the object and of the kind.
            for (object, kind) in
                [("rope_scaling", "type"), ("rope_scaling", "rope_type"), ("rope_parameters", "rope_type")]
            {
                let mut scaling = change.clone();
                scaling[kind] = json!("yarn");
                let rope = parse(json!({object: scaling})).unwrap();
                assert!((rope.attention_factor - attention_factor).abs() < 1e-6, "{change}: {rope:?}");
                for (got, want) in rope.inv_freq.iter().zip(want) {
                    let want: f32 = want;
                    assert!((got - want).abs() <= 1e-6 * want, "{change}: {:?}, not {want}", rope.inv_freq);
                }
            }
        }
    }

    #[test]
    fn dynamic_changes_nothing_within_the_context_and_linear_divides() {
        let plain = parse(json!({})).unwrap();
        assert_eq!(parse(json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}})).unwrap(), plain);
        assert_eq!(parse(json!({"rope_scaling": {}})).unwrap(), plain);
        assert_eq!(parse(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 10000}})).unwrap(), plain);
        let linear = parse(json!({"rope_scaling": {"type": "linear", "factor": 4.0}})).unwrap();
        assert!(linear.inv_freq.iter().zip(&plain.inv_freq).all(|(a, b)| *a == b / 4.0));
    }

    #[test]
    fn what_would_be_ignored_is_refused_by_name() {
        let yarn = |key: &str, value: Value| json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, key: value}});
        let cases = [
            (json!({"rope_scaling": {"type": "longrope", "factor": 4.0}}), "rope_type"),
            (json!({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}}), "type"),
            (json!({"rope_scaling": {"type": "linear", "factor": 4.0, "beta_fast": 32}}), "beta_fast"),
            (json!({"rope_scaling": {"type": "linear"}}), "factor"),
            (json!({"rope_scaling": {"type": "dynamic"}}), "factor"),
            (json!({"rope_scaling": {"mrope_section": [1, 2]}}), "mrope_section"),
            (json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}), "full_attention"),
            (yarn("partial_rotary_factor", json!(0.5)), "partial_rotary_factor"),
            (yarn("mscale", json!(0.7)), "mscale_all_dim"),
            (yarn("mscale_all_dim", json!(0.7)), "mscale"),
            (yarn("beta_slow", json!(64)), "beta_fast"),
            (yarn("attention_factor", json!(-1)), "attention_factor"),
            (yarn("truncate", json!(1)), "truncate"),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}),
                "rope_scaling",
            ),
            (
                json!({"rope_theta": 5000, "rope_parameters": {"rope_type": "default", "rope_theta": 10000}}),
                "rope_theta",
            ),
        ];
        for (change, key) in cases {
            assert_eq!(key_of(change.clone()), key, "{change}");
        }
        // The same twice, as files for old and new readers have it.
        let scaling = json!({"rope_type": "linear", "factor": 4.0});
        parse(json!({"rope_theta": 100, "rope_scaling": scaling, "rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 100}})).unwrap();
        // A remark of the first YaRN models.
        parse(yarn("finetuned", json!(true))).unwrap();
    }
}
