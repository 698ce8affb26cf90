//! What each adapter method costs and brings: values, bytes of the file, speed of training, what decoding costs more than
//! without an adapter, and the loss on the demo's answers to questions in other words after the same steps. The learning
//! rate is the one that the probe of `train` chooses for the method.
//!
//! `cargo run --release --example methods -- MODEL [METHODS [STEPS]]` with a folder of a model in NF4, such as `pocketlora
//! list` shows after `pocketlora pull`. METHODS are some of the names that `train --method` takes, with commas between
//! them. Each method adds a row to a table in Markdown. Speeds are medians of runs in turn with and without the adapter.

use pocketlora::adapter::Kind;
use pocketlora::{Chat, Engine, Error, ErrorCode, Message, Observer, Options, Result, StepReport, TrainConfig};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

const TRAINED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/samples/owner-train.jsonl");
const STEPS: u64 = 40;
const TOKENS: usize = 48;
const RUNS: usize = 3;

struct Quiet;

impl Observer for Quiet {
    fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// The name that `train --method` takes.
fn name_of(kind: Kind) -> String {
    let name = serde_json::to_value(kind).ok();
    name.and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
}

/// The demo's lines of the phrasings for which `take` holds: five of each fact, one phrasing after the other.
fn lines(folder: &Path, name: &str, take: impl Fn(usize) -> bool) -> Result<std::path::PathBuf> {
    let all = fs::read_to_string(TRAINED).map_err(|e| Error::io("read", TRAINED.as_ref(), e))?;
    let facts = all.lines().count() / 5;
    let some: Vec<&str> = all.lines().enumerate().filter(|(i, _)| take(i / facts)).map(|(_, line)| line).collect();
    let path = folder.join(name);
    fs::write(&path, some.join("\n")).map_err(|e| Error::io("write", &path, e))?;
    Ok(path)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Tokens a second of one answer.
fn decode(engine: &Engine) -> Result<f64> {
    let mut chat: Chat = engine.chat()?;
    chat.max_tokens = TOKENS;
    let question = [Message::new("user", "Tell me a long story about a ship.")];
    let (mut first, mut tokens) = (None, 0);
    chat.reply(&question, &mut |_: &str| {
        first.get_or_insert_with(Instant::now);
        tokens += 1;
        ControlFlow::Continue(())
    })?;
    let seconds = first.map_or(f64::INFINITY, |first: Instant| first.elapsed().as_secs_f64());
    Ok(f64::from(tokens - 1) / seconds)
}

/// Trains an adapter by `kind` and writes its row.
fn row(engine: &Engine, kind: Kind, steps: u64, data: [&Path; 2], out: &Path) -> Result<()> {
    let config = TrainConfig {
        method: kind,
        rank: 16,
        batch: 8,
        steps: Some(steps),
        save_every: 0,
        save_seconds: 0,
        ..TrainConfig::default()
    };
    let reader = engine.reader(None)?;
    let [learned, watched] = data.map(|path| reader.dataset(path, config.seq));
    let (learned, watched) = (learned?, watched?);
    let draft = reader.draft(config, &|key| key != "lr", &learned)?;
    let material = reader.material(&draft.config, learned, Some(watched))?;
    let (config, _) = engine.settle(draft, &material, None, out, None, &mut Quiet)?;
    let lr = config.lr;
    let mut trainer = engine.trainer_of(config, material, None, out)?;
    let values = trainer.trained_parameters();
    let summary = trainer.run(&mut Quiet)?;
    drop(trainer);
    let file = out.join("adapter_model.safetensors");
    let bytes = fs::metadata(&file).map_err(|e| Error::io("read", &file, e))?.len();
    let mut speeds = [Vec::new(), Vec::new()];
    for _ in 0..RUNS {
        speeds[0].push(decode(engine)?);
        let id = engine.attach(out, 1.0)?;
        speeds[1].push(decode(engine)?);
        engine.detach(id)?;
    }
    let [without, with] = speeds.map(median);
    let tax = 100.0 * (1.0 - with / without);
    let loss = summary.eval_loss.unwrap_or(f64::NAN);
    let speed = summary.tokens as f64 / summary.time.as_secs_f64();
    println!(
        "| {} | {values} | {:.2} MB | {lr:e} | {speed:.0} | {tax:.0} % | {loss:.3} |",
        name_of(kind),
        bytes as f64 / 1e6
    );
    Ok(())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(model) = args.first() else {
        eprintln!("usage: methods MODEL [METHODS [STEPS]]");
        return Ok(());
    };
    let steps = args.get(2).and_then(|steps| steps.parse().ok()).unwrap_or(STEPS);
    let chosen: Option<Vec<&str>> = args.get(1).map(|names| names.split(',').collect());
    let engine = Engine::open(model.as_ref(), &Options::new())?;
    let folder = std::env::temp_dir().join(format!("pocketlora-methods-{}", std::process::id()));
    fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
    let learned = lines(&folder, "learned.jsonl", |phrasing| phrasing < 4)?;
    let watched = lines(&folder, "watched.jsonl", |phrasing| phrasing == 4)?;
    println!("| method | values | file | rate | train tok/s | decode tax | loss in other words |");
    println!("|---|---|---|---|---|---|---|");
    for kind in Kind::ALL {
        let name = name_of(*kind);
        if chosen.as_ref().is_some_and(|chosen| !chosen.contains(&name.as_str())) {
            continue;
        }
        match row(&engine, *kind, steps, [&learned, &watched], &folder.join(&name)) {
            Err(e) if e.code() == ErrorCode::Config => println!("| {name} | | | | | | {e} |"),
            done => done?,
        }
    }
    let _ = fs::remove_dir_all(&folder);
    Ok(())
}
