//! The forms a record of data may have.

use super::keys::{self, Fields, Key, Named, kind};
use super::{Unused, data_error, messages};
use crate::chat::Message;
use crate::error::Result;
use serde_json::{Value, json};

/// A line, row or file, not yet tokenized.
#[derive(Debug)]
pub(crate) enum Record {
    /// A conversation, of which the answers from turn `from` on are learned.
    Chat { messages: Vec<Message>, tools: Option<Value>, from: usize },
    /// An instruction with perhaps an input, and the answer.
    Instruction { instruction: String, input: String, output: String },
    /// A text, learned from byte `start` on.
    Text { text: String, start: usize },
}

/// Text that is told twice at this length is no accident, in characters.
const SURELY_THE_SAME: usize = 16;

impl Record {
    /// Reads an object. There is no record where all that could be learned has the weight 0.
    ///
    /// # Errors
    /// It has none of the forms, two that differ, or a key that cannot be honoured.
    pub(crate) fn new(mut fields: Fields, unused: &mut Unused) -> Result<Option<Self>> {
        fields.refuse()?;
        let given = |named: &Named| !keys::is_nothing(&named.value);
        let learned = fields.learned()?;
        let names = fields.names();
        let system = fields.take(Key::System).filter(given).map(plain);
        let history = fields.take(Key::History).filter(given);
        let tools = tools(&mut fields)?;
        let mut record = match form(&mut fields, unused)? {
            Some(record) => record,
            None => return Err(no_form(&fields, &names)),
        };
        if learned {
            record.must_say_something()?;
        }
        let asked = matches!(record, Self::Instruction { .. });
        if history.is_some() || system.is_some() || tools.is_some() {
            record = record.into_chat();
        }
        match &mut record {
            Self::Chat { messages, from, tools: shown } => {
                *shown = tools;
                if let Some(history) = history {
                    if !asked {
                        return Err(misplaced(
                            &history,
                            "the messages are the whole conversation; write the earlier turns into them",
                        ));
                    }
                    let name = history.name.clone();
                    let earlier = messages::history(history, unused)?;
                    if learned && earlier.iter().any(messages::is_silent) {
                        return Err(silent(&name));
                    }
                    messages.splice(0..0, earlier);
                }
                if let Some(system) = system {
                    let added = messages::add_system(system, messages)?;
                    *from += usize::from(added && *from > 0);
                }
            }
            _ => {
                if let Some(given) = [system, history].into_iter().flatten().next() {
                    return Err(misplaced(&given, "a text has no turns; write it into the text, or write `messages`"));
                }
                if tools.is_some() {
                    let tools = Named { name: "tools".to_owned(), value: Value::Null };
                    return Err(misplaced(
                        &tools,
                        "a text has no tools; write them into the text, or write `messages`",
                    ));
                }
            }
        }
        fields.others().iter().for_each(|key| unused.key(key));
        let nothing = match &record {
            Self::Chat { messages, from, .. } => {
                let mut answers = messages[*from..].iter().filter(|m| m.role == "assistant").peekable();
                answers.peek().is_some() && answers.all(|m| !m.learned)
            }
            _ => false,
        };
        if !learned || nothing {
            unused.records += 1;
            return Ok(None);
        }
        Ok(Some(record))
    }

    /// # Errors
    /// An answer or a text is empty.
    fn must_say_something(&self) -> Result<()> {
        match self {
            Self::Chat { messages, from, .. } => {
                match (*from..messages.len()).find(|i| messages::is_silent(&messages[*i])) {
                    Some(i) => Err(silent(&format!("turn {}", i + 1))),
                    None => Ok(()),
                }
            }
            Self::Instruction { output, .. } if output.trim().is_empty() => Err(silent("answer")),
            Self::Text { text, start } if text[*start..].trim().is_empty() => {
                Err(silent(if *start > 0 { "completion" } else { "text" }))
            }
            _ => Ok(()),
        }
    }

