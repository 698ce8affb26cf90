//! How much a run holds to, and what it may forget: settings that are a word or a number.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// Whether the model is held, on general prompts, to what it says without the adapter. It keeps what it knew then, for about
/// half as much time again.
///
/// A library's runs are not held unless they ask for it: holding needs the model's tokenizer, answers some prompts before
/// the first step, and takes memory for that. The command line asks for [`Keep::Auto`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub enum Keep {
    /// It is not.
    #[default]
    Off,
    /// With the usual weight.
    Auto,
    /// With so many times the mean divergence on the held tokens added to the loss; above 0.
    Weight(f32),
}

impl Keep {
    /// What [`Keep::Auto`] stands for: a held token counts as much as a learned one.
    const USUAL: f32 = 1.0;

    /// The factor on the divergence; nothing where the model is not held.
    #[must_use]
    pub fn weight(self) -> Option<f32> {
        match self {
            Self::Off => None,
            Self::Auto => Some(Self::USUAL),
            Self::Weight(weight) => Some(weight),
        }
    }

    /// Refuses a weight that is none.
    pub(in crate::train) fn check(self) -> Result<()> {
        match self {
            Self::Weight(weight) if !(weight > 0.0 && weight.is_finite()) => {
                Err(Error::config("keep", "`auto`, `off`, or a weight above 0", weight))
            }
            _ => Ok(()),
        }
    }
}

/// What a run may make the model forget.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub enum Forgetting {
    /// So many nats a token by which the loss on a general text may rise; from 0.
    Nats(f64),
    /// So many percent, up to 100, of the general questions that it answered rightly before.
    Percent(f64),
}

impl From<f64> for Forgetting {
    fn from(nats: f64) -> Self {
        Self::Nats(nats)
    }
}

impl Forgetting {
    /// Refuses what is no bound.
    pub(in crate::train) fn check(self) -> Result<()> {
        let (Self::Nats(bound) | Self::Percent(bound)) = self;
        let most = if matches!(self, Self::Percent(_)) { 100.0 } else { f64::MAX };
        if (0.0..=most).contains(&bound) {
            return Ok(());
        }
        Err(Error::config("max-forgetting", "a number from 0, or a share from `0%` to `100%`", self))
    }
}

impl std::fmt::Display for Forgetting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nats(nats) => write!(f, "{nats}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// A setting as files and flags have it.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Number(f64),
    Word(String),
}

impl TryFrom<Written> for Keep {
    type Error = String;

    fn try_from(written: Written) -> std::result::Result<Self, String> {
        match written {
            Written::Number(weight) => Ok(Self::Weight(weight as f32)),
            Written::Word(word) => match (word.as_str(), word.parse()) {
                ("off", _) => Ok(Self::Off),
                ("auto", _) => Ok(Self::Auto),
                (_, Ok(weight)) => Ok(Self::Weight(weight)),
                _ => Err(format!("setting `keep`: expected `auto`, `off`, or a weight above 0, got `{word}`")),
            },
        }
    }
}

impl From<Keep> for Written {
    fn from(keep: Keep) -> Self {
        match keep {
            Keep::Off => Self::Word("off".to_owned()),
            Keep::Auto => Self::Word("auto".to_owned()),
            // The number that somebody typed: an f32 widened as it is has digits of its own.
            Keep::Weight(weight) => Self::Number(weight.to_string().parse().unwrap_or(f64::from(weight))),
        }
    }
}

impl TryFrom<Written> for Forgetting {
    type Error = String;

    fn try_from(written: Written) -> std::result::Result<Self, String> {
        let word = match written {
            Written::Number(nats) => return Ok(Self::Nats(nats)),
            Written::Word(word) => word,
        };
        let number = |text: &str| text.trim().parse::<f64>().ok();
        let percent = word.strip_suffix('%').and_then(number).map(Self::Percent);
        percent.or_else(|| number(&word).map(Self::Nats)).ok_or_else(|| {
            format!("setting `max-forgetting`: expected nats a token, or percent of general questions such as `5%`, got `{word}`")
        })
    }
}

impl From<Forgetting> for Written {
    fn from(bound: Forgetting) -> Self {
        match bound {
            Forgetting::Nats(nats) => Self::Number(nats),
            Forgetting::Percent(_) => Self::Word(bound.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_words_or_numbers_and_come_back_as_they_were() {
        for (text, keep) in [
            ("\"off\"", Keep::Off),
            ("\"auto\"", Keep::Auto),
            ("0.3", Keep::Weight(0.3)),
            ("\"0.3\"", Keep::Weight(0.3)),
            ("2", Keep::Weight(2.0)),
        ] {
            let read: Keep = serde_json::from_str(text).unwrap();
            assert_eq!(read, keep);
            assert_eq!(serde_json::from_str::<Keep>(&serde_json::to_string(&keep).unwrap()).unwrap(), keep);
        }
        assert_eq!(serde_json::to_string(&Keep::Weight(0.3)).unwrap(), "0.3");
        for (text, bound) in [
            ("0.25", Forgetting::Nats(0.25)),
            ("\"0.25\"", Forgetting::Nats(0.25)),
            ("\"5%\"", Forgetting::Percent(5.0)),
        ] {
            let read: Forgetting = serde_json::from_str(text).unwrap();
            assert_eq!(read, bound);
            assert_eq!(serde_json::from_str::<Forgetting>(&serde_json::to_string(&bound).unwrap()).unwrap(), bound);
        }
        assert!(serde_json::from_str::<Keep>("\"much\"").unwrap_err().to_string().contains("`much`"));
        assert!(serde_json::from_str::<Forgetting>("\"5 of 8\"").unwrap_err().to_string().contains("`5 of 8`"));
    }

    #[test]
    fn bounds_and_weights_that_are_none_are_refused() {
        for keep in [Keep::Weight(0.0), Keep::Weight(-1.0), Keep::Weight(f32::NAN)] {
            assert!(keep.check().unwrap_err().to_string().contains("`keep`"), "{keep:?}");
        }
        for bound in [Forgetting::Nats(-0.1), Forgetting::Nats(f64::NAN), Forgetting::Percent(101.0)] {
            assert!(bound.check().unwrap_err().to_string().contains("`max-forgetting`"), "{bound:?}");
        }
        Keep::Auto.check().and(Forgetting::Percent(5.0).check()).unwrap();
    }
}
