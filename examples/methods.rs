//! What each adapter method, and each course that training of a LoRA can take, costs and brings: values, bytes of the file, speed
//! of training, what decoding costs more than without an adapter, and the loss on the demo's answers to questions in other words
//! after the same steps. The learning rate is the one that the probe of `train` chooses, or, with `usual`, the one that it begins
//! with.
//!
//! `cargo run --release --example methods -- MODEL [NAMES [STEPS [usual]]]` with a folder of a model in NF4, such as `pocketlora
//! list` shows after `pocketlora pull`. NAMES are some of the names that `train --method` takes and of the courses below, with
//! commas between them, or `all`. Each adds a row to one of two tables in Markdown. Speeds are medians of runs in turn with and without the
//! adapter.

use pocketlora::adapter::{DropoutForm, Kind};
use pocketlora::train::{LayerOrder, Summary};
use pocketlora::{Chat, Engine, Error, ErrorCode, Message, Observer, Options, Result, StepReport, TrainConfig};
use serde_json::{Map, Value};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

const TRAINED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/samples/owner-train.jsonl");
const STEPS: u64 = 40;
const TOKENS: usize = 48;
const RUNS: usize = 3;

/// Listens to nothing but how long steps take, in seconds in all.
#[derive(Default)]
struct Clock(f64);

impl Observer for Clock {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        self.0 += report.time.as_secs_f64();
        ControlFlow::Continue(())
    }
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

/// Settings that all rows share.
fn usual(steps: u64) -> TrainConfig {
    TrainConfig { rank: 16, batch: 8, steps: Some(steps), save_every: 0, save_seconds: 0, ..TrainConfig::default() }
}

/// Courses of a LoRA by their names, the plain one first. What comes every so often comes four times.
fn courses(steps: u64) -> Vec<(&'static str, TrainConfig)> {
    let (usual, often) = (|| usual(steps), steps.div_ceil(4).max(1));
    let drops = |dropout_form| TrainConfig { dropout: 0.1, dropout_form, ..usual() };
    let layers = |layers_order| TrainConfig {
        layers_at_once: Some(8),
        layers_every: Some(steps.div_ceil(8).max(1)),
        layers_order,
        ..usual()
    };
    let options: Map<String, Value> =
        [("target_r", 8)].map(|(key, value)| (key.to_owned(), value.into())).into_iter().collect();
    let adalora = |grow_ranks| TrainConfig { method: Kind::Adalora, options: options.clone(), grow_ranks, ..usual() };
    vec![
        ("plain", usual()),
        // As many values as the plain one has.
        ("rank-auto", TrainConfig { budget_parameters: Some(1), ..usual() }),
        ("relora", TrainConfig { relora: Some(often), relora_warmup: Some(1), ..usual() }),
        ("periodic", TrainConfig { relora: Some(often), relora_warmup: Some(1), relora_prune: Some(1.0), ..usual() }),
        ("lisa", layers(LayerOrder::Random)),
        ("rotate", layers(LayerOrder::Rotate)),
        ("dropbp", TrainConfig { dropbp: Some(0.5), ..usual() }),
        ("dropout-input", drops(DropoutForm::Input)),
        ("dropout-rank", drops(DropoutForm::Rank)),
        ("dropout-token", drops(DropoutForm::Token)),
        ("riemannian", TrainConfig { riemannian: Some(1e-6), ..usual() }),
        ("sam", TrainConfig { sam: Some(0.05), ..usual() }),
        ("adalora-falls", adalora(false)),
        ("adalora-grows", adalora(true)),
    ]
}

/// A run that is done.
struct Trained {
    values: usize,
    lr: f32,
    summary: Summary,
    /// Seconds of all steps.
    seconds: f64,
}

fn train(engine: &Engine, mut config: TrainConfig, data: [&Path; 2], usual: bool, out: &Path) -> Result<Trained> {
    let reader = engine.reader(None)?;
    let [learned, watched] = data.map(|path| reader.dataset(path, config.seq));
    let (learned, watched) = (learned?, watched?);
    if config.wants_ranks() {
        config = engine.choose_ranks(&config, &learned, &mut Clock::default())?.apply(config);
    }
    let draft = reader.draft(config, &|key| key != "lr", &learned)?;
    let material = reader.material(&draft.config, learned, Some(watched))?;
    let config =
        if usual { draft.config } else { engine.settle(draft, &material, None, out, None, &mut Clock::default())?.0 };
    let lr = config.lr;
    let mut trainer = engine.trainer_of(config, material, None, out)?;
    let values = trainer.trained_parameters();
    let mut clock = Clock::default();
    let summary = trainer.run(&mut clock)?;
    Ok(Trained { values, lr, summary, seconds: clock.0 })
}

