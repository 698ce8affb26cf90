//! `pocketlora chat`: a conversation at the terminal.

use super::args::{AdapterArg, ModelArgs, SamplingArgs};
use super::generate::stats_line;
use super::interrupt;
use crate::chat::Message;
use crate::error::{Error, Result};
use crate::generate::{Finish, Sampling};
use crate::hub::Hub;
use crate::session::Session;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

const HELP: &str = "\
/adapter DIR[=SCALE]  attach an adapter; `/adapter none` removes all, `/adapter` lists them
/reset                forget the conversation
/save FILE            append the conversation to FILE as one line of training data
/stats                print speed and memory after each answer, or stop doing so
/help                 this text
/quit                 leave (so does Ctrl-D)
Ctrl-C stops an answer.";

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
    #[arg(short = 'n', long, default_value_t = 512)]
    max_tokens: usize,
    /// Print speed and memory after each answer.
    #[arg(long)]
    stats: bool,
}

struct Chat {
    session: Session,
    messages: Vec<Message>,
    system: Option<String>,
    sampling: Sampling,
    max_tokens: usize,
    stats: bool,
}

pub(super) fn run(args: Args) -> Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    let sampling = args.sampling.sampling(0.7, 0.9, now)?;
    let session = args.model.open()?;
    session.template()?;
    let mut chat = Chat {
        session,
        messages: Vec::new(),
        system: args.system,
        sampling,
        max_tokens: args.max_tokens,
        stats: args.stats,
    };
    chat.reset();
    eprintln!("{} is listening; /help shows the commands", args.model.model);
    let terminal = |e: ReadlineError| Error::io("read", Path::new("terminal"), std::io::Error::other(e));
    let mut editor = DefaultEditor::new().map_err(terminal)?;
    // History is a comfort: a chat goes on without it.
    let history = Hub::from_env().ok().map(|h| h.home.join("chat-history"));
    if let Some(path) = &history {
        let _ = editor.load_history(path);
    }
    loop {
        match editor.readline("> ") {
            Ok(line) if line.trim().is_empty() => {}
            Ok(line) => {
                let _ = editor.add_history_entry(&line);
                match line.trim().strip_prefix('/') {
                    None => chat.answer(line.trim()),
                    Some("quit" | "exit") => break,
                    Some(command) => {
                        if let Err(e) = chat.command(command) {
                            eprintln!("error: {e}");
                        }
                    }
                }
            }
            Err(ReadlineError::Interrupted) => eprintln!("(Ctrl-D or /quit leaves)"),
            Err(ReadlineError::Eof) => break,
            Err(e) => return Err(terminal(e)),
        }
    }
    if let Some(path) = &history {
        let _ = path.parent().map(std::fs::create_dir_all);
        let _ = editor.save_history(path);
    }
    Ok(())
}

impl Chat {
    fn reset(&mut self) {
        self.messages = self.system.iter().map(|s| Message::new("system", s)).collect();
    }

    /// One turn. An answer that failed or was stopped before its first word takes the question with it, so that the
    /// template never sees two questions in a row.
    fn answer(&mut self, question: &str) {
        interrupt::take();
        self.messages.push(Message::new("user", question));
        let result = self.session.chat(&self.messages, self.max_tokens, &self.sampling, &mut |piece| {
            print!("{piece}");
            let _ = std::io::stdout().flush();
            if interrupt::take() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        println!();
        match result {
            Ok((text, done)) => {
                if done.finish == Finish::Context {
                    eprintln!("(the context is full; /reset starts anew)");
                }
                if self.stats {
                    eprintln!(
                        "{}",
                        stats_line(&done, self.session.peak_anonymous_bytes(), self.session.mapped_bytes())
                    );
                }
                if text.is_empty() {
                    self.messages.pop();
                } else {
                    self.messages.push(Message::new("assistant", text));
                }
                self.sampling.seed = self.sampling.seed.wrapping_add(1);
            }
            Err(e) => {
                self.messages.pop();
                eprintln!("error: {e}; /reset starts anew");
            }
        }
    }

    fn command(&mut self, command: &str) -> Result<()> {
        let (name, rest) = command.split_once(' ').unwrap_or((command, ""));
        match (name, rest.trim()) {
            ("help", _) => println!("{HELP}"),
            ("reset", _) => self.reset(),
            ("stats", _) => self.stats = !self.stats,
            ("adapter", "") => {
                for (dir, scale) in self.session.attached() {
                    println!("{}={scale}", dir.display());
                }
            }
            ("adapter", "none") => self.session.detach_all(),
            ("adapter", which) => {
                let AdapterArg { dir, scale } =
                    which.parse().map_err(|e| Error::config("adapter", "DIR[=SCALE]", e))?;
                let known = self.session.warnings().len();
                self.session.attach(&dir, scale)?;
                self.session.warnings()[known..].iter().for_each(|warning| eprintln!("note: {warning}"));
            }
            ("save", "") => return Err(Error::config("/save", "a file name", "nothing")),
            ("save", file) => self.save(Path::new(file))?,
            (other, _) => return Err(Error::config("command", "one of those that /help shows", format!("/{other}"))),
        }
        Ok(())
    }

    /// Appends the conversation as one JSON line, in the form that `train` reads.
    fn save(&self, path: &Path) -> Result<()> {
        let line = serde_json::json!({ "messages": self.messages });
        let mut file =
            OpenOptions::new().create(true).append(true).open(path).map_err(|e| Error::io("open", path, e))?;
        writeln!(file, "{line}").map_err(|e| Error::io("write", path, e))?;
        eprintln!("saved {} turns to {}", self.messages.len(), path.display());
        Ok(())
    }
}
