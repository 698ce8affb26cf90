//! Which layers an adapter's config says that it adapts (PEFT `check_target_module_exists`).

use super::config::{Keys, matches_any, regex};
use crate::adapter::experts::{FUSED, is_fused};
use crate::error::Result;
use fancy_regex::Regex;
use serde_json::Value;
use std::path::PathBuf;

/// `target_modules` with what narrows it.
#[derive(Debug)]
pub(super) struct Targets {
    path: PathBuf,
    named: Names,
    excluded: Names,
    /// Ends of the names of weights that are adapted beside those modules (`target_parameters`).
    parameters: Vec<String>,
    /// Modules of which there is a copy are not adapted.
    copied: Vec<(Regex, String)>,
    /// Numbers of layers, if not all.
    layers: Option<Vec<u64>>,
    /// Where a path has its layer's number.
    numbers: Vec<(Regex, String)>,
}

#[derive(Debug)]
enum Names {
    /// Nothing is said.
    Unsaid,
    /// `all-linear`: all but the head.
    AllLinear,
    /// Ends of paths.
    Ends(Vec<String>),
    /// An expression for whole paths.
    Whole(Regex, String),
}

impl Targets {
    pub(super) fn new(keys: &Keys<'_>) -> Result<Self> {
        let path = keys.path;
        let names = |key: &str| -> Result<Names> {
            Ok(match keys.get(key) {
                Some(Value::String(all)) if all == "all-linear" => Names::AllLinear,
                Some(Value::String(one)) => Names::Whole(regex(path, one, &format!("^(?:{one})$"))?, one.clone()),
                _ => match keys.list(key)? {
                    list if list.is_empty() => Names::Unsaid,
                    list => Names::Ends(list),
                },
            })
        };
        let compile = |list: Vec<String>, form: fn(&str) -> String| -> Result<Vec<(Regex, String)>> {
            list.into_iter().map(|one| Ok((regex(path, &one, &form(&one))?, one))).collect()
        };
        let layers = match keys.get("layers_to_transform") {
            None => None,
            Some(Value::Array(list)) if list.is_empty() => None,
            Some(Value::Array(list)) => Some(list.iter().map(Value::as_u64).collect::<Option<Vec<_>>>()),
            Some(one) => Some(one.as_u64().map(|n| vec![n])),
        };
        let wrong = || keys.wrong("layers_to_transform", "numbers of layers");
        let layers = layers.map(|numbers| numbers.ok_or_else(wrong)).transpose()?;
        let mut numbers = keys.list("layers_pattern")?;
        numbers.retain(|pattern| !pattern.is_empty());
        if numbers.is_empty() {
            numbers.push(r"[^.]*".to_owned());
        }
        Ok(Self {
            path: path.to_owned(),
            named: names("target_modules")?,
            excluded: names("exclude_modules")?,
            parameters: keys.list("target_parameters")?,
            copied: compile(keys.list("modules_to_save")?, |m| format!(r"(^|\.)(?:{m})($|\.)"))?,
            layers,
            numbers: compile(numbers, |p| format!(r"^(?:.*?\.)?(?:{p})\.(\d+)\."))?,
        })
    }

    /// Which weight an adapter on the experts at the path `module` is for, inside `depth` others: PEFT wraps the module once
    /// for each weight in the module's own order, whatever the order of the list, and the last one is outside.
    pub(super) fn weight_of_experts(&self, module: &str, depth: usize) -> Option<&'static str> {
        if !module.ends_with(".experts") {
            return None;
        }
        let named = |fused: &&&str| self.parameters.iter().any(|name| is_end(name, fused));
        FUSED.iter().rev().filter(named).nth(depth).copied()
    }

    /// The ends of paths, where a list of them says all; exceptions and expressions need full paths to say the same.
    pub(super) fn suffixes(&self) -> Option<&[String]> {
        match (&self.named, &self.excluded, &self.layers) {
            (Names::Ends(list), Names::Unsaid, None) if self.parameters.is_empty() => Some(list),
            _ => None,
        }
    }

    /// Whether a linear layer with these names is adapted: the path that it has in the base, and the one that it had in
    /// training.
    pub(super) fn names(&self, names: [&str; 2]) -> Result<bool> {
        let weights = names.map(|name| format!("{name}.weight"));
        // Those of experts have no name of their own below the module's.
        let by_weight = |end: &String| {
            let fused = names.into_iter().filter(|name| is_fused(name));
            weights.iter().map(String::as_str).chain(fused).any(|weight| is_end(weight, end))
        };
        if self.parameters.iter().any(by_weight) {
            return Ok(true);
        }
        if self.is_in(&self.excluded, names)? {
            return Ok(false);
        }
        for (regex, key) in &self.copied {
            if matches_any(&self.path, regex, key, names)? {
                return Ok(false);
            }
        }
        let unsaid = matches!(self.named, Names::Unsaid) && self.parameters.is_empty();
        if !unsaid && !self.is_in(&self.named, names)? {
            return Ok(false);
        }
        let (Some(layers), Names::Ends(_)) = (&self.layers, &self.named) else { return Ok(true) };
        // PEFT looks at layer numbers only where a list names the modules, and the first number of a path is the layer's.
        let number = self.numbers.iter().find_map(|(regex, _)| {
            let found = regex.captures(names[0]).ok().flatten()?;
            found.get(1)?.as_str().parse::<u64>().ok()
        });
        Ok(number.is_some_and(|n| layers.contains(&n)))
    }

    fn is_in(&self, list: &Names, names: [&str; 2]) -> Result<bool> {
        let ends = |end: &str| names.iter().any(|name| is_end(name, end));
        match list {
            Names::Unsaid => Ok(false),
            Names::AllLinear => Ok(names[0] != "lm_head"),
            Names::Ends(list) => Ok(list.iter().any(|end| ends(end))),
            Names::Whole(regex, key) => matches_any(&self.path, regex, key, names),
        }
    }
}

/// Whether `name` ends in the segments `end`.
fn is_end(name: &str, end: &str) -> bool {
    name.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}
