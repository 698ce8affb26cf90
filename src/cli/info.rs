//! `pocketlora info`: what a model or an adapter is.

use super::args::{described, megabytes, print_json};
use super::{model, names};
use crate::adapter::{AdapterFile, Centroid, Stored};
use crate::base::architecture_of;
use crate::engine::{adapters_in, name_of, parameters};
use crate::error::Result;
use crate::format::{LeftOut, Source, model_of, open_source};
use crate::generate::{GENERATION_CONFIG, Recommended};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Directory or .gguf file of a model or an adapter, or the name of one in the cache.
    what: String,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    if args.what == "demo" && names::existing("demo").is_none() {
        return adapter(&names::adapter("demo")?, args.json);
    }
    let path = model::find(&args.what)?.path;
    if AdapterFile::is_at(&path) {
        return adapter(&path, args.json);
    }
    if path.is_dir() && !path.join("config.json").exists() && adapters_in(&path).is_ok() {
        return adapters(&path, args.json);
    }
    let path = model_of(&path);
    let source = open_source(&path)?;
    let model = architecture_of(source.config(), &path)?;
    let config = model.config().clone();
    let recommended = recommended(source.as_ref(), &path, parameters(model.as_ref()))?;
    let mut types: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for tensor in source.tensors() {
        let entry = types.entry(&tensor.dtype).or_default();
        entry.0 += 1;
        entry.1 += tensor.shape.iter().product::<usize>() as u64;
    }
    let parameters: u64 = types.values().map(|t| t.1).sum();
    let unused = &recommended.unused;
    if args.json {
        let mut sampling: Map<String, Value> =
            recommended.sampling.named().into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
        sampling.insert("from".to_owned(), recommended.source.to_string().into());
        sampling.insert("unused".to_owned(), json!(unused));
        let left_out = |part: &LeftOut| json!({"part": part.part, "tensors": part.tensors, "bytes": part.bytes});
        let left_out: Vec<_> = source.left_out().iter().map(left_out).collect();
        let types: Vec<_> = types.iter().map(|(t, (n, e))| json!({"dtype": t, "tensors": n, "elements": e})).collect();
        print_json(&json!({
            "path": path, "model_type": config.model_type, "parameters": parameters, "layers": config.layers,
            "hidden_size": config.hidden_size, "heads": config.heads, "kv_heads": config.kv_heads,
            "vocab_size": config.vocab_size, "context": config.max_positions, "types": types,
            "sampling": sampling, "left_out": left_out,
        }));
        return Ok(());
    }
    println!("{}", path.display());
    println!("  {} with {:.1} M parameters", config.model_type, parameters as f64 / 1e6);
    println!(
        "  {} layers, hidden size {}, {} heads ({} for keys and values)",
        config.layers, config.hidden_size, config.heads, config.kv_heads
    );
    println!("  vocabulary {}, context {}", config.vocab_size, config.max_positions);
    println!("  answers in chat: {} ({})", described(&recommended.sampling), recommended.source);
    if !unused.is_empty() {
        println!("  note: {GENERATION_CONFIG} asks for {}, which is not done", unused.join(", "));
    }
    for (dtype, (tensors, elements)) in types {
        println!("  {dtype:<6} {tensors:>5} tensors, {:.1} M elements", elements as f64 / 1e6);
    }
    source.left_out().iter().for_each(|part| println!("  {}", part.described()));
    Ok(())
}

/// How `chat` samples the model's answers, unless flags say otherwise.
fn recommended(source: &dyn Source, path: &Path, parameters: u64) -> Result<Recommended> {
    let files = source.sidecars()?.files;
    let file = files.iter().find(|(name, _)| name == GENERATION_CONFIG).map(|(_, bytes)| &bytes[..]);
    Recommended::read(file, &path.join(GENERATION_CONFIG), parameters)
}

/// What there is to pick from in the folder `dir`, a line for each adapter.
fn adapters(dir: &Path, as_json: bool) -> Result<()> {
    let mut list = Vec::new();
    for path in adapters_in(dir)? {
        let file = AdapterFile::open(&path)?;
        let (described, _) = file.method.describe();
        let texts = Centroid::read(&path)?.map(|centroid| centroid.texts);
        if as_json {
            list.push(json!({
                "path": path, "method": file.method.kind(), "parameters": file.values(), "base": file.base,
                "base_hash": file.base_hash(), "texts": texts,
            }));
            continue;
        }
        let texts = texts.map_or_else(|| "no centroid".to_owned(), |texts| format!("centroid of {texts} texts"));
        println!("{}: {described}, {} parameters, {texts}", name_of(&path), file.values());
    }
    if as_json {
        print_json(&json!({ "path": dir, "adapters": list }));
    }
    Ok(())
}

fn adapter(path: &Path, as_json: bool) -> Result<()> {
    let file = AdapterFile::open(path)?;
    let (parameters, modules) = (file.values(), file.modules().count());
    let (described, keys) = file.method.describe();
    let (targets, half) = (file.method.targets(), file.method.kind().stored() == Stored::F16);
    let replaced: Vec<String> = file.replaced.names().collect();
    if as_json {
        let mut report = json!({"path": path, "method": file.method.kind()});
        let rest = json!({
            "targets": targets, "modules": modules, "parameters": parameters, "base": file.base, "base_hash": file.base_hash(),
            "replaces": replaced, "warnings": file.warnings,
            "beside": file.beside.iter().map(|other| &other.dir).collect::<Vec<_>>(),
        });
        for object in [&keys, &rest] {
            object.as_object().into_iter().flatten().for_each(|(key, value)| report[key] = value.clone());
        }
        print_json(&report);
        return Ok(());
    }
    println!("{}", path.display());
    println!("  {described}");
    let (bytes, kind) = if half { (2, "f16") } else { (4, "f32") };
    let modules = if modules > 0 { format!("{modules} modules ({}), ", targets.join(", ")) } else { String::new() };
    println!("  {modules}{parameters} parameters, {} in {kind}", megabytes(parameters as u64 * bytes));
    if !replaced.is_empty() {
        println!("  in place of the base's: {}", replaced.join(", "));
    }
    if let Some(centroid) = Centroid::read(path)? {
        println!("  centroid of {} texts, for `--adapters DIR --route`", centroid.texts);
    }
    let hash = file.base_hash().map_or_else(String::new, |hash| format!(" (content hash {hash})"));
    println!("  base: {}{hash}", file.base.as_deref().unwrap_or("not said"));
    file.warnings.iter().for_each(|warning| println!("  note: {warning}"));
    for other in &file.beside {
        let (name, values) = (other.method.kind().name(), other.values());
        println!("  works together with {} ({name}, {values} parameters)", other.dir.display());
    }
    Ok(())
}
