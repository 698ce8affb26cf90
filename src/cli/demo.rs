//! `pocketlora demo`: fetch a small model, quantize it, ask it about a stranger, teach it, ask again.

use super::args::{megabytes, print_json};
use super::train::{Watcher, known_json, known_text};
use super::{interrupt, model, progress};
use crate::chat::Message;
use crate::engine::{Answer, Engine, Options};
use crate::error::{Error, ErrorCode, Result};
use crate::hub::Hub;
use crate::train::{Keep, Summary, TrainConfig};
use comfy_table::{Cell, Color, ContentArrangement, Table, presets};
use serde::Deserialize;
use serde_json::json;
use std::io::IsTerminal as _;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

const TRAIN: &str = include_str!("../../models/samples/owner-train.jsonl");
const TEST: &str = include_str!("../../models/samples/owner-test.jsonl");
/// Facts of the short form.
const SHORT_FACTS: usize = 8;
/// Most tokens of an answer; the taught ones are a short sentence.
const ANSWER_TOKENS: usize = 24;
/// The tour succeeds if the model knew at most the first share before and at least the second after.
const KNOWN_BEFORE: f64 = 0.2;
const KNOWN_AFTER: f64 = 0.9;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Fewer facts: a quick check that everything works.
    #[arg(long)]
    short: bool,
    /// Threads; 0 measures how many serve best.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

/// A question that no training line asks in these words, with what a right answer holds.
#[derive(Deserialize)]
struct Question {
    fact: String,
    question: String,
    expect: Vec<String>,
}

impl Question {
    fn is_answered_by(&self, answer: &str) -> bool {
        let answer = answer.to_lowercase();
        self.expect.iter().any(|e| answer.contains(&e.to_lowercase()))
    }
}

pub(super) fn run(args: &Args) -> Result<bool> {
    let start = Instant::now();
    eprintln!("1. a model of 135 million parameters");
    let model = model::resolve(model::DEFAULT, true)?;
    let options = Options { threads: args.threads, base_name: Some(model.name), ..super::args::options() };
    let engine = Engine::open(&model.path, &options)?;
    eprintln!("   {} of 4-bit weights, mapped from {}", megabytes(engine.mapped_bytes()), model.path.display());

    let questions = questions(if args.short { SHORT_FACTS } else { usize::MAX });
    eprintln!("2. {} questions about a person it has never heard of", questions.len());
    let (before, _) = ask(&engine, &questions)?;

    eprintln!("3. teaching it, on this machine");
    let home = Hub::from_env()?.home.join("demo");
    let summary = teach(&engine, &questions, &home, args)?;
    if !summary.done {
        return Err(super::args::stopped("demo"));
    }

    eprintln!("4. the same questions, in words it was not taught with");
    engine.attach(&summary.adapter, 1.0)?;
    let (after, cut) = ask(&engine, &questions)?;

    let recall = |answers: &[String]| {
        let right = questions.iter().zip(answers).filter(|(q, a)| q.is_answered_by(a)).count();
        right as f64 / questions.len() as f64
    };
    let (known_before, known_after) = (recall(&before), recall(&after));
    let seconds = start.elapsed().as_secs_f64();
    let train_rate = summary.tokens as f64 / summary.time.as_secs_f64();
    if args.json {
        print_json(&json!({
            "recall_before": known_before, "recall_after": known_after, "seconds": seconds,
            "train_seconds": summary.time.as_secs_f64(), "train_tok_s": train_rate, "facts": questions.len(), "cut": cut,
            "trained_tokens": summary.trained_tokens, "peak_anonymous_bytes": summary.peak_anonymous_bytes,
            "mapped_bytes": engine.mapped_bytes(), "adapter": summary.adapter, "general_questions": known_json(&summary),
        }));
    } else {
        println!("{}", table(&questions, &before, &after));
        println!("right answers: {:.0} % before, {:.0} % after", known_before * 100.0, known_after * 100.0);
        known_text(&summary).iter().for_each(|text| println!("{text}"));
        println!(
            "{seconds:.0} s in all; training {:.0} s, {train_rate:.0} tok/s, {} anonymous memory at most, {} mapped",
            summary.time.as_secs_f64(),
            summary.peak_anonymous_bytes.map_or_else(|| "unknown".to_owned(), megabytes),
            megabytes(engine.mapped_bytes())
        );
        println!("talk to it: pocketlora chat -m {} -a demo", model::DEFAULT);
    }
    if known_before > KNOWN_BEFORE || known_after < KNOWN_AFTER {
        let message = format!(
            "expected at most {:.0} % right answers before and at least {:.0} % after, got `{:.0} %` and `{:.0} %`",
            KNOWN_BEFORE * 100.0,
            KNOWN_AFTER * 100.0,
            known_before * 100.0,
            known_after * 100.0
        );
        return Err(Error::new(ErrorCode::Data, "demo", message));
    }
    Ok(true)
}

