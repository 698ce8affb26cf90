//! An answer as it comes: progress while a long prompt is read, thoughts, then the text.

use super::{interrupt, names, out, progress};
use crate::engine::{Chat, Engine, Listener};
use crate::error::{Error, ErrorCode, Result};
use indicatif::ProgressBar;
use serde_json::Value;
use std::io::{self, IsTerminal as _};
use std::ops::ControlFlow;
use std::path::PathBuf;

/// Prompts with fewer tokens to read are read before anybody looks at a bar.
const LONG: usize = 256;

/// What a text that is too long fills.
pub(super) fn context(engine: &Engine) -> String {
    let tokens = engine.context_tokens();
    // Of the layers that would hold more.
    let more = engine.context_bytes(2 * tokens) - engine.context_bytes(tokens);
    let kilobytes = more as f64 / tokens as f64 / 1e3;
    match engine.is_context_bound() {
        true => format!("context of {tokens} tokens; a larger `--context` takes {kilobytes:.1} kB a token"),
        false => format!("model's context of {tokens} tokens"),
    }
}

/// What answers are like, wherever there are some.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct AnswerArgs {
    /// End an answer before this text; may be given several times.
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// Have a model that can think before it answers do so. [default: as its chat template has it]
    #[arg(long, overrides_with = "no_think")]
    think: bool,
    /// Have it answer at once.
    #[arg(long, overrides_with = "think")]
    no_think: bool,
    /// Tools that the model may call: a JSON list of functions, as chat templates take them. Calls are shown, not made.
    #[arg(long, value_name = "FILE", value_parser = names::path())]
    tools: Option<PathBuf>,
}

impl AnswerArgs {
    /// Whether anything is asked for that only a chat template can give.
    pub fn for_template(&self) -> bool {
        self.think || self.no_think || self.tools.is_some()
    }

    /// The tools, read.
    pub fn tools(&self) -> Result<Option<Value>> {
        let Some(path) = &self.tools else { return Ok(None) };
        let text = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
        match serde_json::from_slice::<Vec<Value>>(&text) {
            Ok(list) if list.iter().all(Value::is_object) => Ok(Some(list.into())),
            other => {
                let message = "expected a JSON list of functions, each an object, got something else; see the model's card \
                               for their form";
                let error = Error::new(ErrorCode::Data, format!("`{}`", path.display()), message);
                Err(match other {
                    Err(e) => error.caused_by(e),
                    Ok(_) => error,
                })
            }
        }
    }

    /// Has `chat` answer so; `tools` is what [`AnswerArgs::tools`] read.
    pub fn apply(&self, chat: &mut Chat, tools: Option<Value>) -> Result<()> {
        if self.think || self.no_think {
            if !chat.engine().text()?.template.knows_thinking() {
                let flag = if self.think { "--think" } else { "--no-think" };
                eprintln!("note: the model's chat template knows no thinking; `{flag}` does nothing");
            }
            chat.thinking = Some(self.think);
        }
        chat.stop.clone_from(&self.stop);
        chat.tools = tools;
        Ok(())
    }
}

/// A line beside the answers on stderr, dimmed at a terminal.
pub(super) fn dimmed(line: &str) {
    let colours = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    if colours && io::stderr().is_terminal() {
        eprintln!("\x1b[2m{line}\x1b[0m");
    } else {
        eprintln!("{line}");
    }
}

/// Prints what it hears.
pub(super) struct Printer {
    /// The text goes to stdout as it comes.
    prints: bool,
    bar: Option<ProgressBar>,
    /// Thoughts go to a terminal, dimmed or between words of ours; else to stderr, so that stdout has the answer alone.
    terminal: bool,
    colours: bool,
    thinks: bool,
}

impl Printer {
    /// Shows progress, and the text if `prints`.
    pub fn new(prints: bool) -> Self {
        let colours = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { prints, bar: None, terminal: io::stdout().is_terminal(), colours, thinks: false }
    }

    fn clear(&mut self) {
        self.bar.take().inspect(ProgressBar::finish_and_clear);
    }

    /// Begins thoughts, or ends them.
    fn turn(&mut self, thinks: bool) {
        if self.thinks != thinks && self.prints {
            match (thinks, self.terminal, self.colours) {
                (true, true, true) => print!("\x1b[2m"),
                (true, true, false) => println!("(it thinks)"),
                (true, false, _) => eprintln!("(it thinks)"),
                (false, true, true) => print!("\x1b[0m\n\n"),
                (false, true, false) => println!("\n(it answers)"),
                (false, false, _) => eprintln!(),
            }
        }
        self.thinks = thinks;
    }

    fn go_on() -> ControlFlow<()> {
        if interrupt::asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

impl Listener for Printer {
    fn on_prompt(&mut self, done: usize, tokens: usize) {
        if done == tokens {
            self.clear();
        } else if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
        } else if tokens - done > LONG {
            let bar = progress::count(tokens as u64, "read");
            // What is known already took no time that would tell of the rest.
            self.bar = Some(bar.with_position(done as u64));
        }
    }

    fn on_thought(&mut self, piece: &str) -> ControlFlow<()> {
        self.clear();
        self.turn(true);
        if self.prints && self.terminal {
            print!("{piece}");
            out::flush();
        } else if self.prints {
            eprint!("{piece}");
        }
        Self::go_on()
    }

    fn on_text(&mut self, piece: &str) -> ControlFlow<()> {
        self.clear();
        self.turn(false);
        if self.prints {
            print!("{piece}");
            out::flush();
        }
        Self::go_on()
    }
}

impl Drop for Printer {
    fn drop(&mut self) {
        self.clear();
        self.turn(false);
    }
}