/// Bytes of the adapter's file.
fn bytes(out: &Path) -> Result<u64> {
    let file = out.join("adapter_model.safetensors");
    Ok(fs::metadata(&file).map_err(|e| Error::io("read", &file, e))?.len())
}

/// Trains an adapter by `kind` and writes its row.
fn method_row(engine: &Engine, kind: Kind, steps: u64, data: [&Path; 2], usual_rate: bool, out: &Path) -> Result<()> {
    let mut config = TrainConfig { method: kind, ..usual(steps) };
    if !kind.reads("rank") {
        config.rank = TrainConfig::default().rank;
    }
    let Trained { values, lr, summary, seconds } = train(engine, config, data, usual_rate, out)?;
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
    let speed = summary.tokens as f64 / seconds;
    println!(
        "| {} | {values} | {:.2} MB | {lr:e} | {speed:.0} | {tax:.0} % | {loss:.3} |",
        kind.key(),
        bytes(out)? as f64 / 1e6
    );
    Ok(())
}

/// Trains a LoRA by a course and writes its row.
fn course_row(
    engine: &Engine,
    name: &str,
    config: TrainConfig,
    data: [&Path; 2],
    usual_rate: bool,
    out: &Path,
) -> Result<usize> {
    let Trained { values, lr, summary, seconds } = train(engine, config, data, usual_rate, out)?;
    let (step, loss) = (seconds / summary.steps as f64, summary.eval_loss.unwrap_or(f64::NAN));
    println!(
        "| {name} | {values} | {:.2} MB | {lr:e} | {step:.2} s | {:.3} | {loss:.3} |",
        bytes(out)? as f64 / 1e6,
        summary.loss
    );
    Ok(values)
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(model) = args.first() else {
        eprintln!("usage: methods MODEL [NAMES [STEPS [usual]]]");
        return Ok(());
    };
    let steps = args.get(2).and_then(|steps| steps.parse().ok()).unwrap_or(STEPS);
    let usual = args.get(3).is_some_and(|word| word == "usual");
    let named = args.get(1).filter(|names| *names != "all");
    let chosen: Option<Vec<&str>> = named.map(|names| names.split(',').collect());
    let is_chosen = |name: &str| chosen.as_ref().is_none_or(|chosen| chosen.contains(&name));
    let engine = Engine::open(model.as_ref(), &Options::new())?;
    let folder = std::env::temp_dir().join(format!("pocketlora-methods-{}", std::process::id()));
    fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
    let learned = lines(&folder, "learned.jsonl", |phrasing| phrasing < 4)?;
    let watched = lines(&folder, "watched.jsonl", |phrasing| phrasing == 4)?;
    let data: [&Path; 2] = [&learned, &watched];
    println!("| method | values | file | rate | train tok/s | decode tax | loss in other words |");
    println!("|---|---|---|---|---|---|---|");
    for kind in Kind::ALL.iter().filter(|kind| is_chosen(&kind.key())) {
        let name = kind.key();
        match method_row(&engine, *kind, steps, data, usual, &folder.join(&name)) {
            Err(e) if e.code() == ErrorCode::Config => println!("| {name} | | | | | | {e} |"),
            done => done?,
        }
    }
    println!("\n| course | values in training | file | rate | a step | loss of the last step | loss in other words |");
    println!("|---|---|---|---|---|---|---|");
    let mut plain = None;
    // The plain one is what the others are compared with.
    let some = courses(steps).iter().any(|(name, _)| is_chosen(name));
    let runs = courses(steps).into_iter().filter(|(name, _)| some && *name == "plain" || is_chosen(name));
    for (name, mut config) in runs {
        config.budget_parameters = config.budget_parameters.and(plain);
        let values = course_row(&engine, name, config, data, usual, &folder.join(name))?;
        plain.get_or_insert(values);
    }
    let _ = fs::remove_dir_all(&folder);
    Ok(())
}
