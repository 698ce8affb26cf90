//! All keys that a record may have, and what is done with each. A key that is in no table here is not used, which is said.

use super::json::{LISTS, Once, TWICE};
use super::{data_error, messages};
use crate::error::Result;
use serde_json::Value;

/// What a key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// A list of turns.
    Messages,
    /// What comes first, as text or turns.
    Prompt,
    /// What continues a prompt: learned.
    Completion,
    /// What is asked.
    Question,
    /// What an instruction is about.
    Input,
    /// What answers: learned.
    Answer,
    /// Learned from its first token on.
    Text,
    /// The system's turn.
    System,
    /// Earlier turns.
    History,
    /// Tools that may be called.
    Tools,
    /// The same in the older form, without `type`.
    Functions,
    /// Whether it is learned: 0 and 1, false and true.
    Weight,
    /// The other way around.
    Unlearned,
    /// Of an evaluation alone: options to choose from.
    Choices,
    /// Of an evaluation alone: a class.
    Label,
    /// Of an evaluation alone: a right answer.
    Reference,
    /// Of an evaluation alone: several right answers.
    References,
    /// Of an evaluation alone: words of which a right answer holds one.
    Expect,
    /// It would change what is learned and is not understood, for this reason.
    Refused(&'static str),
}

/// Keys of a record by their use. Letters' case, spaces, `_`, `-` and `.` do not count.
const RECORD: &[(Key, &[&str])] = &[
    (
        Key::Messages,
        &["messages", "conversations", "conversation", "dialog", "dialogue", "dialogs", "chat", "turns", "items"],
    ),
    (Key::Prompt, &["prompt"]),
    (Key::Completion, &["completion"]),
    (Key::Question, &["instruction", "question", "query", "problem"]),
    (Key::Question, ASKING),
    (
        Key::Input,
        &["input", "context", "passage", "background", "document", "paragraph", "article", "evidence", "knowledge"],
    ),
    (Key::Answer, &["output", "response", "answer", "solution", "reply", "target"]),
    (Key::Answer, ANSWERING),
    (Key::Text, &["text", "content"]),
    (
        Key::System,
        &[
            "system",
            "system_prompt",
            "system_message",
            "system_instruction",
            "sys_prompt",
            "sys",
            "developer",
            "preamble",
            "persona",
        ],
    ),
    (
        Key::History,
        &[
            "history",
            "chat_history",
            "conversation_history",
            "dialogue_history",
            "dialog_history",
            "message_history",
            "previous",
            "previous_turns",
            "past",
            "past_turns",
            "prior_turns",
        ],
    ),
    (Key::Tools, &["tools", "available_tools", "tool_definitions"]),
    (Key::Functions, &["functions"]),
    (Key::Weight, WEIGHT),
    (Key::Weight, &["sample_weights", "loss_weights"]),
    (Key::Unlearned, UNLEARNED),
    (Key::Choices, &["choices", "options"]),
    (Key::Label, &["label"]),
    (Key::Reference, &["reference"]),
    (Key::References, &["references"]),
    (Key::Expect, &["expect"]),
    (
        Key::Refused(NO_PREFERENCES),
        &["chosen", "rejected", "chosen_response", "rejected_response", "kto_tag", "preferred"],
    ),
    (Key::Refused(ONLY_TEXT), PICTURES),
    (Key::Refused(NO_MASKS), MASKS),
    (Key::Refused(NO_TOKENS), &["input_ids", "labels", "attention_mask", "token_ids"]),
    (
        Key::Refused(
            "write what the model shall think into the answer, or into `reasoning_content` of its turn in `messages`",
        ),
        &["reasoning", "reasoning_content", "thinking", "thought", "thoughts", "rationale", "chain_of_thought", "cot"],
    ),
    (
        Key::Refused("the template is the model's and is given no other settings"),
        &[
            "chat_template",
            "chat_template_kwargs",
            "enable_thinking",
            "add_generation_prompt",
            "continue_final_message",
        ],
    ),
    (Key::Refused("write documents into a turn"), &["documents"]),
    (Key::Refused("write it as `system` or as `instruction`, whichever it is"), &["instructions"]),
    (
        Key::Refused("texts with a gap are not learned; write a `prompt` and a `completion`"),
        &["prefix", "suffix", "middle"],
    ),
];

