//! `pocketlora chat`: a conversation at the terminal.

mod commands;
mod file;
mod input;
mod state;

use super::answer::{AnswerArgs, Printer, context, dimmed};
use super::args::{ModelArgs, SamplingArgs, at_least_one, picked_text};
use super::generate::stats_line;
use super::{interrupt, names, print_error};
use crate::chat::Message;
use crate::engine::{self, Engine};
use crate::error::{Error, ErrorCode, Result};
use crate::generate::{Finish, Sampling};
use input::{Input, Typed};
use state::StateFile;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// Commands, what they take, and what they do.
const COMMANDS: [(&str, &str, &str); 16] = [
    ("/regenerate", "", "answer the last question once more"),
    ("/edit", "[TEXT]", "change the last question and ask it in its new words"),
    ("/system", "[TEXT]", "show the system prompt, or set it; `none` takes it away"),
    (
        "/think",
        "[on|off|auto]",
        "whether a model that can think before it answers is to; auto leaves it to its template",
    ),
    ("/set", "[NAME VALUE]", "show how answers are sampled, or set temperature, top-p, max-tokens, .."),
    ("/adapter", "WHICH[=SCALE]", "attach an adapter by folder or name; `none` removes all, nothing lists them"),
    ("/route", "", "show the adapters that were picked for the last question, and how near they lie"),
    ("/tool", "TEXT", "what a tool gave that the model called; it answers"),
    ("/reset", "", "forget the conversation"),
    ("/save", "FILE", "append the conversation to FILE as one line of training data"),
    ("/load", "FILE", "go on with the conversation in the last line of FILE"),
    ("/sampling", "", "show how answers are sampled"),
    ("/stats", "[on|off]", "print speed and memory after each answer, or stop doing so"),
    ("/help", "", "this text"),
    ("/bye", "", "leave (so does Ctrl-D)"),
    ("/quit", "", "the same"),
];

/// What `/set` sets.
const SETTINGS: [&str; 11] = [
    "temperature",
    "top-k",
    "top-p",
    "min-p",
    "repetition-penalty",
    "dry-multiplier",
    "dry-base",
    "dry-allowed-length",
    "dry-after",
    "seed",
    "max-tokens",
];

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// System prompt.
    #[arg(long)]
    system: Option<String>,
    /// Most tokens in one answer.
    #[arg(short = 'n', long, default_value_t = 512, value_parser = at_least_one)]
    max_tokens: usize,
    #[command(flatten)]
    answers: AnswerArgs,
    /// Keep the chat and what the model remembers of it in this file, and go on with what is in it.
    #[arg(long, value_name = "FILE", value_parser = names::path())]
    state: Option<PathBuf>,
    /// Print speed and memory after each answer.
    #[arg(long)]
    stats: bool,
}

struct Chat {
    engine: Engine,
    inner: engine::Chat,
    system: Option<String>,
    stats: bool,
    state: Option<StateFile>,
}

/// A conversation until its end. False where a question was not answered or not kept, and nobody is there to see it.
pub(super) fn run(args: Args) -> Result<bool> {
    args.sampling.check()?;
    // Before the model, which may take long to make.
    let state = args.state.map(StateFile::open).transpose()?;
    let tools = args.answers.tools()?;
    let engine = args.model.open_for_text()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    let recommended = engine.recommended()?;
    let sampling = args.sampling.over(recommended.sampling, now)?;
    // Now rather than at every question.
    match &args.system {
        Some(_) => engine.text()?.template.check_system()?,
        None => engine.text()?.template.check()?,
    }
    let mut inner = engine.chat()?;
    (inner.sampling, inner.max_tokens) = (sampling, args.max_tokens);
    inner.set_cancel_token(interrupt::cancel());
    let mut chat = Chat { engine, inner, system: None, stats: args.stats, state };
    let path = chat.state.as_mut().and_then(|state| state.load(&mut chat.inner).transpose()).transpose()?;
    match path {
        Some(path) => {
            let kept = chat.inner.sampling.clone();
            // The same command goes on with the random numbers where they were, and does not begin them anew.
            chat.inner.sampling = Sampling { seed: kept.seed, ..args.sampling.over(kept, 0)? };
            chat.inner.max_tokens = args.max_tokens;
            chat.take(chat.inner.messages().to_vec());
            eprintln!("(going on after {} turns, from {})", chat.turns(), path.display());
        }
        None => chat.forget(),
    }
    if args.system.is_some() && chat.system != args.system {
        let said = chat.inner.messages()[chat.system.iter().len()..].to_vec();
        chat.system = args.system;
        let system = chat.system.iter().map(|text| Message::new("system", text));
        chat.inner.set_messages(system.chain(said).collect());
    }
    args.answers.apply(&mut chat.inner, tools)?;
    eprintln!("{} is listening; /help shows the commands", args.model.model);
    let (mut input, mut whole) = (Input::new()?, true);
    while let Some(typed) = input.next()? {
        let done = match &typed {
            Typed::Text(text) => chat.say(Message::new("user", text)),
            Typed::Line(line) => match line.strip_prefix('/').map(str::trim) {
                Some("bye" | "quit" | "exit") => break,
                Some(command) => chat.command(command, &mut input),
                None => chat.say(Message::new("user", line.trim())),
            },
        };
        let kept = chat.state.as_mut().map_or(Ok(()), |state| state.keep(&mut chat.inner));
        // A command that is not there, or not possible now, costs no answer.
        let costs = !matches!(&typed, Typed::Line(line) if line.starts_with('/'));
        for (failed, costs) in
            [(done, costs), (kept, true)].into_iter().filter_map(|(r, costs)| Some((r.err()?, costs)))
        {
            print_error("error", &failed);
            whole &= !costs;
        }
    }
    Ok(whole || std::io::stdin().is_terminal())
}

