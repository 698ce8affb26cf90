//! Flags that several subcommands share.

use super::names;
use crate::adapter::AdapterFile;
use crate::adapter::seal::{Key, is_sealed};
use crate::engine::{Attached, Engine, Options, Pick, Precision, adapters_in, check_threads, name_of};
use crate::error::{Error, ErrorCode, Result};
use crate::generate::{Dry, Sampling};
use crate::tokenizer::SpecialText;
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};

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
    /// Adapter (a folder of PEFT or mlx-lm, a .gguf file) or the name of one in the cache, with a factor on its effect if
    /// wanted; several add up.
    #[arg(short, long = "adapter", value_name = "ADAPTER[=SCALE]")]
    pub adapters: Vec<String>,
    /// File with the key of adapters given with -a that are sealed.
    #[arg(long, requires = "adapters", value_parser = names::path())]
    pub key_file: Option<PathBuf>,
    /// File with the public key of who must have signed them.
    #[arg(long, requires = "key_file", value_parser = names::path())]
    pub verify_key_file: Option<PathBuf>,
    /// Folder with a folder for each of several adapters, of which every request picks those that were taught about what it asks.
    #[arg(long = "adapters", value_name = "DIR", requires = "route", conflicts_with = "adapters", value_parser = names::path())]
    pub adapters_dir: Option<PathBuf>,
    /// With --adapters: mix at most so many, the nearest, with weights by how near they lie. [default: 3]
    #[arg(long, value_name = "MOST", requires = "adapters_dir", num_args = 0..=1, default_missing_value = "3")]
    pub route: Option<usize>,
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
    /// Refuse an adapter whose file tells that it was trained on another base, which is warned of otherwise.
    #[arg(long)]
    pub strict: bool,
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
        let key = self.key_file.as_deref().map(Key::read).transpose()?;
        let signer = self.verify_key_file.as_deref().map(Key::read).transpose()?.map(|key| *key.bytes());
        let key_of = |path: &Path| key.as_ref().filter(|_| is_sealed(path));
        let mut plain = adapters.iter().filter(|(path, _)| key_of(path).is_none());
        plain.try_for_each(|(dir, _)| AdapterFile::open(dir).map(|_| ()))?;
        if let Some(dir) = &self.adapters_dir {
            adapters_in(dir)?.iter().try_for_each(|dir| AdapterFile::open(dir).map(|_| ()))?;
        }
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
                strict: self.strict,
                ..options()
            },
        )?;
        let made_for = engine.context_tokens();
        if self.context > made_for {
            eprintln!("warning: the model was made for texts of {made_for} tokens, not {}", self.context);
        }
        for (dir, scale) in &adapters {
            match key_of(dir) {
                Some(key) => {
                    let bytes = std::fs::read(dir).map_err(|e| Error::io("read", dir, e))?;
                    engine.attach_file(engine.unseal(&bytes, dir, key, 0, signer)?, *scale)?;
                }
                None => engine.attach(dir, *scale).map(|_| ())?,
            }
        }
        engine.attached().iter().for_each(warn);
        if let (Some(dir), Some(most)) = (&self.adapters_dir, self.route) {
            engine.route(dir, most)?;
            let routed = engine.routed();
            routed.iter().for_each(|one| warn(&one.adapter));
            let names: Vec<String> = routed.iter().map(|one| name_of(&one.adapter.dir)).collect();
            eprintln!("each request picks among {} adapters: {}", names.len(), names.join(", "));
        }
        Ok(engine)
    }

    /// As [`ModelArgs::open`], for work on text: a model without a tokenizer is refused before it is quantized.
    pub fn open_for_text(&self) -> Result<Engine> {
        super::model::check_text(&self.model)?;
        self.open()
    }
}

