//! `pocketlora export`: an adapter or a model in the format of another program, or an adapter in few bits.

use super::args::{megabytes, options};
use super::train::Watcher;
use super::{data, model, names, progress};
use crate::adapter::{AdapterFile, export_compressed, export_gguf, export_mlx};
use crate::base::architecture_of;
use crate::engine::Engine;
use crate::error::{Error, ErrorCode, Result};
use crate::format::gguf::{GgufTarget, export_model};
use crate::format::{create_folder, folder_of, open_source};
use crate::train::{SETTINGS, TrainConfig};
use clap::ValueEnum;
use pocketlora_models::Model;
use serde_json::{Map, Value};
use std::fs;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Adapter or model, or name of one in the cache.
    what: String,
    /// Format to write.
    #[arg(long, value_enum)]
    to: To,
    /// File (gguf, compressed) or directory (mlx, peft) to write.
    #[arg(short, long, value_parser = names::path())]
    out: PathBuf,
    /// The adapter's base: directory, .gguf file, or name of a model in the cache. [default: what the adapter names]
    #[arg(short, long)]
    model: Option<String>,
    /// Of a model: type of its matrices. [default: f16]
    #[arg(long = "type", value_enum)]
    dtype: Option<Type>,
    /// With `--to compressed`: share of each matrix's values that is kept, those that training changed most. [default: 0.5]
    #[arg(long)]
    density: Option<f64>,
    /// With `--to compressed`: data on which to measure the loss before and after, as for `train`.
    #[arg(short, long, value_parser = names::path())]
    data: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Type {
    /// IEEE half precision.
    #[value(name = "f16")]
    F16,
    /// 8 bits in blocks of 32.
    #[value(name = "q8_0")]
    Q8,
    /// 4 bits in blocks of 32; embedding and head in 8 bits.
    #[value(name = "q4_0")]
    Q4,
}

