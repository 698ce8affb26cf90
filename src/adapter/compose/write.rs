//! A composition as a PEFT directory.

use super::{Composition, Joined, Pair, Stays, Weighted, by_chance, parts_of, weighted};
use crate::adapter::methods::lora::Lora;
use crate::adapter::{AdapterFile, Kind, Method, Stored};
use crate::error::{Error, ErrorCode, Result};
use crate::format::{AtomicDir, Existing, Progress, create_folder, sidecar_names, write_bytes};
use std::collections::BTreeSet;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Composed {
    /// Modules that it adapts.
    pub modules: usize,
    /// Values of all of them.
    pub values: usize,
    /// The largest rank.
    pub rank: usize,
    /// Where the sum was cut to a rank: the share of its squared size that was kept.
    pub kept: Option<f64>,
}

/// Joins LoRA `adapters`, each with its weight, to one, and writes it as a PEFT directory at `out`, in f32. Beside the
/// adapters, one module is held at a time. `progress` is told of the modules, by the values of the result.
///
/// # Errors
/// A setting is out of range; an adapter is none of plain LoRA, or is for another base or of other shapes than the first;
/// `out` holds something; the caller stopped. Nothing is written then, and what was at `out` stays.
///
/// Source: PEFT 0.21, `add_weighted_adapter`.
pub fn compose(
    adapters: &[(AdapterFile, f32)],
    how: &Composition,
    out: &Path,
    existing: Existing,
    progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Result<Composed> {
    let mut stays = by_chance(how.seed, how.density.unwrap_or(1.0));
    compose_with(adapters, how, out, existing, progress, &mut stays)
}

/// As [`compose`], with what is kept by chance told by `stays`.
pub(super) fn compose_with(
    adapters: &[(AdapterFile, f32)],
    how: &Composition,
    out: &Path,
    existing: Existing,
    progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
    stays: &mut Stays<'_>,
) -> Result<Composed> {
    how.check()?;
    let all = weighted(adapters)?;
    let Some(first) = all.first() else {
        return Err(Error::config("adapters", "one or more", "none"));
    };
    let plan = plan(&all, how)?;
    let texts = texts(all.iter().filter_map(|one| one.file.folder()))?;
    let files: Vec<&AdapterFile> = adapters.iter().map(|(file, _)| file).collect();
    check_place(out, existing, &files)?;
    let dir = AtomicDir::create(out, if existing == Existing::Replace { is_adapter_alone } else { |_| false })?;

    let ranks: Vec<_> = plan.iter().map(|(module, pairs, rank)| shape_of(module, pairs, *rank)).collect();
    let modules: Vec<_> = ranks.iter().map(|(module, _, rank)| (module.clone(), *rank, *rank as f64)).collect();
    let mut file = AdapterFile::new(out.to_owned(), Method::Lora(Lora::of_modules(&modules)), Default::default());
    file.base.clone_from(&all.iter().find_map(|w| w.file.base.clone()));
    let hashed = all.iter().find(|w| w.file.base_hash().is_some()).unwrap_or(first);
    file.base_mark.clone_from(&hashed.file.base_mark);
    let of_module = |(module, [out, input], rank): &(String, [usize; 2], usize)| {
        let [a, b] = parts_of(module).map(|part| format!("{module}.{part}"));
        [(a, vec![*rank, *input]), (b, vec![*out, *rank])]
    };
    let shapes: Vec<(String, Vec<usize>)> = ranks.iter().flat_map(of_module).collect();
    let total = shapes.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>();
    let (mut done, mut sizes) = (0, [0.0; 2]);
    file.save_in(Stored::F32, dir.path(), shapes, |put| {
        for (module, pairs, rank) in &plan {
            if progress(Progress { tensor: module, done, total: total as u64 }).is_break() {
                return Err(Error::new(ErrorCode::Cancelled, "compose", "stopped; nothing was written"));
            }
            let Joined { a, b, sizes: own } = how.join(module, pairs, *rank, stays);
            let [name_a, name_b] = parts_of(module).map(|part| format!("{module}.{part}"));
            put(&name_a, &a.data)?;
            put(&name_b, &b.data)?;
            done += (a.data.len() + b.data.len()) as u64;
            sizes = [sizes[0] + own[0], sizes[1] + own[1]];
        }
        Ok(())
    })?;
    write_texts(dir.path(), &texts)?;
    dir.commit()?;
    let rank = plan.iter().map(|(_, _, rank)| *rank).max().unwrap_or(0);
    let kept = how.combination.cuts().then(|| if sizes[0] > 0.0 { sizes[1] / sizes[0] } else { 1.0 });
    Ok(Composed { modules: plan.len(), values: total, rank, kept })
}

/// A module's path, what each adapter has there, and the rank that it gets.
type Planned<'a> = (String, Vec<Pair<'a>>, usize);

