//! `pocketlora prune`: a LoRA adapter without what matters least.

use super::args::{options, print_json};
use super::train::Watcher;
use super::{data, model, names, shell};
use crate::adapter::{AdapterFile, PruneBy, PrunedSize, cut_rank};
use crate::engine::{Engine, Options, check_threads, looks};
use crate::error::Result;
use crate::format::Existing;
use serde_json::json;
use std::path::PathBuf;

/// Samples below which the choice is spoken of.
const FEW: usize = 16;

#[derive(clap::Args)]
pub(super) struct Args {
    /// LoRA adapter or name of one in the cache.
    adapter: String,
    /// Directory, .gguf file, or name of a model in the cache.
    #[arg(short, long, default_value = model::DEFAULT)]
    model: String,
    /// Data that tells what matters, as for `train`; a few hundred samples are enough.
    #[arg(short, long, value_parser = names::path(), required_unless_present = "cut_rank")]
    data: Option<PathBuf>,
    /// Share of the adapter's values that stays, above 0 and below 1.
    #[arg(long, default_value_t = 0.5)]
    keep: f64,
    /// Keep the first ranks of every module instead, as many as this: what `train --method dylora` has trained for. It looks at
    /// no data.
    #[arg(long, value_name = "RANK", conflicts_with_all = ["data", "keep", "by"])]
    cut_rank: Option<usize>,
    /// What goes as one.
    #[arg(long, value_enum, default_value_t = By::Ranks)]
    by: By,
    /// Folder to write.
    #[arg(short, long, value_parser = names::path())]
    out: PathBuf,
    /// Replace the adapter that is there, if nothing else is in the folder.
    #[arg(long)]
    overwrite: bool,
    /// Threads; 0 measures how many serve best.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Refuse an adapter whose file tells that it was trained on another base, which is warned of otherwise.
    #[arg(long)]
    strict: bool,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum By {
    /// Single ranks of modules.
    Ranks,
    /// All ranks of a module.
    Modules,
}

pub(super) fn run(args: &Args) -> Result<()> {
    check_threads(args.threads)?;
    let file = AdapterFile::open(&names::adapter(&args.adapter)?)?;
    file.warnings.iter().for_each(|warning| eprintln!("note: {warning}"));
    let existing = if args.overwrite { Existing::Replace } else { Existing::Keep };
    if let Some(rank) = args.cut_rank {
        let sizes = cut_rank(&file, rank, &args.out, existing)?;
        return report(args, sizes, None);
    }
    let Some(data) = &args.data else { unreachable!("required without a rank to cut to") };
    // Before the model, which may take long to make.
    crate::adapter::check_pruning(&file, args.keep, &args.out, existing)?;
    let found = model::resolve(&args.model, true)?;
    let engine = Engine::open(&found.path, &Options { threads: args.threads, strict: args.strict, ..options() })?;
    let dataset = engine.reader(Some(&file))?.dataset(data, crate::train::TrainConfig::default().seq)?;
    data::say_unused("data", Some(&dataset));
    let (samples, tokens) = (dataset.samples.len(), dataset.trained_tokens());
    eprintln!("what matters is told by {samples} samples with {tokens} learned tokens");
    if samples < FEW {
        eprintln!("warning: so few samples tell little of what matters elsewhere; a few hundred are enough");
    }
    let by = match args.by {
        By::Ranks => PruneBy::Ranks,
        By::Modules => PruneBy::Modules,
    };
    let mut watcher = Watcher::new(looks(&dataset), 0, false);
    let pruned = engine.prune(&file, &dataset, args.keep, by, (&args.out, existing), &mut watcher);
    watcher.bar.finish_and_clear();
    let pruned = pruned?;
    report(args, pruned.size, Some(pruned.loss))
}

/// Says what was written, and the losses without the adapter, with it and with what is left of it, where those are known.
fn report(args: &Args, [before, after]: [PrunedSize; 2], loss: Option<[f64; 3]>) -> Result<()> {
    if args.json {
        let size = |s: &PrunedSize| json!({"modules": s.modules, "ranks": s.ranks, "parameters": s.values});
        let loss = loss.map(|[plain, with, left]| json!({"base": plain, "before": with, "after": left}));
        print_json(&json!({"out": args.out, "before": size(&before), "after": size(&after), "loss": loss}));
        return Ok(());
    }
    println!(
        "{}: {} of {} modules, {} of {} ranks, {} of {} parameters",
        args.out.display(),
        after.modules,
        before.modules,
        after.ranks,
        before.ranks,
        after.values,
        before.values
    );
    if let Some([plain, with, left]) = loss {
        println!(
            "loss on the data: {plain:.3} without the adapter, {with:.3} with all of it, {left:.3} with what is left"
        );
    }
    eprintln!("use it: pocketlora chat -m {} -a {}", shell::quoted(&args.model), shell::quoted_value(&args.out));
    Ok(())
}
