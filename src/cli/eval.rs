//! `pocketlora eval`: how well a model predicts and answers.

use super::args::{ModelArgs, at_least_one, megabytes, print_json, stopped};
use super::model::is_copy;
use super::{interrupt, names, outputs, progress};
use crate::engine::{Engine, name_of};
use crate::error::{Error, ErrorCode, Result};
use crate::eval::{
    Ask, Expected, General, LabelBy, Metric, Record, Records, Score, TaskOptions, TaskReport, general, metrics_for,
    read_records, run_tasks, score_data, score_text,
};
use crate::format::foreign;
use crate::memory::Peak;
use crate::train::Unused;
use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    what: What,
    #[command(flatten)]
    tasks: TaskArgs,
    /// Score a text in windows of this many tokens; 0 takes it whole.
    #[arg(long, default_value_t = 512)]
    window: usize,
    /// With --ids: write the logits here, tensor `logits.N` [tokens, vocab] in f32 for array N.
    #[arg(long, value_name = "OUT.safetensors", requires = "ids", value_parser = names::path())]
    save_logits: Option<PathBuf>,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct What {
    /// Perplexity of a text file.
    #[arg(long, value_parser = names::path())]
    text: Option<PathBuf>,
    /// Scores on a data file: training samples (loss on the learned tokens), or JSONL with `choices` and `answer`, with
    /// `label`, with `reference(s)` or with `expect`, asked by `prompt`, `question` or `messages`.
    #[arg(short, long, value_parser = names::path())]
    data: Option<PathBuf>,
    /// JSON array of arrays of token ids, each scored whole.
    #[arg(long, value_parser = names::path())]
    ids: Option<PathBuf>,
    /// What the model knows in general: questions with short answers and a text, both shipped; with an adapter, also what
    /// it knows without.
    #[arg(long, conflicts_with = "adapters_dir")]
    general: bool,
}

/// How a data file is asked and scored.
#[derive(clap::Args)]
#[group(multiple = true, conflicts_with_all = ["text", "ids", "general"])]
struct TaskArgs {
    /// Metrics, separated by commas. [default: by what the records hold]
    #[arg(long, value_delimiter = ',', value_enum)]
    metrics: Vec<Metric>,
    /// Put `prompt` and `question` through the model's chat template, as the user's turn.
    #[arg(long)]
    chat: bool,
    /// How labels are read: the likeliest of those in the file, or the first line that the model writes.
    #[arg(long, value_enum, default_value = "likelihood")]
    labels_by: LabelBy,
    /// Most tokens of an answer.
    #[arg(short = 'n', long, default_value_t = 128, value_parser = at_least_one)]
    max_tokens: usize,
    /// ROUGE compares stems of words (Porter's).
    #[arg(long)]
    stemmer: bool,
    /// Write the answers here, one JSON object a line.
    #[arg(long, value_name = "OUT.jsonl", value_parser = names::path())]
    answers: Option<PathBuf>,
}

/// What an evaluation found.
#[derive(Default)]
struct Found {
    score: Option<Score>,
    records: Option<usize>,
    tasks: TaskReport,
    /// What is known with the adapters, and without them.
    general: Option<[General; 2]>,
    /// What is in the data and not used.
    unused: Option<Unused>,
}

/// Refuses inputs that are not there, and to lose a file that is no older output.
fn check_files(args: &Args) -> Result<()> {
    let What { text, data, ids, .. } = &args.what;
    let reads = || [text, data, ids].into_iter().filter_map(|path| path.as_deref());
    reads().try_for_each(outputs::check_readable)?;
    let answers = args.tasks.answers.iter().try_for_each(|out| outputs::check(out, reads(), outputs::has_answers));
    answers.and(args.save_logits.iter().try_for_each(|out| outputs::check(out, reads(), outputs::has_logits)))
}

