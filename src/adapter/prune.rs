//! Smaller LoRA adapters: what matters least for some data goes.
//!
//! A rank of a module is a column of B with its row of A. Without it the loss changes, to the first order, by the
//! negative product of the column with its gradient, so the size of this product says what the rank matters (LoRAPrune,
//! Zhang et al. 2023). Whole modules go by the sum over their ranks (as in LoRA-drop, Zhou et al. 2024, which judges by
//! outputs instead). What stays is as it was, with the same factor: ranks that differ are in `rank_pattern` and
//! `alpha_pattern`.

use super::compose::{check_place, is_adapter_alone, parts_of, plain_lora, texts, write_texts};
use super::methods::lora::Lora;
use super::{AdapterFile, HostTensor, Method, Tensors};
use crate::error::{Error, ErrorCode, Result};
use crate::format::{AtomicDir, Existing};
use std::collections::BTreeMap;
use std::path::Path;

/// What goes as one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PruneBy {
    /// Single ranks of modules.
    #[default]
    Ranks,
    /// All ranks of a module.
    Modules,
}

/// What an adapter has, and what is left of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Adapted modules.
    pub modules: usize,
    /// Ranks of all of them.
    pub ranks: usize,
    /// Values of A and B.
    pub values: usize,
}

/// Scores of the ranks of each module, by its path: what a rank matters, from 0.
pub(crate) type Scores = BTreeMap<String, Vec<f64>>;

/// Names of A and B of the module at the path `module`.
fn parts(module: &str) -> [String; 2] {
    parts_of(module).map(|part| format!("{module}.{part}"))
}

/// The settings of an adapter that can be pruned.
fn prunable(file: &AdapterFile) -> Result<&Lora> {
    plain_lora(file, "prune", ["prune a plain LoRA adapter"; 2])
}

/// Adds to `scores` what one gradient says: `gradients` of tensors by their names.
pub(crate) fn add_scores(scores: &mut Scores, file: &AdapterFile, gradients: &[(String, Vec<f32>)]) {
    for module in file.modules() {
        let [_, name] = parts(module);
        let (b, gradient) = (&file.tensors[&name], gradients.iter().find(|(own, _)| *own == name));
        let rank = b.shape[1];
        let scores = scores.entry(module.to_owned()).or_insert_with(|| vec![0.0; rank]);
        let Some((_, gradient)) = gradient else { continue };
        let mut sums = vec![0.0f64; rank];
        for (row, gradients) in b.data.chunks_exact(rank).zip(gradient.chunks_exact(rank)) {
            let products = row.iter().zip(gradients).map(|(b, g)| f64::from(*b) * f64::from(*g));
            sums.iter_mut().zip(products).for_each(|(sum, product)| *sum += product);
        }
        scores.iter_mut().zip(sums).for_each(|(score, sum)| *score += sum.abs());
    }
}

fn size(file: &AdapterFile) -> Size {
    let ranks = file.modules().map(|module| file.tensors[&parts(module)[1]].shape[1]).sum();
    let values = file.tensors.values().map(|t| t.data.len()).sum();
    Size { modules: file.modules().count(), ranks, values }
}

/// Which ranks stay: as many of the best by score for each value as have at most the share `keep` of all values, and at
/// least one.
fn chosen(file: &AdapterFile, scores: &Scores, keep: f64, by: PruneBy) -> BTreeMap<String, Vec<usize>> {
    // Score for a value, values, module, ranks.
    let mut all: Vec<(f64, usize, &str, Vec<usize>)> = Vec::new();
    for module in file.modules() {
        let [a, b] = parts(module).map(|name| &file.tensors[&name]);
        let (of_rank, scores) = (a.shape[1] + b.shape[0], &scores[module]);
        match by {
            PruneBy::Ranks => all.extend(
                scores.iter().enumerate().map(|(rank, score)| (score / of_rank as f64, of_rank, module, vec![rank])),
            ),
            PruneBy::Modules => {
                let values = of_rank * scores.len();
                all.push((scores.iter().sum::<f64>() / values as f64, values, module, (0..scores.len()).collect()));
            }
        }
    }
    // A stable sort: of equal ones the first stay.
    all.sort_by(|x, y| y.0.total_cmp(&x.0));
    let most = keep * all.iter().map(|(_, values, ..)| *values).sum::<usize>() as f64;
    let (mut kept, mut chosen) = (0, BTreeMap::<String, Vec<usize>>::new());
    for (_, values, module, ranks) in all {
        if kept > 0 && (kept + values) as f64 > most {
            continue;
        }
        kept += values;
        chosen.entry(module.to_owned()).or_default().extend(ranks);
    }
    chosen.values_mut().for_each(|ranks| ranks.sort_unstable());
    chosen
}

/// Writes what is left of the adapter `file` as a PEFT directory at `out`: the share `keep` of its values, above 0 and
/// below 1, that `scores` rank highest. Returns its size before and after.
///
/// # Errors
/// `keep` is out of range, `out` holds something; nothing is written then.
pub(crate) fn write_pruned(
    file: &AdapterFile,
    scores: &Scores,
    keep: f64,
    by: PruneBy,
    out: &Path,
    existing: Existing,
) -> Result<[Size; 2]> {
    let lora = prunable(file)?;
    check_keep(keep)?;
    let kept = chosen(file, scores, keep, by);
    write(file, kept, &|module, _| f64::from(lora.of_module(module).1), out, existing)
}

