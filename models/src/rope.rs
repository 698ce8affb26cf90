//! Rotary position embedding: frequencies and their long-context scalings.

use crate::config::{ConfigError, Keys};
use std::f64::consts::TAU;

/// Angles of a rotary embedding (Su et al. 2021): position `p` turns pair `i` by `p * inv_freq[i]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Angle per position of each of the `D / 2` pairs, in radians.
    pub inv_freq: Vec<f32>,
}

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
}

impl Rope {
    /// Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before it).
    pub(crate) fn parse(keys: &Keys<'_>, head_dim: usize) -> Result<Self, ConfigError> {
        let nested = match keys.object("rope_parameters")? {
            Some(object) => Some(object),
            None => keys.object("rope_scaling")?,
        };
        let theta = match nested.as_ref().and_then(|n| n.get("rope_theta")) {
            Some(_) => nested.as_ref().map_or(Ok(10_000.0), |n| n.number("rope_theta", 10_000.0))?,
            None => keys.number("rope_theta", 10_000.0)?,
        };
        // The upper bounds, here and below, keep every angle a finite f32.
        if !(theta > 1.0 && theta < 1e30) {
            return Err(ConfigError::new("rope_theta", "a number from 1 to 1e30", theta));
        }
        let scaling = nested.map_or(Ok(Scaling::Default), |n| Scaling::parse(&n, keys))?;
        // transformers computes the exponent and the power in f32; doing so too keeps the angles bit-equal.
        let inv_freq = (0..head_dim / 2)
            .map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / head_dim as f32))
            .map(|f| scaling.apply(f64::from(f)) as f32)
            .collect();
        Ok(Self { inv_freq })
    }
}

impl Scaling {
    fn parse(rope: &Keys<'_>, config: &Keys<'_>) -> Result<Self, ConfigError> {
        let kind = match rope.text("rope_type")? {
            Some(kind) => kind,
            None => rope.text("type")?.unwrap_or("default"),
        };
        let positive = |key: &str, default: Option<f64>| -> Result<f64, ConfigError> {
            let value = match default {
                Some(default) => rope.number(key, default)?,
                None => rope.required_number(key)?,
            };
            if (1e-6..1e12).contains(&value) {
                Ok(value)
            } else {
                Err(ConfigError::new(key, "a number from 1e-6 to 1e12", value))
            }
        };
        match kind {
            "default" => Ok(Self::Default),
            "linear" => Ok(Self::Linear(positive("factor", None)?)),
            "llama3" => {
                let (low, high) = (positive("low_freq_factor", None)?, positive("high_freq_factor", None)?);
                if low >= high {
                    return Err(ConfigError::new("high_freq_factor", format!("more than low_freq_factor {low}"), high));
                }
                let context = config.number("max_position_embeddings", 8192.0)?;
                let original = positive("original_max_position_embeddings", Some(context))?;
                Ok(Self::Llama3 { factor: positive("factor", None)?, low, high, original })
            }
            other => Err(ConfigError::unsupported("rope_type", "one of `default`, `linear`, `llama3`", other)),
        }
    }

    fn apply(self, freq: f64) -> f64 {
        match self {
            Self::Default => freq,
            Self::Linear(factor) => freq / factor,
            Self::Llama3 { factor, low, high, original } => {
                let waves = original * freq / TAU; // full turns within the original context
                let keep = ((waves - low) / (high - low)).clamp(0.0, 1.0);
                freq * keep + freq / factor * (1.0 - keep)
            }
        }
    }
}
