//! An app in a page: it chats on one thread while another trains, takes a snapshot of the run, and talks to that.
//!
//! `cargo run --release --example app -- MODEL DATA.jsonl OUT` with a folder of a model in NF4, such as
//! `pocketlora list` shows after `pocketlora pull`.

use pocketlora::{Engine, Observer, Options, Result, StepReport, TrainConfig, Trainer};
use std::io::Write as _;
use std::ops::ControlFlow;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// What an app holds: all of it may move between threads, and the engine is shared by clone.
struct App {
    engine: Engine,
    trainer: Trainer,
}

/// Shows the loss as it falls.
struct Progress;

impl Observer for Progress {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        eprintln!("step {} of {}: loss {:.3}", report.step, report.total_steps, report.loss);
        ControlFlow::Continue(())
    }
}

/// Asks, and prints the answer as it comes. An app would keep `chat` and show a button for its `cancel_token`.
fn ask(engine: &Engine, question: &str) -> Result<String> {
    let mut chat = engine.chat()?;
    chat.max_tokens = 24;
    print!("> {question}\n< ");
    let answer = chat.ask(question, &mut |piece: &str| {
        print!("{piece}");
        match std::io::stdout().flush() {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    })?;
    println!();
    Ok(answer.text)
}

/// Returns the answers before, beside and after training.
pub fn run(model: &Path, data: &Path, out: &Path, question: &str) -> Result<[String; 3]> {
    let engine = Engine::open(model, &Options::new().context(1024))?;
    eprintln!("a text of 1024 tokens takes {} kB", engine.context_bytes(1024) / 1000);
    let config = TrainConfig { steps: Some(40), lr: 1e-3, ..TrainConfig::default() };
    let data = engine.dataset(data, config.seq)?;
    let trainer = engine.trainer(config, data, None, None, out)?;
    let App { engine, mut trainer } = App { engine, trainer };
    let before = ask(&engine, question)?;

    let handle = trainer.handle();
    let run = thread::spawn(move || trainer.run(&mut Progress));
    // The chat takes turns with the run, token by token and layer by layer.
    ask(&engine, question)?;
    // A call comes in: the run holds where it is. What it has learned so far can be tried.
    handle.pause();
    let beside = if handle.wait_paused(Duration::from_secs(2)) {
        let early = engine.attach_file(handle.snapshot()?, 1.0)?;
        let answer = ask(&engine, question)?;
        engine.detach(early)?;
        answer
    } else {
        before.clone()
    };
    handle.resume();
    let summary = run.join().expect("a run does not panic")?;

    engine.attach(&summary.adapter, 1.0)?;
    let after = ask(&engine, question)?;
    Ok([before, beside, after])
}

#[allow(dead_code, reason = "a test takes this file as a module")]
fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, data, out] = &args[..] else {
        eprintln!("usage: app MODEL DATA.jsonl OUT");
        return Ok(());
    };
    run(model.as_ref(), data.as_ref(), out.as_ref(), "what is number 3?").map(|_| ())
}