pub(super) fn run(args: &Args) -> Result<()> {
    check_files(args)?;
    let engine = if args.what.ids.is_some() { args.model.open()? } else { args.model.open_for_text()? };
    let copy = is_copy(engine.dir());
    if copy {
        eprintln!(
            "note: these are figures of an NF4 copy of {}, made at first use; for its own weights, give `--no-quantize` \
             (a GGUF file is first converted by `pocketlora quantize --to f16`)",
            args.model.model
        );
    }
    let (start, bar) = (Instant::now(), progress::spinner("eval"));
    let (mut peak, mut tokens) = (Peak::default(), 0);
    let mut on_progress = |new: usize| {
        tokens += new;
        bar.inc(new as u64);
        peak.sample();
        !interrupt::asked()
    };
    let found = find(args, &engine, &mut on_progress);
    bar.finish_and_clear();
    let found = found.map_err(|e| if e.code() == ErrorCode::Cancelled { stopped("evaluation") } else { e })?;
    let (seconds, peak) = (start.elapsed().as_secs_f64(), peak.bytes().max(engine.peak_anonymous_bytes()));
    let routed = engine.routed();
    let nearest = || routed.iter().map(|one| (name_of(&one.adapter.dir), one.nearest));
    if args.json {
        let mut json = found.json();
        json.insert("weights".into(), if copy { "nf4 copy" } else { "as given" }.into());
        json.insert("seconds".into(), seconds.into());
        json.insert("tok_s".into(), (tokens as f64 / seconds).into());
        json.insert("peak_anonymous_bytes".into(), peak.into());
        json.insert("mapped_bytes".into(), engine.mapped_bytes().into());
        if !routed.is_empty() {
            let nearest = nearest().map(|(name, count)| (name, count.into()));
            json.insert("nearest".into(), nearest.collect::<Map<_, _>>().into());
        }
        print_json(&json.into());
    } else {
        found.print();
        if !routed.is_empty() {
            let nearest: Vec<String> = nearest().map(|(name, count)| format!("{name} {count}")).collect();
            println!("nearest adapters of the requests: {}", nearest.join(", "));
        }
        let peak = peak.map_or_else(|| "unknown".to_owned(), megabytes);
        let rate = tokens as f64 / seconds;
        eprintln!("{tokens} tokens in {seconds:.1} s, {rate:.0} tok/s, {peak} anonymous at most");
    }
    Ok(())
}

fn find(args: &Args, engine: &Engine, on_progress: &mut dyn FnMut(usize) -> bool) -> Result<Found> {
    let score = if let Some(path) = &args.what.text {
        let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
        let text = foreign::text(path, bytes)?;
        let ids = engine.text()?.tokenizer.encode(&text, true)?;
        let window = if args.window == 0 { ids.len() } else { args.window };
        score_text(engine, &ids, window, on_progress).map_err(|e| named(e, path))?
    } else if let Some(path) = &args.what.data {
        return find_in_data(&args.tasks, path, engine, on_progress);
    } else if args.what.general {
        let with = general(engine, false, on_progress)?;
        let without = if engine.attached().is_empty() { with } else { general(engine, true, on_progress)? };
        return Ok(Found { general: Some([with, without]), ..Found::default() });
    } else {
        let path = args.what.ids.as_deref().expect("clap requires one of the four");
        let lists = read_ids(path)?;
        let score = match &args.save_logits {
            Some(out) => crate::eval::save_logits(engine, &lists, out, on_progress),
            None => lists.iter().enumerate().try_fold(Score::default(), |sum, (i, ids)| {
                let score = score_text(engine, ids, ids.len(), on_progress);
                Ok(sum + score.map_err(|e| e.at(format!("array {i}")))?)
            }),
        };
        score.map_err(|e| named(e, path))?
    };
    Ok(Found { score: Some(score), ..Found::default() })
}

fn find_in_data(
    args: &TaskArgs,
    path: &Path,
    engine: &Engine,
    on_progress: &mut dyn FnMut(usize) -> bool,
) -> Result<Found> {
    // For the perplexity of training samples nothing is asked.
    let asked = &args.metrics;
    let only_loss = asked == &[Metric::Perplexity];
    let Records { records, unused } = if only_loss { Records::default() } else { read_records(path, args.chat)? };
    let metrics = if only_loss { vec![Metric::Perplexity] } else { metrics_for(&records, asked)? };
    let mut found = Found { unused: Some(unused), ..Found::default() };
    if metrics.contains(&Metric::Perplexity) {
        let data = engine.held_out_dataset(path, usize::MAX)?;
        found.score = Some(score_data(engine, &data, on_progress)?);
        found.unused = Some(data.unused);
    }
    if metrics.iter().any(|m| *m != Metric::Perplexity) {
        let options = TaskOptions { label_by: args.labels_by, max_tokens: args.max_tokens, stemmer: args.stemmer };
        found.records = Some(records.len());
        found.tasks = run_tasks(engine, &records, &metrics, &options, on_progress).map_err(|e| named(e, path))?;
        let asks_plainly = !found.tasks.answers.is_empty() && records.iter().any(|r| matches!(r.ask, Ask::Text(_)));
        if asks_plainly && engine.text()?.template.is_own() {
            eprintln!(
                "note: the questions were put as plain text, which the model goes on with; `--chat` asks them as a chat does"
            );
        }
    }
    if let Some(out) = &args.answers {
        write_answers(out, &records, &found.tasks)?;
    }
    Ok(found)
}