impl From<Type> for GgufTarget {
    fn from(dtype: Type) -> Self {
        match dtype {
            Type::F16 => Self::F16,
            Type::Q8 => Self::Q8_0,
            Type::Q4 => Self::Q4_0,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum To {
    /// One file, for llama.cpp.
    Gguf,
    /// A directory, for mlx-lm.
    Mlx,
    /// A directory, for PEFT.
    Peft,
    /// One small file, for this program: signs of what training changed (ComPEFT). It loses some of it.
    Compressed,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let path = match names::existing(&args.what) {
        Some(path) if !AdapterFile::is_at(&path) && !is_adapter_file(&path) => return model_file(args),
        None if is_model(&args.what) => return model_file(args),
        _ => names::adapter(&args.what)?,
    };
    if args.dtype.is_some() {
        return Err(Error::config("type", "it for a model alone, for adapters are written in f32", "an adapter"));
    }
    if args.to != To::Compressed && (args.density.is_some() || args.data.is_some()) {
        let (name, got) =
            if args.density.is_some() { ("density", "another format") } else { ("data", "another format") };
        return Err(Error::config(name, "it with `--to compressed` alone", got));
    }
    let file = AdapterFile::open(&path)?;
    file.check_alone("an export takes one adapter")?;
    file.warnings.iter().for_each(|warning| eprintln!("note: {warning}"));
    check_out(args)?;
    let base = (args.to != To::Peft || file.needs_base()).then(|| base_of(args, &file)).transpose()?;
    // Only now, so that what could not begin leaves no folder.
    create_folder(&folder_of(&args.out))?;
    match (args.to, base) {
        (To::Gguf, Some(base)) => export_gguf(&file, base.as_ref(), &args.out)?,
        (To::Mlx, Some(base)) => export_mlx(&file, base.as_ref(), &args.out)?,
        (To::Compressed, Some(base)) => return compressed(args, &file, base.as_ref()),
        (_, Some(base)) => file.fitted(base.as_ref())?.save_exact(&args.out)?,
        (_, None) => file.save_exact(&args.out)?,
    }
    println!("{}: {} modules", args.out.display(), file.modules().count());
    Ok(())
}

/// Writes `file`, which is for `base`, in few bits, and tells what that cost.
fn compressed(args: &Args, file: &AdapterFile, base: &dyn Model) -> Result<()> {
    // Read before anything is written.
    let measured = match (&args.data, args.model.as_ref().or(file.base.as_ref())) {
        (Some(path), Some(name)) => {
            let engine = Engine::open(&model::resolve(name, true)?.path, &options())?;
            let dataset = engine.reader(Some(file))?.dataset(path, TrainConfig::default().seq)?;
            data::say_unused("data", Some(&dataset));
            Some((engine, dataset))
        }
        _ => None,
    };
    // Where the adapter was trained here, its run's settings lie beside it.
    let settings = fs::read_to_string(file.dir.join(SETTINGS)).unwrap_or_default();
    let seed = toml::from_str::<TrainConfig>(&settings).map_or(0, |config| config.seed);
    let done = export_compressed(file, base, seed, args.density.unwrap_or(0.5), &args.out)?;
    println!(
        "{}: {} parameters in {} ({:.2} bits each), {:.1} % of their effect's size lost",
        args.out.display(),
        done.values,
        megabytes(done.bytes as u64),
        8.0 * done.bytes as f64 / done.values as f64,
        100.0 * done.error
    );
    if done.differences == 0 {
        eprintln!("note: how the adapter began is not known here, so that the file is larger than it could be");
    }
    let Some((engine, dataset)) = measured else { return Ok(()) };
    let mut watcher = Watcher::new(0, 0, false);
    let adapters = [None, Some(file.clone()), Some(AdapterFile::open(&args.out)?)];
    let losses = adapters.map(|file| engine.loss_with(file, &dataset, &mut watcher));
    watcher.bar.finish_and_clear();
    let [plain, whole, left] = losses;
    println!(
        "loss on the data: {:.3} without the adapter, {:.3} with it, {:.3} with the compressed one",
        plain?, whole?, left?
    );
    Ok(())
}

/// Whether `path` is a file of an adapter's folder.
fn is_adapter_file(path: &Path) -> bool {
    path.is_file() && AdapterFile::exists(&folder_of(path))
}

/// Whether the cache, or a manifest, has a model called `name`.
fn is_model(name: &str) -> bool {
    let known = crate::hub::manifests().is_ok_and(|manifests| manifests.iter().any(|m| m.name == name));
    known || crate::hub::resolve(name).is_some_and(|path| !AdapterFile::is_at(&path))
}

/// Writes a model as a GGUF file.
fn model_file(args: &Args) -> Result<()> {
    if args.to != To::Gguf {
        let expected = "`gguf` for a model, or an adapter";
        return Err(Error::config("to", expected, format!("the model `{}`", args.what)));
    }
    let found = model::locate(&args.what)?;
    let source = open_source(&found.path)?;
    check_new(&args.out)?;
    create_folder(&folder_of(&args.out))?;
    let to = args.dtype.map_or(GgufTarget::F16, GgufTarget::from);
    if let Some(window) = lost_window(source.config()) {
        eprintln!(
            "note: llama.cpp runs a Mistral without its window of {window} tokens; longer texts have other answers there"
        );
    }
    let bar = progress::count(0, "export");
    let done = export_model(source.as_ref(), &found.path, &args.out, to, &mut |p| {
        model::show(&bar, p);
        model::go_on()
    });
    bar.finish_and_clear();
    done?;
    let bytes = fs::metadata(&args.out).map_or(0, |meta| meta.len());
    println!("{}: {} tensors, {}", args.out.display(), source.tensors().len(), megabytes(bytes));
    Ok(())
}

/// The window of a Mistral that some texts are longer than: the one thing of a model that llama.cpp does not take.
fn lost_window(config: &Map<String, Value>) -> Option<u64> {
    let window = config.get("sliding_window").and_then(Value::as_u64)?;
    let context = config.get("max_position_embeddings").and_then(Value::as_u64)?;
    let mistral = config.get("model_type").and_then(Value::as_str) == Some("mistral");
    (mistral && window < context).then_some(window)
}

/// Refuses to write over something, before any work.
fn check_out(args: &Args) -> Result<()> {
    let empty = |folder: &Path| fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none());
    if matches!(args.to, To::Gguf | To::Compressed) || !args.out.exists() {
        return check_new(&args.out);
    }
    if empty(&args.out) {
        return Ok(());
    }
    let got = if args.out.is_dir() { "one that holds something" } else { "a file" };
    let message = format!("expected a new or an empty folder, got {got}; name another one");
    Err(Error::new(ErrorCode::Config, format!("`{}`", args.out.display()), message))
}

/// Refuses a place where something is: models take long to fetch or to make.
fn check_new(out: &Path) -> Result<()> {
    if !out.exists() {
        return Ok(());
    }
    let message = "expected a place for a new file, got one where something is; name another, or take that away";
    Err(Error::new(ErrorCode::Config, format!("`{}`", out.display()), message))
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
