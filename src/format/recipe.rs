//! What a conversion is to make of a checkpoint's weights.

use crate::error::{Error, Result};
use std::str::FromStr;

/// What to make of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Linear layers in 4-bit NF4 with double quantization, the rest in 16 bits.
    Nf4,
    /// Everything in IEEE binary16.
    F16,
    /// Everything in bfloat16.
    BF16,
    /// Everything in binary32.
    F32,
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "nf4" => Ok(Self::Nf4),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::BF16),
            "f32" => Ok(Self::F32),
            _ => Err(Error::config("to", "`nf4`, `f16`, `bf16` or `f32`", name)),
        }
    }
}

/// A target, and what is left out of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// What to make of the weights.
    pub to: Target,
    /// Linear layers that stay in 16 bits where others become 4-bit: parts of their paths, such as `down_proj`,
    /// `layers.0` or `layers.*.mlp`, where `*` stands for any one segment.
    pub skip: Vec<String>,
}

impl From<Target> for Recipe {
    fn from(to: Target) -> Self {
        Self { to, skip: Vec::new() }
    }
}

impl Recipe {
    /// Whether the layer at the path `module` stays in 16 bits.
    pub(super) fn skips(&self, module: &str) -> bool {
        self.skip.iter().any(|pattern| is_part(pattern, module))
    }

    /// Refuses a pattern that names none of the layers `modules`: it would change nothing without a word.
    ///
    /// # Errors
    /// There is one.
    pub(super) fn check(&self, modules: &[&str]) -> Result<()> {
        let idle = |pattern: &&String| !modules.iter().any(|module| is_part(pattern, module));
        let Some(pattern) = self.skip.iter().find(idle) else { return Ok(()) };
        let mut known: Vec<&str> = modules.iter().filter_map(|module| module.rsplit('.').next()).collect();
        known.sort_unstable();
        known.dedup();
        let expected = format!("part of the path of a linear layer, such as `layers.0` or `{}`", known.join("`, `"));
        Err(Error::config("skip", expected, pattern))
    }
}

/// Whether the segments of `pattern` stand one after another in `path`.
fn is_part(pattern: &str, path: &str) -> bool {
    let (pattern, path): (Vec<&str>, Vec<&str>) = (pattern.split('.').collect(), path.split('.').collect());
    let same =
        |window: &[&str]| window.iter().zip(&pattern).all(|(segment, wanted)| wanted == &"*" || segment == wanted);
    path.windows(pattern.len()).any(same)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_whole_segments_of_a_path() {
        let path = "model.layers.1.mlp.down_proj";
        for (pattern, is) in [
            ("down_proj", true),
            ("layers.1", true),
            ("layers.*.mlp", true),
            (path, true),
            ("proj", false),
            ("layers.11", false),
            ("layers.1.down_proj", false),
            ("a.b.c.d.e.f", false),
            ("", false),
        ] {
            assert_eq!(is_part(pattern, path), is, "{pattern}");
        }
    }

    #[test]
    fn a_pattern_that_names_nothing_is_refused() {
        let recipe = Recipe { to: Target::Nf4, skip: vec!["down_proj".to_owned(), "dwon_proj".to_owned()] };
        let error = recipe.check(&["model.layers.0.mlp.down_proj"]).unwrap_err().to_string();
        assert!(error.contains("`dwon_proj`") && error.contains("`down_proj`"), "{error}");
        assert!(Recipe { skip: Vec::new(), ..recipe }.check(&[]).is_ok());
    }
}
