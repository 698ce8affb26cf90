//! What is typed: lines with their history, texts of several lines between `"""`, and Tab.

use super::{COMMANDS, SETTINGS};
use crate::cli::{interrupt, print_error};
use crate::error::{Error, ErrorCode, Result};
use crate::hub::Hub;
use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::Validator;
use rustyline::{Context, Editor, Helper};
use std::fs;
use std::io::{self, IsTerminal as _};
use std::path::PathBuf;

/// What stands around a text of several lines.
const FENCE: &str = "\"\"\"";

/// What was typed.
pub(super) enum Typed {
    /// A line.
    Line(String),
    /// A text between fences, which is no command.
    Text(String),
}

/// Lines of a terminal or a pipe.
pub(super) struct Input {
    editor: Editor<Tab, DefaultHistory>,
    /// Where earlier questions are kept. They are a comfort: a chat goes on without them.
    history: Option<PathBuf>,
    piped: bool,
}

impl Input {
    /// Reads stdin.
    pub fn new() -> Result<Self> {
        let piped = !io::stdin().is_terminal();
        let mut editor = Editor::new().map_err(|e| unread(piped, e))?;
        editor.set_helper(Some(Tab { files: FilenameCompleter::new() }));
        let history = Hub::from_env().ok().map(|hub| hub.home);
        let history = history.filter(|home| fs::create_dir_all(home).is_ok()).map(|home| home.join("chat-history"));
        if let Some(path) = &history {
            let _ = editor.load_history(path);
        }
        Ok(Self { editor, history, piped })
    }

    /// Whether nobody types here.
    pub fn is_piped(&self) -> bool {
        self.piped
    }

    /// The next line or text that is not blank; none at the end, or where the program is to end.
    pub fn next(&mut self) -> Result<Option<Typed>> {
        loop {
            // A Ctrl-C was meant for what is over now; other wishes are for all.
            interrupt::take();
            if interrupt::asked() {
                return Ok(None);
            }
            let typed = match self.read("> ", "") {
                Ok(line) if line.trim().is_empty() => continue,
                Ok(line) => match line.trim_start().strip_prefix(FENCE) {
                    Some(first) => self.text(first)?.map(Typed::Text),
                    None => Some(Typed::Line(line)),
                },
                Err(ReadlineError::Interrupted) => {
                    eprintln!("(Ctrl-D or /bye leaves)");
                    None
                }
                Err(ReadlineError::Eof) => return Ok(None),
                // Of a pipe, the line was taken whole; the next may be sound.
                Err(ReadlineError::Io(e)) if self.piped && e.kind() == io::ErrorKind::InvalidData => {
                    let message = "expected a question in UTF-8, got other bytes; passed over: convert it";
                    print_error("error", &Error::new(ErrorCode::Data, "line of stdin", message));
                    None
                }
                Err(e) => return Err(unread(self.piped, e)),
            };
            if let Some(typed) = typed {
                let (Typed::Line(text) | Typed::Text(text)) = &typed;
                let _ = self.editor.add_history_entry(text);
                // At once, for there are ends that leave no time for it.
                if let Some(path) = &self.history {
                    let _ = self.editor.append_history(path);
                }
                return Ok(Some(typed));
            }
        }
    }

    /// `text`, changed by whoever sits at the terminal; none if they gave up.
    pub fn edited(&mut self, text: &str) -> Result<Option<String>> {
        match self.read("edit> ", text) {
            Ok(line) if line.trim().is_empty() => Ok(None),
            Ok(line) => Ok(Some(line)),
            Err(ReadlineError::Interrupted | ReadlineError::Eof) => Ok(None),
            Err(e) => Err(unread(self.piped, e)),
        }
    }

