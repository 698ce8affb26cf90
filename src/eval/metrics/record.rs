//! Lines of a file that asks a model and knows the answers.

use super::tasks::Metric;
use crate::chat::Message;
use crate::data::keys::{self, Fields, Key, Named};
use crate::data::{self, Entry, Purpose, Unused, data_error, messages, record::Record as Sample};
use crate::error::{Error, ErrorCode, Result};
use serde_json::Value;
use std::path::Path;

/// What the model reads.
#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    /// Text that it continues.
    Text(String),
    /// A conversation that it answers, through the chat template.
    Chat(Vec<Message>),
}

/// What the right answer is.
#[derive(Clone, Debug, PartialEq)]
pub enum Expected {
    /// One of several options.
    Choice {
        /// The options, two at least.
        choices: Vec<String>,
        /// Index of the right one.
        answer: usize,
    },
    /// A label.
    Label(String),
    /// Free text: one or more references, each as good as the others.
    References(Vec<String>),
    /// Free text that is right when it holds one of these.
    Holding(Vec<String>),
    /// The answer of a training sample; perplexity is its measure, others if asked for.
    Taught(Vec<String>),
    /// Nothing to answer: a text to be predicted.
    Nothing,
}

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Its number in the file, from 1.
    pub line: usize,
    /// What the model reads.
    pub ask: Ask,
    /// What it should say.
    pub expected: Expected,
}

/// What a file holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Records {
    /// Its records, in order.
    pub records: Vec<Record>,
    /// What is in it and not used.
    pub unused: Unused,
}

impl Expected {
    /// Whether one file may hold both. Training samples of all forms go together.
    fn goes_with(&self, other: &Self) -> bool {
        let taught = |e: &Self| matches!(e, Self::Taught(_) | Self::Nothing);
        std::mem::discriminant(self) == std::mem::discriminant(other) || taught(self) && taught(other)
    }

    /// The metrics that this kind of answer is measured by unless others are asked for, and all that it can be.
    pub(super) fn metrics(&self) -> (&'static [Metric], &'static [Metric]) {
        use Metric::{Accuracy, Bleu, Choice, Exact, Expect, F1, Perplexity, Rouge};
        match self {
            Self::Choice { .. } => (&[Choice], &[Choice]),
            Self::Label(_) => (&[Accuracy, F1], &[Accuracy, F1]),
            Self::References(_) => (&[Exact, Bleu, Rouge], &[Exact, Bleu, Rouge]),
            Self::Holding(_) => (&[Expect], &[Expect]),
            Self::Taught(_) => (&[Perplexity], &[Perplexity, Exact, Bleu, Rouge]),
            Self::Nothing => (&[Perplexity], &[Perplexity]),
        }
    }
}

/// Reads data as [`crate::train::Dataset::open`] does; its records ask by `prompt` (text to be continued), `question` (put
/// into `Question: ..\nAnswer:`) or `messages`, and hold `choices` and `answer` (an index from 0, a letter from A, or the
/// choice itself), `label`, `reference` or `references`, or `expect`; or they are training samples. With `into_chat`, `prompt` and
/// `question` are a user's turn of a chat. All records must be of one kind.
///
/// # Errors
/// The file cannot be read, is empty, or a record has none of the forms or another than the first.
pub fn read_records(path: &Path, into_chat: bool) -> Result<Records> {
    let (mut records, mut unused): (Vec<Record>, Unused) = (Vec::new(), Unused::default());
    data::read(path, Purpose::Evaluate, &mut unused, &mut |entry, line, unused| {
        let fields = match entry {
            Entry::Keys(fields) => fields,
            Entry::Note(..) => {
                records.push(Record { line, ask: Ask::Text(String::new()), expected: Expected::Nothing });
                return Ok(());
            }
        };
        let Some((ask, expected)) = parse(fields, into_chat, unused)? else { return Ok(()) };
        if let Some(first) = records.first()
            && !first.expected.goes_with(&expected)
        {
            let message =
                format!("expected a record of the same kind as in line {}, got another; split the file", first.line);
            return Err(data_error("record", message));
        }
        records.push(Record { line, ask, expected });
        Ok(())
    })?;
    if records.is_empty() {
        return Err(Error::new(
            ErrorCode::Data,
            format!("`{}`", path.display()),
            "expected at least one record, got none",
        ));
    }
    Ok(Records { records, unused })
}

