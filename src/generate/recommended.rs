//! How a model's answers are sampled where nobody says otherwise: as its makers recommend, or by its size.

use super::{Dry, Sampling};
use crate::error::{Error, Result};
use crate::format::foreign::parse_object;
use serde_json::{Map, Value};
use std::fmt;
use std::path::Path;

/// The file in which a model's makers recommend it.
pub(crate) const FILE: &str = "generation_config.json";

/// transformers' value where sampling is asked for and no other is given.
const TOP_K: usize = 50;

/// By the number of parameters: below which it is, temperature and top-p. `examples/loops.rs` compares such settings.
const BY_SIZE: [(u64, f32, f32); 2] = [(300_000_000, 0.2, 0.9), (u64::MAX, 0.7, 0.9)];

/// What else a file may say of sampling, with the value at which it does nothing. None of these is done here.
const OTHERS: [(&str, f64); 13] = [
    ("typical_p", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("top_h", 1.0),
    ("no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("num_beams", 1.0),
    ("num_beam_groups", 1.0),
    ("diversity_penalty", 0.0),
    ("length_penalty", 1.0),
    ("penalty_alpha", 0.0),
    ("guidance_scale", 1.0),
];
/// The same for lists and objects, which do nothing where they are not there.
const OTHER_LISTS: [&str; 5] =
    ["bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "exponential_decay_length_penalty"];

/// Where the settings are from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SamplingSource {
    /// The model's `generation_config.json`.
    Model,
    /// Measured on models of its size.
    Size,
}

impl fmt::Display for SamplingSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Model => FILE,
            Self::Size => "by its size",
        })
    }
}

/// Sampling for a model, and where it is from.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Recommended {
    /// The settings, with the guard against loops.
    pub sampling: Sampling,
    /// Where they are from.
    pub source: SamplingSource,
    /// What the model's file says of sampling beside that, which is not done.
    pub unused: Vec<String>,
}

impl Recommended {
    /// For a model of so many parameters, with the content of its `generation_config.json`, which is at `place`.
    ///
    /// # Errors
    /// The content is no JSON object, or a setting in it is not a number or out of range.
    pub(crate) fn read(file: Option<&[u8]>, place: &Path, parameters: u64) -> Result<Self> {
        let json = file.map(|bytes| parse_object(place, bytes)).transpose()?.unwrap_or_default();
        let dry = Dry::GUARD;
        let (unused, given) = (unused(&json), given(&json, place)?);
        if let Some(sampling) = given {
            return Ok(Self { sampling: Sampling { dry, ..sampling }, source: SamplingSource::Model, unused });
        }
        let fits = BY_SIZE.iter().find(|(below, ..)| parameters < *below);
        let (_, temperature, top_p) = fits.unwrap_or(&BY_SIZE[BY_SIZE.len() - 1]);
        let sampling = Sampling { temperature: *temperature, top_p: *top_p, dry, ..Sampling::default() };
        Ok(Self { sampling, source: SamplingSource::Size, unused })
    }
}

/// What the file says of sampling, as transformers takes it; `None` if it says nothing.
fn given(json: &Map<String, Value>, place: &Path) -> Result<Option<Sampling>> {
    let wrong = |key: &str, expected: &str, value: &Value| Error::format(place, key, expected, format!("`{value}`"));
    let number = |key: &str| match json.get(key).filter(|value| !value.is_null()) {
        None => Ok(None),
        Some(value) => value.as_f64().map(|n| Some(n as f32)).ok_or_else(|| wrong(key, "a number", value)),
    };
    let samples = match json.get("do_sample").filter(|value| !value.is_null()) {
        None => None,
        Some(value) => Some(value.as_bool().ok_or_else(|| wrong("do_sample", "true or false", value))?),
    };
    let top_k = match json.get("top_k").filter(|value| !value.is_null()) {
        None => None,
        Some(value) => Some(value.as_u64().ok_or_else(|| wrong("top_k", "a whole number from 0", value))? as usize),
    };
    let (temperature, top_p, min_p) = (number("temperature")?, number("top_p")?, number("min_p")?);
    let penalty = number("repetition_penalty")?;
    let says = temperature.is_some() || top_k.is_some() || top_p.is_some() || min_p.is_some() || penalty.is_some();
    if samples.is_none() && !says {
        return Ok(None);
    }
    let sampling = Sampling {
        temperature: if samples == Some(false) { 0.0 } else { temperature.unwrap_or(1.0) },
        top_k: top_k.unwrap_or(if samples == Some(true) { TOP_K } else { 0 }),
        top_p: top_p.unwrap_or(1.0),
        min_p: min_p.unwrap_or(0.0),
        repetition_penalty: penalty.unwrap_or(1.0),
        ..Sampling::default()
    };
    sampling.validate().map_err(|e| e.at(format!("`{}`", place.display())))?;
    Ok(Some(sampling))
}