    /// An instruction as a conversation.
    pub(crate) fn into_chat(self) -> Self {
        match self {
            Self::Instruction { instruction, input, output } => {
                let question = if input.is_empty() { instruction } else { format!("{instruction}\n\n{input}") };
                let messages = vec![Message::new("user", question), Message::new("assistant", output)];
                Self::Chat { messages, tools: None, from: 0 }
            }
            other => other,
        }
    }
}

/// Finds the form and takes its keys; what is left must tell nothing else.
fn form(fields: &mut Fields, unused: &mut Unused) -> Result<Option<Record>> {
    let record = if let Some(list) = fields.take(Key::Messages) {
        Record::Chat { messages: messages::messages(list, unused)?, tools: None, from: 0 }
    } else if fields.has(Key::Prompt) && fields.has(Key::Completion) {
        let (prompt, completion) = (fields.take(Key::Prompt), fields.take(Key::Completion));
        prompt_completion(prompt.expect("looked for"), completion.expect("looked for"), unused)?
    } else if let Some((question, answer)) = question_answer(fields, unused)? {
        let input = fields.take(Key::Input).map_or_else(|| Ok(String::new()), Named::text)?;
        let (instruction, output) = (question.text()?, answer.text()?);
        match (instruction.trim().is_empty(), input.trim().is_empty()) {
            (_, true) => Record::Instruction { instruction, input: String::new(), output },
            (true, false) => Record::Instruction { instruction: input, input: String::new(), output },
            (false, false) => Record::Instruction { instruction, input, output },
        }
    } else if fields.has(Key::Text) && !fields.others().iter().any(|key| keys::same(key, "role")) {
        Record::Text { text: fields.take(Key::Text).expect("looked for").text()?, start: 0 }
    } else {
        return Ok(None);
    };
    for (key, named) in fields.rest() {
        if matches!(key, Key::Reference | Key::References | Key::Expect)
            || keys::is_nothing(&named.value)
            || is_told(&record, &named.value)
        {
            unused.key(&named.name);
            continue;
        }
        if matches!(key, Key::Refused(_) | Key::Choices | Key::Label) {
            continue;
        }
        return Err(misplaced(
            &named,
            "the record has another form beside, which does not tell the same; keep one of the two",
        ));
    }
    Ok(Some(record))
}

/// A question and its answer under two of their names. Where two names are there for one of them, they must tell the same.
fn question_answer(fields: &mut Fields, unused: &mut Unused) -> Result<Option<(Named, Named)>> {
    let asked = fields.has(Key::Question) || fields.has(Key::Prompt) || fields.has(Key::Input);
    let answered = fields.has(Key::Answer) || fields.has(Key::Completion);
    if !asked || !answered {
        return Ok(None);
    }
    let question = fields.take(Key::Question).or_else(|| fields.take(Key::Prompt)).or_else(|| fields.take(Key::Input));
    let mut answer = fields.take(Key::Answer).or_else(|| fields.take(Key::Completion)).expect("looked for");
    // Data of mathematics has the way to a result as its solution, and the bare result beside it as the answer.
    while let Some(other) = fields.get(Key::Answer) {
        let (Some(one), Some(two)) = (answer.value.as_str(), other.value.as_str()) else { break };
        let is = |named: &Named, name: &str| keys::same(&named.name, name);
        let dropped =
            if one.trim() == two.trim() || is(&answer, "solution") && is(other, "answer") && one.contains(two.trim()) {
                other.name.clone()
            } else if is(&answer, "answer") && is(other, "solution") && two.contains(one.trim()) {
                std::mem::replace(&mut answer, other.clone()).name
            } else {
                break;
            };
        fields.take(Key::Answer);
        unused.key(&dropped);
    }
    Ok(question.map(|question| (question, answer)))
}

