//! An answer as it comes: progress while a long prompt is read, then the text.

use super::{interrupt, out, progress};
use crate::engine::{Engine, Listener};
use indicatif::ProgressBar;
use std::ops::ControlFlow;

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

/// Prints what it hears.
pub(super) struct Printer {
    /// The text goes to stdout as it comes.
    prints: bool,
    bar: Option<ProgressBar>,
}

impl Printer {
    /// Shows progress, and the text if `prints`.
    pub fn new(prints: bool) -> Self {
        Self { prints, bar: None }
    }

    fn clear(&mut self) {
        self.bar.take().inspect(ProgressBar::finish_and_clear);
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

    fn on_text(&mut self, piece: &str) -> ControlFlow<()> {
        self.clear();
        if self.prints {
            print!("{piece}");
            out::flush();
        }
        if interrupt::asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

impl Drop for Printer {
    fn drop(&mut self) {
        self.clear();
    }
}
