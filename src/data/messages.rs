//! Turns of a conversation, by whatever names their parts go.

use super::keys::{self, Fields, Key, Named, kind, same};
use super::{Unused, data_error};
use crate::chat::{CUT, Message};
use crate::error::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// Keys of who speaks.
pub(super) const ROLE: &[&str] = &["role", "from", "speaker"];
/// Keys of what is said.
const CONTENT: &[&str] = &["content", "value", "text"];
/// Keys that templates know, and the mark of our own; all others are shown to the template, too, and said not to be used.
const PASSED: [&str; 11] = [
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
    "tool_plan",
    "tools",
    "documents",
    "citations",
    CUT,
];

/// Names of roles, and the one that templates know.
const ROLES: [(&str, &[&str]); 6] = [
    ("system", &["system", "sys"]),
    ("developer", &["developer"]),
    ("user", &["user", "human", "prompter"]),
    ("assistant", &["assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai", "bing", "bard", "claude", "llm"]),
    (
        "tool",
        &["tool", "function", "observation", "tool_response", "function_response", "tool_result", "function_output"],
    ),
    ("ipython", &["ipython"]),
];
/// A turn of the assistant whose content is its calls of tools.
const CALLS: [&str; 2] = ["function_call", "tool_call"];

/// The role that templates know a speaker by.
fn role(name: &str) -> Option<&'static str> {
    ROLES.iter().find(|(_, names)| names.iter().any(|n| same(n, name.trim()))).map(|(role, _)| *role)
}

/// Messages are a list, or that list as JSON in a string.
pub(crate) fn messages(list: Named, unused: &mut Unused) -> Result<Vec<Message>> {
    let name = list.name.clone();
    let turns = match list.json()? {
        Value::Array(turns) => turns,
        other => {
            let message =
                format!("expected a list of messages with `role` and `content`, got {}; correct it", kind(&other));
            return Err(data_error(&name, message));
        }
    };
    let (mut out, mut not_used) = (Vec::with_capacity(turns.len()), BTreeSet::new());
    for (i, turn) in turns.into_iter().enumerate() {
        let wrong = |e: Error| e.at(format_args!("{name}, turn {}", i + 1));
        match turn {
            Value::Object(keys) => read(keys, &mut out, &mut not_used).map_err(wrong)?,
            other => {
                let message = format!(
                    "expected a list of messages with `role` and `content`, got {} in it; correct it",
                    kind(&other)
                );
                return Err(wrong(data_error("turn", message)));
            }
        }
    }
    not_used.iter().for_each(|key| unused.key(&format!("messages.{key}")));
    Ok(out)
}

/// Earlier turns: pairs of a question and its answer, or messages.
pub(super) fn history(list: Named, unused: &mut Unused) -> Result<Vec<Message>> {
    let name = list.name.clone();
    let value = list.json()?;
    let pairs = match &value {
        Value::Array(items) if items.iter().all(Value::is_object) => return messages(Named { name, value }, unused),
        Value::Array(items) => items.iter().map(|item| match item.as_array().map(Vec::as_slice) {
            Some([Value::String(question), Value::String(answer)]) => Some((question, answer)),
            _ => None,
        }),
        _ => {
            return Err(data_error(
                &name,
                "expected a list of earlier turns, got something else; write pairs of a question and an answer",
            ));
        }
    };
    let pairs: Option<Vec<_>> = pairs.collect();
    let pairs = pairs.ok_or_else(|| {
        data_error(&name, "expected pairs of two texts, a question and its answer, got something else; correct it")
    })?;
    Ok(pairs.into_iter().flat_map(|(q, a)| [Message::new("user", q), Message::new("assistant", a)]).collect())
}

/// Puts the system's turn first.
///
/// # Errors
/// There is one that says something else.
pub(crate) fn add_system(system: Named, messages: &mut Vec<Message>) -> Result<bool> {
    let name = format!("`{}`", system.name);
    let text = system.text()?;
    let first = messages.first().filter(|m| matches!(m.role.as_str(), "system" | "developer"));
    match first.map(|m| m.content.as_deref().unwrap_or_default()) {
        Some(said) if said.trim() == text.trim() => Ok(false),
        Some(_) => Err(data_error(
            &name,
            "expected it to say the same as the system's turn in the messages, got another text; keep one of the two",
        )),
        None => {
            messages.insert(0, Message::new("system", text));
            Ok(true)
        }
    }
}