/// Roles that are keys of a question and its answer where both are there.
const ASKING: &[&str] = &["user", "human"];
const ANSWERING: &[&str] = &["assistant", "gpt", "bot"];

/// Keys that say whether a record or a turn is learned.
pub(super) const WEIGHT: &[&str] = &[
    "weight",
    "weights",
    "sample_weight",
    "loss_weight",
    "train",
    "training",
    "train_on",
    "trainable",
    "trained",
    "is_trained",
    "should_train",
    "learn",
    "loss",
    "loss_mask",
];
/// Keys that say whether it is not.
pub(super) const UNLEARNED: &[&str] = &["ignore", "skip", "no_train", "no_loss"];

/// Keys of turns that are refused; `messages` has those that are used, and the rest is shown to the template.
pub(super) const TURN: &[(&str, &[&str])] = &[
    (ONLY_TEXT, PICTURES),
    (NO_MASKS, MASKS),
    (NO_PREFERENCES, &["chosen", "rejected"]),
    ("what an answer begins with is learned as the rest of it is", &["prefix"]),
];

const PICTURES: &[&str] =
    &["image", "images", "image_url", "img", "video", "videos", "audio", "audios", "pixel_values"];
const MASKS: &[&str] = &[
    "mask",
    "masked",
    "is_masked",
    "train_detail",
    "training_detail",
    "segments",
    "train_on_input",
    "train_on_inputs",
    "mask_history",
];
const ONLY_TEXT: &str = "only text is learned";
const NO_MASKS: &str = "what is learned is told by `weight`, 0 or 1, of a turn";
const NO_TOKENS: &str = "tokens are made of text by the model's own tokenizer; write the text";
const NO_PREFERENCES: &str =
    "preferences are not learned from; keep the better answer alone, as `completion` or as a turn in `messages`";

/// Spelling that does not matter left out.
fn squeezed(key: &str) -> String {
    key.chars()
        .filter(|c| !matches!(c, ' ' | '\t' | '_' | '-' | '.' | '\u{feff}'))
        .flat_map(char::to_lowercase)
        .collect()
}

/// Whether two spellings are of one key.
pub(crate) fn same(a: &str, b: &str) -> bool {
    squeezed(a) == squeezed(b)
}

/// What the key is for.
fn find(key: &str) -> Option<Key> {
    let key = squeezed(key);
    RECORD.iter().find(|(_, names)| names.iter().any(|name| squeezed(name) == key)).map(|(key, _)| *key)
}

/// Whether a record is understood to have this key, be it refused.
pub(super) fn is_known(key: &str) -> bool {
    find(key).is_some()
}

/// Whether an object is a turn rather than a record.
pub(super) fn is_turn(object: &[(String, Value)]) -> bool {
    object.iter().any(|(key, _)| messages::ROLE.iter().any(|role| same(role, key)))
}

/// A value under the name that it has in the file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Named {
    pub name: String,
    pub value: Value,
}

impl Named {
    /// Its text.
    pub fn text(self) -> Result<String> {
        match self.value {
            Value::String(text) => Ok(text),
            other => {
                let next =
                    if matches!(other, Value::Array(_) | Value::Object(_)) { COLUMNS } else { "put it in quotes" };
                let message = format!("expected a text, got {}; {next}", kind(&other));
                Err(data_error(&self.name, message))
            }
        }
    }

    /// A list, an object, or either as JSON in a string, as tables and some data sets hold it.
    ///
    /// # Errors
    /// A key is given twice in it, or it is Python's notation.
    pub fn json(self) -> Result<Value> {
        let Value::String(text) = self.value else { return Ok(self.value) };
        match serde_json::from_str::<Once>(&text) {
            Ok(Once(value)) => Ok(value),
            Err(e) if e.to_string().contains(TWICE) => Err(data_error(&self.name, e.to_string()).caused_by(e)),
            Err(e) if ["[{'", "{'", "['"].iter().any(|start| text.trim_start().starts_with(start)) => {
                let message = "expected JSON, got Python's notation; write the column with `json.dumps`";
                Err(data_error(&self.name, message).caused_by(e))
            }
            Err(_) => Ok(Value::String(text)),
        }
    }
}

