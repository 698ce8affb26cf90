//! Kinds of layers, and the sliding windows of those that have one.

use crate::config::{Config, ConfigError};
use crate::keys::Keys;

/// A layer whose tokens see all tokens before them, as `layer_types` spells it.
pub(crate) const FULL: &str = "full_attention";
/// A layer whose tokens see the last `sliding_window` tokens.
pub(crate) const SLIDING: &str = "sliding_attention";

/// `layer_types`, where the file has it: for each of `layers` one of the names in `known`.
///
/// # Errors
/// The list has another length, or a name that is not among them.
pub(crate) fn layer_types(
    keys: &Keys<'_>,
    layers: usize,
    known: &[&'static str],
) -> Result<Option<Vec<&'static str>>, ConfigError> {
    let Some(types) = keys.get("layer_types") else { return Ok(None) };
    let expected = || format!("`{}` for each of {layers} layers", known.join("` or `"));
    let list = types.as_array().filter(|list| list.len() == layers);
    let list = list.ok_or_else(|| ConfigError::new("layer_types", expected(), types))?;
    let names = list.iter().map(|kind| {
        let name = known.iter().find(|name| kind.as_str() == Some(**name)).copied();
        name.ok_or_else(|| ConfigError::unsupported("layer_types", expected(), kind))
    });
    names.collect::<Result<_, _>>().map(Some)
}

/// Every so many layers full, and the others sliding.
pub(crate) fn full_every(every: usize, layers: usize) -> Vec<&'static str> {
    (1..=layers).map(|i| if i.is_multiple_of(every) { FULL } else { SLIDING }).collect()
}

/// The window of each layer of these kinds; `window` is what the family takes where the file has none.
pub(crate) fn windows_of(
    keys: &Keys<'_>,
    types: &[&str],
    window: Option<usize>,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let window = keys.size_or("sliding_window", window)?;
    if types.contains(&SLIDING) && window.is_none() {
        return Err(ConfigError::new("sliding_window", "a window for the sliding layers", "nothing"));
    }
    Ok(types.iter().map(|kind| window.filter(|_| *kind == SLIDING)).collect())
}

/// The keys of sliding windows.
pub(crate) struct WindowKeys {
    /// `sliding_window`, in tokens.
    pub(crate) window: Option<usize>,
    /// `max_window_layers`: layers below it see all.
    pub(crate) first: Option<usize>,
    /// `use_sliding_window`.
    pub(crate) on: bool,
}

/// The windows of a family without any, whatever `sliding_window` might say.
pub(crate) fn none(keys: &Keys<'_>, config: &Config) -> Result<Vec<Option<usize>>, ConfigError> {
    WindowKeys::read(keys, None, true)?.same(keys, config.layers, None)
}

/// The windows of a family whose layers all have the one of `sliding_window`, if the file has it.
pub(crate) fn one(keys: &Keys<'_>, config: &Config) -> Result<Vec<Option<usize>>, ConfigError> {
    let given = WindowKeys::read(keys, None, true)?;
    given.same(keys, config.layers, given.window)
}

impl WindowKeys {
    /// Reads the keys; `window` and `on` are what the family takes where the file has none.
    pub(crate) fn read(keys: &Keys<'_>, window: Option<usize>, on: bool) -> Result<Self, ConfigError> {
        Ok(Self {
            window: keys.size_or("sliding_window", window)?,
            first: keys.index("max_window_layers")?,
            on: keys.flag("use_sliding_window", on)?,
        })
    }

    /// The window of each of `layers`, where `layer_types` says which of them have one.
    pub(crate) fn named(&self, keys: &Keys<'_>, layers: usize) -> Result<Option<Vec<Option<usize>>>, ConfigError> {
        let Some(types) = layer_types(keys, layers, &[FULL, SLIDING])? else { return Ok(None) };
        let window = |(i, kind)| match kind {
            FULL => Ok(None),
            _ if self.on && self.window.is_some() => Ok(self.window),
            _ => Err(ConfigError::new(
                "layer_types",
                "no sliding layer where no window is switched on",
                format!("layer {i}"),
            )),
        };
        types.into_iter().enumerate().map(window).collect::<Result<_, _>>().map(Some)
    }

    /// The windows of a family whose upper layers slide: those that `layer_types` names, or else those from
    /// `max_window_layers` on; none where windows are switched off.
    pub(crate) fn upper(&self, keys: &Keys<'_>, layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
        if let Some(named) = self.named(keys, layers)? {
            return Ok(named);
        }
        let first = if self.on { self.first.unwrap_or(28) } else { layers };
        Ok((0..layers).map(|i| self.window.filter(|_| i >= first)).collect())
    }

    /// The windows of a family whose layers all have the same `window`, whatever `layer_types` might say.
    pub(crate) fn same(
        &self,
        keys: &Keys<'_>,
        layers: usize,
        window: Option<usize>,
    ) -> Result<Vec<Option<usize>>, ConfigError> {
        let windows = vec![window; layers];
        if self.named(keys, layers)?.is_some_and(|named| named != windows) {
            let family = keys.text("model_type")?.unwrap_or_default();
            let got = keys.get("layer_types").map(ToString::to_string).unwrap_or_default();
            return Err(ConfigError::new("layer_types", format!("the same window in every layer of `{family}`"), got));
        }
        Ok(windows)
    }
}