/// One item of a list: a turn, or a question with its answer.
fn read(keys: Map<String, Value>, out: &mut Vec<Message>, not_used: &mut BTreeSet<String>) -> Result<()> {
    let is = |names: &[&str], key: &str| names.iter().any(|name| same(name, key));
    if !keys.keys().any(|key| is(ROLE, key)) {
        return pair(keys, out, not_used);
    }
    let (mut speaker, mut content, mut weight, mut unlearned) = (None, None, None, None);
    let mut extra = Map::new();
    for (name, value) in keys {
        if value.is_null() {
            continue;
        }
        let slot = match () {
            () if is(ROLE, &name) => &mut speaker,
            () if is(CONTENT, &name) => &mut content,
            () if is(keys::WEIGHT, &name) => &mut weight,
            () if is(keys::UNLEARNED, &name) => &mut unlearned,
            () => {
                if let Some((reason, _)) =
                    keys::TURN.iter().find(|(_, names)| is(names, &name)).filter(|_| !keys::is_harmless(&name, &value))
                {
                    let message = format!(
                        "this key would change what is learned and is not used: {reason}; take it out if it does not matter"
                    );
                    return Err(data_error(&format!("`{name}`"), message));
                }
                match PASSED.iter().find(|known| same(known, &name)) {
                    Some(known) => drop(extra.insert((*known).to_owned(), value)),
                    None if same("function_call", &name) => drop(extra.insert("tool_calls".to_owned(), calls(value)?)),
                    None => {
                        not_used.insert(name.clone());
                        extra.insert(name, value);
                    }
                }
                continue;
            }
        };
        if let Some(Named { name: first, .. }) = slot.replace(Named { name: name.clone(), value }) {
            return Err(data_error("keys", format!("expected one of `{first}` and `{name}`, got both; take one out")));
        }
    }
    let speaker =
        speaker.ok_or_else(|| data_error("`role`", "expected who speaks, got nothing; correct it"))?.text()?;
    let content = content.map(|c: Named| c.value);
    content.iter().try_for_each(parts_alike)?;
    let (role, content) = match role(&speaker) {
        Some(role) => (role, content),
        None if is(&CALLS, &speaker) => {
            extra.insert("tool_calls".to_owned(), calls(content.unwrap_or_default())?);
            ("assistant", None)
        }
        None => {
            let known: Vec<String> =
                ROLES.iter().flat_map(|(_, names)| names.iter()).chain(&CALLS).map(|n| format!("`{n}`")).collect();
            let got: String = speaker.chars().take(40).collect();
            let message =
                format!("expected one of {}, got `{}`; rename the role", known.join(", "), got.escape_debug());
            return Err(data_error("`role`", message));
        }
    };
    if let Some(Value::String(text)) = extra.get("tool_calls") {
        let parsed = serde_json::from_str(text).map_err(|e| {
            data_error("`tool_calls`", format!("expected a list of calls, got a text that is no JSON: {e}; correct it"))
                .caused_by(e)
        })?;
        extra.insert("tool_calls".to_owned(), parsed);
    }
    let mut message = Map::from_iter([("role".to_owned(), role.into())]);
    message.extend(content.map(|content| ("content".to_owned(), content)));
    message.extend(extra);
    let mut message = Message::deserialize(Value::Object(message))
        .map_err(|e| data_error("`content`", e.to_string()).caused_by(e))?;
    message.parse_arguments();
    if let Some(weight) = weight.filter(|w| !keys::is_nothing(&w.value)) {
        message.learned = keys::weight(&weight)?;
        if message.learned && role != "assistant" {
            let message = format!(
                "only the assistant's turns are learned, and this is one of `{role}`; write 0 or false, or take the key out"
            );
            return Err(data_error(&format!("`{}`", weight.name), message));
        }
    }
    let unlearned = unlearned.filter(|w: &Named| !keys::is_nothing(&w.value));
    message.learned &= !unlearned.map_or(Ok(false), |w| keys::weight(&w))?;
    if role == "assistant" && message.content.is_none() && !calls_tools(&message) {
        return Err(data_error("`content`", "expected what is said, got nothing; write it, or take the turn out"));
    }
    out.push(message);
    Ok(())
}

