//! How often answers loop, and how often they are right: the measurement by which defaults of sampling were chosen.
//!
//! `cargo run --release --example loops -- [MODEL] [--cap N] [--threads N] [--answers FILE] [ROW ..]` asks the prompts of
//! `models/samples/chat-prompts.jsonl` with each row's settings and prints a table. MODEL is a name that `pull` knows.
//! `ROW` is a row's name, all rows if there is none.
//!
//! - `cut`: the cap came before the answer's end.
//! - `loops`: of the cut answers, those that end in the same tokens four times or more, over at least 16 tokens. Outside of
//!   blocks of code, all numbers are alike. What the cap cuts while it says something new is none.
//! - `right`: of the prompts with an exact answer (`expect`), those whose answer holds one as whole words.

use pocketlora::generate::{Guard, Sampler};
use pocketlora::hub::{self, Hub};
use pocketlora::internals::{self, Adapters, Logits, Sequence, Step, Workspace};
use pocketlora::{Dry, Engine, Error, Message, Options, Precision, Result, Sampling, Text};
use pocketlora_kernels::Cpu;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write as _;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::time::Instant;

const PROMPTS: &str = include_str!("../models/samples/chat-prompts.jsonl");
/// The usual cap of `pocketlora chat`.
const CAP: usize = 512;
/// Copies that make a loop, and the tokens that they take at least.
const COPIES: usize = 4;
const TOKENS: usize = 16;
/// Answers that grow together: a weight is read once for all of them.
const BATCH: usize = 20;

/// A row of the table.
struct Row {
    name: &'static str,
    options: Options,
    sampling: Sampling,
}

fn rows(recommended: &Sampling) -> Vec<Row> {
    let plain = Sampling::default;
    let unguarded = |sampling: Sampling| Sampling { dry: Dry::OFF, ..sampling };
    let always = Dry { after: 0, ..Dry::GUARD };
    let before = Sampling { temperature: 0.7, top_p: 0.9, ..plain() };
    let (fast, recommended) = (Options::new(), recommended.clone());
    let cool = Sampling { temperature: 0.2, top_p: 0.9, ..plain() };
    let row = |name, options: &Options, sampling: Sampling| Row { name, options: options.clone(), sampling };
    vec![
        row("greedy unguarded", &fast, plain()),
        row("greedy plain-dry", &fast, Sampling { dry: always, ..plain() }),
        row("greedy guarded", &fast, Sampling { dry: Dry::GUARD, ..plain() }),
        row("t0.7 unguarded", &fast, before.clone()),
        row("t0.7 plain-dry", &fast, Sampling { dry: always, ..before.clone() }),
        row("t0.7 guarded", &fast, Sampling { dry: Dry::GUARD, ..before }),
        row("t0.2 unguarded", &fast, cool.clone()),
        row("t0.2 guarded", &fast, Sampling { dry: Dry::GUARD, ..cool }),
        row("recommended unguarded", &fast, unguarded(recommended.clone())),
        row("recommended", &fast, recommended.clone()),
        row("recommended exact", &fast.clone().precision(Precision::Exact), recommended.clone()),
        row("recommended bf16", &fast.clone().precision(Precision::Bf16), recommended.clone()),
        // Without a cache for its copy, the head stays in 16 bits.
        row("recommended head16", &fast, recommended),
    ]
}

/// What was found in a row.
#[derive(Default)]
struct Found {
    asked: usize,
    cut: usize,
    loops: usize,
    exact: usize,
    right: usize,
    tokens: usize,
}

fn words(text: &str) -> Vec<String> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_lowercase).collect()
}

/// Whether `answer` holds one of the texts as whole words.
fn is_right(answer: &str, expect: &[Value]) -> bool {
    let said = words(answer);
    let holds = |wanted: Vec<String>| said.windows(wanted.len().max(1)).any(|part| part == wanted);
    expect.iter().filter_map(Value::as_str).any(|text| holds(words(text)))
}

