//! Conversations in files of training data, one a line.

use crate::chat::{CUT, Message};
use crate::error::{Error, ErrorCode, Result};
use serde_json::{Map, Value};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

/// Longer lines are no conversation of this program.
const LINE: u64 = 1 << 26;

/// Key of a turn that tells whether it is learned.
const WEIGHT: &str = "weight";

/// Appends `messages` as one JSON line, in the form that `train` reads. Answers that were cut are not to be learned: nobody
/// wants an end in the middle of a sentence. Returns how many these are.
pub(super) fn append(path: &Path, messages: &[Message]) -> Result<usize> {
    let mut messages = messages.to_vec();
    let mut cut = 0;
    for message in messages.iter_mut().filter(|message| message.extra.contains_key(CUT)) {
        message.extra.insert(WEIGHT.to_owned(), 0.into());
        cut += 1;
    }
    let line = serde_json::json!({ "messages": messages });
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
    Ok(cut)
}

/// The conversation in the last line.
pub(super) fn last(path: &Path) -> Result<Vec<Message>> {
    let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    let wrong = |got: &str| {
        let message =
            format!("expected a last line of JSON with `messages`, as `/save` writes it, got {got}; name another file");
        Error::new(ErrorCode::Data, format!("`{}`", path.display()), message)
    };
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).ok_or_else(|| wrong("none"))?;
    let mut record: Map<String, Value> = serde_json::from_str(line).map_err(|e| wrong("another").caused_by(e))?;
    let messages = record.remove("messages").ok_or_else(|| wrong("one without them"))?;
    let mut messages: Vec<Message> = serde_json::from_value(messages).map_err(|e| wrong("others").caused_by(e))?;
    let known = |role: &str| matches!(role, "system" | "user" | "assistant" | "tool");
    if let Some(other) = messages.iter().find(|message| !known(&message.role)) {
        return Err(wrong(&format!("a turn of `{}`", other.role)));
    }
    for message in &mut messages {
        message.parse_arguments();
        message.extra.remove(WEIGHT);
    }
    if messages.is_empty() { Err(wrong("an empty conversation")) } else { Ok(messages) }
}

/// Whether the first line that is not blank is an object, if there is one.
fn is_empty_or_json_lines(file: &mut File) -> io::Result<bool> {
    let mut lines = io::BufReader::new(file.take(LINE));
    let mut line = Vec::new();
    while line.trim_ascii().is_empty() {
        line.clear();
        if lines.read_until(b'\n', &mut line)? == 0 {
            return Ok(true);
        }
    }
    Ok(serde_json::from_slice::<Map<String, Value>>(&line).is_ok())
}
