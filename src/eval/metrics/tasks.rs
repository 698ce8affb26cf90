//! Asks a model what a file asks and scores what it says.

use super::bleu::bleu;
use super::labels::{accuracy, exact_match, holding, macro_f1};
use super::record::{Ask, Expected, Record};
use super::rouge::rouge;
use super::{Likelihood, stopped};
use crate::chat::Rendered;
use crate::engine::{AdapterSet, Answer, Engine};
use crate::error::{Error, ErrorCode, Result};
use crate::generate::Finish;
use crate::text::Text;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Metric {
    /// Of the learned tokens.
    Perplexity,
    /// Right choices by likelihood, of the whole option and for each of its characters.
    Choice,
    /// Right labels.
    Accuracy,
    /// Macro-F1 of labels.
    F1,
    /// Answers equal to a reference, but for case, punctuation and articles.
    Exact,
    /// Answers that hold one of the expected texts, whatever its case.
    Expect,
    /// Corpus BLEU, as sacrebleu's default.
    Bleu,
    /// ROUGE-1, 2 and L, as rouge-score's.
    Rouge,
}

impl Metric {
    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Perplexity => "perplexity",
            Self::Choice => "choice",
            Self::Accuracy => "accuracy",
            Self::F1 => "f1",
            Self::Exact => "exact",
            Self::Expect => "expect",
            Self::Bleu => "bleu",
            Self::Rouge => "rouge",
        }
    }
}

/// How a label is read off a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum LabelBy {
    /// The likeliest of all labels in the file.
    #[default]
    Likelihood,
    /// The first line that the model writes must be the label; letters' case does not count.
    Generation,
}

/// How to ask.
#[derive(Clone, Debug)]
pub struct TaskOptions {
    /// How labels are read.
    pub label_by: LabelBy,
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// ROUGE compares stems of words.
    pub stemmer: bool,
}

impl Default for TaskOptions {
    fn default() -> Self {
        Self { label_by: LabelBy::default(), max_tokens: 128, stemmer: false }
    }
}

