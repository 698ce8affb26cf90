//! One error type: a kind that programs act on, a place that people look at, and the cause.

use std::fmt;
use std::io;
use std::path::Path;

/// Result of everything that can meet bad input or a failing system.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Stable numbers for app code; the wrappers for other languages carry the same list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u32)]
pub enum ErrorCode {
    /// A file could not be read or written.
    Io = 1,
    /// A file is not what its format asks for: truncated, contradictory, out of range.
    Format = 2,
    /// A well-formed file asks for something this version does not do.
    Unsupported = 3,
    /// An adapter does not belong to this base model.
    AdapterMismatch = 4,
    /// Training or evaluation data is empty, malformed or unusable.
    Data = 5,
    /// A setting is out of range or contradicts another.
    Config = 6,
    /// An allocation was refused.
    OutOfMemory = 7,
    /// A device failed or was lost.
    Device = 8,
    /// A download failed or its checksum is wrong.
    Network = 9,
    /// The caller stopped the work.
    Cancelled = 10,
    /// Loss or gradients became NaN or infinite.
    Diverged = 11,
    /// A text has more tokens than the context takes.
    ContextFull = 12,
    /// A handle of the C library, or of a wrapper of it, is null, was freed, or is of another kind.
    Handle = 13,
    /// A chat or trainer is at work for another caller.
    Busy = 14,
    /// A bug in the library, which was caught at its border.
    Internal = 15,
    /// A sealed adapter is not for this key, or is not signed by that one; a key is none.
    Key = 16,
    /// A sealed adapter is older than the least version that is taken.
    Outdated = 17,
}

impl ErrorCode {
    /// All codes, in the order of their numbers.
    ///
    /// cbindgen:ignore
    pub const ALL: [Self; 17] = [
        Self::Io,
        Self::Format,
        Self::Unsupported,
        Self::AdapterMismatch,
        Self::Data,
        Self::Config,
        Self::OutOfMemory,
        Self::Device,
        Self::Network,
        Self::Cancelled,
        Self::Diverged,
        Self::ContextFull,
        Self::Handle,
        Self::Busy,
        Self::Internal,
        Self::Key,
        Self::Outdated,
    ];

    /// Its number, which never changes.
    #[must_use]
    pub fn number(self) -> u32 {
        self as u32
    }
}

impl TryFrom<u32> for ErrorCode {
    type Error = Error;

    fn try_from(number: u32) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|code| code.number() == number);
        found.ok_or_else(|| Error::config("error code", format!("a number from 1 to {}", Self::ALL.len()), number))
    }
}

