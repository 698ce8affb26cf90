//! `pocketlora export`: an adapter in the format of another program.

use super::{model, names, outputs};
use crate::adapter::{AdapterFile, export_gguf, export_mlx};
use crate::base::architecture_of;
use crate::error::{Error, ErrorCode, Result};
use crate::format::open_source;
use clap::ValueEnum;
use pocketlora_models::Model;
use std::fs;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Adapter, or name of one in the cache.
    what: String,
    /// Format to write.
    #[arg(long, value_enum)]
    to: To,
    /// File (gguf) or directory (mlx, peft) to write.
    #[arg(short, long, value_parser = names::path())]
    out: PathBuf,
    /// The adapter's base: directory, .gguf file, or name of a model in the cache. [default: what the adapter names]
    #[arg(short, long)]
    model: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum To {
    /// One file, for llama.cpp.
    Gguf,
    /// A directory, for mlx-lm.
    Mlx,
    /// A directory, for PEFT.
    Peft,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let path = names::adapter(&args.what)?;
    let file = AdapterFile::open(&path)?;
    file.warnings.iter().for_each(|warning| eprintln!("note: {warning}"));
    check_out(args, &path)?;
    match args.to {
        To::Gguf => export_gguf(&file, base_of(args, &file)?.as_ref(), &args.out)?,
        To::Mlx => export_mlx(&file, base_of(args, &file)?.as_ref(), &args.out)?,
        To::Peft if file.needs_base() => file.fitted(base_of(args, &file)?.as_ref())?.save_exact(&args.out)?,
        To::Peft => file.save_exact(&args.out)?,
    }
    println!("{}: {} modules", args.out.display(), file.modules().count());
    Ok(())
}

/// Refuses to write over something, before any work, and makes the folders on the way.
fn check_out(args: &Args, path: &Path) -> Result<()> {
    let folder = match args.to {
        To::Gguf => crate::format::folder_of(&args.out),
        To::Mlx | To::Peft => args.out.clone(),
    };
    fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
    if args.to == To::Gguf {
        return outputs::check(&args.out, [path], AdapterFile::is_at);
    }
    if fs::read_dir(&folder).is_ok_and(|mut entries| entries.next().is_none()) {
        return Ok(());
    }
    let message = "expected a new or an empty folder, got one that holds something; name another one";
    Err(Error::new(ErrorCode::Config, format!("`{}`", folder.display()), message))
}

/// The architecture of the adapter's base.
fn base_of(args: &Args, file: &AdapterFile) -> Result<Box<dyn Model>> {
    let Some(name) = args.model.as_ref().or(file.base.as_ref()) else {
        let expected = "the adapter's base, for the adapter does not name it";
        return Err(Error::config("model", expected, "nothing"));
    };
    let found = model::locate(name).map_err(|e| match args.model {
        Some(_) => e,
        None => {
            let message = format!("it names `{name}` as its base, which is not here ({e}); give the base with `-m`");
            Error::new(ErrorCode::Config, format!("`{}`", file.dir.display()), message)
        }
    })?;
    architecture_of(open_source(&found.path)?.config(), &found.path)
}
