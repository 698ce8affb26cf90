//! The forms a line of data may have.

use super::data_error;
use crate::chat::Message;
use crate::error::Result;
use serde::Deserialize;
use serde_json::{Map, Value};

/// A line, row or file, not yet tokenized.
#[derive(Debug)]
pub(super) enum Record {
    /// A conversation, of which the answers from turn `from` on are learned.
    Chat { messages: Vec<Message>, tools: Option<Value>, from: usize },
    /// An instruction with perhaps an input, and the answer.
    Instruction { instruction: String, input: String, output: String },
    /// A text, learned from byte `start` on.
    Text { text: String, start: usize },
}

impl Record {
    /// Reads the known keys of an object; other keys are ignored, and so are those that are null.
    pub(super) fn new(mut keys: Map<String, Value>) -> Result<Self> {
        keys.retain(|_, value| !value.is_null());
        let tools = keys.remove("tools").map(tools).transpose()?.flatten();
        if let Some(list) = keys.remove("messages") {
            return Ok(Self::Chat { messages: messages("messages", list)?, tools, from: 0 });
        }
        if let (Some(prompt), Some(completion)) = (keys.remove("prompt"), keys.remove("completion")) {
            return prompt_completion(prompt, completion, tools);
        }
        if let (Some(instruction), Some(output)) = (keys.remove("instruction"), keys.remove("output")) {
            let input = keys.remove("input").map_or_else(|| Ok(String::new()), |v| text("input", v))?;
            let (instruction, output) = (text("instruction", instruction)?, text("output", output)?);
            return Ok(Self::Instruction { instruction, input, output });
        }
        match keys.remove("text") {
            Some(value) => Ok(Self::Text { text: text("text", value)?, start: 0 }),
            None => Err(data_error(
                "keys",
                "expected `messages`, `prompt` and `completion`, `instruction` and `output`, or `text`, got none of \
                 these; rename the keys",
            )),
        }
    }
}

fn prompt_completion(prompt: Value, completion: Value, tools: Option<Value>) -> Result<Record> {
    match (prompt, completion) {
        (Value::String(prompt), Value::String(completion)) => {
            let start = prompt.len();
            Ok(Record::Text { text: prompt + &completion, start })
        }
        (prompt @ Value::Array(_), completion @ Value::Array(_)) => {
            let mut all = messages("prompt", prompt)?;
            let from = all.len();
            all.extend(messages("completion", completion)?);
            Ok(Record::Chat { messages: all, tools, from })
        }
        _ => Err(data_error(
            "prompt",
            "expected `prompt` and `completion` to be both texts or both lists of messages, got something else; give \
             both the same form",
        )),
    }
}

/// Tools are a list, or, as some data sets keep them, that list as JSON in a string.
fn tools(value: Value) -> Result<Option<Value>> {
    let value = match value {
        Value::String(text) if text.trim().is_empty() => return Ok(None),
        Value::String(text) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        other => other,
    };
    match value {
        Value::Array(list) if list.is_empty() => Ok(None),
        Value::Array(_) => Ok(Some(value)),
        other => Err(data_error("tools", format!("expected a list of tools, got {}; write a list", kind(&other)))),
    }
}

/// Messages are a list, or that list as JSON in a string, as a table holds it.
fn messages(key: &str, value: Value) -> Result<Vec<Message>> {
    let value = match value {
        Value::String(text) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        other => other,
    };
    let got = kind(&value);
    let mut list = Vec::<Message>::deserialize(value).map_err(|e| {
        let message = format!("expected a list of messages with `role` and `content`, got {got}: {e}; correct it");
        data_error(key, message).caused_by(e)
    })?;
    list.iter_mut().for_each(Message::parse_arguments);
    Ok(list)
}

fn text(key: &str, value: Value) -> Result<String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(data_error(key, format!("expected a text, got {}; put it in quotes", kind(&other)))),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