/// `facts 0.7, style 0.3`: which adapters were picked, and how strong each is.
pub(super) fn picked_text(picks: &[Pick]) -> String {
    if picks.is_empty() {
        return "none".to_owned();
    }
    picks.iter().map(|pick| format!("{} {}", pick.name, pick.weight)).collect::<Vec<_>>().join(", ")
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
#[derive(Args, Clone, Debug, Default)]
pub(super) struct SamplingArgs {
    /// Divides the logits; 0 takes the likeliest token. [default: 0 in generate; in chat as `info` shows for the model]
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Keep the K likeliest tokens; 0 keeps all.
    #[arg(long)]
    pub top_k: Option<usize>,
    /// Keep the likeliest tokens that reach this probability together.
    #[arg(long)]
    pub top_p: Option<f32>,
    /// Keep tokens at least this fraction as likely as the likeliest.
    #[arg(long)]
    pub min_p: Option<f32>,
    /// Makes tokens of the context less likely; 1 does nothing.
    #[arg(long)]
    pub repetition_penalty: Option<f32>,
    /// Let an answer repeat itself without end: switches the guard off, as --dry-multiplier 0 does.
    #[arg(long, conflicts_with_all = ["dry_multiplier", "dry_base", "dry_allowed_length", "dry_after"])]
    pub no_guard: bool,
    /// Takes this from the logit of a token that would go on with a repetition. [default: 0.8]
    #[arg(long)]
    pub dry_multiplier: Option<f32>,
    /// What that grows by with each token that is repeated already. [default: 1.75]
    #[arg(long)]
    pub dry_base: Option<f32>,
    /// Repetitions up to this length cost nothing. [default: 2]
    #[arg(long, value_name = "TOKENS")]
    pub dry_allowed_length: Option<usize>,
    /// Only once an answer has ended in so many copies of the same text; 0 always. [default: 3]
    #[arg(long, value_name = "COPIES")]
    pub dry_after: Option<usize>,
    /// Seed of the random stream. [default: 0 in generate, the time in chat]
    #[arg(long)]
    pub seed: Option<u64>,
}

impl SamplingArgs {
    /// Refuses what is out of range: asked before a model is opened, which may take long.
    pub fn check(&self) -> Result<()> {
        self.over(Sampling::default(), 0).map(|_| ())
    }

    /// The flag `name` alone, given as `value`; none if there is no such flag.
    pub fn one(name: &str, value: &str) -> Option<Result<Self>> {
        fn number<T: std::str::FromStr>(name: &str, value: &str, expected: &str) -> Result<Option<T>> {
            value.parse().map(Some).map_err(|_| Error::config(name, expected, value))
        }
        let real = |value| number::<f32>(name, value, "a number");
        let whole = |value| number::<usize>(name, value, "a whole number");
        let mut args = Self::default();
        let done = match name {
            "temperature" => real(value).map(|value| args.temperature = value),
            "top-k" => whole(value).map(|value| args.top_k = value),
            "top-p" => real(value).map(|value| args.top_p = value),
            "min-p" => real(value).map(|value| args.min_p = value),
            "repetition-penalty" => real(value).map(|value| args.repetition_penalty = value),
            "dry-multiplier" => real(value).map(|value| args.dry_multiplier = value),
            "dry-base" => real(value).map(|value| args.dry_base = value),
            "dry-allowed-length" => whole(value).map(|value| args.dry_allowed_length = value),
            "dry-after" => whole(value).map(|value| args.dry_after = value),
            "seed" => number(name, value, "a whole number").map(|value| args.seed = value),
            _ => return None,
        };
        Some(done.map(|()| args))
    }

    /// `defaults` with what was given instead.
    pub fn over(&self, defaults: Sampling, seed: u64) -> Result<Sampling> {
        let dry = if self.no_guard { Dry::OFF } else { defaults.dry };
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            dry: Dry {
                multiplier: self.dry_multiplier.unwrap_or(dry.multiplier),
                base: self.dry_base.unwrap_or(dry.base),
                allowed_length: self.dry_allowed_length.unwrap_or(dry.allowed_length),
                after: self.dry_after.unwrap_or(dry.after),
            },
            seed: self.seed.unwrap_or(seed),
        };
        sampling.validate()?;
        Ok(sampling)
    }
}

/// Sampling in words: what it does beside taking the likeliest token, and whether answers are guarded.
pub(super) fn described(sampling: &Sampling) -> String {
    let plain = Sampling::default().named();
    let differs = sampling
        .named()
        .into_iter()
        .zip(plain)
        .filter(|((name, value), (_, plain))| !name.starts_with("dry") && value != plain);
    let mut parts: Vec<String> =
        differs.map(|((name, value), _)| format!("{} {value}", name.replace('_', " "))).collect();
    if sampling.temperature == 0.0 {
        parts.insert(0, "the likeliest token".to_owned());
    }
    parts.push(if sampling.dry.is_on() { "guarded against loops" } else { "unguarded" }.to_owned());
    parts.join(", ")
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
