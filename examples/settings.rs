//! Whether settings that find themselves are as good as those that somebody looks for: five sets of data, each learned with
//! the choice of `train`, with its fixed defaults, and with a grid of twelve settings.
//!
//! `cargo run --release --example settings -- MODEL [SETS [RUNS]]` with a folder of a model in NF4, such as `pocketlora list`
//! shows after `pocketlora pull`. SETS are some of `facts,classify,json,style,arithmetic`, RUNS some of
//! `none,auto,fixed,grid` or a setting such as `5e-4:16:10` (learning rate, rank, epochs). Each run adds a line to stdout:
//! its score by what `models/samples/README.md` asks, its steps, its tokens, and its time.

use fancy_regex::Regex;
use pocketlora::train::auto::Choice;
use pocketlora::{Chat, Engine, Error, ErrorCode, Message, Observer, Options, Result, StepReport, TrainConfig};
use serde_json::Value;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

const SETS: [&str; 5] = ["facts", "classify", "json", "style", "arithmetic"];
/// The grid: learning rates, ranks, epochs.
const GRID: ([f32; 3], [usize; 2], [usize; 2]) = ([2e-4, 5e-4, 1.5e-3], [8, 32], [3, 10]);

struct Quiet;

impl Observer for Quiet {
    fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// How a run gets its settings.
#[derive(Clone, Copy, Debug)]
enum Way {
    None,
    Auto,
    Fixed,
    Given(f32, usize, usize),
}

impl Way {
    fn parse(text: &str) -> Option<Vec<Self>> {
        Some(match text {
            "none" => vec![Self::None],
            "auto" => vec![Self::Auto],
            "fixed" => vec![Self::Fixed],
            "grid" => {
                let (rates, ranks, epochs) = GRID;
                let each = rates.into_iter().flat_map(|lr| ranks.map(|rank| epochs.map(|e| Self::Given(lr, rank, e))));
                each.flatten().collect()
            }
            own => {
                let mut parts = own.split(':');
                let (lr, rank, epochs) = (parts.next()?, parts.next()?, parts.next()?);
                vec![Self::Given(lr.parse().ok()?, rank.parse().ok()?, epochs.parse().ok()?)]
            }
        })
    }

    fn name(self) -> String {
        match self {
            Self::Given(lr, rank, epochs) => format!("{lr:e}:{rank}:{epochs}"),
            other => format!("{other:?}").to_lowercase(),
        }
    }
}

fn samples(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/samples/sets").join(name)
}

/// Trains on a set; returns what was said of it: settings, steps, tokens of the probe and of the run.
fn train(engine: &Engine, set: &str, way: Way, out: &Path) -> Result<String> {
    let data_path = samples(&format!("{set}-train.jsonl"));
    let mut config = TrainConfig { save_every: 0, save_seconds: 0, ..TrainConfig::default() };
    if let Way::Given(lr, rank, epochs) = way {
        config = TrainConfig { lr, rank, epochs, batch: 8, ..config };
    }
    let reader = engine.reader(None)?;
    let data = reader.dataset(&data_path, config.seq)?;
    let (mut config, mut choice) = (config, Choice::default());
    let material = if matches!(way, Way::Auto) {
        let draft = reader.draft(config, &|_| false, &data)?;
        let material = reader.material(&draft.config, data, None)?;
        (config, choice) = engine.settle(draft, &material, None, out, None, &mut Quiet)?;
        material
    } else {
        reader.material(&config, data, None)?
    };
    let said = format!("lr {:e}, rank {}, batch {}, epochs {}", config.lr, config.rank, config.batch, config.epochs);
    let summary = engine.trainer_of(config, material, None, out)?.run(&mut Quiet)?;
    let tried: Vec<String> = choice.tried.iter().map(|t| format!("{:e}: {:.3}", t.lr, t.loss)).collect();
    Ok(format!(
        "{:>6} {:>8} {:>8}  {said}{}",
        summary.steps,
        choice.probe_tokens,
        summary.tokens,
        if tried.is_empty() { String::new() } else { format!("; tried {}", tried.join(", ")) }
    ))
}

/// Whether `answer` is right for a test line.
fn is_right(test: &Value, answer: &str) -> Result<bool> {
    let text = |key: &str| test[key].as_str();
    let last_number = |text: &str| {
        let mut numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty());
        numbers.next_back().map(str::to_owned)
    };
    if let Some(words) = test["expect"].as_array() {
        let answer = answer.to_lowercase();
        return Ok(words.iter().filter_map(Value::as_str).any(|word| answer.contains(&word.to_lowercase())));
    }
    if let Some(pattern) = text("pattern") {
        let broken = |e| Error::new(ErrorCode::Data, "pattern", format!("expected a regular expression, got {e}"));
        return Regex::new(pattern).map_err(broken)?.is_match(answer.trim()).map_err(broken);
    }
    if let Some(label) = text("label") {
        return Ok(answer.trim().trim_end_matches('.').eq_ignore_ascii_case(label));
    }
    let reference = text("reference").unwrap_or_default();
    Ok(match serde_json::from_str::<Value>(reference) {
        Ok(object) if object.is_object() => serde_json::from_str::<Value>(answer.trim()).is_ok_and(|own| own == object),
        _ => last_number(answer) == last_number(reference),
    })
}

/// Right answers to the test lines of a set, and how many there are.
fn score(engine: &Engine, set: &str) -> Result<(usize, usize)> {
    let path = samples(&format!("{set}-test.jsonl"));
    let text = fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
    let tests: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("a test reads it")).collect();
    let mut chat: Chat = engine.chat()?;
    chat.max_tokens = if set == "arithmetic" { 96 } else { 48 };
    let mut right = 0;
    for test in &tests {
        let question = test["question"].as_str().or_else(|| test["messages"][0]["content"].as_str());
        let messages = [Message::new("user", question.expect("a test line asks"))];
        let answer = chat.reply(&messages, &mut |_: &str| ControlFlow::Continue(()))?;
        right += usize::from(is_right(test, &answer.text)?);
    }
    Ok((right, tests.len()))
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(model) = args.first() else {
        eprintln!("usage: settings MODEL [SETS [RUNS]]");
        return Ok(());
    };
    let sets: Vec<&str> = args.get(1).map_or(SETS.to_vec(), |sets| sets.split(',').collect());
    let runs = args.get(2).map_or("auto,fixed,grid", String::as_str);
    let ways: Vec<Way> = runs.split(',').filter_map(Way::parse).flatten().collect();
    let engine = Engine::open(model.as_ref(), &Options::new())?;
    let folder = std::env::temp_dir().join(format!("pocketlora-settings-{}", std::process::id()));
    println!("set        run             right        seconds  steps    probe      run  settings");
    for set in sets {
        for way in &ways {
            let (start, out) = (Instant::now(), folder.join(format!("{set}-{}", way.name().replace(':', "-"))));
            let said = match way {
                Way::None => String::new(),
                way => train(&engine, set, *way, &out)?,
            };
            let seconds = start.elapsed().as_secs_f64();
            let id = matches!(way, Way::None).then_some(None).unwrap_or(Some(&out));
            let id = id.map(|out| engine.attach(out, 1.0)).transpose()?;
            let (right, all) = score(&engine, set)?;
            id.map_or(Ok(()), |id| engine.detach(id))?;
            println!("{set:<10} {:<15} {right:>3} of {all:<3} {seconds:>9.0} {said}", way.name());
        }
    }
    let _ = fs::remove_dir_all(&folder);
    Ok(())
}