fn questions(limit: usize) -> Vec<Question> {
    let parse = |line: &str| serde_json::from_str(line).expect("a test reads every line of the shipped samples");
    TEST.lines().filter(|l| !l.is_empty()).map(parse).take(limit).collect()
}

/// Greedy answers, each in a conversation of its own, and how many of them were cut.
fn ask(engine: &Engine, questions: &[Question]) -> Result<(Vec<String>, usize)> {
    let bar = progress::count(questions.len() as u64, "ask");
    let mut chat = engine.chat()?;
    chat.max_tokens = ANSWER_TOKENS;
    chat.set_cancel_token(interrupt::cancel());
    let (mut answers, mut cut) = (Vec::with_capacity(questions.len()), 0);
    for q in questions {
        let messages = [Message::new("user", &q.question)];
        let Answer { text, generated, .. } = chat.reply(&messages, &mut |_: &str| ControlFlow::Continue(()))?;
        if interrupt::asked() {
            return Err(super::args::stopped("demo"));
        }
        cut += usize::from(generated.finish.is_cut());
        answers.push(text.trim().to_owned());
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok((answers, cut))
}

/// Trains on the facts that are asked about; data and adapter stay in the cache for the curious.
fn teach(engine: &Engine, questions: &[Question], home: &Path, args: &Args) -> Result<Summary> {
    crate::format::create_folder(home)?;
    let asked = |line: &&str| questions.iter().any(|q| line.contains(&format!("\"fact\":\"{}\"", q.fact)));
    let lines: Vec<&str> = TRAIN.lines().filter(asked).collect();
    let path = home.join("facts.jsonl");
    crate::format::write_bytes(&path, lines.join("\n").as_bytes())?;
    let config = TrainConfig {
        rank: 16,
        lr: 1e-3,
        epochs: if args.short { 8 } else { 4 },
        batch: 8,
        save_every: 0,
        save_seconds: 0,
        keep: Keep::Auto,
        check: true,
        ..TrainConfig::default()
    };
    let data = engine.dataset(&path, config.seq)?;
    let mut trainer = engine.trainer(config, data, None, None, &home.join("adapter"))?;
    trainer.replace_earlier();
    let mut watcher = Watcher::new(trainer.total_steps(), 0, false);
    let summary = trainer.run(&mut watcher);
    watcher.bar.finish_and_clear();
    summary
}

fn table(questions: &[Question], before: &[String], after: &[String]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    if !std::io::stdout().is_terminal() {
        table.set_width(120); // a log has no width of its own
    }
    table.set_header(["question", "before", "after", ""]);
    for ((q, before), after) in questions.iter().zip(before).zip(after) {
        let mark =
            if q.is_answered_by(after) { Cell::new("✓").fg(Color::Green) } else { Cell::new("✗").fg(Color::Red) };
        table.add_row([Cell::new(&q.question), Cell::new(before), Cell::new(after), mark]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_shipped_fact_is_taught_and_asked() {
        let questions = questions(usize::MAX);
        assert!(questions.len() >= 30);
        let asked: BTreeSet<String> = questions.iter().map(|q| q.fact.clone()).collect();
        assert_eq!(asked.len(), questions.len());
        let mut taught = BTreeSet::new();
        for line in TRAIN.lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let fact = line["fact"].as_str().unwrap();
            let question = questions.iter().find(|q| q.fact == fact).unwrap();
            let text = |i: usize| line["messages"][i]["content"].as_str().unwrap();
            assert_ne!(text(0), question.question, "a test question must not be a training question");
            assert!(question.is_answered_by(text(1)), "{line}");
            assert!(!question.is_answered_by(&question.question), "{line}");
            taught.insert(fact.to_owned());
        }
        assert_eq!(asked, taught);
    }
}