/// Writes the first `rank` ranks of each module of `file` as a PEFT directory at `out`, with the factor that LoRA's
/// alpha gives to that rank: the LoRA that DyLoRA has trained beside the others. Returns its size before and after.
///
/// # Errors
/// It is no plain LoRA, a module has no more ranks than that, `out` holds something; nothing is written then.
pub fn cut_rank(file: &AdapterFile, rank: usize, out: &Path, existing: Existing) -> Result<[Size; 2]> {
    let lora = prunable(file)?;
    super::ranks::check_single(file, "cut the ranks of", true)?;
    check_place(out, existing, &[file])?;
    let of = |module: &str| file.tensors[&parts(module)[1]].shape[1];
    let least = file.modules().map(of).min().unwrap_or(0);
    if rank == 0 || rank >= least {
        let expected = format!("a rank from 1 to {}, below those of all modules", least.saturating_sub(1));
        return Err(Error::config("cut-rank", expected, rank));
    }
    let kept = file.modules().map(|module| (module.to_owned(), (0..rank).collect())).collect();
    let factor = |module: &str, whole: usize| {
        let ratio = whole as f64 / rank as f64;
        f64::from(lora.of_module(module).1) * if lora.rslora { ratio.sqrt() } else { ratio }
    };
    write(file, kept, &factor, out, existing)
}

/// Writes the ranks `kept` of each module, with the factor on `B A` that `factor` gives for a module and the rank that
/// it had.
fn write(
    file: &AdapterFile,
    kept: BTreeMap<String, Vec<usize>>,
    factor: &dyn Fn(&str, usize) -> f64,
    out: &Path,
    existing: Existing,
) -> Result<[Size; 2]> {
    let lora = prunable(file)?;
    let (mut tensors, mut modules) = (Tensors::new(), Vec::new());
    for (module, ranks) in kept {
        let names = parts(&module);
        let [a, b] = [&names[0], &names[1]].map(|name| &file.tensors[name]);
        let (input, out, rank) = (a.shape[1], b.shape[0], b.shape[1]);
        let rows: Vec<f32> = ranks.iter().flat_map(|r| a.data[r * input..][..input].iter().copied()).collect();
        let columns: Vec<f32> = b.data.chunks_exact(rank).flat_map(|row| ranks.iter().map(|r| row[*r])).collect();
        let [name_a, name_b] = names;
        tensors.insert(name_a, HostTensor { shape: vec![ranks.len(), input], data: rows });
        tensors.insert(name_b, HostTensor { shape: vec![out, ranks.len()], data: columns });
        let factor = factor(&module, rank);
        modules.push((module, ranks.len(), factor * ranks.len() as f64));
    }
    let mut pruned = Lora::of_modules(&modules);
    pruned.dropout = lora.dropout;
    // PEFT would begin a module anew that is named and not in the file.
    let is_whole = |end: &str| {
        let ends = |module: &str| module.rsplit('.').next() == Some(end);
        file.modules().filter(|m| ends(m)).count() == modules.iter().filter(|(m, ..)| ends(m)).count()
    };
    if !pruned.targets.iter().all(|end| is_whole(end)) {
        pruned.targets = modules.into_iter().map(|(module, ..)| module).collect();
    }
    let mut left = AdapterFile::new(out.to_owned(), Method::Lora(pruned), tensors);
    (left.base, left.base_mark) = (file.base.clone(), file.base_mark.clone());
    let dir = AtomicDir::create(out, if existing == Existing::Replace { is_adapter_alone } else { |_| false })?;
    left.save_exact(dir.path())?;
    write_texts(dir.path(), &texts(file.folder())?)?;
    dir.commit()?;
    Ok([size(file), size(&left)])
}

/// Refuses, before any work, a share that prunes nothing or everything, and a place where something else is.
pub(crate) fn check_pruning(file: &AdapterFile, keep: f64, out: &Path, existing: Existing) -> Result<()> {
    prunable(file)?;
    check_keep(keep)?;
    check_place(out, existing, &[file])
}

