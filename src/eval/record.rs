//! Lines of a file that asks a model and knows the answers.

use super::tasks::Metric;
use crate::chat::Message;
use crate::error::{Error, ErrorCode, Result};
use serde::Deserialize;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader};
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

/// The forms a line may have. Other keys are ignored.
#[derive(Deserialize)]
struct Line {
    messages: Option<Vec<Message>>,
    prompt: Option<String>,
    question: Option<String>,
    choices: Option<Vec<String>>,
    answer: Option<Value>,
    label: Option<Value>,
    reference: Option<String>,
    references: Option<Vec<String>>,
    completion: Option<String>,
}

impl Expected {
    /// Whether one file may hold both. Training samples of all forms go together.
    fn goes_with(&self, other: &Self) -> bool {
        let taught = |e: &Self| matches!(e, Self::Taught(_) | Self::Nothing);
        std::mem::discriminant(self) == std::mem::discriminant(other) || taught(self) && taught(other)
    }

    /// The metrics that this kind of answer is measured by unless others are asked for, and all that it can be.
    pub(super) fn metrics(&self) -> (&'static [Metric], &'static [Metric]) {
        use Metric::{Accuracy, Bleu, Choice, Exact, F1, Perplexity, Rouge};
        match self {
            Self::Choice { .. } => (&[Choice], &[Choice]),
            Self::Label(_) => (&[Accuracy, F1], &[Accuracy, F1]),
            Self::References(_) => (&[Exact, Bleu, Rouge], &[Exact, Bleu, Rouge]),
            Self::Taught(_) => (&[Perplexity], &[Perplexity, Exact, Bleu, Rouge]),
            Self::Nothing => (&[Perplexity], &[Perplexity]),
        }
    }
}

/// Reads JSONL whose lines ask by `prompt` (text to be continued), `question` (put into `Question: ..\nAnswer:`) or
/// `messages`, and hold `choices` and `answer` (an index from 0, a letter from A, or the choice itself), `label`,
/// `reference` or `references`; or training samples. With `as_chat`, `prompt` and `question` are a user's turn of a chat.
/// All lines must be of one kind.
///
/// # Errors
/// The file cannot be read, is empty, or a line has none of the forms or another than the first.
pub fn read_records(path: &Path, as_chat: bool) -> Result<Vec<Record>> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let mut records: Vec<Record> = Vec::new();
    for (line, text) in (1..).zip(BufReader::new(file).lines()) {
        let text = text.map_err(|e| Error::io("read", path, e))?;
        if text.trim().is_empty() {
            continue;
        }
        let at = |e: Error| e.at(format!("`{}` line {line}", path.display()));
        let (ask, expected) = parse(&text, as_chat).map_err(at)?;
        if let Some(first) = records.first()
            && !first.expected.goes_with(&expected)
        {
            let message =
                format!("expected a record of the same kind as in line {}, got another; split the file", first.line);
            return Err(at(data_error("record", message)));
        }
        records.push(Record { line, ask, expected });
    }
    if records.is_empty() {
        return Err(Error::new(
            ErrorCode::Data,
            format!("`{}`", path.display()),
            "expected at least one record, got none",
        ));
    }
    Ok(records)
}

fn data_error(item: &str, message: impl Into<String>) -> Error {
    Error::new(ErrorCode::Data, item, message)
}

fn parse(text: &str, as_chat: bool) -> Result<(Ask, Expected)> {
    let mut line: Line = serde_json::from_str(text)
        .map_err(|e| data_error("JSON", format!("expected one object a line, got an error: {e}")).caused_by(e))?;
    let expected = expected(&mut line)?;
    let as_text = |text: String| if as_chat { Ask::Chat(vec![Message::new("user", text)]) } else { Ask::Text(text) };
    let ask = match line {
        Line { messages: Some(messages), .. } => Ask::Chat(messages),
        Line { prompt: Some(prompt), .. } => as_text(prompt),
        Line { question: Some(question), .. } if as_chat => as_text(question),
        Line { question: Some(question), .. } => as_text(format!("Question: {question}\nAnswer:")),
        _ if expected == Expected::Nothing => as_text(String::new()),
        _ => return Err(data_error("keys", "expected `prompt`, `question` or `messages`, got none; add one")),
    };
    Ok((ask, expected))
}

fn expected(line: &mut Line) -> Result<Expected> {
    if let Some(choices) = line.choices.take() {
        if choices.len() < 2 || choices.iter().any(String::is_empty) {
            return Err(data_error("choices", "expected at least two, none of them empty; add what is missing"));
        }
        let answer = line.answer.as_ref().and_then(|answer| index_of(answer, &choices));
        let answer = answer.ok_or_else(|| {
            let got = line.answer.as_ref().map_or_else(|| "nothing".to_owned(), ToString::to_string);
            let message =
                format!("expected an index below {}, a letter or one of `choices`, got `{got}`", choices.len());
            data_error("answer", message)
        })?;
        return Ok(Expected::Choice { choices, answer });
    }
    match line.label.take() {
        Some(Value::String(label)) if !label.trim().is_empty() => return Ok(Expected::Label(label)),
        Some(label @ (Value::Number(_) | Value::Bool(_))) => return Ok(Expected::Label(label.to_string())),
        Some(other) => {
            return Err(data_error("label", format!("expected a text that is not empty, or a number, got `{other}`")));
        }
        None => {}
    }
    match (line.reference.take(), line.references.take()) {
        (Some(one), None) => return Ok(Expected::References(vec![one])),
        (None, Some(several)) if !several.is_empty() => return Ok(Expected::References(several)),
        (None, None) => {}
        _ => return Err(data_error("references", "expected `reference`, or a list `references` that is not empty")),
    }
    // Training samples: the last turn, where it is the assistant's, or the completion.
    if let Some(messages) = &mut line.messages {
        let last = messages.pop_if(|m| m.role == "assistant").and_then(|m| m.content);
        return Ok(last.map_or(Expected::Nothing, |text| Expected::Taught(vec![text])));
    }
    Ok(line.completion.take().map_or(Expected::Nothing, |text| Expected::Taught(vec![text])))
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
            (r#"{"text":"t"}"#, "", Expected::Nothing),
        ];
        for (line, ask, expected) in cases {
            assert_eq!(parse(line, false).unwrap(), (Ask::Text(ask.into()), expected), "{line}");
        }
        let chat = r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"r"}]}"#;
        let asked = Ask::Chat(vec![Message::new("user", "q")]);
        assert_eq!(parse(chat, false).unwrap(), (asked.clone(), Expected::Taught(vec!["r".into()])));
        assert_eq!(parse(r#"{"question":"q","reference":"r"}"#, true).unwrap().0, asked);
    }

    #[test]
    fn unusable_lines_say_what_is_missing() {
        for (line, place) in [
            (r#"{"prompt":"q","choices":["x"],"answer":0}"#, "choices"),
            (r#"{"prompt":"q","choices":["x","y"],"answer":2}"#, "answer"),
            (r#"{"prompt":"q","choices":["x","y"]}"#, "answer"),
            (r#"{"prompt":"q","label":""}"#, "label"),
            (r#"{"prompt":"q","references":[]}"#, "references"),
            (r#"{"reference":"r"}"#, "keys"),
            ("[1]", "JSON"),
        ] {
            assert_eq!(parse(line, false).unwrap_err().place(), place, "{line}");
        }
    }
}