/// What a record asks and expects; nothing where it is a training sample that is not learned.
fn parse(mut fields: Fields, into_chat: bool, unused: &mut Unused) -> Result<Option<(Ask, Expected)>> {
    let Some(expected) = expected(&mut fields)? else {
        return Ok(Sample::new(fields, unused)?.map(|sample| taught(sample, into_chat)));
    };
    fields.refuse()?;
    let system = fields.take(Key::System).filter(|system| !keys::is_nothing(&system.value));
    let as_text = |text: String| if into_chat { Ask::Chat(vec![Message::new("user", text)]) } else { Ask::Text(text) };
    let mut ask = if let Some(list) = fields.take(Key::Messages) {
        Ask::Chat(messages::messages(list, unused)?)
    } else if let Some(prompt) = fields.take(Key::Prompt) {
        as_text(prompt.text()?)
    } else if let Some(question) = fields.take(Key::Question) {
        let (name, question) = (question.name.clone(), question.text()?);
        // An instruction is asked as it is.
        let text = if into_chat || !keys::same(&name, "question") {
            question
        } else {
            format!("Question: {question}\nAnswer:")
        };
        as_text(text)
    } else {
        return Err(data_error(
            "keys",
            format!("expected `prompt`, `question` or `messages`, got {}; add one", fields.names()),
        ));
    };
    if let Some(system) = system {
        let Ask::Chat(turns) = &mut ask else {
            let message = "this key would change what is asked, and a text that is continued has no system's turn; ask with `TaskOptions::chat`";
            return Err(data_error(&format!("`{}`", system.name), message));
        };
        messages::add_system(system, turns)?;
    }
    for (_, Named { name, value }) in fields.rest() {
        if !keys::is_nothing(&value) {
            let message =
                "this key would change what is asked and is not used here; write it into the question, or take it out";
            return Err(data_error(&format!("`{name}`"), message));
        }
    }
    fields.others().iter().for_each(|key| unused.key(key));
    Ok(Some((ask, expected)))
}

/// What a training sample asks: all before its last answer.
fn taught(sample: Sample, into_chat: bool) -> (Ask, Expected) {
    let as_text = |text: String| if into_chat { Ask::Chat(vec![Message::new("user", text)]) } else { Ask::Text(text) };
    match sample {
        Sample::Text { text, start: 0 } => {
            drop(text);
            (as_text(String::new()), Expected::Nothing)
        }
        Sample::Text { mut text, start } => {
            let answer = text.split_off(start);
            (as_text(text), Expected::Taught(vec![answer]))
        }
        sample => {
            let Sample::Chat { mut messages, tools, .. } = sample.into_chat() else {
                unreachable!("texts were matched")
            };
            let last = messages.pop_if(|m| m.role == "assistant" && m.learned).and_then(|m| m.content);
            // Generation shows no tools, so that an answer which needs them cannot be asked for.
            let answer = last.filter(|_| tools.is_none());
            (Ask::Chat(messages), answer.map_or(Expected::Nothing, |text| Expected::Taught(vec![text])))
        }
    }
}

/// What is right; nothing where the record is a training sample.
fn expected(fields: &mut Fields) -> Result<Option<Expected>> {
    if let Some(named) = fields.take(Key::Choices) {
        let choices = texts(named)?;
        if choices.len() < 2 || choices.iter().any(String::is_empty) {
            return Err(data_error("choices", "expected at least two, none of them empty; add what is missing"));
        }
        let answer = fields.take(Key::Answer).map(|named| named.value);
        let index = answer.as_ref().and_then(|answer| index_of(answer, &choices));
        let answer = index.ok_or_else(|| {
            let got = answer.as_ref().map_or_else(|| "nothing".to_owned(), ToString::to_string);
            let message =
                format!("expected an index below {}, a letter or one of `choices`, got `{got}`", choices.len());
            data_error("answer", message)
        })?;
        return Ok(Some(Expected::Choice { choices, answer }));
    }
    match fields.take(Key::Label).map(|named| named.value) {
        Some(Value::String(label)) if !label.trim().is_empty() => return Ok(Some(Expected::Label(label))),
        Some(label @ (Value::Number(_) | Value::Bool(_))) => return Ok(Some(Expected::Label(label.to_string()))),
        Some(other) => {
            return Err(data_error("label", format!("expected a text that is not empty, or a number, got `{other}`")));
        }
        None => {}
    }
    let several = match (fields.take(Key::Reference), fields.take(Key::References)) {
        (Some(one), None) => vec![one.text()?],
        (None, Some(several)) => texts(several)?,
        (None, None) => return fields.take(Key::Expect).map(holding).transpose(),
        (Some(_), Some(_)) => Vec::new(),
    };
    if several.is_empty() {
        return Err(data_error("references", "expected `reference`, or a list `references` that is not empty"));
    }
    Ok(Some(Expected::References(several)))
}