fn check_keep(keep: f64) -> Result<()> {
    if keep > 0.0 && keep < 1.0 {
        return Ok(());
    }
    Err(Error::new(ErrorCode::Config, "setting `keep`", format!("expected a share above 0 and below 1, got `{keep}`")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two modules of rank 2, of which the second has more values.
    fn file(dir: &Path) -> AdapterFile {
        let modules = [("model.layers.0.self_attn.q_proj", 2, 3), ("model.layers.1.self_attn.q_proj", 4, 6)];
        let mut tensors = Tensors::new();
        for (module, input, out) in modules {
            let values = |n: usize| (0..n).map(|i| i as f32 + 1.0).collect::<Vec<f32>>();
            let [a, b] = parts(module);
            tensors.insert(a, HostTensor { shape: vec![2, input], data: values(2 * input) });
            tensors.insert(b, HostTensor { shape: vec![out, 2], data: values(2 * out) });
        }
        AdapterFile::new(dir.to_owned(), Method::Lora(Lora::new(2, 4.0)), tensors)
    }

    fn scores(of: [[f64; 2]; 2]) -> Scores {
        let names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"];
        names.iter().zip(of).map(|(name, scores)| ((*name).to_owned(), scores.to_vec())).collect()
    }

    #[test]
    fn what_matters_stays_with_its_factor() {
        let dir = tempfile::tempdir().unwrap();
        let file = file(&dir.path().join("in"));
        for (name, of, keep, by, ranks) in [
            ("one rank of each", [[5.0, 0.0], [0.0, 10.0]], 0.5, PruneBy::Ranks, [1, 1]),
            ("the second", [[0.1, 0.1], [10.0, 10.0]], 0.7, PruneBy::Modules, [0, 2]),
            ("at least one", [[0.1, 0.0], [0.0, 0.0]], 0.01, PruneBy::Ranks, [1, 0]),
            // By what a value matters: 5/5 and 4/5 before 3/10.
            ("the first", [[5.0, 4.0], [3.0, 3.0]], 0.34, PruneBy::Ranks, [2, 0]),
        ] {
            let out = dir.path().join(name);
            let [_, after] = write_pruned(&file, &scores(of), keep, by, &out, Existing::Keep).unwrap();
            let left = AdapterFile::open(&out).unwrap();
            let Method::Lora(lora) = &left.method else { panic!() };
            let got: Vec<usize> = ["0", "1"]
                .map(|layer| format!("model.layers.{layer}.self_attn.q_proj"))
                .iter()
                .map(|module| left.tensors.get(&parts(module)[1]).map_or(0, |b| b.shape[1]))
                .collect();
            assert_eq!((got, after.ranks), (ranks.to_vec(), ranks.iter().sum()), "{name}");
            assert!(left.modules().all(|module| lora.of_module(module).1 == 2.0), "{name}");
        }
        let left = AdapterFile::open(&dir.path().join("one rank of each")).unwrap();
        let [a, b] = parts("model.layers.1.self_attn.q_proj").map(|name| left.tensors[&name].data.clone());
        assert_eq!((a, b), (vec![5.0, 6.0, 7.0, 8.0], vec![2.0, 4.0, 6.0, 8.0, 10.0, 12.0]));
        for keep in [0.0, 1.0, -1.0, f64::NAN] {
            let refused = check_pruning(&file, keep, &dir.path().join("none"), Existing::Keep).unwrap_err();
            assert_eq!(refused.place(), "setting `keep`");
        }
    }

    #[test]
    fn the_first_ranks_are_cut_with_their_own_factor() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = file(&dir.path().join("in"));
        let out = dir.path().join("out");
        let [before, after] = cut_rank(&file, 1, &out, Existing::Keep).unwrap();
        assert_eq!((before.ranks, after.ranks, after.modules), (4, 2, 2));
        let left = AdapterFile::open(&out).unwrap();
        let Method::Lora(lora) = &left.method else { panic!() };
        for module in left.modules() {
            // Alpha 4 at a rank of 1 instead of 2.
            assert_eq!(lora.of_module(module), (1, 4.0));
            let [a, b] = parts(module).map(|name| (&left.tensors[&name], &file.tensors[&name]));
            assert_eq!(a.0.data, a.1.data[..a.1.shape[1]]);
            assert!(b.0.data.iter().zip(b.1.data.chunks(2)).all(|(own, row)| *own == row[0]));
        }
        for rank in [0, 2, 9] {
            let refused = cut_rank(&file, rank, &dir.path().join("none"), Existing::Keep).unwrap_err();
            assert_eq!(refused.place(), "setting `cut-rank`", "{rank}");
        }
        assert!(cut_rank(&file, 1, &out, Existing::Keep).is_err(), "what is there stays");
        if let Method::Lora(lora) = &mut file.method {
            lora.rslora = true;
        }
        cut_rank(&file, 1, &dir.path().join("rs"), Existing::Keep).unwrap();
        let Method::Lora(lora) = AdapterFile::open(&dir.path().join("rs")).unwrap().method else { panic!() };
        assert!((lora.of_module("model.layers.0.self_attn.q_proj").1 - 4.0).abs() < 1e-6);
    }

    #[test]
    fn a_score_is_the_size_of_the_product_with_the_gradient() {
        let dir = tempfile::tempdir().unwrap();
        let file = file(dir.path());
        let name = parts("model.layers.0.self_attn.q_proj")[1].clone();
        // B is [[1, 2], [3, 4], [5, 6]].
        let gradients = [(name, vec![1.0, 0.0, -1.0, 0.5, 0.0, 0.0])];
        let mut scores = Scores::new();
        add_scores(&mut scores, &file, &gradients);
        add_scores(&mut scores, &file, &gradients);
        assert_eq!(scores["model.layers.0.self_attn.q_proj"], [4.0, 4.0]);
        assert_eq!(scores["model.layers.1.self_attn.q_proj"], [0.0, 0.0]);
    }
}