/// What came out, and what it took.
#[derive(Clone, Debug, Default)]
pub struct TaskReport {
    /// Name and value of each score.
    pub scores: Vec<(&'static str, f64)>,
    /// What the model wrote, record by record, where it was made to write.
    pub answers: Vec<String>,
    /// Answers that would have gone on: the number of tokens, or the context, ended them.
    pub cut: usize,
    /// Tokens read.
    pub prompt_tokens: usize,
    /// Tokens written.
    pub generated_tokens: usize,
    /// Time for those after each answer's first.
    pub decode: Duration,
}

/// The metrics of a file: those `asked` for, or what is usual for its kind of records if none are.
///
/// # Errors
/// A metric does not fit the records.
pub fn metrics_for(records: &[Record], asked: &[Metric]) -> Result<Vec<Metric>> {
    // A text among training samples leaves perplexity as the only metric that fits all.
    let narrowest = records.iter().map(|r| &r.expected).min_by_key(|e| e.metrics().1.len());
    let Some(narrowest) = narrowest else { return Ok(Vec::new()) };
    let (usual, possible) = narrowest.metrics();
    if let Some(unfit) = asked.iter().find(|m| !possible.contains(m)) {
        let names: Vec<_> = possible.iter().map(|m| m.name()).collect();
        let expected = format!("for records like these, `{}`", names.join("`, `"));
        return Err(Error::config("metrics", expected, unfit.name()));
    }
    Ok(if asked.is_empty() { usual } else { asked }.to_vec())
}

/// Asks every record and scores `metrics` other than perplexity, all of which must fit the records ([`metrics_for`]).
/// `progress` hears of tokens done and may stop the work.
///
/// # Errors
/// A record is too long for the context, logits that are not numbers, stopped, out of memory.
pub fn run_tasks(
    engine: &Engine,
    records: &[Record],
    metrics: &[Metric],
    options: &TaskOptions,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<TaskReport> {
    let mut report = TaskReport::default();
    match records.first().map(|r| &r.expected) {
        Some(Expected::Choice { .. }) => choices(engine, records, &mut report, progress)?,
        Some(Expected::Label(_)) => labels(engine, records, metrics, options, &mut report, progress)?,
        Some(Expected::References(_) | Expected::Holding(_) | Expected::Taught(_)) => {
            generate(engine, records, options.max_tokens, &mut report, progress)?;
            text_scores(records, metrics, options.stemmer, &mut report);
        }
        Some(Expected::Nothing) | None => {}
    }
    Ok(report)
}

/// Log-likelihoods of all `options` after what `record` asks.
fn likelihoods(
    model: &mut Likelihood<'_>,
    text: &Text,
    record: &Record,
    options: &[String],
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<Vec<f64>> {
    let (given, chat) = match &record.ask {
        Ask::Text(text) => (Rendered { text: text.clone(), plain: Vec::new() }, false),
        Ask::Chat(messages) => (text.template.render(messages, None, true)?, true),
    };
    let (Rendered { text: given, plain }, tokenizer) = (given, &text.tokenizer);
    let mut found = Vec::with_capacity(options.len());
    for option in options {
        let before = model.tokens;
        // Words of running text are apart; an answer in a chat begins at once.
        let apart =
            chat || given.is_empty() || given.ends_with(char::is_whitespace) || option.starts_with(char::is_whitespace);
        let text = format!("{given}{}{option}", if apart { "" } else { " " });
        let plain = if chat { plain.clone() } else { tokenizer.plain_in(&text) };
        found.push(model.of(&text, &plain, given.len(), chat)?);
        if !progress(model.tokens - before) {
            return Err(stopped());
        }
    }
    Ok(found)
}

/// The adapters that answer `record`.
fn set_for(engine: &Engine, record: &Record) -> Result<Arc<AdapterSet>> {
    match &record.ask {
        Ask::Text(text) => engine.set_for(&[engine.text()?.tokenizer.encode(text, false)?]),
        Ask::Chat(messages) => engine.set_for_messages(messages),
    }
}

/// Index of the highest value, the first of equals.
fn argmax(values: impl IntoIterator<Item = f64>) -> usize {
    let best = values.into_iter().enumerate().reduce(|best, one| if one.1 > best.1 { one } else { best });
    best.map_or(0, |(i, _)| i)
}

fn choices(
    engine: &Engine,
    records: &[Record],
    report: &mut TaskReport,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<()> {
    let (text, set) = (engine.text()?, engine.all());
    let mut model = Likelihood::new(engine, &text, set)?;
    let (mut by_sum, mut by_length, mut right) = (Vec::new(), Vec::new(), Vec::new());
    for record in records {
        let Expected::Choice { choices, answer } = &record.expected else { continue };
        model.with(set_for(engine, record)?);
        let found = likelihoods(&mut model, &text, record, choices, progress).map_err(|e| in_line(e, record))?;
        by_sum.push(argmax(found.iter().copied()));
        by_length.push(argmax(found.iter().zip(choices).map(|(l, c)| l / c.chars().count() as f64)));
        right.push(*answer);
    }
    report.prompt_tokens = model.tokens;
    report.scores = vec![("choice", accuracy(&by_sum, &right)), ("choice_norm", accuracy(&by_length, &right))];
    Ok(())
}

fn labels(
    engine: &Engine,
    records: &[Record],
    metrics: &[Metric],
    options: &TaskOptions,
    report: &mut TaskReport,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<()> {
    let label = |r: &Record| match &r.expected {
        Expected::Label(label) => label.trim().to_owned(),
        _ => String::new(),
    };
    let mut right: Vec<String> = records.iter().map(label).collect();
    let mut predicted: Vec<String> = Vec::with_capacity(records.len());
    match options.label_by {
        LabelBy::Likelihood => {
            let mut set = right.clone();
            set.sort();
            set.dedup();
            let (text, adapters) = (engine.text()?, engine.all());
            let mut model = Likelihood::new(engine, &text, adapters)?;
            for record in records {
                model.with(set_for(engine, record)?);
                let found = likelihoods(&mut model, &text, record, &set, progress).map_err(|e| in_line(e, record))?;
                predicted.push(set[argmax(found)].clone());
            }
            report.prompt_tokens = model.tokens;
        }
        LabelBy::Generation => {
            generate(engine, records, options.max_tokens, report, progress)?;
            let first_line = |text: &String| text.trim().lines().next().unwrap_or_default().trim().to_lowercase();
            predicted = report.answers.iter().map(first_line).collect();
            right = right.iter().map(|l| l.to_lowercase()).collect();
        }
    }
    for metric in metrics {
        match metric {
            Metric::Accuracy => report.scores.push(("accuracy", accuracy(&predicted, &right))),
            Metric::F1 => report.scores.push(("f1", macro_f1(&predicted, &right))),
            _ => {}
        }
    }
    Ok(())
}

/// Lets the model answer every record, always by the likeliest token.
fn generate(
    engine: &Engine,
    records: &[Record],
    max_tokens: usize,
    report: &mut TaskReport,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<()> {
    let mut chat = engine.chat()?;
    chat.max_tokens = max_tokens;
    for record in records {
        let mut on_text = |_: &str| if progress(1) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) };
        let answered = match &record.ask {
            Ask::Text(text) => chat.complete(text, &mut on_text),
            Ask::Chat(messages) => chat.reply(messages, &mut on_text),
        };
        let Answer { text, generated: made, .. } = answered.map_err(|e| in_line(e, record))?;
        if made.finish == Finish::Cancelled || !progress(made.prefilled) {
            return Err(stopped());
        }
        report.cut += usize::from(made.finish.is_cut());
        report.prompt_tokens += made.prefilled;
        report.generated_tokens += made.ids.len();
        report.decode += made.decode;
        report.answers.push(text.trim().to_owned());
    }
    Ok(())
}

fn text_scores(records: &[Record], metrics: &[Metric], stemmer: bool, report: &mut TaskReport) {
    let references = |r: &Record| match &r.expected {
        Expected::References(texts) | Expected::Holding(texts) | Expected::Taught(texts) => texts.clone(),
        _ => Vec::new(),
    };
    let references: Vec<Vec<String>> = records.iter().map(references).collect();
    for metric in metrics {
        match metric {
            Metric::Exact => report.scores.push(("exact", exact_match(&report.answers, &references))),
            Metric::Expect => report.scores.push(("expect", holding(&report.answers, &references))),
            Metric::Bleu => report.scores.push(("bleu", bleu(&report.answers, &references))),
            Metric::Rouge => {
                let all = rouge(&report.answers, &references, stemmer);
                report.scores.extend([("rouge1", all.rouge1), ("rouge2", all.rouge2), ("rougeL", all.rouge_l)]);
            }
            _ => {}
        }
    }
}

fn in_line(e: Error, record: &Record) -> Error {
    match e.code() {
        ErrorCode::Data | ErrorCode::Diverged | ErrorCode::ContextFull => e.at(format!("line {}", record.line)),
        _ => e,
    }
}
