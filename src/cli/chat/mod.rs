//! `pocketlora chat`: a conversation at the terminal.

use super::answer::{Printer, context};
use super::args::{ModelArgs, SamplingArgs, at_least_one, described, warn};
use super::generate::stats_line;
use super::{interrupt, names, print_error};
use crate::chat::Message;
use crate::engine::{self, Engine};
use crate::error::{Error, ErrorCode, Result};
use crate::generate::Finish;
use crate::hub::Hub;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, IsTerminal as _, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

const HELP: &str = "\
/adapter WHICH[=SCALE] attach an adapter by folder or name; `/adapter none` removes all, `/adapter` lists them
/reset                forget the conversation
/save FILE            append the conversation to FILE as one line of training data
/sampling             show how answers are sampled
/stats                print speed and memory after each answer, or stop doing so
/help                 this text
/quit                 leave (so does Ctrl-D)
Ctrl-C stops an answer, also while a long text is read. A question that begins with a slash needs a space before it.";

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
    /// Print speed and memory after each answer.
    #[arg(long)]
    stats: bool,
}

struct Chat {
    engine: Engine,
    inner: engine::Chat,
    system: Option<String>,
    stats: bool,
}

pub(super) fn run(args: Args) -> Result<()> {
    args.sampling.check()?;
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
    let mut chat = Chat { engine, inner, system: args.system, stats: args.stats };
    chat.forget();
    eprintln!("{} is listening; /help shows the commands", args.model.model);
    let piped = !io::stdin().is_terminal();
    let unread = |e: ReadlineError| {
        let place = if piped { "stdin" } else { "terminal" };
        Error::new(ErrorCode::Io, place, "could not read it").caused_by(e)
    };
    let mut editor = DefaultEditor::new().map_err(unread)?;
    let history = history();
    if let Some(path) = &history {
        let _ = editor.load_history(path);
    }
    loop {
        // A Ctrl-C was meant for what is over now; other wishes are for all.
        interrupt::take();
        if interrupt::asked() {
            break;
        }
        match interrupt::idle(|| editor.readline("> ")) {
            Ok(line) if line.trim().is_empty() => {}
            Ok(line) => {
                let _ = editor.add_history_entry(&line);
                // At once, for there are ends that leave no time for it.
                if let Some(path) = &history {
                    let _ = editor.append_history(path);
                }
                match line.strip_prefix('/').map(str::trim) {
                    Some("quit" | "exit") => break,
                    command => {
                        let done = match command {
                            None => chat.answer(line.trim()),
                            Some(command) => chat.command(command),
                        };
                        done.unwrap_or_else(|e| print_error("error", &e));
                    }
                }
            }
            Err(ReadlineError::Interrupted) => eprintln!("(Ctrl-D or /quit leaves)"),
            Err(ReadlineError::Eof) => break,
            // Of a pipe, the line was taken whole; the next may be sound.
            Err(ReadlineError::Io(e)) if piped && e.kind() == io::ErrorKind::InvalidData => {
                let message = "expected a question in UTF-8, got other bytes; passed over: convert it";
                print_error("error", &Error::new(ErrorCode::Data, "line of stdin", message));
            }
            Err(e) => return Err(unread(e)),
        }
    }
    Ok(())
}

/// Where earlier questions are kept. They are a comfort: a chat goes on without them.
fn history() -> Option<PathBuf> {
    let home = Hub::from_env().ok()?.home;
    fs::create_dir_all(&home).ok()?;
    Some(home.join("chat-history"))
}

impl Chat {
    fn forget(&mut self) {
        self.inner.set_messages(self.system.iter().map(|s| Message::new("system", s)).collect());
    }

    /// Turns that were said, the system prompt not counted.
    fn turns(&self) -> usize {
        self.inner.messages().len() - self.system.iter().len()
    }