impl Chat {
    fn forget(&mut self) {
        self.inner.set_messages(self.system.iter().map(|s| Message::new("system", s)).collect());
    }

    /// Goes on with `messages`.
    fn take(&mut self, messages: Vec<Message>) {
        let first = messages.first().filter(|message| message.role == "system");
        self.system = first.map(|message| message.content.clone().unwrap_or_default());
        self.inner.set_messages(messages);
    }

    /// Turns that were said, the system prompt not counted.
    fn turns(&self) -> usize {
        self.inner.messages().len() - self.system.iter().len()
    }

    /// The answer to `message`, as it comes.
    fn say(&mut self, message: Message) -> Result<()> {
        let mut turns = self.inner.messages().to_vec();
        turns.push(message.clone());
        let (tokens, limit) = (self.inner.prompt_of(&turns)?.len(), self.inner.context_tokens()?);
        if tokens >= limit {
            return Err(self.too_long(tokens, limit));
        }
        if self.inner.pick(&turns)? {
            dimmed(&format!("(adapters: {})", picked_text(self.inner.picked())));
        }
        let mut printer = Printer::new(true);
        let answered = self.inner.say(message, &mut printer);
        drop(printer);
        println!();
        let answer = answered?;
        let (finish, max) = (answer.generated.finish, self.inner.max_tokens);
        let used = answer.generated.prompt_tokens + answer.generated.ids.len();
        match finish {
            Finish::Length if answer.text.is_empty() && !answer.thoughts.is_empty() => eprintln!(
                "(cut after {max} tokens, while it was thinking; the question is forgotten: `/set max-tokens` with a larger \
                 number cuts later, `/think off` has it answer at once)"
            ),
            Finish::Length => eprintln!(
                "(cut after {max} tokens, before its end; `go on` may continue it, `chat -n` with a larger number cuts later)"
            ),
            Finish::Context if self.turns() > 2 => {
                eprintln!("(cut: the conversation fills the {}; /reset forgets it)", context(&self.engine));
            }
            Finish::Context => eprintln!("(cut: question and answer fill the {})", context(&self.engine)),
            Finish::Cancelled if answer.text.is_empty() => eprintln!("(stopped; the question is forgotten)"),
            Finish::Stop if answer.text.is_empty() => {
                eprintln!("(the answer is empty, and the question is forgotten; asking in other words may help)");
            }
            Finish::Stop | Finish::Cancelled => {}
        }
        if finish != Finish::Context && 4 * used >= 3 * limit {
            let whole = context(&self.engine);
            eprintln!("(the conversation takes {used} of {limit} tokens of the {whole}; /reset forgets it)");
        }
        if self.stats {
            let (peak, mapped) = (self.engine.peak_anonymous_bytes(), self.engine.mapped_bytes());
            eprintln!("{}", stats_line(&answer.generated, peak, mapped));
        }
        Ok(())
    }

    /// With advice that helps: what is long is the history, or else the question.
    fn too_long(&self, tokens: usize, context: usize) -> Error {
        let (what, next) = match self.turns() {
            0 => ("question", "shorten it"),
            _ => ("conversation with this question", "`/reset` forgets what was said, then ask again"),
        };
        let whose = if self.engine.is_context_bound() { "that `--context` allows" } else { "of the model's context" };
        let message = format!("expected fewer than the {context} tokens {whose}, got `{tokens}`; {next}");
        Error::new(ErrorCode::ContextFull, what, message)
    }
}
