//! Ranks and alphas of single layers, which a fresh LoRA is given by the ends of their paths.

use super::init::Init;
use super::method::paths_of;
use super::methods::lora::Lora;
use super::{AdapterFile, Method, Settings};
use crate::error::{Error, Result};
use pocketlora_models::{Model, Param};
use std::collections::BTreeMap;

/// What the longest end of the path `module` among the keys of `patterns` has.
fn value_of<'p, V>(patterns: &'p BTreeMap<String, V>, module: &str) -> Option<&'p V> {
    let ends =
        |key: &String| module == key || module.strip_suffix(key.as_str()).is_some_and(|rest| rest.ends_with('.'));
    patterns.iter().filter(|(key, _)| ends(key)).max_by_key(|(key, _)| key.len()).map(|(_, value)| value)
}

/// Refuses `what` of a LoRA that began as PiSSA and its like do, whose ranks are pairs: a rank without its partner would be another
/// adapter. PEFT writes them as `[A; A0]` and `[B, -B0]`, of which no half may be rounded by itself either; here they are
/// `[A; A - A0]` and `[B - B0, B0]`, which is refused where they are `taken_apart`.
///
/// # Errors
/// It is one.
pub(super) fn check_single(file: &AdapterFile, what: &str, taken_apart: bool) -> Result<()> {
    let (mut opposite, mut moved, mut pairs) = (0.0, 0, 0);
    for module in file.modules() {
        let [a, b] = ["lora_A.weight", "lora_B.weight"].map(|part| file.tensors.get(&format!("{module}.{part}")));
        let (Some(a), Some(b)) = (a, b) else { continue };
        let (rank, input) = (a.shape[0], a.shape[1]);
        let row = |k: usize| a.data[k * input..(k + 1) * input].to_vec();
        let column = |k: usize| -> Vec<f32> { b.data.iter().skip(k).step_by(rank).copied().collect() };
        let half = if rank.is_multiple_of(2) { rank / 2 } else { 0 };
        for k in 0..half {
            let ([a, other_a], [b, other_b]) = ([row(k), row(k + half)], [column(k), column(k + half)]);
            opposite += cosine(&a, &other_a).min(-cosine(&b, &other_b));
            let small = |x: &[f32], y: &[f32]| 4.0 * dot(x, x) < dot(y, y);
            moved += usize::from(small(&other_a, &a) && small(&b, &other_b));
        }
        pairs += half.max(1);
    }
    let is_moved = taken_apart && 10 * moved >= 9 * pairs;
    if pairs == 0 || opposite < 0.5 * pairs as f64 && !is_moved {
        return Ok(());
    }
    let what = format!("to {what} a LoRA whose ranks are pairs, as those are that began with `pissa` or the like,");
    let next = "bring it to half its rank first (`pocketlora compose -a DIR --method svd --rank N -o OTHER`)";
    Err(Error::unsupported(&file.dir, what, next))
}

fn dot(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

fn cosine(x: &[f32], y: &[f32]) -> f64 {
    let lengths = (dot(x, x) * dot(y, y)).sqrt();
    if lengths > 0.0 { dot(x, y) / lengths } else { 0.0 }
}

/// Path of the module that the tensor `name` is the A of, in a LoRA.
pub(crate) fn low_rank_names(name: &str) -> Option<&str> {
    ["lora_A.weight", "lora_embedding_A"].iter().find_map(|part| name.strip_suffix(part)?.strip_suffix('.'))
}

impl Method {
    /// The same LoRA with other ranks of its modules, given by their paths, and the factors that it has; `bias` tells whether it
    /// keeps the bias of B. Any other method stays as it is.
    pub(crate) fn of_other_ranks(&self, ranks: &[(String, usize)], bias: bool) -> Self {
        let Self::Lora(lora) = self else { return self.clone() };
        let module = |(path, rank): &(String, usize)| {
            let factor = f64::from(lora.of_module(path).1);
            (path.clone(), *rank, factor * *rank as f64)
        };
        let plain = Lora { rslora: false, init: Init::Plain, bias: lora.bias && bias, ..lora.clone() };
        Self::Lora(plain.of_ranks(&ranks.iter().map(module).collect::<Vec<_>>()))
    }

    /// A fresh adapter with the ranks and alphas that `settings` give single layers, and those of its `layers` that are left:
    /// rank 0 takes a layer out.
    ///
    /// # Errors
    /// A pattern that names no layer, or no layer that is left; an embedding of which one of two terms is taken out; a rank
    /// that the beginning cannot have.
    pub(crate) fn with_ranks(
        self,
        settings: &Settings,
        model: &dyn Model,
        layers: Vec<Param>,
    ) -> Result<(Self, Vec<Param>)> {
        let Self::Lora(lora) = self else { return Ok((self, layers)) };
        if settings.rank_pattern.is_empty() && settings.alpha_pattern.is_empty() {
            return Ok((Self::Lora(lora), layers));
        }
        let (mut modules, mut left, mut out) = (Vec::new(), Vec::new(), Vec::new());
        let mut all: Vec<&str> = Vec::new();
        for param in layers {
            let paths = paths_of(model, &model.params()[param.0 as usize], &lora.targets);
            let ranks: Vec<usize> =
                paths.iter().map(|path| *value_of(&settings.rank_pattern, path).unwrap_or(&settings.rank)).collect();
            match ranks.iter().filter(|rank| **rank > 0).count() {
                0 => out.extend(paths.iter().copied()),
                n if n < paths.len() => {
                    let expected = format!("a rank above 0 for both of `{}`, which are one weight", paths.join("`, `"));
                    return Err(Error::config("rank-pattern", expected, 0));
                }
                _ => left.push(param),
            }
            for (path, rank) in paths.iter().zip(ranks).filter(|(_, rank)| *rank > 0) {
                let alpha = *value_of(&settings.alpha_pattern, path).unwrap_or(&settings.alpha);
                modules.push(((*path).to_owned(), rank, alpha));
            }
            all.extend(paths);
        }
        let names = |key: &str| {
            let one = BTreeMap::from([(key.to_owned(), ())]);
            all.iter().any(|path| value_of(&one, path).is_some())
        };
        let keys = |of: &'static str, key: &String| (!names(key)).then(|| (of, key.clone()));
        let idle = settings.rank_pattern.keys().find_map(|key| keys("rank-pattern", key));
        if let Some((of, key)) = idle.or(settings.alpha_pattern.keys().find_map(|key| keys("alpha-pattern", key))) {
            return Err(Error::config(of, "ends of the paths of adapted layers", key));
        }
        if modules.is_empty() {
            return Err(Error::config("rank-pattern", "a rank above 0 for some layer", "0 for all"));
        }
        let mut ranked = lora.of_ranks(&modules);
        // PEFT would begin a layer anew that is named and not in the file.
        let end = |path: &str| path.rsplit('.').next().map(str::to_owned);
        if out.iter().any(|gone| modules.iter().any(|(path, ..)| end(path) == end(gone))) {
            ranked.targets = modules.into_iter().map(|(path, ..)| path).collect();
        } else {
            ranked.targets.retain(|target| !out.iter().any(|gone| end(gone).as_ref() == Some(target)));
        }
        ranked.check_init(model, &left)?;
        Ok((Self::Lora(ranked), left))
    }
}