fn unused(json: &Map<String, Value>) -> Vec<String> {
    let numbers = OTHERS.iter().filter(|(key, nothing)| {
        json.get(*key).is_some_and(|value| !value.is_null() && value.as_f64() != Some(*nothing))
    });
    let lists = OTHER_LISTS.iter().filter(|key| json.get(**key).is_some_and(|value| !value.is_null()));
    numbers.map(|(key, _)| key).chain(lists).map(|key| (*key).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str, parameters: u64) -> Result<Recommended> {
        Recommended::read(Some(json.as_bytes()), Path::new(FILE), parameters)
    }

    #[test]
    fn a_models_own_settings_count_before_those_of_its_size() {
        let plain = Sampling { dry: Dry::GUARD, ..Sampling::default() };
        for (json, want) in [
            (
                r#"{"do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}"#,
                Sampling { temperature: 0.7, top_k: 20, top_p: 0.8, repetition_penalty: 1.1, ..plain.clone() },
            ),
            (r#"{"do_sample": true}"#, Sampling { temperature: 1.0, top_k: 50, ..plain.clone() }),
            (r#"{"do_sample": false, "temperature": 0.7}"#, plain.clone()),
            (r#"{"temperature": 0.5, "min_p": 0.1}"#, Sampling { temperature: 0.5, min_p: 0.1, ..plain.clone() }),
        ] {
            let read = read(json, 1).unwrap();
            assert_eq!((&read.sampling, read.source), (&want, SamplingSource::Model), "{json}");
        }
        for json in ["{}", r#"{"eos_token_id": 2, "temperature": null}"#] {
            let (small, large) = (read(json, 135_000_000).unwrap(), read(json, 7_000_000_000).unwrap());
            assert_eq!((small.source, large.source), (SamplingSource::Size, SamplingSource::Size));
            assert!(small.sampling.temperature < large.sampling.temperature && small.sampling.dry.is_on());
        }
        assert_eq!(Recommended::read(None, Path::new(FILE), 1).unwrap(), read("{}", 1).unwrap());
    }

    #[test]
    fn what_is_not_done_is_named_and_what_is_wrong_is_refused() {
        let json =
            r#"{"temperature": 1, "num_beams": 4, "typical_p": 1.0, "suppress_tokens": [7], "bad_words_ids": null}"#;
        assert_eq!(read(json, 1).unwrap().unused, ["num_beams", "suppress_tokens"]);
        for (json, what) in [
            (r#"{"temperature": "hot"}"#, "temperature: expected a number, got `\"hot\"`"),
            (r#"{"temperature": -1}"#, "0 <= temperature <= 100"),
            (r#"{"do_sample": 1}"#, "do_sample: expected true or false, got `1`"),
            (r#"{"top_k": -5}"#, "top_k: expected a whole number"),
            (r#"{"top_p": 0}"#, "0 < top-p <= 1"),
            ("[]", "an object"),
        ] {
            let error = read(json, 1).unwrap_err().to_string();
            assert!(error.contains(what) && error.contains(FILE), "{error}");
        }
    }
}
