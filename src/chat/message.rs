//! One turn of a conversation.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// Key of a turn that was cut before its end, with the value true.
pub const CUT: &str = "cut";

/// One turn. Keys that only some templates know (tool calls, names) are passed through.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`.
    pub role: String,
    /// Its text, also where it was given as a list of text parts; absent where a turn only calls tools.
    /// Templates do not see that it is absent or null (transformers leaves nulls out, too), so that they print nothing for it.
    #[serde(default, deserialize_with = "text_of", skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Anything else that is not null.
    #[serde(flatten, deserialize_with = "given")]
    pub extra: Map<String, Value>,
    /// Whether it is learned, where it is an assistant's turn; templates do not see it.
    #[serde(skip, default = "learned")]
    pub learned: bool,
}

/// Turns are learned unless the data says otherwise.
fn learned() -> bool {
    true
}

impl Message {
    /// A turn of plain text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into()), extra: Map::new(), learned: true }
    }

    /// Makes objects of the arguments of tool calls that are written as JSON in a string, as some services write them:
    /// templates print objects and would quote such a string once more.
    pub fn parse_arguments(&mut self) {
        let calls = self.extra.get_mut("tool_calls").and_then(Value::as_array_mut);
        for call in calls.into_iter().flatten() {
            let arguments = match call.get("function").is_some() {
                true => call["function"].get_mut("arguments"),
                false => call.get_mut("arguments"),
            };
            let Some(arguments) = arguments else { continue };
            let parsed = arguments.as_str().and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok());
            if let Some(object) = parsed {
                *arguments = Value::Object(object);
            }
        }
    }
}

/// Without nulls, which data sets have for keys that a turn lacks.
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Map<String, Value>, D::Error> {
    let mut keys = Map::deserialize(deserializer)?;
    keys.retain(|_, value| !value.is_null());
    Ok(keys)
}

/// Text, nothing, or a list of text parts, which are joined.
fn text_of<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let part = |part: &Value| match (part, part.get("text")) {
        (Value::String(text), _) | (_, Some(Value::String(text))) => Ok(text.clone()),
        _ => {
            let kind = part.get("type").map_or_else(|| "no `type`".to_owned(), Value::to_string);
            Err(D::Error::custom(format!("expected `content` to hold text parts, got one of {kind}; keep only text")))
        }
    };
    match Value::deserialize(deserializer)? {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text)),
        Value::Array(parts) => Ok(Some(parts.iter().map(part).collect::<Result<String, _>>()?)),
        _ => Err(D::Error::custom("expected `content` to be text or a list of text parts, got something else")),
    }
}