/// What went wrong, where, and why. It reads `place: what was expected, what was found; next step`.
#[derive(Debug)]
pub struct Error {
    kind: ErrorCode,
    place: String,
    finding: String,
    next: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` at `place`, from the outermost (a file) to the item in it (a tensor, a line, a setting), with
    /// `: ` between them. `message` says what was expected and what was found, then, after the first `; ` that does not
    /// stand in backticks, what to do next.
    pub fn new(kind: ErrorCode, place: impl Into<String>, message: impl Into<String>) -> Self {
        let mut finding: String = message.into();
        let split = outside_backticks(&finding, "; ").next();
        let next = split.map(|at| finding.split_off(at).split_off(2));
        Self { kind, place: place.into(), finding, next, source: None }
    }

    /// The same error with the one that caused it.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The same error with a place in front of its own.
    pub(crate) fn at(mut self, place: impl fmt::Display) -> Self {
        self.place = format!("{place}: {}", self.place);
        self
    }

    /// The same error for files that stand in for those in `to`, which people know.
    pub(crate) fn moved(mut self, from: &Path, to: &Path) -> Self {
        let [from, to] = [from, to].map(|path| path.display().to_string());
        self.place = self.place.replace(&from, &to);
        self.finding = self.finding.replace(&from, &to);
        self.next = self.next.map(|next| next.replace(&from, &to));
        self
    }

    /// The system refused to `verb` the file at `path`.
    pub fn io(verb: &str, path: &Path, source: io::Error) -> Self {
        Self::new(ErrorCode::Io, format!("`{}`", path.display()), format!("could not {verb} it")).caused_by(source)
    }

    /// The file at `path` breaks its format at `item`.
    pub fn format(path: &Path, item: impl fmt::Display, expected: impl fmt::Display, got: impl fmt::Display) -> Self {
        Self::new(
            ErrorCode::Format,
            format!("`{}`: {item}", path.display()),
            format!("expected {expected}, got {got}; fetch or export the file again"),
        )
    }

    /// The file at `path` is sound but asks for `what`, which this version does not do.
    pub fn unsupported(path: &Path, what: impl fmt::Display, next: impl fmt::Display) -> Self {
        Self::new(ErrorCode::Unsupported, format!("`{}`", path.display()), format!("{what} is not supported; {next}"))
    }

    /// The setting `name` is unusable.
    pub fn config(name: impl fmt::Display, expected: impl fmt::Display, got: impl fmt::Display) -> Self {
        Self::new(ErrorCode::Config, format!("setting `{name}`"), format!("expected {expected}, got `{got}`"))
    }

    /// The stable number of this kind of error.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        self.kind
    }

    /// Where it happened, from the outermost place to the failing item: "`model.safetensors`: tensor `x`".
    #[must_use]
    pub fn place(&self) -> &str {
        &self.place
    }

    /// The innermost part of [`Error::place`]: the tensor, line, key or setting that failed, or the file itself.
    #[must_use]
    pub fn item(&self) -> &str {
        outside_backticks(&self.place, ": ").last().map_or(&self.place, |at| &self.place[at + 2..])
    }

    /// What was expected, and what was found instead.
    #[must_use]
    pub fn finding(&self) -> &str {
        &self.finding
    }

    /// What to do about it, where something can be done.
    #[must_use]
    pub fn next(&self) -> Option<&str> {
        self.next.as_deref()
    }
}

/// Where `mark` stands in `text`, but for values, which stand in backticks.
fn outside_backticks<'t>(text: &'t str, mark: &'t str) -> impl Iterator<Item = usize> {
    let mut quoted = false;
    text.char_indices().filter_map(move |(at, c)| {
        quoted ^= c == '`';
        (!quoted && text[at..].starts_with(mark)).then_some(at)
    })
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.finding)?;
        self.next.as_ref().map_or(Ok(()), |next| write!(f, "; {next}"))
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

impl From<pocketlora_kernels::Error> for Error {
    fn from(e: pocketlora_kernels::Error) -> Self {
        let (kind, place) = match e {
            pocketlora_kernels::Error::OutOfMemory { .. } => (ErrorCode::OutOfMemory, "memory"),
            pocketlora_kernels::Error::Matrix { .. } => (ErrorCode::Format, "weight"),
            _ => (ErrorCode::Device, "device"),
        };
        Self::new(kind, place, e.to_string()).caused_by(e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_come_back_from_their_numbers() {
        for (number, code) in (1..).zip(ErrorCode::ALL) {
            assert_eq!((code.number(), ErrorCode::try_from(number).unwrap()), (number, code));
            // A new code does not compile until it stands here, and is then missed in `ALL` unless it is the last.
            let last = match code {
                ErrorCode::Io | ErrorCode::Format | ErrorCode::Unsupported | ErrorCode::AdapterMismatch => false,
                ErrorCode::Data | ErrorCode::Config | ErrorCode::OutOfMemory | ErrorCode::Device => false,
                ErrorCode::Network | ErrorCode::Cancelled | ErrorCode::Diverged => false,
                ErrorCode::ContextFull | ErrorCode::Handle | ErrorCode::Busy => false,
                ErrorCode::Internal | ErrorCode::Key => false,
                ErrorCode::Outdated => true,
            };
            assert_eq!(last, number as usize == ErrorCode::ALL.len());
        }
        for number in [0, ErrorCode::ALL.len() as u32 + 1, u32::MAX] {
            assert_eq!(ErrorCode::try_from(number).unwrap_err().code(), ErrorCode::Config);
        }
    }

    #[test]
    fn the_parts_of_an_error_are_told_apart_and_read_as_one() {
        for (place, item, finding, next) in [
            ("`a: b`: tensor `x: y`", "tensor `x: y`", "expected 1, got `2; 3`", Some("mend it; or not")),
            ("setting `lr`", "setting `lr`", "expected 1, got `0`", None),
            ("stdin", "stdin", "could not read it", None),
        ] {
            let message = next.map_or(finding.to_owned(), |next| format!("{finding}; {next}"));
            let error = Error::new(ErrorCode::Data, place, &message);
            assert_eq!((error.item(), error.finding(), error.next()), (item, finding, next));
            assert_eq!(error.to_string(), format!("{place}: {message}"));
        }
    }
}
