//! Typed access to the keys of `config.json`.

use crate::config::ConfigError;
use serde_json::{Map, Value};

/// Upper bound on every size: beyond any model, small enough that products of two cannot overflow.
const MAX_SIZE: usize = 1 << 24;
/// Upper bound on the number of layers, heads and the width of a head.
pub(crate) const MAX_COUNT: usize = 4096;

/// The keys of a JSON object; `null` counts as absent.
pub(crate) struct Keys<'a>(pub(crate) &'a Map<String, Value>);

impl<'a> Keys<'a> {
    /// Whether the key is there, if only as `null`: some keys have a default that `null` turns off.
    fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &'a str> {
        let map = self.0;
        map.iter().filter(|(_, value)| !value.is_null()).map(|(key, _)| key.as_str())
    }

    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<Keys<'a>>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Keys(map))),
            Some(other) => Err(ConfigError::new(key, "an object", other)),
        }
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(ConfigError::new(key, "a string", other)),
        }
    }

    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(ConfigError::new(key, "true or false", other)),
        }
    }

    pub(crate) fn number(&self, key: &str, default: f64) -> Result<f64, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| ConfigError::new(key, "a number", value)),
        }
    }

    pub(crate) fn required_number(&self, key: &str) -> Result<f64, ConfigError> {
        if self.get(key).is_none() {
            return Err(ConfigError::new(key, "a number", "nothing"));
        }
        self.number(key, 0.0)
    }

    /// As [`Keys::optional_size`], where nothing is a size too.
    pub(crate) fn index(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        if self.get(key).and_then(Value::as_u64) == Some(0) { Ok(Some(0)) } else { self.optional_size(key) }
    }

    pub(crate) fn optional_size(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=MAX_SIZE).contains(n));
        size.map(Some).ok_or_else(|| ConfigError::new(key, format!("a whole number from 1 to {MAX_SIZE}"), value))
    }

    /// As [`Keys::optional_size`], with a default for an absent key that `null` turns off.
    pub(crate) fn size_or(&self, key: &str, default: Option<usize>) -> Result<Option<usize>, ConfigError> {
        if self.has(key) { self.optional_size(key) } else { Ok(default) }
    }

    /// Checks that what is there is one of `names`.
    pub(crate) fn one_of(&self, key: &str, names: &[&str]) -> Result<(), ConfigError> {
        match self.text(key)? {
            Some(name) if !names.contains(&name) => {
                Err(ConfigError::unsupported(key, format!("one of `{}`", names.join("`, `")), name))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn indices(&self, key: &str) -> Result<Option<Vec<usize>>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let index = |value: &Value| value.as_u64().and_then(|index| usize::try_from(index).ok());
        let list = value.as_array().and_then(|list| list.iter().map(index).collect::<Option<_>>());
        list.map(Some).ok_or_else(|| ConfigError::new(key, "a list of whole numbers", value))
    }

    pub(crate) fn is_null(&self, key: &str) -> bool {
        self.has(key) && self.get(key).is_none()
    }

    /// A number above 0, and not beyond all bounds.
    pub(crate) fn positive(&self, key: &str, default: f64) -> Result<f64, ConfigError> {
        let value = self.number(key, default)?;
        if (1e-6..1e12).contains(&value) {
            Ok(value)
        } else {
            Err(ConfigError::new(key, "a number from 1e-6 to 1e12", value))
        }
    }

    /// As [`Keys::positive`], with a default for an absent key that `null` turns off.
    pub(crate) fn positive_or(&self, key: &str, default: Option<f64>) -> Result<Option<f64>, ConfigError> {
        match self.get(key) {
            Some(_) => self.positive(key, 1.0).map(Some),
            None => Ok(default.filter(|_| !self.has(key))),
        }
    }

    /// As [`Keys::count`], with a default.
    pub(crate) fn count_or(&self, key: &str, default: usize) -> Result<usize, ConfigError> {
        if self.get(key).is_none() { Ok(default) } else { self.count(key) }
    }

    /// A number from 0 to below 1.
    pub(crate) fn share(&self, key: &str, default: f64) -> Result<f32, ConfigError> {
        let value = self.number(key, default)?;
        if (0.0..1.0).contains(&value) {
            return Ok(value as f32);
        }
        Err(ConfigError::new(key, "a number from 0 to 1", value))
    }

    pub(crate) fn count(&self, key: &str) -> Result<usize, ConfigError> {
        let count = self.size(key)?;
        if count > MAX_COUNT {
            return Err(ConfigError::new(key, format!("at most {MAX_COUNT}"), count));
        }
        Ok(count)
    }

    pub(crate) fn size(&self, key: &str) -> Result<usize, ConfigError> {
        self.optional_size(key)?.ok_or_else(|| ConfigError::new(key, "a whole number", "nothing"))
    }
}