/// A record's keys by their use, without those that hold nothing.
#[derive(Clone, Debug)]
pub(crate) struct Fields {
    known: Vec<(Key, Named)>,
    /// Keys without a use.
    others: Vec<String>,
    /// What most likely is wrong where there is no form.
    hint: Option<String>,
}

impl Fields {
    /// # Errors
    /// A key is given twice.
    pub(crate) fn new(object: Vec<(String, Value)>) -> Result<Self> {
        let (mut known, mut others): (Vec<(Key, Named)>, Vec<String>) = (Vec::new(), Vec::new());
        // `user` alone may be whoever wrote the record.
        let has = |names: &[&str]| object.iter().any(|(key, _)| names.iter().any(|name| same(name, key)));
        let by_roles = has(ASKING) && has(ANSWERING);
        let hint = hint(&object);
        for (name, value) in object {
            if value.is_null() {
                continue;
            }
            let name = name.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}').to_owned();
            let role = ASKING.iter().chain(ANSWERING).any(|role| same(role, &name));
            match find(&name).filter(|key| if role { by_roles } else { is_meant(*key, &name, &value) }) {
                Some(key) => {
                    if let Some((_, first)) = known.iter().find(|(_, first)| same(&first.name, &name)) {
                        let message =
                            format!("expected each key once, got `{}` and `{name}`; take one out", first.name);
                        return Err(data_error("keys", message));
                    }
                    known.push((key, Named { name, value }));
                }
                None => others.push(name),
            }
        }
        Ok(Self { known, others, hint })
    }

    /// Takes the first value of that use.
    pub fn take(&mut self, key: Key) -> Option<Named> {
        let i = self.known.iter().position(|(k, _)| *k == key)?;
        Some(self.known.remove(i).1)
    }

    pub fn get(&self, key: Key) -> Option<&Named> {
        self.known.iter().find(|(k, _)| *k == key).map(|(_, named)| named)
    }

    pub fn has(&self, key: Key) -> bool {
        self.get(key).is_some()
    }

    /// Takes all weights, and whether what has them is learned.
    pub fn learned(&mut self) -> Result<bool> {
        let mut learned = true;
        for (key, if_true) in [(Key::Weight, true), (Key::Unlearned, false)] {
            while let Some(named) = self.take(key) {
                learned &= is_nothing(&named.value) || weight(&named)? == if_true;
            }
        }
        Ok(learned)
    }

    /// What is left.
    pub fn rest(&mut self) -> std::vec::Drain<'_, (Key, Named)> {
        self.known.drain(..)
    }

    /// What to do where there is no form.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// Keys without a use.
    pub fn others(&self) -> &[String] {
        &self.others
    }

    /// All names, for messages.
    pub fn names(&self) -> String {
        let names = self.known.iter().map(|(_, named)| &named.name).chain(&self.others);
        let names: Vec<String> = names
            .take(12)
            .map(|name| format!("`{}`", name.chars().take(40).collect::<String>().escape_debug()))
            .collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    }

    /// Whether there is something to learn or to ask, in whatever form.
    pub(super) fn have_a_form(&self) -> bool {
        let asked = self.has(Key::Prompt) || self.has(Key::Question) || self.has(Key::Input);
        let answered = [Key::Completion, Key::Answer, Key::Label, Key::Reference, Key::References, Key::Expect]
            .iter()
            .any(|k| self.has(*k));
        self.has(Key::Messages)
            || self.has(Key::Text)
            || asked && answered
            || self.known.iter().any(|(k, _)| matches!(k, Key::Refused(_)))
    }

    /// # Errors
    /// A key is refused, or is of an evaluation alone.
    pub fn refuse(&self) -> Result<()> {
        let reason = |key: Key| match key {
            Key::Refused(reason) => Some(reason),
            Key::Choices | Key::Label => {
                Some("it is of records that `eval` asks; the right answer is learned as a `completion` or an `output`")
            }
            _ => None,
        };
        for (key, named) in &self.known {
            if let Some(reason) = reason(*key).filter(|_| !is_harmless(&named.name, &named.value)) {
                let message = format!(
                    "this key would change what is learned and is not used: {reason}; take the key out of the file if it does \
                     not matter"
                );
                return Err(data_error(&format!("`{}`", named.name), message));
            }
        }
        Ok(())
    }
}

