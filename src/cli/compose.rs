//! `pocketlora compose`: several LoRA adapters as one.

use super::args::print_json;
use super::{model, names, progress, shell};
use crate::adapter::{AdapterFile, Combination, Composition, MajoritySign, compose};
use crate::error::Result;
use crate::format::{Existing, create_folder};
use clap::ValueEnum;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde_json::json;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Args {
    /// LoRA adapter or name of one in the cache, with its weight; a weight below zero takes its effect away.
    #[arg(short, long = "adapter", value_name = "ADAPTER[=WEIGHT]", required = true)]
    adapters: Vec<String>,
    /// How they are joined, by PEFT's names: `cat` adds what they do, exactly, `svd` keeps the most of that at a smaller
    /// rank, `linear` adds A and B each; the others leave out values that matter little or contradict each other.
    #[arg(long, default_value = "cat", value_parser = method())]
    method: Combination,
    /// Of `ties`, `dare` and `magnitude_prune`: the share of values that is kept, above 0 and at most 1.
    #[arg(long)]
    density: Option<f64>,
    /// Of methods with `svd`: rank of the result. [default: the largest of the adapters' ranks]
    #[arg(long)]
    rank: Option<usize>,
    /// Of methods with `svd`: cut values beyond this quantile, such as 0.99.
    #[arg(long)]
    svd_clamp: Option<f64>,
    /// Of `ties`: how the sign of a value is elected, by the sum of the values or by how many adapters have it.
    #[arg(long, value_enum, default_value_t = Majority::Total)]
    majority_sign: Majority,
    /// Of `dare`: seed of what is kept by chance.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder to write.
    #[arg(short, long, value_parser = names::path())]
    out: PathBuf,
    /// Replace the adapter that is there, if nothing else is in the folder.
    #[arg(long)]
    overwrite: bool,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Majority {
    Total,
    Frequency,
}

/// For clap: a combination by its name.
fn method() -> impl TypedValueParser<Value = Combination> {
    let names = Combination::ALL.map(|(name, _)| name);
    PossibleValuesParser::new(names).map(|name| Combination::named(&name).expect("one of the names"))
}

pub(super) fn run(args: &Args) -> Result<()> {
    let how = Composition {
        density: args.density,
        rank: args.rank,
        clamp: args.svd_clamp,
        majority: match args.majority_sign {
            Majority::Total => MajoritySign::Total,
            Majority::Frequency => MajoritySign::Frequency,
        },
        seed: args.seed,
        ..Composition::new(args.method)
    };
    let adapters: Vec<_> = args.adapters.iter().map(|a| names::scaled_adapter(a)).collect::<Result<_>>()?;
    let files: Vec<_> =
        adapters.iter().map(|(dir, weight)| Ok((AdapterFile::open(dir)?, *weight))).collect::<Result<_>>()?;
    files.iter().flat_map(|(file, _)| &file.warnings).for_each(|warning| eprintln!("note: {warning}"));
    if let Some(parent) = args.out.parent().filter(|p| !p.as_os_str().is_empty()) {
        create_folder(parent)?;
    }
    let existing = if args.overwrite { Existing::Replace } else { Existing::Keep };
    let bar = progress::count(0, "compose");
    let done = compose(&files, &how, &args.out, existing, &mut |p| {
        model::show(&bar, p);
        model::go_on()
    });
    bar.finish_and_clear();
    let done = done?;
    if args.json {
        print_json(&json!({
            "out": args.out, "method": args.method.name(), "modules": done.modules, "parameters": done.values,
            "rank": done.rank, "kept": done.kept,
        }));
        return Ok(());
    }
    let kept = done
        .kept
        .map_or_else(String::new, |kept| format!("; {:.2} % of the sum's squared size is in that rank", kept * 100.0));
    println!(
        "{}: {} modules of rank {}, {} parameters, from {} adapters by {}{kept}",
        args.out.display(),
        done.modules,
        done.rank,
        done.values,
        files.len(),
        args.method.name(),
    );
    eprintln!("use it: pocketlora chat -a {}", shell::quoted_value(&args.out));
    Ok(())
}