/// Whether a turn has calls of tools.
fn calls_tools(message: &Message) -> bool {
    message.extra.get("tool_calls").is_some_and(|calls| !keys::is_nothing(calls))
}

/// Whether a turn would teach to say nothing.
pub(super) fn is_silent(message: &Message) -> bool {
    message.role == "assistant"
        && message.learned
        && !calls_tools(message)
        && message.content.as_deref().is_none_or(|text| text.trim().is_empty())
}

/// Parts of a turn are learned together: a weight of one alone must change nothing.
fn parts_alike(content: &Value) -> Result<()> {
    let is = |names: &[&str], key: &str| names.iter().any(|name| same(name, key));
    for (name, value) in content.as_array().into_iter().flatten().filter_map(Value::as_object).flatten() {
        let named = || Named { name: name.clone(), value: value.clone() };
        let changes = match () {
            () if keys::is_nothing(value) => false,
            () if is(keys::WEIGHT, name) => !keys::weight(&named())?,
            () if is(keys::UNLEARNED, name) => keys::weight(&named())?,
            // The first are pictures, which are no text.
            () => keys::TURN.iter().skip(1).any(|(_, names)| is(names, name)) && !keys::is_harmless(name, value),
        };
        if changes {
            let message =
                "the parts of a turn are learned together; give the whole turn a `weight`, or take the key out";
            return Err(data_error(&format!("`{name}` of a part of `content`"), message));
        }
    }
    Ok(())
}

/// A question with its answer, and perhaps the system's turn, in one item.
fn pair(keys: Map<String, Value>, out: &mut Vec<Message>, not_used: &mut BTreeSet<String>) -> Result<()> {
    let names: Vec<String> =
        keys.keys().take(12).map(|k| format!("`{}`", k.chars().take(40).collect::<String>())).collect();
    let mut fields = Fields::new(keys.into_iter().collect())?;
    fields.refuse()?;
    let question = fields.take(Key::Question).or_else(|| fields.take(Key::Prompt)).or_else(|| fields.take(Key::Input));
    let answer = fields.take(Key::Answer).or_else(|| fields.take(Key::Completion));
    let (Some(question), Some(answer)) = (question, answer) else {
        let message = format!(
            "expected `role` (or `from`) and `content` (or `value`), got {}; rename the keys",
            names.join(", ")
        );
        return Err(data_error("keys", message));
    };
    if let Some(system) = fields.take(Key::System).filter(|s| !keys::is_nothing(&s.value)) {
        out.push(Message::new("system", system.text()?));
    }
    let learned = fields.learned()?;
    if let Some((_, named)) = fields.rest().find(|(_, named)| !keys::is_nothing(&named.value)) {
        return Err(data_error(
            &format!("`{}`", named.name),
            "a question and its answer are read here, and nothing is done with this key; take it out",
        ));
    }
    not_used.extend(fields.others().iter().cloned());
    out.push(Message::new("user", question.text()?));
    out.push(Message { learned, ..Message::new("assistant", answer.text()?) });
    Ok(())
}

/// Calls of tools as messages hold them: from one call, or a list, or either as JSON in a string; each with or without
/// `type` and `function`.
fn calls(value: Value) -> Result<Value> {
    let value = Named { name: "calls".to_owned(), value }.json()?;
    let one = |call: Value| match call.get("function").is_some() {
        true => Ok(call),
        false if call.get("name").is_some_and(Value::is_string) => Ok(json!({ "type": "function", "function": call })),
        false => Err(data_error(
            "`function_call`",
            "expected an object with `name` and `arguments`, or a list of them, got something else; correct it",
        )),
    };
    match value {
        Value::Array(list) => Ok(Value::Array(list.into_iter().map(one).collect::<Result<_>>()?)),
        call => Ok(Value::Array(vec![one(call)?])),
    }
}
