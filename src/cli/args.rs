//! Flags that several subcommands share.

use super::names;
use crate::adapter::AdapterFile;
use crate::engine::{Attached, Engine, Options, Precision, check_threads};
use crate::error::{Error, ErrorCode, Result};
use crate::generate::Sampling;
use crate::tokenizer::SpecialText;
use clap::{Args, ValueEnum};

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum PrecisionArg {
    /// f32 everywhere.
    Exact,
    /// Cache and adapters in f16, products in bf16 where the CPU has fast ones.
    Bf16,
    /// Cache and adapters in f16, products in 8 bits, the head too.
    Fast,
}

impl From<PrecisionArg> for Precision {
    fn from(arg: PrecisionArg) -> Self {
        match arg {
            PrecisionArg::Exact => Self::Exact,
            PrecisionArg::Bf16 => Self::Bf16,
            PrecisionArg::Fast => Self::Fast,
        }
    }
}

/// What becomes of special tokens, such as `<|im_end|>`, that are written out in a text.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum SpecialTokensArg {
    /// Parsed in a text that is taken as it is, plain characters in the messages of a chat.
    Auto,
    /// Parsed wherever they stand.
    Parse,
    /// Plain characters wherever they stand; only the chat template's own are parsed.
    Text,
}

impl From<SpecialTokensArg> for SpecialText {
    fn from(arg: SpecialTokensArg) -> Self {
        match arg {
            SpecialTokensArg::Auto => Self::Auto,
            SpecialTokensArg::Parse => Self::Parse,
            SpecialTokensArg::Text => Self::Text,
        }
    }
}

/// Which model, with which adapters, and how to run it.
#[derive(Args, Clone, Debug)]
pub(super) struct ModelArgs {
    /// Directory, .gguf file, or name of a model in the cache.
    #[arg(short, long, default_value = super::model::DEFAULT)]
    pub model: String,
    /// PEFT adapter directory or name of an adapter in the cache, with a factor on its effect if wanted; several add up.
    #[arg(short, long = "adapter", value_name = "ADAPTER[=SCALE]")]
    pub adapters: Vec<String>,
    /// Threads; 0 measures how many serve best.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Arithmetic of inference.
    #[arg(long, value_enum, default_value = "fast")]
    pub precision: PrecisionArg,
    /// Keep keys and values of the text in 8 bits: half the memory, at a small cost in quality.
    #[arg(long)]
    pub int8_cache: bool,
    /// Most tokens of one text, prompt and answer together; memory grows with it. 0 takes what the model was made for.
    #[arg(long, default_value_t = 0, value_name = "TOKENS")]
    pub context: usize,
    /// Run 16- and 32-bit weights as they are instead of quantizing them at first use.
    #[arg(long)]
    pub no_quantize: bool,
    /// Special tokens, such as <|im_end|>, that are written out in a text.
    #[arg(long, value_enum, default_value = "auto")]
    pub special_tokens: SpecialTokensArg,
}

impl ModelArgs {
    /// Opens the model, quantizing it into the cache at first use, and attaches the adapters.
    pub fn open(&self) -> Result<Engine> {
        // Before the model, which may take long to make.
        check_threads(self.threads)?;
        let adapters: Vec<_> = self.adapters.iter().map(|a| names::scaled_adapter(a)).collect::<Result<_>>()?;
        adapters.iter().try_for_each(|(dir, _)| AdapterFile::open(dir).map(|_| ()))?;
        let model = super::model::resolve(&self.model, !self.no_quantize)?;
        let engine = Engine::open(
            &model.path,
            &Options {
                base_name: Some(model.name),
                threads: self.threads,
                precision: self.precision.into(),
                int8_cache: self.int8_cache,
                context: self.context,
                special_text: self.special_tokens.into(),
                ..options()
            },
        )?;
        let made_for = engine.context_tokens();
        if self.context > made_for {
            eprintln!("warning: the model was made for texts of {made_for} tokens, not {}", self.context);
        }
        for (dir, scale) in &adapters {
            engine.attach(dir, *scale)?;
        }
        engine.attached().iter().for_each(warn);
        Ok(engine)
    }

    /// As [`ModelArgs::open`], for work on text: a model without a tokenizer is refused before it is quantized.
    pub fn open_for_text(&self) -> Result<Engine> {
        super::model::check_text(&self.model)?;
        self.open()
    }
}

/// Says what is odd about an adapter.
pub(super) fn warn(adapter: &Attached) {
    adapter.warnings.iter().for_each(|warning| eprintln!("note: {warning}"));
}

/// What all commands open models with: copies that speed them up lie in the model cache.
pub(super) fn options() -> Options {
    let cache_dir = crate::hub::Hub::from_env().ok().map(|hub| hub.home.join("int8"));
    Options { cache_dir, ..Options::default() }
}

/// How tokens are chosen.
#[derive(Args, Clone, Debug)]
pub(super) struct SamplingArgs {
    /// Divides the logits; 0 takes the likeliest token. [default: 0 in generate, 0.7 in chat]
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Keep the K likeliest tokens; 0 keeps all.
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Keep the likeliest tokens that reach this probability together. [default: 1 in generate, 0.9 in chat]
    #[arg(long)]
    pub top_p: Option<f32>,
    /// Keep tokens at least this fraction as likely as the likeliest.
    #[arg(long, default_value_t = 0.0)]
    pub min_p: f32,
    /// Makes tokens of the context less likely; 1 does nothing.
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Seed of the random stream. [default: 0 in generate, the time in chat]
    #[arg(long)]
    pub seed: Option<u64>,
}

impl SamplingArgs {
    /// The settings, with a command's own defaults for what was not given.
    pub fn sampling(&self, temperature: f32, top_p: f32, seed: u64) -> Result<Sampling> {
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(temperature),
            top_k: self.top_k,
            top_p: self.top_p.unwrap_or(top_p),
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed.unwrap_or(seed),
        };
        sampling.validate()?;
        Ok(sampling)
    }
}

/// A number of things of which there must be one: clap's own message would give a range of twenty digits.
pub(super) fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "expected a whole number from 1".to_owned())
}

/// Prints one JSON object on stdout.
pub(super) fn print_json(value: &serde_json::Value) {
    println!("{value}");
}

/// The error of work that was asked to stop.
pub(super) fn stopped(what: &str) -> Error {
    Error::new(ErrorCode::Cancelled, what, "stopped by Ctrl-C or by the system")
}

/// `12.3 MB`, in powers of ten as disks and networks count.
pub(super) fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}
