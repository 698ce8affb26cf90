//! `pocketlora generate`: one prompt, one answer.

use super::answer::{AnswerArgs, Printer, context, dimmed};
use super::args::{ModelArgs, SamplingArgs, at_least_one, megabytes, picked_text, print_json};
use super::{interrupt, names};
use crate::chat::Message;
use crate::engine::{Answer, Pick};
use crate::error::{Error, ErrorCode, Result};
use crate::format::foreign;
use crate::generate::{Dry, Finish, Sampling};
use serde_json::json;
use std::borrow::Cow;
use std::io::{IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    answers: AnswerArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Put the prompt through the model's chat template, as the user's turn.
    #[arg(long)]
    chat: bool,
    /// System prompt, with --chat.
    #[arg(long, requires = "chat")]
    system: Option<String>,
    /// Most tokens to write.
    #[arg(short = 'n', long, default_value_t = 256, value_parser = at_least_one)]
    max_tokens: usize,
    /// Report as one JSON object instead of streaming the text.
    #[arg(long)]
    json: bool,
    /// Print speed and memory on stderr afterwards.
    #[arg(long)]
    stats: bool,
}

#[derive(clap::Args)]
#[group(multiple = false)]
struct PromptArgs {
    /// The prompt; `-` reads it from stdin, as does leaving it out where something is piped in.
    #[arg(short, long)]
    prompt: Option<String>,
    /// A file with the prompt, or `-` for stdin; the end of its last line is no part of it.
    #[arg(short = 'f', long, value_name = "FILE", value_parser = names::path())]
    prompt_file: Option<PathBuf>,
}

impl PromptArgs {
    fn read(&self) -> Result<Cow<'_, str>> {
        let (place, bytes) = match (&self.prompt, &self.prompt_file) {
            (Some(prompt), _) if prompt != "-" => return Ok(prompt.into()),
            (None, None) if std::io::stdin().is_terminal() => {
                return Err(Error::config("prompt", "it with `-p`, in a file with `-f`, or piped in", "none"));
            }
            (_, Some(path)) if path.as_os_str() != "-" => {
                (path.as_path(), std::fs::read(path).map_err(|e| Error::io("read", path, e))?)
            }
            _ => {
                let (place, mut bytes) = (Path::new("stdin"), Vec::new());
                std::io::stdin().lock().read_to_end(&mut bytes).map_err(|e| Error::io("read", place, e))?;
                (place, bytes)
            }
        };
        let text = foreign::text(place, bytes)?;
        let text = text.strip_suffix('\n').map_or(&*text, |text| text.strip_suffix('\r').unwrap_or(text));
        if text.is_empty() {
            let message = "expected a prompt, got nothing; write it there, or give it with `-p`";
            return Err(Error::new(ErrorCode::Data, format!("`{}`", place.display()), message));
        }
        Ok(text.to_owned().into())
    }
}

pub(super) fn run(args: &Args) -> Result<()> {
    // The likeliest tokens, so that the same command gives the same answer.
    let sampling = args.sampling.over(Sampling { dry: Dry::GUARD, ..Sampling::default() }, 0)?;
    if args.answers.for_template() && !args.chat {
        let message = "expected `--chat` beside `--think`, `--no-think` and `--tools`, for they are in the chat template's \
                       hands; give it, or leave them out";
        return Err(Error::new(ErrorCode::Config, "generate", message));
    }
    let (prompt, tools) = (args.prompt.read()?, args.answers.tools()?);
    let engine = args.model.open_for_text()?;
    if args.system.is_some() {
        engine.text()?.template.check_system()?;
    }
    let mut chat = engine.chat()?;
    (chat.sampling, chat.max_tokens) = (sampling, args.max_tokens);
    chat.set_cancel_token(interrupt::cancel());
    args.answers.apply(&mut chat, tools)?;
    let mut printer = Printer::new(!args.json);
    let mut messages: Vec<Message> = args.system.iter().map(|s| Message::new("system", s)).collect();
    messages.push(Message::new("user", &*prompt));
    let prompt_ids =
        if args.chat { chat.prompt_of(&messages)? } else { engine.text()?.tokenizer.encode(&prompt, true)? };
    let Answer { text, thoughts, generated: done } = match args.chat {
        true => chat.reply(&messages, &mut printer)?,
        false => chat.complete(&prompt, &mut printer)?,
    };
    drop(printer);
    let peak = engine.peak_anonymous_bytes();
    if args.json {
        let pick = |pick: &Pick| json!({ "name": pick.name, "similarity": pick.similarity, "weight": pick.weight });
        let picked: Vec<_> = chat.picked().iter().map(pick).collect();
        print_json(&json!({
            "text": text,
            "thoughts": thoughts,
            "adapters": picked,
            "prompt_tokens": done.prompt_tokens,
            "prompt_ids": prompt_ids,
            "tokens": done.ids.len(),
            "finish": done.finish,
            "ids": done.ids,
            "prefill_tok_s": done.prefill_rate(),
            "decode_tok_s": done.decode_rate(),
            "peak_anonymous_bytes": peak,
            "mapped_bytes": engine.mapped_bytes(),
        }));
    } else {
        println!();
        if !engine.routed().is_empty() {
            dimmed(&format!("(adapters: {})", picked_text(chat.picked())));
        }
        match done.finish {
            Finish::Length => eprintln!("(cut after {} tokens, before its end; -n allows more)", done.ids.len()),
            Finish::Context => eprintln!(
                "(cut before its end: prompt and answer, {} and {} tokens, fill the {})",
                done.prompt_tokens,
                done.ids.len(),
                context(&engine)
            ),
            Finish::Stop | Finish::Cancelled => {}
        }
    }
    if args.stats {
        eprintln!("{}", stats_line(&done, peak, engine.mapped_bytes()));
    }
    if done.finish == Finish::Cancelled && interrupt::asked() {
        return Err(super::args::stopped("generation"));
    }
    Ok(())
}

/// Speed and memory in one line.
pub(super) fn stats_line(done: &crate::generate::Generated, peak: Option<u64>, mapped: u64) -> String {
    format!(
        "{} prompt tokens at {:.0} tok/s, {} tokens at {:.1} tok/s; {} anonymous, {} mapped",
        done.prefilled,
        done.prefill_rate(),
        done.ids.len(),
        done.decode_rate(),
        peak.map_or_else(|| "unknown".to_owned(), megabytes),
        megabytes(mapped)
    )
}