/// What an answer must hold: a text, or a list of texts of which one is enough.
fn holding(named: Named) -> Result<Expected> {
    let several = matches!(&named.value, Value::Array(_)) || named.value.as_str().is_some_and(|t| t.starts_with('['));
    let name = named.name.clone();
    let all = if several { texts(named)? } else { vec![named.text()?] };
    if all.is_empty() || all.iter().any(|text| text.trim().is_empty()) {
        return Err(data_error(
            &name,
            "expected a text, or a list of texts, none of them empty; write what is to be held",
        ));
    }
    Ok(Expected::Holding(all))
}

/// A list of texts, or that list as JSON in a string.
fn texts(named: Named) -> Result<Vec<String>> {
    let name = named.name.clone();
    match named.json()? {
        Value::Array(list) => list.into_iter().map(|value| Named { name: name.clone(), value }.text()).collect(),
        _ => Err(data_error(&name, "expected a list of texts, got something else; write a list")),
    }
}

/// Which of `choices` an answer names: a letter where that is no choice itself, an index, or the choice.
fn index_of(answer: &Value, choices: &[String]) -> Option<usize> {
    let index = match answer {
        Value::Number(n) => n.as_u64()? as usize,
        Value::String(text) => {
            if let Some(i) = choices.iter().position(|c| c == text) {
                return Some(i);
            }
            match text.trim().as_bytes() {
                [letter @ (b'A'..=b'Z' | b'a'..=b'z')] => usize::from(letter.to_ascii_uppercase() - b'A'),
                _ => text.trim().parse().ok()?,
            }
        }
        _ => return None,
    };
    (index < choices.len()).then_some(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str, into_chat: bool) -> Result<(Ask, Expected)> {
        let object: serde_json::Map<String, Value> = serde_json::from_str(line).unwrap();
        let fields = Fields::new(object.into_iter().collect())?;
        parse(fields, into_chat, &mut Unused::default()).map(|record| record.expect("a record that is learned"))
    }

    #[test]
    fn lines_say_what_is_asked_and_what_is_right() {
        let choice = |answer| Expected::Choice { choices: vec!["x".into(), "B".into(), "z".into()], answer };
        let cases = [
            (r#"{"question":"q","choices":["x","B","z"],"answer":2}"#, "Question: q\nAnswer:", choice(2)),
            (r#"{"prompt":"q","choices":["x","B","z"],"answer":"c"}"#, "q", choice(2)),
            (r#"{"prompt":"q","choices":["x","B","z"],"answer":"B"}"#, "q", choice(1)),
            (r#"{"prompt":"q","choices":["x","B","z"],"answer":"0"}"#, "q", choice(0)),
            (r#"{"prompt":"q","label":"good"}"#, "q", Expected::Label("good".into())),
            (r#"{"prompt":"q","label":1}"#, "q", Expected::Label("1".into())),
            (r#"{"prompt":"q","reference":"r"}"#, "q", Expected::References(vec!["r".into()])),
            (r#"{"prompt":"q","completion":"r"}"#, "q", Expected::Taught(vec!["r".into()])),
            (r#"{"prompt":"q","expect":["a","b"]}"#, "q", Expected::Holding(vec!["a".into(), "b".into()])),
            (r#"{"prompt":"q","expect":"a","note":"n"}"#, "q", Expected::Holding(vec!["a".into()])),
            (r#"{"text":"t"}"#, "", Expected::Nothing),
        ];
        for (line, ask, expected) in cases {
            assert_eq!(read(line, false).unwrap(), (Ask::Text(ask.into()), expected), "{line}");
        }
        let chat = r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"r"}]}"#;
        let asked = Ask::Chat(vec![Message::new("user", "q")]);
        assert_eq!(read(chat, false).unwrap(), (asked.clone(), Expected::Taught(vec!["r".into()])));
        assert_eq!(read(r#"{"question":"q","reference":"r"}"#, true).unwrap().0, asked);
    }

    #[test]
    fn unusable_lines_say_what_is_missing() {
        for (line, place) in [
            (r#"{"prompt":"q","choices":["x"],"answer":0}"#, "choices"),
            (r#"{"prompt":"q","choices":["x","y"],"answer":2}"#, "answer"),
            (r#"{"prompt":"q","choices":["x","y"]}"#, "answer"),
            (r#"{"prompt":"q","label":""}"#, "label"),
            (r#"{"prompt":"q","references":[]}"#, "references"),
            (r#"{"prompt":"q","expect":[]}"#, "expect"),
            (r#"{"prompt":"q","expect":["a"," "]}"#, "expect"),
            (r#"{"reference":"r"}"#, "keys"),
        ] {
            assert_eq!(read(line, false).unwrap_err().place(), place, "{line}");
        }
    }
}