fn write_answers(out: &Path, records: &[Record], report: &TaskReport) -> Result<()> {
    if report.answers.is_empty() {
        let expected =
            "metrics for which the model writes: `exact`, `expect`, `bleu`, `rouge`, or labels by generation";
        return Err(Error::config("answers", expected, "none of them"));
    }
    let mut lines = String::new();
    for (record, answer) in records.iter().zip(&report.answers) {
        let mut line = json!({"line": record.line, "answer": answer});
        match &record.expected {
            Expected::References(texts) | Expected::Taught(texts) => line["references"] = json!(texts),
            Expected::Holding(texts) => line["expect"] = json!(texts),
            Expected::Label(label) => line["label"] = json!(label),
            Expected::Choice { .. } | Expected::Nothing => {}
        }
        lines += &format!("{line}\n");
    }
    crate::format::write_bytes(out, lines.as_bytes())
}

impl Found {
    /// One field for each score, and what it took.
    fn json(&self) -> Map<String, Value> {
        let mut json = Map::new();
        json.extend(self.unused.as_ref().map(|unused| ("unused".to_owned(), json!(unused))));
        if let Some(score) = self.score {
            json.insert("tokens".into(), score.tokens.into());
            json.insert("nll".into(), score.nll().into());
            json.insert("perplexity".into(), score.perplexity().into());
        }
        if let Some([with, without]) = &self.general {
            json.insert("asked".into(), with.asked.into());
            json.insert("known".into(), with.known.count().into());
            json.insert("known_base".into(), without.known.count().into());
            json.insert("still".into(), with.known.still(without.known).count().into());
            json.insert("general_loss".into(), with.text.nll().into());
            json.insert("general_loss_base".into(), without.text.nll().into());
        }
        let Some(records) = self.records else { return json };
        json.insert("records".into(), records.into());
        json.extend(self.tasks.scores.iter().map(|(name, value)| ((*name).to_owned(), (*value).into())));
        json.insert("prompt_tokens".into(), self.tasks.prompt_tokens.into());
        json.insert("generated_tokens".into(), self.tasks.generated_tokens.into());
        if !self.tasks.answers.is_empty() {
            json.insert("cut".into(), self.tasks.cut.into());
        }
        if let Some(rate) = self.decode_rate() {
            json.insert("decode_tok_s".into(), rate.into());
        }
        json
    }

    fn print(&self) {
        eprint!("{}", self.unused.as_ref().map(Unused::text).unwrap_or_default());
        if let Some(score) = self.score {
            println!("{} tokens: loss {:.4}, perplexity {:.3}", score.tokens, score.nll(), score.perplexity());
        }
        if let Some([with, without]) = &self.general {
            print_general(with, without);
        }
        let Some(records) = self.records else { return };
        let scores: Vec<String> = self.tasks.scores.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        println!("{records} records: {}", scores.join(", "));
        if let Some(rate) = self.decode_rate() {
            eprintln!("{} tokens written at {rate:.0} tok/s", self.tasks.generated_tokens);
        }
        if self.tasks.cut > 0 {
            let (cut, answers) = (self.tasks.cut, self.tasks.answers.len());
            eprintln!("{cut} of {answers} answers were cut before their end, by `-n` or by the model's context");
        }
    }

    /// Tokens written per second, the first of each answer not counted.
    fn decode_rate(&self) -> Option<f64> {
        let tokens = self.tasks.generated_tokens.saturating_sub(self.tasks.answers.len());
        (tokens > 0).then(|| tokens as f64 / self.tasks.decode.as_secs_f64())
    }
}

fn print_general(with: &General, without: &General) {
    let (asked, known, loss) = (with.asked, with.known.count(), with.text.nll());
    let (known_base, loss_base) = (without.known.count(), without.text.nll());
    if asked == 0 {
        println!("no general questions: the model has no chat template, or no room for them");
    } else if with == without {
        println!("general questions: {known} of {asked} right");
    } else {
        let still = with.known.still(without.known).count();
        println!(
            "general questions: {known_base} of {asked} right without the adapter, {known} with it, {still} in both"
        );
    }
    match with == without {
        true => println!("loss on the general text: {loss:.3}"),
        false => println!("loss on the general text: {loss_base:.3} without the adapter, {loss:.3} with it"),
    }
}

/// An error about what stands in the file at `path`, with the file's name.
fn named(e: Error, path: &Path) -> Error {
    match e.code() {
        ErrorCode::Data | ErrorCode::Diverged | ErrorCode::ContextFull => e.at(format!("`{}`", path.display())),
        _ => e,
    }
}

fn read_ids(path: &Path) -> Result<Vec<Vec<u32>>> {
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    foreign::check(path, &bytes, "an array of arrays of token ids")?;
    let lists: Vec<Vec<u32>> = serde_json::from_slice(&bytes)
        .map_err(|e| Error::format(path, "JSON", "an array of arrays of token ids", &e).caused_by(e))?;
    if lists.is_empty() {
        return Err(Error::format(path, "JSON", "at least one array of token ids", "none"));
    }
    Ok(lists)
}
