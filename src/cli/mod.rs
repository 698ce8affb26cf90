//! The command line: one file per subcommand; answers on stdout, progress on stderr.

// Where a macro of `out` is not the one that is meant.
#![deny(clippy::print_stdout, clippy::print_stderr)]

// First, for the macros in it: `println!` and its like mean these in all that follows.
#[macro_use]
mod out;
mod outputs;

#[cfg(feature = "ggml")]
mod against;
mod answer;
mod args;
mod bench;
mod centroid;
mod chat;
mod compose;
mod data;
mod data_check;
mod demo;
mod eval;
mod export;
mod generate;
mod info;
mod interrupt;
mod list;
mod merge;
mod model;
mod names;
mod progress;
mod prune;
mod pull;
mod quantize;
mod remove;
mod seal;
mod setup;
mod shell;
mod train;

use crate::error::{Error, ErrorCode, Result};
use clap::{Arg, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use std::error::Error as _;
use std::io::{ErrorKind, IsTerminal as _};
use std::process::ExitCode;

/// Run and fine-tune QLoRA models on this device. Nothing you type or train on leaves it.
#[derive(Parser)]
#[command(name = "pocketlora", version, arg_required_else_help = true, after_help = PLACES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Where things are, and what changes that.
const PLACES: &str = "\
Places:
  The model cache is $POCKETLORA_HOME, else the folder `pocketlora` in the system's cache folder (~/.cache on Linux,
  ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows). `pocketlora list` shows where it is and what it holds:
  models      what `pull` fetched; downloads from the model hub lie in the hub's own cache, shared with other programs
  quantized   NF4 copies of models that were not in NF4, made at first use and made again when a model changes
  int8        8-bit copies of heads
  demo        data and adapter of the demo, an adapter called `demo`
  chat-history  what was typed in `chat`, for the arrow keys; may be deleted

Environment:
  POCKETLORA_HOME         the model cache
  POCKETLORA_CACHE_LIMIT  size such as 20GB: before a copy is made, the longest unused ones go; what was pulled never does
  POCKETLORA_ISA          instruction set, where another than the best is wanted
  HF_HUB_CACHE, HF_HOME   the hub's cache: the folder itself, or the one that has it as `hub`
  HF_TOKEN                for repositories that ask for an account
  HF_ENDPOINT             another hub
  HF_HUB_OFFLINE          1: never ask the hub, use what its cache has
  NO_COLOR                no colours";

#[derive(Subcommand)]
enum Command {
    /// The tour: fetch a small model, quantize it, ask it, teach it, ask again.
    Demo(demo::Args),
    /// Fetch a model into the cache, by its short name or as OWNER/REPO of the model hub.
    Pull(pull::Args),
    /// List what the cache holds: models, adapters, and the copies that were made of them.
    List(list::Args),
    /// Take something out of the cache, with all that was made from it.
    Remove(remove::Args),
    /// Convert a GGUF file or a Hugging Face directory to bitsandbytes NF4, or to plain 16 or 32 bits.
    Quantize(quantize::Args),
    /// Fold adapters into a model's weights.
    Merge(merge::Args),
    /// Join several LoRA adapters to one.
    Compose(compose::Args),
    /// Take from a LoRA adapter what matters least for some data.
    Prune(prune::Args),
    /// Note beside an adapter what it was taught about, for `--adapters DIR --route`; `train` does so by itself.
    Centroid(centroid::Args),
    /// Write an adapter or a model in the format of another program.
    Export(export::Args),
    /// Encrypt an adapter into one file, for one base.
    Seal(seal::SealArgs),
    /// Write the adapter in a sealed file to a folder.
    Unseal(seal::UnsealArgs),
    /// Describe a model or an adapter.
    Info(info::Args),
    /// Talk to a model.
    Chat(chat::Args),
    /// Answer one prompt.
    Generate(generate::Args),
    /// Teach a model: train a LoRA adapter on a JSONL file.
    Train(Box<train::Args>),
    /// Measure how well a model predicts a text or a data file.
    Eval(eval::Args),
    /// Measure how fast a model runs and learns here, and what share of the machine's limits that is.
    Bench(bench::Args),
    /// Print what a shell needs to complete this command line.
    Completions(setup::CompletionsArgs),
    /// Write the manual's pages.
    Man(setup::ManArgs),
}

