//! One error type: a kind that programs act on, a place that people look at, and the cause.

use std::fmt;
use std::io;
use std::path::Path;

/// Result of everything that can meet bad input or a failing system.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Stable numbers for app code; the wrappers for other languages carry the same list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(i32)]
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
}

/// What went wrong, where, and why. The message reads `place: what was expected, what was found; next step`.
#[derive(Debug)]
pub struct Error {
    kind: ErrorCode,
    place: String,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` at `place` (a file, a tensor, a line, a setting); `message` says what was expected, what
    /// was found and what to do next.
    pub fn new(kind: ErrorCode, place: impl Into<String>, message: impl Into<String>) -> Self {
        Self { kind, place: place.into(), message: message.into(), source: None }
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
        self.message = self.message.replace(&from, &to);
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

    /// File, tensor, line or setting where it happened.
    #[must_use]
    pub fn place(&self) -> &str {
        &self.place
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
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