/// Whether tokens end in a loop; `tokens` has numbers all alike.
fn ends_in_a_loop(tokens: &[String]) -> bool {
    let repeats = |period: usize| {
        let taken = (COPIES * period).max(TOKENS);
        let Some(start) = tokens.len().checked_sub(taken) else { return false };
        (start + period..tokens.len()).all(|at| tokens[at] == tokens[at - period])
    };
    (1..=tokens.len() / COPIES).any(repeats)
}

/// Whether an answer ends in a loop: exactly, or but for its numbers, which code and data may count up.
fn loops(pieces: &[String]) -> bool {
    let fenced = pieces.concat().matches("```").count() % 2 == 1;
    let alike = |piece: &String| if piece.trim().parse::<u64>().is_ok() { "0".to_owned() } else { piece.clone() };
    ends_in_a_loop(pieces) || !fenced && ends_in_a_loop(&pieces.iter().map(alike).collect::<Vec<_>>())
}

/// An answer that grows beside others.
struct Growing {
    prompt: Value,
    sequence: Sequence<Cpu>,
    sampler: Sampler,
    guard: Option<Guard>,
    /// The prompt, then what was chosen.
    context: Vec<u32>,
    start: usize,
    /// Of the context, what has not been run.
    waiting: Range<usize>,
    ended: bool,
}

impl Growing {
    fn new(engine: &Engine, line: &str, sampling: &Sampling, seed: u64) -> Result<Self> {
        let (text, base) = (engine.text()?, internals::base(engine));
        let prompt: Value = serde_json::from_str(line).expect("a test reads every line of the shipped samples");
        let asked = prompt["prompt"].as_str().unwrap_or_default();
        let context = engine.chat()?.prompt_of(&[Message::new("user", asked)])?;
        let decode = move |ids: &[u32]| text.tokenizer.decode(ids).unwrap_or_default();
        Ok(Self {
            sequence: Sequence::new(base, internals::numbers(engine).cache)?,
            sampler: Sampler::new(Sampling { seed, ..sampling.clone() }),
            guard: Guard::new(sampling.dry, &context, decode),
            start: context.len(),
            waiting: 0..context.len(),
            prompt,
            context,
            ended: false,
        })
    }

    /// Chooses the next token, as a decoder does.
    fn choose(&mut self, logits: &mut [f32], stop: &[u32]) -> Result<()> {
        self.guard.iter().for_each(|guard| guard.apply(logits));
        let id = self.sampler.sample(logits, &self.context)?;
        self.ended = stop.contains(&id);
        if !self.ended {
            self.guard.iter_mut().for_each(|guard| guard.accept(id));
            self.waiting = self.context.len()..self.context.len() + 1;
            self.context.push(id);
        }
        Ok(())
    }
}

/// All answers of a row, in batches: each is what it would be by itself, up to rounding.
fn measure(engine: &Engine, row: &Row, cap: usize, answers: &mut Option<File>) -> Result<Found> {
    let (text, base) = (engine.text()?, internals::base(engine));
    let mut work = Workspace::new(internals::numbers(engine).arithmetic);
    let (none, mut found) = (Adapters::none(base), Found::default());
    let lines: Vec<(&str, u64)> = PROMPTS.lines().zip(1..).collect();
    for batch in lines.chunks(BATCH) {
        let new = |(line, seed): &(&str, u64)| Growing::new(engine, line, &row.sampling, *seed);
        let mut all: Vec<Growing> = batch.iter().map(new).collect::<Result<_>>()?;
        loop {
            let mut open: Vec<&mut Growing> =
                all.iter_mut().filter(|one| !one.ended && one.context.len() - one.start < cap).collect();
            if open.is_empty() {
                break;
            }
            let mut logits = vec![Vec::new(); open.len()];
            let steps = open.iter_mut().map(|one| {
                let (ids, rows) = (&one.context[one.waiting.clone()], one.waiting.len());
                Step { sequence: &mut one.sequence, ids, adapters: &none, logits: rows - 1..rows }
            });
            let mut steps: Vec<Step<'_, Cpu>> = steps.collect();
            base.forward(&mut work, &mut steps, &mut || true, &mut |made: &Logits| {
                let each = made.values.chunks_exact(made.values.len() / made.places.len());
                made.places.iter().zip(each).for_each(|((step, _), row)| logits[*step] = row.to_vec());
                Ok(())
            })?;
            drop(steps);
            for (one, logits) in open.iter_mut().zip(&mut logits) {
                one.choose(logits, &text.tokenizer.stop)?;
            }
        }
        for one in all {
            found.add(row, &one, &text, answers)?;
        }
    }
    Ok(found)
}

