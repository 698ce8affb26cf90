//! `pocketlora merge`: a model with adapters folded into its weights.

use super::args::{at_least_one, megabytes, options, print_json, stopped};
use super::{interrupt, model, names, progress, quantize, shell};
use crate::adapter::{AdapterFile, Merged, Rounding, rounding};
use crate::engine::{Engine, Options, Precision, check_threads, of_another_base};
use crate::error::{Error, ErrorCode, Result};
use crate::eval::{Score, score_text};
use crate::format::{Existing, Target, TensorMeta, foreign, is_gguf, open_source};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Directory, .gguf file, or name of a model in the cache.
    #[arg(short, long, default_value = model::DEFAULT)]
    model: String,
    /// Adapter or name of one in the cache, with a factor on its effect if wanted; several add up.
    #[arg(short, long = "adapter", value_name = "ADAPTER[=SCALE]", required = true)]
    adapters: Vec<String>,
    /// Directory to write.
    #[arg(short, long, value_parser = names::path())]
    out: PathBuf,
    /// Replace an older output of this command or of `quantize`.
    #[arg(long)]
    overwrite: bool,
    /// Format of the linear layers. [default: the 16 or 32 bits that the model's other weights have]
    #[arg(long, value_enum)]
    to: Option<quantize::To>,
    /// Measure the perplexity of this text by the model with its adapters, and by the merged one.
    #[arg(long, value_name = "FILE", value_parser = names::path())]
    text: Option<PathBuf>,
    /// With --text: tokens of a window.
    #[arg(long, default_value_t = 512, value_parser = at_least_one, requires = "text")]
    window: usize,
    /// Threads for --text; 0 measures how many serve best.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Refuse an adapter whose file tells that it was trained on another base, which is warned of otherwise.
    #[arg(long)]
    strict: bool,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    check_threads(args.threads)?;
    let text = args.text.as_deref().map(read_text).transpose()?;
    let adapters: Vec<_> = args.adapters.iter().map(|a| names::scaled_adapter(a)).collect::<Result<_>>()?;
    let mut files = Vec::new();
    for (dir, scale) in &adapters {
        files.extend(AdapterFile::open(dir)?.each().into_iter().map(|file| (file, *scale)));
    }
    if text.is_some() {
        model::check_text(&args.model)?;
    }
    let found = model::locate(&args.model)?;
    let source = open_source(&found.path)?;
    let exact = !source.tensors().iter().any(TensorMeta::is_four_bit);
    let merged = Merged::new(source, &found.path, &files)?;
    files.iter().flat_map(|(file, _)| &file.warnings).for_each(|warning| eprintln!("note: {warning}"));
    for (file, _) in &files {
        match merged.doubt(file)? {
            Some(doubt) if args.strict => return Err(of_another_base(file, &doubt)),
            Some(doubt) => eprintln!("note: `{}`: {doubt}", file.dir.display()),
            None => {}
        }
    }
    let to = args.to.map_or_else(|| merged.own_type(), quantize::To::target);
    if exact && to != Target::Nf4 {
        eprintln!(
            "note: the weights of {} are taken as its files have them; an adapter that was trained on their NF4 copy, as \
             `train` makes one, is fitted to that: to merge into what it was trained on, make the copy with `pocketlora \
             quantize` and give it as `-m`",
            found.name
        );
    }
    let start = Instant::now();
    let existing = if args.overwrite { Existing::Replace } else { Existing::Keep };
    let summary = model::with_bar("merge", &args.out, |progress| merged.write(&args.out, to, existing, progress))?;
    let seconds = start.elapsed().as_secs_f64();
    let layers = if to == Target::Nf4 { by_layer(&merged, &args.out)? } else { Vec::new() };
    let scores = match &text {
        Some(text) => Some(compare(args, &found, &adapters, text)?),
        None => None,
    };
    if args.json {
        let mut report = json!({
            "out": args.out, "tensors": summary.quantized + summary.dense, "quantized": summary.quantized,
            "bytes": summary.bytes, "dtype": summary.dtype, "seconds": seconds,
        });
        if to == Target::Nf4 {
            report["rounding"] = layers.iter().map(as_json).collect();
        }
        if let Some([before, after]) = scores {
            report["perplexity"] =
                json!({"tokens": after.tokens, "unmerged": before.perplexity(), "merged": after.perplexity()});
        }
        print_json(&report);
        return Ok(());
    }
    println!(
        "{}: {} tensors, {} of them in 4 bits, the others in {}, {} in {seconds:.1} s",
        args.out.display(),
        summary.quantized + summary.dense,
        summary.quantized,
        summary.dtype,
        megabytes(summary.bytes)
    );
    layers.iter().for_each(|layer| println!("{}", in_words(layer)));
    if let Some([before, after]) = scores {
        let (before, after, tokens) = (before.perplexity(), after.perplexity(), after.tokens);
        println!("perplexity of {tokens} tokens: {before:.3} with the adapters beside the model, {after:.3} merged");
    }
    let as_it_is = if to == Target::Nf4 { "" } else { " --no-quantize" };
    eprintln!("use it: pocketlora chat -m {}{as_it_is}", shell::quoted_value(&args.out));
    Ok(())
}

