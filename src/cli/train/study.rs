//! Notes that are studied: questions and answers are made of them, learned in their place, and asked afterwards.

use super::Args;
use super::settings::Chosen;
use crate::cli::args::{print_json, stopped};
use crate::cli::{interrupt, model, progress};
use crate::engine::{Engine, Reader};
use crate::error::{Error, ErrorCode, Result};
use crate::study::{self, Item, Note, NotesRecall, STUDY, Source, Study, StudyOptions};
use crate::train::auto::{parse_time, usual_prompt_dropout};
use crate::train::{Dataset, TrainConfig};
use serde_json::json;
use std::path::Path;
use std::time::Duration;

/// Sentences whose questions a dry run shows.
const SHOWN: usize = 3;
/// Models with fewer bytes of weights learn at the higher of two rates.
const SMALL_MODEL: u64 = 200_000_000;
/// How often each sentence is to be seen, and the least steps of a run.
const TIMES_SEEN: usize = 24;
const LEAST_STEPS: usize = 40;
/// Longer notes are texts unless somebody wants them studied.
const MOST_SENTENCES: usize = 2000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Mode {
    /// Notes, where the model has a chat template.
    Auto,
    /// Always.
    On,
    /// Notes are learned as texts.
    Off,
}

#[derive(clap::Args)]
pub(super) struct StudyArgs {
    /// Make questions and answers of notes, with the model itself, and learn these; auto does for notes and a chat model.
    #[arg(long, value_enum, num_args = 0..=1, default_missing_value = "on", default_value = "auto")]
    study: Mode,
    /// Time for the model's own questions, such as 90s, 5m or 1h; after it rules alone make them. [default: by the notes' size]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    study_time: Option<Duration>,
}

/// A time as people write it, which may be none.
fn duration(text: &str) -> Result<Duration> {
    if text.trim().trim_end_matches('s') == "0" { Ok(Duration::ZERO) } else { parse_time(text) }
}

/// The notes to study, if that is what is to be done with the data.
pub(super) fn notes(args: &Args) -> Result<Option<Vec<Note>>> {
    let mode = args.study.study;
    if mode == Mode::Off || mode == Mode::Auto && !args.data.exists() {
        return Ok(None);
    }
    let read = study::read_notes(&args.data);
    // What is wrong with other data is said where it is read to be learned.
    let read = if mode == Mode::On { read? } else { read.unwrap_or_default() };
    match read {
        Some(notes) if mode == Mode::On || model::has_template(&args.model) => {
            let count = sentences(&notes);
            if count > MOST_SENTENCES && mode == Mode::Auto {
                eprintln!(
                    "note: {count} sentences are learned as texts, for making questions of more than {MOST_SENTENCES} takes \
                     long; `--study` does it"
                );
            }
            Ok((count > 0 && (mode == Mode::On || count <= MOST_SENTENCES)).then_some(notes))
        }
        None if mode == Mode::On => {
            let message = "expected notes (`.txt`, `.md`) to study, got other data; leave out `--study`";
            Err(Error::new(ErrorCode::Data, format!("`{}`", args.data.display()), message))
        }
        _ => Ok(None),
    }
}

fn sentences(notes: &[Note]) -> usize {
    notes.iter().flat_map(|note| &note.passages).map(|passage| passage.sentences.len()).sum()
}

/// What a dry run says of it.
pub(super) fn show(notes: Option<&[Note]>, as_json: bool) {
    let Some(notes) = notes.filter(|_| !as_json) else { return };
    println!(
        "study: these notes become questions and answers before training (`--study off` learns their texts as above)"
    );
    for Item { question, answer, .. } in study::sample(notes, SHOWN) {
        println!("  {question}\n    {answer}");
    }
    println!("  and more, which the model itself asks");
}

/// Material, and what of it was known before.
pub(super) struct Studied {
    study: Study,
    before: NotesRecall,
}

/// Makes the material, or takes up what lies in the output folder, and asks the questions that are kept out.
pub(super) fn prepare(
    engine: &Engine,
    notes: Option<Vec<Note>>,
    chosen: &mut Chosen,
    args: &Args,
) -> Result<Option<Studied>> {
    let Some(notes) = notes else { return Ok(None) };
    let sentences = sentences(&notes);
    // Long enough for a slow machine; most need far less.
    let usual = Duration::from_secs((10 * sentences as u64).clamp(60, 1800));
    let time = args.study.study_time.unwrap_or(usual);
    let path = args.out().join(STUDY);
    eprintln!(
        "study: {} of {sentences} sentence{}; the model asks about them for at most {} s, into {}; --study-time bounds it, \
         --study off learns the texts",
        if notes.len() == 1 { "a note".to_owned() } else { format!("{} notes", notes.len()) },
        if sentences == 1 { "" } else { "s" },
        time.as_secs(),
        path.display()
    );
    let bar = progress::count(sentences as u64, "study");
    let options = StudyOptions { time, ..StudyOptions::default() };
    let made = study::make(engine, &notes, Some(args.out()), &options, &mut |p| {
        bar.set_position(p.sentences as u64);
        bar.set_message(format!("{} questions", p.questions));
        !interrupt::asked()
    });
    bar.finish_and_clear();
    let made = made.map_err(|e| {
        if e.code() == ErrorCode::Cancelled {
            eprintln!("what was made is kept; go on with the same command");
            return stopped("study");
        }
        e
    })?;
    say(&made, &path);
    settings(&made, engine, chosen);
    if !args.resume {
        eprintln!("{}", chosen_text(&made, &chosen.config));
    }
    let mut studied = Studied { study: made, before: NotesRecall::default() };
    let init = args.init.as_deref().map(crate::cli::names::adapter).transpose()?;
    init.iter().try_for_each(|dir| engine.attach(dir, 1.0).map(|_| ()))?;
    studied.before = studied.ask(engine, "before")?;
    engine.detach_all();
    Ok(Some(studied))
}