fn prompt_completion(prompt: Named, completion: Named, unused: &mut Unused) -> Result<Record> {
    let list = |named: &Named| match &named.value {
        Value::Array(_) => true,
        // A list in a string, as tables hold it.
        Value::String(text) if text.trim_start().starts_with("[{") => {
            serde_json::from_str::<Vec<serde_json::Map<String, Value>>>(text).is_ok()
        }
        _ => false,
    };
    match (list(&prompt), list(&completion)) {
        (false, false) if prompt.value.is_string() && completion.value.is_string() => {
            let prompt = prompt.text()?;
            Ok(Record::Text { start: prompt.len(), text: prompt + &completion.text()? })
        }
        (true, true) => {
            let mut all = messages::messages(prompt, unused)?;
            let from = all.len();
            all.extend(messages::messages(completion, unused)?);
            Ok(Record::Chat { messages: all, tools: None, from })
        }
        _ => {
            let message = format!(
                "expected `prompt` and `completion` to be both texts or both lists of messages, got {} and {}; give both the same form, and write a table record by record: \
                 `df.to_json('x.jsonl', orient='records', lines=True)`",
                kind(&prompt.value),
                kind(&completion.value)
            );
            Err(data_error("prompt", message))
        }
    }
}

/// Whether the record tells what `value` does: a part of it once more, or all of it in another layout.
fn is_told(record: &Record, value: &Value) -> bool {
    let Value::String(text) = value else { return false };
    let text = text.trim();
    let parts: Vec<&str> = match record {
        Record::Chat { messages, .. } => messages.iter().filter_map(|m| m.content.as_deref()).collect(),
        Record::Instruction { instruction, input, output } => vec![instruction, input, output],
        Record::Text { text, start } => vec![&text[..*start], &text[*start..]],
    };
    let parts: Vec<&str> = parts.into_iter().map(str::trim).filter(|part| !part.is_empty()).collect();
    let again = |part: &&str| *part == text || text.chars().count() >= SURELY_THE_SAME && part.contains(text);
    parts.iter().any(again) || !parts.is_empty() && parts.iter().all(|part| text.contains(part))
}

/// Tools are a list, or that list as JSON in a string; older data lists functions.
fn tools(fields: &mut Fields) -> Result<Option<Value>> {
    let mut found = None;
    for key in [Key::Tools, Key::Functions] {
        let Some(named) = fields.take(key).filter(|named| !keys::is_nothing(&named.value)) else { continue };
        let name = named.name.clone();
        match named.json()? {
            Value::Array(list) if list.is_empty() => continue,
            Value::Array(list) if found.is_none() => {
                let function =
                    |f: Value| if f.get("type").is_some() { f } else { json!({ "type": "function", "function": f }) };
                let list = if key == Key::Functions { list.into_iter().map(function).collect() } else { list };
                found = Some(Value::Array(list));
            }
            Value::Array(_) => return Err(data_error(&name, "expected one list of tools, got two; keep one")),
            other => {
                return Err(data_error(&name, format!("expected a list of tools, got {}; write a list", kind(&other))));
            }
        }
    }
    Ok(found)
}

/// A system's text, also where it is a turn or the only item of a list.
fn plain(mut system: Named) -> Named {
    loop {
        system.value = match system.value {
            Value::Array(mut list) if list.len() == 1 => list.remove(0),
            Value::Object(mut turn)
                if turn.len() == 2
                    && turn.get("role").is_some_and(|r| r == "system")
                    && turn.contains_key("content") =>
            {
                turn.remove("content").unwrap_or_default()
            }
            other => {
                system.value = other;
                return system;
            }
        };
    }
}

fn silent(item: &str) -> crate::Error {
    let message =
        "expected something to learn, got nothing or only spaces; write it, take it out, or give it the `weight` 0";
    data_error(item, message)
}

fn misplaced(named: &Named, why: &str) -> crate::Error {
    data_error(
        &format!("`{}`", named.name),
        format!("this key would change what is learned and cannot be used here: {why}"),
    )
}

fn no_form(fields: &Fields, names: &str) -> crate::Error {
    let has = |name: &str| fields.others().iter().any(|key| keys::same(key, name));
    let next = if has("role") || has("from") {
        "this is a turn: put the turns of a conversation into a list under `messages`"
    } else {
        fields.hint().unwrap_or("rename the keys")
    };
    let message = format!(
        "expected `messages` or `conversations`, `prompt` and `completion`, `instruction` (or `question`) and `output` (or \
         `response`, `answer`), or `text`, got {names}; {next}"
    );
    data_error("keys", message)
}
