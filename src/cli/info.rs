//! `pocketlora info`: what a model or an adapter is.

use super::args::{megabytes, print_json};
use super::{model, names};
use crate::adapter::AdapterFile;
use crate::error::Result;
use crate::exec::architecture_of;
use crate::format::{model_of, open_source};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Directory, .gguf file, PEFT adapter directory, or name of a model or adapter in the cache.
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
    if path.join("adapter_config.json").exists() {
        return adapter(&path, args.json);
    }
    let path = model_of(&path);
    let source = open_source(&path)?;
    let config = architecture_of(source.config(), &path)?.config().clone();
    let mut types: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for tensor in source.tensors() {
        let entry = types.entry(&tensor.dtype).or_default();
        entry.0 += 1;
        entry.1 += tensor.shape.iter().product::<usize>() as u64;
    }
    let parameters: u64 = types.values().map(|t| t.1).sum();
    if args.json {
        let types: Vec<_> = types.iter().map(|(t, (n, e))| json!({"dtype": t, "tensors": n, "elements": e})).collect();
        print_json(&json!({
            "path": path, "model_type": config.model_type, "parameters": parameters, "layers": config.layers,
            "hidden_size": config.hidden_size, "heads": config.heads, "kv_heads": config.kv_heads,
            "vocab_size": config.vocab_size, "context": config.max_positions, "types": types,
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
    for (dtype, (tensors, elements)) in types {
        println!("  {dtype:<6} {tensors:>5} tensors, {:.1} M elements", elements as f64 / 1e6);
    }
    Ok(())
}

fn adapter(path: &Path, as_json: bool) -> Result<()> {
    let file = AdapterFile::open(path)?;
    let parameters: usize = file.modules.iter().map(|m| m.a.data.len() + m.b.data.len()).sum();
    let c = &file.config;
    let replaced: Vec<String> = file.replaced.names().collect();
    if as_json {
        print_json(&json!({
            "path": path, "method": "lora", "rank": c.rank, "alpha": c.alpha, "rslora": c.rslora,
            "targets": c.targets, "modules": file.modules.len(), "parameters": parameters, "base": c.base,
            "replaces": replaced, "warnings": file.warnings,
        }));
        return Ok(());
    }
    println!("{}", path.display());
    println!("  {} of rank {}, alpha {}", if c.rslora { "rsLoRA" } else { "LoRA" }, c.rank, c.alpha);
    println!(
        "  {} modules ({}), {parameters} parameters, {} in f16",
        file.modules.len(),
        c.targets.join(", "),
        megabytes(parameters as u64 * 2)
    );
    if !replaced.is_empty() {
        println!("  in place of the base's: {}", replaced.join(", "));
    }
    println!("  base: {}", c.base.as_deref().unwrap_or("not said"));
    file.warnings.iter().for_each(|warning| println!("  note: {warning}"));
    Ok(())
}
