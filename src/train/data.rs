//! JSONL training data: tokens and which of them are learned.

use crate::chat::{ChatTemplate, Message};
use crate::error::{Error, ErrorCode, Result};
use crate::tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One line of a data file, tokenized.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Tokens.
    pub ids: Vec<u32>,
    /// Which tokens the model learns to write. The first never is: nothing comes before it.
    pub trained: Vec<bool>,
}

impl Sample {
    /// Tokens to learn.
    #[must_use]
    pub fn trained_tokens(&self) -> usize {
        self.trained.iter().filter(|&&t| t).count()
    }
}

/// A data file in memory.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// Where it came from.
    pub path: PathBuf,
    /// Its samples, in file order.
    pub samples: Vec<Sample>,
}

/// The forms a line may have. Other keys are ignored.
#[derive(Deserialize)]
struct Line {
    messages: Option<Vec<Message>>,
    tools: Option<Value>,
    prompt: Option<String>,
    completion: Option<String>,
    text: Option<String>,
}

impl Dataset {
    /// Reads JSONL whose lines hold `messages`, `prompt` and `completion`, or `text`. Of `messages` only what the
    /// assistant says is learned, of `prompt`/`completion` the completion, of `text` everything; the last two end with
    /// the model's end-of-text token. Empty lines are skipped.
    ///
    /// # Errors
    /// The file is missing or empty, or a line is not JSON, has none of the forms, nothing to learn, or more than
    /// `max_tokens` tokens.
    pub fn open(path: &Path, tokenizer: &Tokenizer, template: &ChatTemplate, max_tokens: usize) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let mut samples = Vec::new();
        for (number, line) in BufReader::new(file).lines().enumerate() {
            let at = |e: Error| {
                Error::new(e.code(), format!("`{}` line {}", path.display(), number + 1), e.to_string()).caused_by(e)
            };
            let line = line.map_err(|e| at(Error::io("read", path, e)))?;
            if line.trim().is_empty() {
                continue;
            }
            samples.push(parse(&line, tokenizer, template, max_tokens).map_err(at)?);
        }
        if samples.is_empty() {
            let message = "expected at least one line with `messages`, `prompt` and `completion`, or `text`, got none";
            return Err(Error::new(ErrorCode::Data, format!("`{}`", path.display()), message));
        }
        Ok(Self { path: path.to_owned(), samples })
    }

    /// A number that changes when any token or mask does.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        self.samples.iter().fold(self.samples.len() as u64, |hash, s| {
            let words = s.ids.iter().zip(&s.trained).map(|(&id, &t)| u64::from(id) << 1 | u64::from(t));
            words.fold(crate::rng::mix(hash, s.ids.len() as u64), crate::rng::mix)
        })
    }
}

fn data_error(item: &str, message: impl Into<String>) -> Error {
    Error::new(ErrorCode::Data, item, message)
}

fn parse(line: &str, tokenizer: &Tokenizer, template: &ChatTemplate, max_tokens: usize) -> Result<Sample> {
    let line: Line = serde_json::from_str(line)
        .map_err(|e| data_error("JSON", format!("expected one object a line, got an error: {e}")).caused_by(e))?;
    let sample = match line {
        Line { messages: Some(messages), tools, .. } => chat(&messages, tools.as_ref(), tokenizer, template)?,
        Line { prompt: Some(prompt), completion: Some(completion), .. } => {
            let start = prompt.len();
            plain(&(prompt + &completion), start, tokenizer)?
        }
        Line { text: Some(text), .. } => plain(&text, 0, tokenizer)?,
        _ => {
            return Err(data_error(
                "keys",
                "expected `messages`, `prompt` and `completion`, or `text`; rename the keys",
            ));
        }
    };
    if sample.ids.len() > max_tokens {
        let message =
            format!("expected at most {max_tokens} tokens, got `{}`; split it or raise `--seq`", sample.ids.len());
        return Err(data_error("sample", message));
    }
    if sample.trained_tokens() == 0 {
        return Err(data_error("sample", "expected at least one token to learn, got none; give it an answer"));
    }
    Ok(sample)
}

/// A conversation: answers are learned up to and including the token that ends them.
fn chat(messages: &[Message], tools: Option<&Value>, tokenizer: &Tokenizer, template: &ChatTemplate) -> Result<Sample> {
    if !messages.iter().any(|m| m.role == "assistant") {
        return Err(data_error(
            "messages",
            "expected a turn with role `assistant`, got none; there is nothing to learn",
        ));
    }
    let (text, answers) = template.render_with_answers(messages, tools)?;
    let tokens = tokenizer.encode_with_offsets(&text)?;
    let mut sample = mask(&tokens, &answers);
    // What a template prints after the end of a turn is its own, not the model's.
    for answer in &answers {
        let inside = |i: &usize| answer.contains(&tokens[*i].1.start) && tokens[*i].1.end <= answer.end;
        let mut ended = false;
        for i in (0..tokens.len()).filter(inside) {
            sample.trained[i] &= !ended;
            ended |= tokenizer.stop.contains(&tokens[i].0);
        }
    }
    Ok(sample)
}

/// Plain text, learned from byte `start` on, closed by the end-of-text token.
fn plain(text: &str, start: usize, tokenizer: &Tokenizer) -> Result<Sample> {
    let mut tokens = tokenizer.encode_with_offsets(text)?;
    let bos = tokenizer.prefix_ids()?;
    tokens.splice(0..0, bos.into_iter().map(|id| (id, 0..0)));
    if let Some(eos) = tokenizer.eos() {
        tokens.push((eos, text.len()..text.len() + 1));
    }
    let learned = start..text.len() + 1;
    Ok(mask(&tokens, &[learned]))
}

/// Marks the tokens that lie within `learned`. A token that straddles a border holds text that was given, so it is not.
fn mask(tokens: &[(u32, Range<usize>)], learned: &[Range<usize>]) -> Sample {
    let within = |t: &Range<usize>| learned.iter().any(|l| !t.is_empty() && l.start <= t.start && t.end <= l.end);
    let trained = tokens.iter().enumerate().map(|(i, (_, range))| i > 0 && within(range)).collect();
    Sample { ids: tokens.iter().map(|t| t.0).collect(), trained }
}