/// Parses the command line and runs it. Exit codes: 0 done, 1 failed or a run that was stopped, 2 wrong usage. Whoever
/// closes stdout has read enough: that is no failure.
#[must_use]
pub fn run() -> ExitCode {
    let cli = match parse() {
        Ok(cli) => cli,
        // What was asked for, help or version: an answer like others. A terminal takes it, in colours.
        Err(e) if !e.use_stderr() && !std::io::stdout().is_terminal() => {
            print!("{}", e.render());
            return end(Ok(true));
        }
        Err(e) => e.exit(),
    };
    interrupt::install();
    end(match cli.command {
        Command::Demo(args) => demo::run(&args),
        Command::Pull(args) => pull::run(&args).map(|()| true),
        Command::List(args) => list::run(&args).map(|()| true),
        Command::Remove(args) => remove::run(&args).map(|()| true),
        Command::Quantize(args) => quantize::run(&args).map(|()| true),
        Command::Merge(args) => merge::run(&args).map(|()| true),
        Command::Compose(args) => compose::run(&args).map(|()| true),
        Command::Prune(args) => prune::run(&args).map(|()| true),
        Command::Centroid(args) => centroid::run(&args).map(|()| true),
        Command::Export(args) => export::run(&args).map(|()| true),
        Command::Seal(args) => seal::seal(&args).map(|()| true),
        Command::Unseal(args) => seal::unseal(&args).map(|()| true),
        Command::Info(args) => info::run(&args).map(|()| true),
        Command::Chat(args) => chat::run(args),
        Command::Generate(args) => generate::run(&args).map(|()| true),
        Command::Train(args) => train::run(&args),
        Command::Eval(args) => eval::run(&args).map(|()| true),
        Command::Bench(args) => bench::run(&args).map(|()| true),
        Command::Completions(args) => {
            setup::completions(&args);
            Ok(true)
        }
        Command::Man(args) => setup::man(&args).map(|()| true),
    })
}

/// Tells how the work ended.
fn end(result: Result<bool>) -> ExitCode {
    // A stdout that fails asks the work to stop, so that work which was cancelled may be what its failure did.
    let stopped = |result: &Result<bool>| result.as_ref().map_or_else(|e| e.code() == ErrorCode::Cancelled, |_| true);
    let result = match out::close() {
        Some(e) if stopped(&result) && e.kind() != ErrorKind::BrokenPipe => {
            let message = format!("could not write it: {e}; make room, or write to another place");
            Err(Error::new(ErrorCode::Io, "stdout", message))
        }
        Some(_) if stopped(&result) => result.or(Ok(true)),
        _ => result,
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            print_error("error", &error);
            ExitCode::FAILURE
        }
    }
}

/// What was typed. A number below zero is a value, to be refused with its range, rather than an unknown flag.
fn parse() -> Result<Cli, clap::Error> {
    let value = |arg: Arg| if arg.get_action().takes_values() { arg.allow_negative_numbers(true) } else { arg };
    let matches = command().mut_subcommands(|command| command.mut_args(value)).try_get_matches()?;
    Cli::from_arg_matches(&matches)
}

/// The command line, with its long version.
fn command() -> clap::Command {
    Cli::command().long_version(setup::version())
}

/// What the library's messages name of its own settings, and the flags that set them here.
const FLAGS: [(&str, &str); 8] = [
    ("`Engine::unseal`", "`-a FILE --key-file KEY`, or `pocketlora unseal`"),
    ("`Existing::Replace`", "`--overwrite`"),
    ("`Options::context`", "`--context`"),
    ("`Options::strict`", "`--strict`"),
    ("`Precision::Exact`", "`--precision exact`"),
    ("`SpecialText::Text`", "`--special-tokens text`"),
    ("`TaskOptions::chat`", "`--chat`"),
    ("leave the system prompt out", "leave `--system` out"),
];

/// A message of the library's, in the words of the command line.
fn in_flags(message: String) -> String {
    FLAGS.iter().fold(message, |message, (setting, flag)| message.replace(setting, flag))
}

/// An error with what caused it, on stderr; nothing is said twice.
fn print_error(kind: &str, error: &Error) {
    let mut said = in_flags(error.to_string());
    eprintln!("{kind}: {said}");
    let mut cause = error.source();
    while let Some(e) = cause {
        let text = in_flags(e.to_string());
        if !said.contains(&text) {
            eprintln!("  caused by: {text}");
            said.push_str(&text);
        }
        cause = e.source();
    }
}
