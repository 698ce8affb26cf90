//! Where a model keeps its chat templates.

use crate::error::{Error, Result};
use crate::format::foreign;
use crate::tokenizer::read_json;
use serde_json::{Map, Value};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Name of the template for conversations without tools, and of one that is alone.
pub(super) const DEFAULT: &str = "default";
/// Name of the template for conversations with tools.
pub(super) const TOOL_USE: &str = "tool_use";
/// Most templates in a folder; published models have up to three.
const MAX_TEMPLATES: usize = 64;

/// Templates by their names.
type Named = Vec<(String, String)>;

/// The templates in `dir` and the file that they come from. Files of their own count before `tokenizer_config.json`, as in
/// transformers.
pub(super) fn find(dir: &Path) -> Result<Option<(Named, PathBuf)>> {
    let mut own = additional(&dir.join("additional_chat_templates"))?;
    let file = dir.join("chat_template.jinja");
    own.extend(read(&file)?.map(|text| (DEFAULT.to_owned(), text)));
    if !own.is_empty() {
        return Ok(Some((own, file)));
    }
    // Processors of models that see or hear keep theirs in a file of its own, which counts last.
    for name in ["tokenizer_config.json", "chat_template.json"] {
        let path = dir.join(name);
        if let Some(templates) = templates_of(&read_json(&path)?, &path)? {
            return Ok(Some((templates, path)));
        }
    }
    Ok(None)
}

fn additional(dir: &Path) -> Result<Named> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("list", dir, e)),
    };
    let mut named = Vec::new();
    for entry in entries.take(MAX_TEMPLATES) {
        let path = entry.map_err(|e| Error::io("list", dir, e))?.path();
        let name = path.file_stem().and_then(|n| n.to_str()).map(str::to_owned);
        if let (Some(name), true) = (name, path.extension().is_some_and(|e| e == "jinja")) {
            named.extend(read(&path)?.map(|text| (name, text)));
        }
    }
    named.sort_unstable();
    Ok(named)
}

fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => {
            // A pointer or a page would be a template that never mentions the messages.
            foreign::check(path, text.as_bytes(), "a chat template")?;
            // Editors of another system begin a file with a mark that is no text.
            Ok(Some(text.strip_prefix('\u{feff}').map_or_else(|| text.clone(), str::to_owned)))
        }
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("read", path, e)),
    }
}

/// `chat_template` is a string, or named ones: a list of objects with `name` and `template`, or an object.
fn templates_of(config: &Map<String, Value>, path: &Path) -> Result<Option<Named>> {
    let unusable = || Error::format(path, "chat_template", "a string or a list of named ones", "something else");
    let text = |name: &str, text: &Value| {
        let text = text.as_str().ok_or_else(unusable)?;
        Ok((name.to_owned(), text.to_owned()))
    };
    let named: Named = match config.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(list)) => {
            let one = |t: &Value| {
                let name = t.get("name").and_then(Value::as_str).ok_or_else(unusable)?;
                text(name, t.get("template").ok_or_else(unusable)?)
            };
            list.iter().map(one).collect::<Result<_>>()?
        }
        Some(Value::Object(map)) => map.iter().map(|(name, t)| text(name, t)).collect::<Result<_>>()?,
        Some(one) => vec![text(DEFAULT, one)?],
    };
    if named.is_empty() { Err(unusable()) } else { Ok(Some(named)) }
}
