//! Files that a command writes where it is told to: they replace older ones of their kind, and nothing else.

use crate::error::{Error, ErrorCode, Result};
use crate::format::folder_of;
use crate::format::safetensors::TensorFile;
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::Path;

/// Refuses to write to `out` what `is_older` does not know as an older output, or what the command reads; asked before any
/// work.
pub(super) fn check<'a>(
    out: &Path,
    reads: impl IntoIterator<Item = &'a Path>,
    is_older: impl Fn(&Path) -> bool,
) -> Result<()> {
    let refuse = |what: &str| {
        let message = format!("expected a place for a new file, got {what}; name another file");
        Err(Error::new(ErrorCode::Config, format!("`{}`", out.display()), message))
    };
    let folder = folder_of(out);
    if !folder.is_dir() {
        let message = "expected a folder to write the file to, got none of that name; make it, or name another place";
        return Err(Error::new(ErrorCode::Io, format!("`{}`", folder.display()), message));
    }
    tempfile::tempfile_in(&folder).map_err(|e| Error::io("write into", &folder, e))?;
    let Ok(full) = out.canonicalize() else { return Ok(()) };
    if full.is_dir() {
        return refuse("a folder");
    }
    if reads.into_iter().any(|read| read.canonicalize().is_ok_and(|read| read == full)) {
        return refuse("what the command reads");
    }
    let empty = fs::metadata(&full).is_ok_and(|meta| meta.len() == 0);
    if empty || is_older(&full) { Ok(()) } else { refuse("a file of another kind, which would be lost") }
}

/// Refuses a file or folder to be read that is not there; asked before any work.
pub(super) fn check_readable(path: &Path) -> Result<()> {
    fs::metadata(path).map(|_| ()).map_err(|e| Error::io("read", path, e))
}

/// Whether the file at `path` has logits and nothing else.
pub(super) fn has_logits(path: &Path) -> bool {
    TensorFile::open(path).is_ok_and(|file| file.tensors().all(|(name, _)| name.starts_with("logits.")))
}

/// Whether the file at `path` is a report of `bench`.
pub(super) fn has_record(path: &Path) -> bool {
    let value = fs::read(path).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    value.is_some_and(|value| value["command"].is_string() && value["machine"].is_object())
}

/// Whether the file at `path` begins like a file of answers.
pub(super) fn has_answers(path: &Path) -> bool {
    let mut line = String::new();
    let read = File::open(path).and_then(|file| BufReader::new(file).read_line(&mut line));
    let value = read.ok().and_then(|_| serde_json::from_str::<Value>(&line).ok());
    value.is_some_and(|value| value["line"].is_u64() && value["answer"].is_string())
}
