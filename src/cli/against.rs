//! `pocketlora bench --against ggml`: the flags, and the table.

use super::bench::new_table;
use crate::bench::ggml::{Quant, requantize};
use crate::bench::{Against, OnMeasure, Options, compare, gguf};
use crate::engine;
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Measure ggml's 4-bit types on the same shapes in turn, and llama.cpp on whole models.
    #[arg(long, value_name = "WHOM", value_parser = ["ggml"])]
    against: Option<String>,
    /// GGUF files to compare the model with.
    #[arg(long, value_name = "FILE", value_delimiter = ',', requires = "against")]
    gguf: Vec<PathBuf>,
    /// Make these types from the one --gguf file, or from the --shape, and compare with them: q4_0, iq4_nl, q4_k_m.
    #[arg(long, value_name = "TYPE", value_delimiter = ',', requires = "against")]
    gguf_types: Vec<Quant>,
}

impl Args {
    /// The comparison as JSON and as text, if it was asked for. Files that it needs are made in `folder`.
    pub fn measure(
        &self,
        shape: Option<&str>,
        folder: &Path,
        dir: &Path,
        open: &engine::Options,
        options: &Options,
        progress: &mut OnMeasure<'_>,
    ) -> Result<Option<(Value, String)>> {
        if self.against.is_none() {
            return Ok(None);
        }
        let files = self.files(shape, folder, progress)?;
        let against = compare(dir, open, options, &files, progress)?;
        Ok(Some((json!(against), text(&against))))
    }

    /// The GGUF files to compare with, made now where types are wanted.
    fn files(&self, shape: Option<&str>, folder: &Path, progress: &mut OnMeasure<'_>) -> Result<Vec<PathBuf>> {
        if self.gguf_types.is_empty() {
            return Ok(self.gguf.clone());
        }
        let (source, name) = match (&self.gguf[..], shape) {
            ([one], _) => (one.clone(), one.file_stem().unwrap_or_default().to_string_lossy().into_owned()),
            ([], Some(shape)) => (gguf::write_shape(shape, folder, progress)?, shape.to_owned()),
            _ => {
                return Err(Error::config("gguf-types", "one file given by `--gguf`, or a `--shape`", self.gguf.len()));
            }
        };
        let make = |quant: &Quant| {
            let out = folder.join(format!("{name}.{}.gguf", quant.name()));
            if !out.exists() {
                progress(&format!("{} for llama.cpp", quant.name()));
                requantize(&source, &out, *quant)?;
            }
            Ok(out)
        };
        self.gguf_types.iter().map(make).collect()
    }
}

fn text(against: &Against) -> String {
    let mut models =
        new_table(&["against llama.cpp", "threads", "prefill", "ours", "ratio", "decode", "ours", "ratio"]);
    for m in &against.models {
        models.add_row([
            m.file.clone(),
            m.threads.to_string(),
            format!("{:.1}", m.prefill.median),
            format!("{:.1}", m.our_prefill.median),
            format!("{:.2}", m.prefill_ratio),
            format!("{:.1}", m.decode.median),
            format!("{:.1}", m.our_decode.median),
            format!("{:.2}", m.decode_ratio),
        ]);
    }
    let mut kernels = new_table(&["against ggml", "shape", "threads", "us", "ours", "ratio"]);
    for k in &against.kernels {
        for t in &k.theirs {
            kernels.add_row([
                format!("{}{}", t.quant, if t.repacked { ", repacked" } else { "" }),
                k.shape.clone(),
                k.threads.to_string(),
                format!("{:.1}", 1e6 / t.calls.median),
                format!("{:.1}", 1e6 / k.ours.median),
                format!("{:.2}", t.ratio),
            ]);
        }
    }
    let mut text = format!("ggml {}: {}\n", against.version, against.system);
    for table in [models, kernels].iter().filter(|t| t.row_count() > 0) {
        text.push_str(&format!("{table}\n"));
    }
    text
}
