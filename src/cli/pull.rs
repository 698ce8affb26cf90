//! `pocketlora pull`: a model into the cache.

use super::{interrupt, progress};
use crate::error::Result;
use crate::hub::{self, Event, Stage};
use indicatif::ProgressBar;
use std::ops::ControlFlow;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Short name (see `pocketlora pull --list`), or OWNER/REPO[:FILE.gguf][@REVISION] of the model hub: all that a model in
    /// safetensors needs, or one GGUF file; of a branch, tag or commit.
    #[arg(default_value = super::model::DEFAULT)]
    name: String,
    /// List the short names, and what the cache holds as `pocketlora list` does.
    #[arg(long)]
    list: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    if args.list {
        for manifest in hub::manifests()? {
            println!("{:<20} {} ({})", manifest.name, manifest.title, manifest.licence);
        }
        return super::list::print();
    }
    if args.name.contains("://") {
        return Err(super::model::address(&args.name));
    }
    let path = fetch(&args.name)?;
    println!("{}", path.display());
    Ok(())
}

/// Pulls `name` with a progress bar and says where it is.
pub(super) fn fetch(name: &str) -> Result<PathBuf> {
    let mut bar: Option<(Stage, String, ProgressBar)> = None;
    let path = hub::pull(name, &mut |event| {
        match event {
            Event::Licence { title, licence } => eprintln!("{title}, licence {licence}"),
            Event::Waiting => eprintln!("another program is pulling this model; waiting for it"),
            Event::Source(source) => eprintln!("from {source}"),
            Event::SourceFailed { source, error } => eprintln!("{source} failed: {error}"),
            Event::Progress { stage, item, done, total } => {
                let current = bar.as_ref().is_some_and(|(s, i, _)| *s == stage && i == item);
                if !current {
                    let label = match stage {
                        Stage::Download => "download",
                        Stage::Unpack => "unpack",
                        Stage::Check => "check",
                    };
                    let new = total.map_or_else(|| progress::spinner(label), |total| progress::bytes(total, label));
                    bar = Some((stage, item.to_owned(), new.with_message(item.to_owned())));
                }
                if let Some((_, _, bar)) = &bar {
                    bar.set_position(done);
                }
            }
        }
        if interrupt::asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    if let Some((_, _, bar)) = bar {
        bar.finish_and_clear();
    }
    Ok(path)
}