fn say(made: &Study, path: &Path) {
    let [model, rules, user] = [Source::Model, Source::Template, Source::User].map(|source| made.count(source));
    let mut parts = vec![format!("{model} asked by the model"), format!("{rules} by rules")];
    if user > 0 {
        parts.push(format!("{user} by you"));
    }
    let taken_up = match (made.found, made.edited) {
        (true, true) => ", taken up as edited",
        (true, false) => ", taken up",
        (false, true) => ", edited lines kept",
        (false, false) => "",
    };
    eprintln!(
        "study: {} questions to learn ({}), {} kept out to ask afterwards: {}{taken_up}",
        model + rules + user,
        parts.join(", "),
        made.held().count(),
        path.display()
    );
}

/// Settings that learn such material, where nobody chose others.
fn settings(made: &Study, engine: &Engine, chosen: &mut Chosen) {
    let given = |key: &str| chosen.given.contains(key);
    let small = engine.mapped_bytes() < SMALL_MODEL;
    let learned = made.items.len() - made.held().count();
    let usual = chosen.config.clone();
    let batch = if given("batch") { usual.batch } else { 8 };
    let seen = (TIMES_SEEN * made.sentences).div_ceil(learned.max(1)).clamp(2, 8);
    let epochs = seen.max((LEAST_STEPS * batch).div_ceil(learned.max(1)).min(40));
    let epochs = if given("epochs") || given("steps") { usual.epochs } else { epochs };
    let config = TrainConfig {
        rank: if given("rank") || given("method") { usual.rank } else { 16 },
        lr: if given("lr") {
            usual.lr
        } else if small {
            1e-3
        } else {
            5e-4
        },
        batch,
        epochs,
        prompt_dropout: if given("prompt-dropout") { usual.prompt_dropout } else { usual_prompt_dropout(epochs) },
        ..usual
    };
    chosen.config = config;
}

/// The settings in a line, as those of other data are told.
fn chosen_text(made: &Study, config: &TrainConfig) -> String {
    let rank = if config.method.reads("rank") { format!(", rank {}", config.rank) } else { String::new() };
    let thinned = match config.prompt_dropout {
        0.0 => String::new(),
        share => format!(", prompt dropout {share}"),
    };
    let length = config.steps.map_or_else(|| format!("{} epochs", config.epochs), |steps| format!("{steps} steps"));
    let schedule = format!("{:?}", config.schedule).to_lowercase();
    format!(
        "auto: lr {:e}{rank}{thinned}, batch {}, {schedule}, {length}; for {} questions on {} sentences",
        config.lr,
        config.batch * config.accumulate,
        made.items.len() - made.held().count(),
        made.sentences
    )
}

impl Studied {
    /// What to say where a run cannot be resumed, for somebody may have edited its material.
    pub(super) fn edited_text(&self, out: &Path) -> Option<String> {
        self.study.edited.then(|| {
            format!(
                "note: {} was edited since it was made; a run goes on only with the questions that it began with: undo the \
                 edit, or begin again with --overwrite instead of --resume",
                out.join(STUDY).display()
            )
        })
    }

    pub(super) fn dataset(&self, reader: &Reader, max_tokens: usize, args: &Args) -> Result<Dataset> {
        self.study.dataset(reader, &args.data, max_tokens)
    }

    fn ask(&self, engine: &Engine, when: &str) -> Result<NotesRecall> {
        let bar = progress::count(self.study.held().count() as u64, when);
        let found = study::recall(engine, self.study.held(), interrupt::cancel(), &mut |_, _| bar.inc(1));
        bar.finish_and_clear();
        found.map_err(|e| if e.code() == ErrorCode::Cancelled { stopped("study") } else { e })
    }

    /// Says what was learned: the questions that were kept out, before and after.
    pub(super) fn report(&mut self, engine: &Engine, adapter: &Path, args: &Args) -> Result<()> {
        let (asked, before) = (self.study.held().count(), self.before);
        if asked == 0 {
            return Ok(());
        }
        engine.attach(adapter, 1.0)?;
        let after = self.ask(engine, "after");
        engine.detach_all();
        let after = match after {
            // The adapter is written, and who does not wait for its check goes without.
            Err(e) if e.code() == ErrorCode::Cancelled => {
                eprintln!("the questions after training were stopped; not measured: what was learned");
                return Ok(());
            }
            after => after?,
        };
        if args.json {
            print_json(&json!({ "study": { "asked": asked, "before": before, "after": after } }));
        } else {
            println!(
                "learned: of {asked} questions in other words, {} answered rightly before, {} after ({} word for word)",
                before.held, after.held, after.exact
            );
        }
        if after.held <= before.held {
            eprintln!(
                "warning: the adapter knows no more of the notes than the model did; try more `--epochs`, a higher `--lr` or \
                 `--rank`, or look at the material"
            );
        }
        Ok(())
    }
}