impl Found {
    fn add(&mut self, row: &Row, one: &Growing, text: &Text, answers: &mut Option<File>) -> Result<()> {
        let ids = &one.context[one.start..];
        let (answer, cut) = (text.tokenizer.decode(ids)?, !one.ended);
        let pieces: Vec<String> = ids.iter().map(|id| text.tokenizer.decode(&[*id])).collect::<Result<_>>()?;
        let loops = cut && loops(&pieces);
        let right = one.prompt["expect"].as_array().map(|expect| is_right(&answer, expect));
        self.asked += 1;
        self.cut += usize::from(cut);
        self.loops += usize::from(loops);
        self.exact += usize::from(right.is_some());
        self.right += usize::from(right == Some(true));
        self.tokens += ids.len();
        if let Some(file) = answers {
            let report = json!({"row": row.name, "prompt": one.prompt["prompt"], "cut": cut, "loops": loops,
                "right": right, "tokens": ids.len(), "answer": answer});
            writeln!(file, "{report}").map_err(|e| Error::io("write", Path::new("answers"), e))?;
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let (mut model, mut cap, mut answers, mut wanted) = ("smollm2-135m".to_owned(), CAP, None, Vec::new());
    let mut threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut args = std::env::args().skip(1).peekable();
    if let Some(name) = args.next_if(|arg| hub::resolve(arg).is_some()) {
        model = name;
    }
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--cap" => cap = args.next().and_then(|n| n.parse().ok()).unwrap_or(CAP),
            "--threads" => threads = args.next().and_then(|n| n.parse().ok()).unwrap_or(threads),
            "--answers" => {
                let path = args.next().unwrap_or_default();
                answers = Some(File::create(&path).map_err(|e| Error::io("create", path.as_ref(), e))?);
            }
            name => wanted.push(name.to_owned()),
        }
    }
    let hub = Hub::from_env()?;
    let go_on = ControlFlow::Continue(());
    let source = hub::pull(&model, &mut |_| go_on)?;
    let copy = hub.quantized(&source, &model, &mut |_| go_on)?;
    let recommended = Engine::open(&copy.dir, &Options::new().ids_only(true))?.recommended()?;
    println!("{model}: {recommended:?}\n");
    println!("| settings | loops | cut | right | tokens | s |\n|---|---|---|---|---|---|");
    for row in rows(&recommended.sampling) {
        if !wanted.is_empty() && !wanted.iter().any(|name| row.name == name) {
            continue;
        }
        let int8_head = !row.name.contains("head16");
        let options = row.options.clone().threads(threads);
        let options = if int8_head { options.cache_dir(hub.home.join("int8")) } else { options };
        let engine = Engine::open(&copy.dir, &options)?;
        let start = Instant::now();
        let found = measure(&engine, &row, cap, &mut answers)?;
        println!(
            "| {} | {} of {} ({:.1} %) | {} | {} of {} | {} | {:.0} |",
            row.name,
            found.loops,
            found.asked,
            100.0 * found.loops as f64 / found.asked as f64,
            found.cut,
            found.right,
            found.exact,
            found.tokens,
            start.elapsed().as_secs_f64()
        );
    }
    Ok(())
}