    /// The answer to `question`, as it comes.
    fn answer(&mut self, question: &str) -> Result<()> {
        let mut turns = self.inner.messages().to_vec();
        turns.push(Message::new("user", question));
        let (tokens, limit) = (self.inner.prompt_of(&turns)?.len(), self.inner.context_tokens()?);
        if tokens >= limit {
            return Err(self.too_long(tokens, limit));
        }
        let mut printer = Printer::new(true);
        let answered = self.inner.ask(question, &mut printer);
        drop(printer);
        println!();
        let answer = answered?;
        match answer.generated.finish {
            Finish::Length => eprintln!(
                "(cut after {} tokens, before its end; `go on` may continue it, `chat -n` with a larger number cuts later)",
                self.inner.max_tokens
            ),
            Finish::Context if self.turns() > 2 => {
                eprintln!("(cut: the conversation fills the {}; /reset forgets it)", context(&self.engine));
            }
            Finish::Context => eprintln!("(cut: question and answer fill the {})", context(&self.engine)),
            Finish::Cancelled if answer.text.is_empty() => eprintln!("(stopped; the question is forgotten)"),
            Finish::Stop | Finish::Cancelled => {}
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

    fn command(&mut self, command: &str) -> Result<()> {
        let (name, rest) = command.split_once(' ').unwrap_or((command, ""));
        match (name, rest.trim()) {
            ("help", _) => println!("{HELP}"),
            ("reset", _) => {
                eprintln!("(forgot {} turns)", self.turns());
                self.forget();
            }
            ("stats", "" | "on" | "off") => {
                self.stats = if rest.trim().is_empty() { !self.stats } else { rest.trim() == "on" };
                eprintln!("(speed and memory after each answer: {})", if self.stats { "on" } else { "off" });
            }
            ("sampling", "") => println!("{}", described(&self.inner.sampling)),
            ("adapter", "") => {
                let attached = self.engine.attached();
                if attached.is_empty() {
                    eprintln!("(no adapter is attached)");
                }
                attached.iter().for_each(|adapter| println!("{}={}", adapter.dir.display(), adapter.scale));
            }
            ("adapter", "none") => {
                self.engine.detach_all();
                eprintln!("(no adapter is attached)");
            }
            ("adapter", which) => {
                let (dir, scale) = names::scaled_adapter(which)?;
                self.engine.attach(&dir, scale)?;
                self.engine.attached().last().into_iter().for_each(warn);
                eprintln!("(attached {})", dir.display());
            }
            ("save", "") => return Err(Error::config("/save", "a file name", "nothing")),
            ("save", file) => self.save(&names::expanded(Path::new(file)))?,
            (other, _) => {
                let message =
                    "there is no such command; `/help` lists them, and a space before the slash makes it a question";
                return Err(Error::new(ErrorCode::Config, format!("`/{other}`"), message));
            }
        }
        Ok(())
    }

    /// Appends the conversation as one JSON line, in the form that `train` reads.
    fn save(&self, path: &Path) -> Result<()> {
        if self.turns() == 0 {
            let message = "expected a question and its answer, got none yet; ask something first";
            return Err(Error::new(ErrorCode::Data, "/save", message));
        }
        let line = serde_json::json!({ "messages": self.inner.messages() });
        let failed = |e| Error::io("write", path, e);
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(path).map_err(failed)?;
        if !is_empty_or_json_lines(&mut file).map_err(failed)? {
            let message = "expected a new file or one of conversations, a line each, got another; name a new file";
            return Err(Error::new(ErrorCode::Config, format!("`{}`", path.display()), message));
        }
        // A last line without its end would swallow this one.
        let mut last = [b'\n'];
        if file.seek(SeekFrom::End(-1)).is_ok() {
            file.read_exact(&mut last).map_err(failed)?;
        }
        let start = if last == *b"\n" { "" } else { "\n" };
        file.write_all(format!("{start}{line}\n").as_bytes()).map_err(failed)?;
        eprintln!("(saved {} turns to {})", self.turns(), path.display());
        Ok(())
    }
}

/// Whether the first line that is not blank is an object, if there is one.
fn is_empty_or_json_lines(file: &mut File) -> io::Result<bool> {
    /// Longer lines are no conversation of this program.
    const LINE: u64 = 1 << 26;
    let mut lines = io::BufReader::new(file.take(LINE));
    let mut line = Vec::new();
    while line.trim_ascii().is_empty() {
        line.clear();
        if lines.read_until(b'\n', &mut line)? == 0 {
            return Ok(true);
        }
    }
    Ok(serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&line).is_ok())
}
