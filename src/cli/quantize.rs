//! `pocketlora quantize`: a GGUF file or Hugging Face directory to bitsandbytes NF4 or plain floats.

use super::args::{megabytes, print_json};
use super::{model, names, shell};
use crate::error::{Error, Result};
use crate::format::{Existing, Recipe, Target};
use clap::ValueEnum;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Hugging Face directory, .safetensors file with its config.json beside it, .gguf file, or name of a cached model.
    source: String,
    /// Directory to write.
    #[arg(short, long, value_parser = names::path())]
    out: PathBuf,
    /// Replace an older output of this command; never the source, and never a folder that holds something else.
    #[arg(long)]
    overwrite: bool,
    /// Format of the linear layers.
    #[arg(long, value_enum, default_value = "nf4")]
    to: To,
    /// Linear layers to leave in 16 bits: parts of their paths, separated by commas, such as down_proj or layers.0; a * stands
    /// for any one segment.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    skip: Vec<String>,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum To {
    /// bitsandbytes NF4 with double quantization, 4.127 bits a weight.
    Nf4,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE single precision.
    F32,
}

impl To {
    pub(super) fn target(self) -> Target {
        match self {
            Self::Nf4 => Target::Nf4,
            Self::F16 => Target::F16,
            Self::Bf16 => Target::BF16,
            Self::F32 => Target::F32,
        }
    }
}

pub(super) fn run(args: &Args) -> Result<()> {
    let to = args.to.target();
    if to != Target::Nf4 && !args.skip.is_empty() {
        let expected = "`--to nf4`: in other formats no layer is 4-bit";
        return Err(Error::config("skip", expected, args.skip.join(",")));
    }
    let start = Instant::now();
    let existing = if args.overwrite { Existing::Replace } else { Existing::Keep };
    let summary = model::convert(
        &model::locate(&args.source)?.path,
        &args.out,
        Recipe { to, skip: args.skip.clone() },
        existing,
    )?;
    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        print_json(&json!({
            "out": args.out, "tensors": summary.quantized + summary.dense, "quantized": summary.quantized, "bytes": summary.bytes,
            "seconds": seconds,
        }));
    } else {
        println!(
            "{}: {} tensors, {} of them in 4 bits, {} in {seconds:.1} s",
            args.out.display(),
            summary.quantized + summary.dense,
            summary.quantized,
            megabytes(summary.bytes)
        );
        let as_it_is = if to == Target::Nf4 { "" } else { " --no-quantize" };
        eprintln!("use it: pocketlora chat -m {}{as_it_is}", shell::quoted_value(&args.out));
    }
    Ok(())
}
