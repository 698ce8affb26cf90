//! Where text goes: the command line's own `print!`, `println!`, `eprint!` and `eprintln!`.
//!
//! The standard ones panic where nobody reads any more or the disk is full. These keep the first failure of stdout. It
//! counts as a wish to stop, so that running work ends as by Ctrl-C and keeps its state, and [`close`] tells of it at
//! the end. What stderr cannot take is dropped: there is nowhere left to say so.

use std::fmt::Arguments;
use std::io::{self, Write as _};
use std::sync::OnceLock;

static FAILURE: OnceLock<io::Error> = OnceLock::new();

macro_rules! print {
    ($($arg:tt)*) => { $crate::cli::out::stdout(format_args!($($arg)*)) };
}
macro_rules! println {
    () => { $crate::cli::out::stdout(format_args!("\n")) };
    ($($arg:tt)*) => { $crate::cli::out::stdout(format_args!("{}\n", format_args!($($arg)*))) };
}
macro_rules! eprint {
    ($($arg:tt)*) => { $crate::cli::out::stderr(format_args!($($arg)*)) };
}
macro_rules! eprintln {
    () => { $crate::cli::out::stderr(format_args!("\n")) };
    ($($arg:tt)*) => { $crate::cli::out::stderr(format_args!("{}\n", format_args!($($arg)*))) };
}

/// Behind `print!` and `println!`.
pub(super) fn stdout(text: Arguments<'_>) {
    keep(|out| out.write_fmt(text));
}

/// Behind `eprint!` and `eprintln!`.
pub(super) fn stderr(text: Arguments<'_>) {
    let _ = io::stderr().lock().write_fmt(text);
}

/// Shows what was printed without an end of line.
pub(super) fn flush() {
    keep(io::Write::flush);
}

fn keep(write: impl FnOnce(&mut io::StdoutLock<'static>) -> io::Result<()>) {
    if !failed()
        && let Err(e) = write(&mut io::stdout().lock())
    {
        let _ = FAILURE.set(e);
    }
}

/// Whether stdout takes nothing any more.
pub(super) fn failed() -> bool {
    FAILURE.get().is_some()
}

/// The last of stdout, and why it failed if it did.
pub(super) fn close() -> Option<&'static io::Error> {
    flush();
    FAILURE.get()
}