/// What a whole table in one object needs.
const COLUMNS: &str = "write one text; a whole table in one object is written record by record by \
                       `df.to_json('x.jsonl', orient='records', lines=True)`";

/// Advice for an object that holds records rather than being one.
fn hint(object: &[(String, Value)]) -> Option<String> {
    let has = |name: &str| object.iter().any(|(key, value)| same(key, name) && value.is_array());
    let numbered = |(key, value): &(String, Value)| key.parse::<u64>().is_ok() && value.is_object();
    if has("columns") && has("data") || !object.is_empty() && object.iter().all(numbered) {
        return Some(COLUMNS.to_owned());
    }
    object.iter().find_map(|(key, value)| match value {
        Value::Array(list) if list.is_empty() && LISTS.iter().any(|l| same(l, key)) => {
            Some(format!("the list under `{key}` is empty"))
        }
        Value::Array(list) if list.first().is_some_and(Value::is_object) => {
            Some(format!("there is a list under `{key}`: if it holds the records, write it alone into the file"))
        }
        Value::Object(inside) => inside.iter().find(|(_, v)| v.is_array()).map(|(name, _)| {
            format!("there is a list under `{key}` and in it `{name}`: if it holds the records, write it alone into the file")
        }),
        _ => None,
    })
}

/// Whether a name has the meaning of the table, which its value can tell.
fn is_meant(key: Key, name: &str, value: &Value) -> bool {
    let listed = || match value {
        Value::Array(list) => list.first().is_none_or(Value::is_object),
        Value::String(text) => text.trim_start().starts_with('['),
        _ => false,
    };
    match key {
        // The others are counts and names of conversations, too.
        Key::Messages if !["messages", "conversations"].iter().any(|n| same(n, name)) => listed(),
        // What a model thinks of a record is a number, too.
        Key::Weight if same("loss", name) => truth(value).is_some(),
        // Numbers are those of the documents or turns.
        Key::Input if !["input", "context"].iter().any(|n| same(n, name)) => !value.is_number(),
        Key::History if !same("history", name) => !value.is_number(),
        Key::Text if same("content", name) => value.is_string(),
        _ => true,
    }
}

/// Empty texts, lists and objects say nothing.
pub(crate) fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// Whether a key that is refused would change nothing with this value.
pub(super) fn is_harmless(name: &str, value: &Value) -> bool {
    // What a `mask` that is false leaves out is open; the others ask for something.
    is_nothing(value) || *value == Value::Bool(false) && !same(name, "mask") && !same(name, "label")
}

/// A truth value, however it is written.
fn truth(value: &Value) -> Option<bool> {
    let text = match value {
        Value::String(text) => text.trim().to_ascii_lowercase(),
        other => other.to_string(),
    };
    match text.as_str() {
        "0" | "0.0" | "false" => Some(false),
        "1" | "1.0" | "true" => Some(true),
        _ => None,
    }
}

/// Whether what has this weight is learned.
pub(super) fn weight(named: &Named) -> Result<bool> {
    match truth(&named.value) {
        Some(truth) => Ok(truth),
        None => {
            let got: String = named.value.to_string().chars().take(40).collect();
            let message = format!(
                "expected 0 or 1, false or true, got `{got}`; other weights are not used: round it, or take the key out"
            );
            Err(data_error(&format!("`{}`", named.name), message))
        }
    }
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
