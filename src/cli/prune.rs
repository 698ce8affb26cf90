//! `pocketlora prune`: a LoRA adapter without what matters least.

use super::args::{options, print_json};
use super::train::Watcher;
use super::{data, model, names, shell};
use crate::adapter::{AdapterFile, PruneBy};
use crate::engine::{Engine, Options, check_threads, looks};
use crate::error::Result;
use crate::format::Existing;
use serde_json::json;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Args {
    /// LoRA adapter or name of one in the cache.
    adapter: String,
    /// Directory, .gguf file, or name of a model in the cache.
    #[arg(short, long, default_value = model::DEFAULT)]
    model: String,
    /// Data that tells what matters, as for `train`; a few hundred samples are enough.
    #[arg(short, long, value_parser = names::path())]
    data: PathBuf,
    /// Share of the adapter's values that stays, above 0 and below 1.
    #[arg(long, default_value_t = 0.5)]
    keep: f64,
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
    // Before the model, which may take long to make.
    crate::adapter::check_pruning(&file, args.keep, &args.out, existing)?;
    let found = model::resolve(&args.model, true)?;
    let engine = Engine::open(&found.path, &Options { threads: args.threads, strict: args.strict, ..options() })?;
    let dataset = engine.reader(Some(&file))?.dataset(&args.data, crate::train::TrainConfig::default().seq)?;
    data::say_unused(Some(&dataset));
    let by = match args.by {
        By::Ranks => PruneBy::Ranks,
        By::Modules => PruneBy::Modules,
    };
    let mut watcher = Watcher::new(looks(&dataset), 0, false);
    let pruned = engine.prune(&file, &dataset, args.keep, by, (&args.out, existing), &mut watcher);
    watcher.bar.finish_and_clear();
    let pruned = pruned?;
    let ([before, after], [plain, with, left]) = (pruned.size, pruned.loss);
    if args.json {
        let size =
            |s: &crate::adapter::PrunedSize| json!({"modules": s.modules, "ranks": s.ranks, "parameters": s.values});
        print_json(&json!({
            "out": args.out, "before": size(&before), "after": size(&after),
            "loss": {"base": plain, "before": with, "after": left},
        }));
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
    println!("loss on the data: {plain:.3} without the adapter, {with:.3} with all of it, {left:.3} with what is left");
    eprintln!("use it: pocketlora chat -m {} -a {}", shell::quoted(&args.model), shell::quoted_value(&args.out));
    Ok(())
}
