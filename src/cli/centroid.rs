//! `pocketlora centroid`: notes beside an adapter what it is for.

use super::args::{options, print_json};
use super::{data, model, names};
use crate::adapter::{AdapterFile, CENTROID, Centroid};
use crate::engine::{Engine, Options};
use crate::error::{Error, ErrorCode, Result};
use crate::train::TrainConfig;
use serde_json::json;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Folder of an adapter, or name of one in the cache.
    adapter: String,
    /// Directory, .gguf file, or name of a model in the cache.
    #[arg(short, long, default_value = model::DEFAULT)]
    model: String,
    /// Data that the adapter was trained on, or questions like those that it is for; as for `train`.
    #[arg(short, long, value_parser = names::path())]
    data: PathBuf,
    /// Replace the centroid that is there.
    #[arg(long)]
    overwrite: bool,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let file = AdapterFile::open(&names::adapter(&args.adapter)?)?;
    let path = file.dir.join(CENTROID);
    if !file.dir.is_dir() {
        let message = "expected a folder, in which the centroid is to lie beside the adapter, got a file; `--adapters` takes folders";
        return Err(Error::new(ErrorCode::Config, format!("`{}`", file.dir.display()), message));
    }
    if path.exists() && !args.overwrite {
        let message = "is there already; `--overwrite` replaces it";
        return Err(Error::new(ErrorCode::Config, format!("`{}`", path.display()), message));
    }
    let found = model::resolve(&args.model, true)?;
    let engine = Engine::open(&found.path, &Options { ids_only: true, ..options() })?;
    let dataset = engine.reader(Some(&file))?.dataset(&args.data, TrainConfig::default().seq)?;
    data::say_unused("data", Some(&dataset));
    // Of a model of another width nothing could be said about the adapter.
    engine.check_fits(&file)?;
    let centroid: Centroid = engine.centroid(&dataset)?.ok_or_else(|| {
        let message = "expected at least one question or text with a token of this model, got none";
        Error::new(ErrorCode::Data, format!("`{}`", args.data.display()), message)
    })?;
    centroid.write(&file.dir)?;
    if args.json {
        print_json(&json!({ "out": path, "texts": centroid.texts, "width": centroid.values.len() }));
    } else {
        println!("{}: of {} texts, {} values", path.display(), centroid.texts, centroid.values.len());
    }
    Ok(())
}