/// What NF4 cost, by decoder layer, and in all of them.
fn by_layer(merged: &Merged, out: &Path) -> Result<Vec<Rounding>> {
    let bar = progress::spinner("compare");
    let parts = rounding(merged, out, &mut |values| {
        bar.inc(values * 4);
        model::go_on()
    });
    bar.finish_and_clear();
    let parts = parts?;
    let mut layers: BTreeMap<Option<usize>, Vec<&Rounding>> = BTreeMap::new();
    parts.iter().for_each(|part| layers.entry(part.layer).or_default().push(part));
    let name = |layer: Option<usize>| layer.map_or_else(|| "outside layers".to_owned(), |n| format!("layer {n}"));
    let one =
        |(layer, parts): (Option<usize>, Vec<&Rounding>)| Rounding::of_all(&name(layer), layer, parts.into_iter());
    let mut rows: Vec<Rounding> = layers.into_iter().map(one).collect();
    if !parts.is_empty() {
        rows.push(Rounding::of_all("all layers", None, parts.iter()));
    }
    Ok(rows)
}

fn as_json(row: &Rounding) -> Value {
    json!({"what": row.module, "error": row.error(), "change": row.change(), "arrived": row.arrived()})
}

fn in_words(row: &Rounding) -> String {
    let arrived = row.arrived().map_or_else(String::new, |share| {
        format!("; the adapters' change is {:.2} % and {:.0} % of it arrived", row.change() * 100.0, share * 100.0)
    });
    format!("  {}: rounding took {:.2} % of the weights' size{arrived}", row.module, row.error() * 100.0)
}

fn read_text(path: &Path) -> Result<String> {
    foreign::text(path, fs::read(path).map_err(|e| Error::io("read", path, e))?)
}

/// The scores of `text` by the model with its adapters beside it, and by the merged one, both with the weights as they are.
fn compare(args: &Args, found: &model::Model, adapters: &[(PathBuf, f32)], text: &str) -> Result<[Score; 2]> {
    let base = if is_gguf(&found.path) {
        eprintln!("note: the adapters are beside an NF4 copy of the model here, for a GGUF file does not run as it is");
        model::resolve(&args.model, true)?.path
    } else {
        found.path.clone()
    };
    let score = |path: &Path, adapters: &[(PathBuf, f32)]| -> Result<Score> {
        let options = Options { threads: args.threads, precision: Precision::Exact, ..options() };
        let engine = Engine::open(path, &options)?;
        adapters.iter().try_for_each(|(dir, scale)| engine.attach(dir, *scale).map(|_| ()))?;
        let ids = engine.text()?.tokenizer.encode(text, true)?;
        let bar = progress::spinner("eval");
        let score = score_text(&engine, &ids, args.window, &mut |new| {
            bar.inc(new as u64);
            !interrupt::asked()
        });
        bar.finish_and_clear();
        score.map_err(|e| if e.code() == ErrorCode::Cancelled { stopped("evaluation") } else { e })
    };
    Ok([score(&base, adapters)?, score(&args.out, &[])?])
}