fn shape_of(module: &str, pairs: &[Pair<'_>], rank: usize) -> (String, [usize; 2], usize) {
    (module.to_owned(), [pairs[0].b.shape[0], pairs[0].a.shape[1]], rank)
}

/// All modules in the order of their names.
fn plan<'a>(all: &'a [Weighted<'a>], how: &Composition) -> Result<Vec<Planned<'a>>> {
    let modules: BTreeSet<&str> = all.iter().flat_map(|one| one.file.modules()).collect();
    let name = how.combination.name();
    let mut plan = Vec::with_capacity(modules.len());
    for module in modules {
        let pairs: Vec<Pair<'_>> = all.iter().enumerate().filter_map(|(i, one)| one.pair(i, module)).collect();
        let (first, shape) = (&pairs[0], |pair: &Pair<'_>| [pair.b.shape[0], pair.a.shape[1]]);
        let place = |pair: &Pair<'_>| format!("`{}`: module `{module}`", all[pair.adapter].file.dir.display());
        let of_first = all[first.adapter].file.dir.display();
        for pair in &pairs[1..] {
            if shape(pair) != shape(first) {
                let message = format!(
                    "expected terms for a layer `{:?}` as in `{of_first}`, got `{:?}`; compose adapters of one base",
                    shape(first),
                    shape(pair)
                );
                return Err(Error::new(ErrorCode::AdapterMismatch, place(pair), message));
            }
            let joins_by_rank = !how.combination.cuts() && how.combination != super::Combination::Cat;
            if joins_by_rank && pair.rank() != first.rank() {
                let message = format!(
                    "expected rank {} as in `{of_first}`, got {}; `{name}` needs equal ranks: use `cat`, `svd` or one that \
                     ends in `_svd`",
                    first.rank(),
                    pair.rank()
                );
                return Err(Error::new(ErrorCode::AdapterMismatch, place(pair), message));
            }
        }
        plan.push((module.to_owned(), pairs, 0));
    }
    let largest = plan.iter().flat_map(|(_, pairs, _)| pairs.iter().map(Pair::rank)).max().unwrap_or(0);
    if let Some(rank) = how.rank {
        let exact = how.combination == super::Combination::Svd;
        let most = |pairs: &[Pair<'_>]| match exact {
            true => pairs.iter().map(Pair::rank).sum(),
            false => shape_of("", pairs, 0).1.into_iter().min().unwrap_or(0),
        };
        let most = plan.iter().map(|(_, pairs, _)| most(pairs)).max().unwrap_or(0);
        if rank > most {
            let what = if exact { "the sum of the adapters' ranks" } else { "the smaller side of the largest layer" };
            return Err(Error::config("rank", format!("at most {most}, {what}"), rank));
        }
    }
    plan.iter_mut().for_each(|(_, pairs, rank)| *rank = how.rank_of(pairs, largest));
    Ok(plan)
}

/// Names and content of what the adapters' folders bring for tokens and templates.
pub(in crate::adapter) fn texts<'a>(folders: impl IntoIterator<Item = &'a Path>) -> Result<Vec<(String, Vec<u8>)>> {
    let mut texts: Vec<(String, Vec<u8>, &Path)> = Vec::new();
    for dir in folders.into_iter().filter(|dir| dir.is_dir()) {
        for name in sidecar_names(dir)? {
            let path = dir.join(&name);
            let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
            match texts.iter().find(|(there, ..)| *there == name) {
                None => texts.push((name, bytes, dir)),
                Some((_, there, _)) if *there == bytes => {}
                Some((.., other)) => {
                    let message = format!(
                        "expected the same file as in `{}`, got another one; an adapter has one tokenizer and one \
                         template: take away the file that is not to be used",
                        other.display()
                    );
                    return Err(Error::new(ErrorCode::AdapterMismatch, format!("`{}`", path.display()), message));
                }
            }
        }
    }
    Ok(texts.into_iter().map(|(name, bytes, _)| (name, bytes)).collect())
}

/// Writes files that [`texts`] has read to the folder `dir`.
pub(in crate::adapter) fn write_texts(dir: &Path, texts: &[(String, Vec<u8>)]) -> Result<()> {
    for (name, bytes) in texts {
        let path = dir.join(name);
        create_folder(path.parent().unwrap_or(dir))?;
        write_bytes(&path, bytes)?;
    }
    Ok(())
}

/// Refuses a place where something is that is not to be replaced.
pub(in crate::adapter) fn check_place(out: &Path, existing: Existing, adapters: &[&AdapterFile]) -> Result<()> {
    let refused = |message: &str| Err(Error::new(ErrorCode::Config, format!("`{}`", out.display()), message));
    let here = |dir: &Path| Some(dir.canonicalize().ok()? == out.canonicalize().ok()?);
    if adapters.iter().filter_map(|file| file.folder()).any(|dir| here(dir) == Some(true)) {
        return refused("expected another folder than those of the adapters; name a new one");
    }
    let vacant = !out.exists() || fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
    match (vacant, is_adapter_alone(out), existing) {
        (true, ..) | (_, true, Existing::Replace) => Ok(()),
        (_, true, Existing::Keep) => {
            refused("holds an adapter already; name another folder or replace it with `Existing::Replace`")
        }
        _ if !out.is_dir() => refused("expected a folder to write to, got a file; name another one"),
        _ => refused("holds more than an adapter, and it will not be taken away; name another folder"),
    }
}

/// Whether `dir` holds the files of a LoRA and nothing else, so that replacing it loses nothing but that.
pub(in crate::adapter) fn is_adapter_alone(dir: &Path) -> bool {
    let Ok(texts) = sidecar_names(dir) else { return false };
    let known = |name: &str| {
        let own = ["adapter_config.json", "adapter_model.safetensors"].contains(&name);
        own || texts.iter().any(|text| text == name || text.starts_with(&format!("{name}/")))
    };
    let alone = || {
        fs::read_dir(dir)
            .is_ok_and(|mut all| all.all(|entry| entry.is_ok_and(|e| known(&e.file_name().to_string_lossy()))))
    };
    AdapterFile::exists(dir) && alone() && AdapterFile::open(dir).is_ok_and(|file| file.method.kind() == Kind::Lora)
}