    /// The lines up to the fence that closes the text that began with `first`; none if it was given up.
    fn text(&mut self, first: &str) -> Result<Option<String>> {
        let (mut lines, mut line) = (Vec::new(), first.to_owned());
        loop {
            if let Some(last) = line.trim_end().strip_suffix(FENCE) {
                lines.push(last.to_owned());
                let text = lines.join("\n");
                return Ok(Some(text.trim_matches('\n').to_owned()).filter(|text| !text.trim().is_empty()));
            }
            lines.push(line);
            line = match self.read("... ", "") {
                Ok(line) => line,
                Err(ReadlineError::Interrupted) => {
                    eprintln!("(the text is forgotten)");
                    return Ok(None);
                }
                Err(ReadlineError::Eof) => {
                    let message = format!(
                        "expected `{FENCE}` after the last line of a text, got the end; end the text with a line of `{FENCE}`"
                    );
                    print_error("error", &Error::new(ErrorCode::Data, "stdin", message));
                    return Ok(None);
                }
                Err(ReadlineError::Io(e)) if self.piped && e.kind() == io::ErrorKind::InvalidData => {
                    let message = "expected text in UTF-8, got other bytes; the text is passed over: convert it";
                    print_error("error", &Error::new(ErrorCode::Data, "line of stdin", message));
                    return Ok(None);
                }
                Err(e) => return Err(unread(self.piped, e)),
            };
        }
    }

    fn read(&mut self, prompt: &str, initial: &str) -> Result<String, ReadlineError> {
        interrupt::idle(|| match initial {
            "" => self.editor.readline(prompt),
            text => self.editor.readline_with_initial(prompt, (text, "")),
        })
    }
}

fn unread(piped: bool, e: ReadlineError) -> Error {
    let place = if piped { "stdin" } else { "terminal" };
    Error::new(ErrorCode::Io, place, "could not read it").caused_by(e)
}

/// Completes commands and what follows them.
struct Tab {
    files: FilenameCompleter,
}

impl Helper for Tab {}
impl Hinter for Tab {
    type Hint = String;
}
impl Highlighter for Tab {}
impl Validator for Tab {}

impl Completer for Tab {
    type Candidate = Pair;

    fn complete(&self, line: &str, at: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<Pair>)> {
        let typed = &line[..at];
        match typed.split_once(' ') {
            Some(("/adapter" | "/save" | "/load", _)) => self.files.complete_path(line, at),
            _ => Ok(words(typed)),
        }
    }
}

/// Where the word before the cursor begins, and what it may become.
fn words(typed: &str) -> (usize, Vec<Pair>) {
    let among = |start: usize, names: &mut dyn Iterator<Item = &'static str>| {
        let fits = |name: &&str| name.starts_with(&typed[start..]);
        let pair = |name: &str| Pair { display: name.to_owned(), replacement: format!("{name} ") };
        (start, names.filter(fits).map(pair).collect())
    };
    match typed.split_once(' ') {
        None if typed.starts_with('/') => among(0, &mut COMMANDS.iter().map(|(name, ..)| *name)),
        Some(("/set", rest)) if !rest.contains(' ') => among(5, &mut SETTINGS.iter().copied()),
        Some(("/think", rest)) if !rest.contains(' ') => among(7, &mut ["on", "off", "auto"].into_iter()),
        Some(("/stats", rest)) if !rest.contains(' ') => among(7, &mut ["on", "off"].into_iter()),
        _ => (typed.len(), Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::words;

    #[test]
    fn tab_completes_commands_and_settings() {
        let found = |typed: &str| {
            let (start, pairs) = words(typed);
            (start, pairs.into_iter().map(|pair| pair.replacement).collect::<Vec<_>>())
        };
        assert_eq!(found("/re"), (0, vec!["/regenerate ".to_owned(), "/reset ".to_owned()]));
        assert_eq!(found("/set top"), (5, vec!["top-k ".to_owned(), "top-p ".to_owned()]));
        assert_eq!(found("/think o"), (7, vec!["on ".to_owned(), "off ".to_owned()]));
        for nothing in ["hello", "", "/nonsense", "/set top-p 0.", "a /re"] {
            assert!(found(nothing).1.is_empty(), "{nothing}");
        }
    }
}
