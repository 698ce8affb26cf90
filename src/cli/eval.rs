//! `pocketlora eval`: how well a model predicts.

use super::args::{ModelArgs, print_json, stopped};
use super::{interrupt, progress};
use crate::error::{Error, ErrorCode, Result};
use crate::eval::{Score, score_data, score_text};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    what: What,
    /// Score a text in windows of this many tokens; 0 takes it whole.
    #[arg(long, default_value_t = 512)]
    window: usize,
    /// With --ids: write the logits here, tensor `logits.N` [tokens, vocab] in f32 for array N.
    #[arg(long, value_name = "OUT.safetensors", requires = "ids")]
    save_logits: Option<PathBuf>,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct What {
    /// Perplexity of a text file.
    #[arg(long)]
    text: Option<PathBuf>,
    /// Loss on the learned tokens of a JSONL file.
    #[arg(short, long)]
    data: Option<PathBuf>,
    /// JSON array of arrays of token ids, each scored whole.
    #[arg(long)]
    ids: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let session = args.model.open()?;
    let bar = progress::spinner("eval");
    let mut on_progress = |tokens: usize| {
        bar.inc(tokens as u64);
        !interrupt::asked()
    };
    let score = if let Some(path) = &args.what.text {
        let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        let ids = session.tokenizer()?.encode(&text, true)?;
        let window = if args.window == 0 { ids.len() } else { args.window };
        score_text(&session, &ids, window, &mut on_progress).map_err(|e| named(e, path))
    } else if let Some(path) = &args.what.data {
        let data = session.dataset(path, usize::MAX)?;
        score_data(&session, &data, &mut on_progress)
    } else {
        let path = args.what.ids.as_deref().expect("clap requires one of the three");
        let lists = read_ids(path)?;
        let score = match &args.save_logits {
            Some(out) => crate::eval::save_logits(&session, &lists, out, &mut on_progress),
            None => lists.iter().enumerate().try_fold(Score::default(), |sum, (i, ids)| {
                let score = score_text(&session, ids, ids.len(), &mut on_progress);
                Ok(sum + score.map_err(|e| e.at(format!("array {i}")))?)
            }),
        };
        score.map_err(|e| named(e, path))
    };
    bar.finish_and_clear();
    let score = score.map_err(|e| if e.code() == ErrorCode::Cancelled { stopped("evaluation") } else { e })?;
    if args.json {
        print_json(&json!({"tokens": score.tokens, "nll": score.nll(), "perplexity": score.perplexity()}));
    } else {
        println!("{} tokens: loss {:.4}, perplexity {:.3}", score.tokens, score.nll(), score.perplexity());
    }
    Ok(())
}

/// An error about what stands in the file at `path`, with the file's name.
fn named(e: Error, path: &Path) -> Error {
    match e.code() {
        ErrorCode::Data | ErrorCode::Diverged => e.at(format!("`{}`", path.display())),
        _ => e,
    }
}

fn read_ids(path: &Path) -> Result<Vec<Vec<u32>>> {
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let lists: Vec<Vec<u32>> = serde_json::from_slice(&bytes)
        .map_err(|e| Error::format(path, "JSON", "an array of arrays of token ids", &e).caused_by(e))?;
    if lists.is_empty() {
        return Err(Error::format(path, "JSON", "at least one array of token ids", "none"));
    }
    Ok(lists)
}
