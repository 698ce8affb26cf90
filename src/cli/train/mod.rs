//! `pocketlora train`: a LoRA adapter from a data file.

mod out_folder;
mod report;
mod settings;
mod study;
mod watcher;

pub(super) use report::{known_json, known_text, plan_text};
pub(super) use watcher::Watcher;

use super::args::SpecialTokensArg;
use super::data::DryRun;
use super::data_check::DataCheck;
use super::{data, interrupt, model, names};
use crate::adapter::{AdapterFile, Kind};
use crate::engine::{Engine, Options, check_threads};
use crate::error::{ErrorCode, Result};
use crate::eval;
use crate::hub::Hub;
use crate::train::auto::{Choice, Draft, parse_time, usual_rate};
use crate::train::{
    DataReport, Dataset, Learned, Material, MemoryPlan, RankChoice, SETTINGS, Summary, TrainConfig, has_checkpoint,
};
use report::{keep_text, report};
pub(super) use settings::Chosen;
use settings::Settings;
use std::path::{Path, PathBuf};
use std::time::Instant;
use study::Studied;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Directory, .gguf file, or name of a model in the cache.
    #[arg(short, long, default_value = model::DEFAULT)]
    model: String,
    /// JSONL or CSV with `messages`, `prompt` and `completion`, `instruction` and `output`, or `text`; or a folder of
    /// .txt and .md notes.
    #[arg(short, long, value_parser = names::path())]
    data: PathBuf,
    /// Folder for the adapter.
    #[arg(short, long, required_unless_present = "dry_run", value_parser = names::path())]
    out: Option<PathBuf>,
    /// Show the first samples, what of them is learned, and figures of the data; train nothing.
    #[arg(long)]
    dry_run: bool,
    /// Settings as TOML; flags win over it.
    #[arg(long, value_parser = names::path())]
    config: Option<PathBuf>,
    /// Continue a stopped run from its checkpoint in the output folder, with its settings; those given must agree.
    #[arg(long)]
    resume: bool,
    /// Replace an adapter, or the checkpoint of an unfinished run, in the output folder.
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,
    /// Start from this PEFT adapter, a folder or a name in the cache; its rank, alpha and layers are kept, and its dropout unless another is given.
    #[arg(long, value_name = "ADAPTER")]
    init: Option<String>,
    /// Whether settings that are not given are chosen, from the model, the data and a short probe; off takes fixed
    /// defaults.
    #[arg(long, value_enum, default_value = "on")]
    auto: Auto,
    /// Time for choosing and training, such as 90s, 10m or 2h; the choice then depends on how fast this machine is.
    /// [default: as long as it gets better, see the second line of what is chosen]
    #[arg(long)]
    time: Option<String>,
    /// Threads; 0 measures how many serve best.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Run 16- and 32-bit weights as they are instead of quantizing them at first use.
    #[arg(long)]
    no_quantize: bool,
    /// With --init: refuse an adapter whose file tells that it was trained on another base, which is warned of otherwise.
    #[arg(long, requires = "init")]
    strict: bool,
    /// Special tokens, such as <|im_end|>, that are written out in the data.
    #[arg(long, value_enum, default_value = "auto")]
    special_tokens: SpecialTokensArg,
    /// One JSON object per step on stdout, the summary last.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    study: study::StudyArgs,
    #[command(flatten)]
    settings: Settings,
}

/// Whether settings find themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Auto {
    /// All that are not given.
    On,
    /// Those that are not given are as `train --help` says.
    Off,
}

impl Args {
    fn out(&self) -> &Path {
        self.out.as_deref().expect("asked for where it is used")
    }
}

pub(super) fn run(args: &Args) -> Result<bool> {
    // The program itself, before it has read anything.
    let baseline = crate::memory::anonymous_bytes();
    let own = own_settings(args);
    let files: Vec<&Path> = own.as_deref().into_iter().chain(args.config.as_deref()).collect();
    let mut chosen = args.settings.merge(&files, own.is_none())?;
    let notes = study::notes(args)?;
    let end = args.time.as_deref().map(parse_time).transpose()?.map(|time| Instant::now() + time);
    if args.dry_run {
        let init = args.init.as_deref().map(names::adapter).transpose()?;
        let init = init.as_deref().map(AdapterFile::open).transpose()?;
        data::dry_run(&DryRun {
            model: &args.model,
            quantize: !args.no_quantize,
            special_text: args.special_tokens.into(),
            init: init.as_ref(),
            data: &args.data,
            chosen: &chosen,
            // What is studied has settings of its own, and so does a run to go on with.
            auto: args.auto == Auto::On && !args.resume && notes.is_none(),
            as_json: args.json,
        })?;
        study::show(notes.as_deref(), args.json);
        return Ok(true);
    }
    out_folder::check(args, &chosen.config)?;
    model::check_text(&args.model)?;
    // Before the model, which may take long to make.
    check_threads(args.threads)?;
    let init = args.init.as_deref().map(names::adapter).transpose()?;
    let init = init.as_deref().map(AdapterFile::open).transpose()?;
    if init.is_none() {
        model::check_targets(&args.model, chosen.config.method, &chosen.config.targets)?;
    }
    let model = model::resolve(&args.model, !args.no_quantize)?;
    let base_name = Some(model.name);
    let options = Options {
        threads: args.threads,
        base_name,
        // Questions are asked and answered in words.
        ids_only: notes.is_none(),
        special_text: args.special_tokens.into(),
        strict: args.strict,
        ..super::args::options()
    };
    let engine = Engine::open(&model.path, &options)?;
    let mut studied = study::prepare(&engine, notes, &mut chosen, args)?;
    let run = fit(&engine, chosen, init, studied.as_ref(), args, end)?;
    if let Some(studied) = studied.as_mut().filter(|_| run.summary.done) {
        studied.report(&engine, &run.summary.adapter, args)?;
    }
    if run.summary.done {
        // For `list`, which can do without.
        let _ = Hub::from_env().and_then(|hub| hub.note_trained(&run.summary.adapter));
    }
    report(&run, baseline, &engine, args);
    Ok(run.summary.done)
}

/// What the run to go on with wrote of its settings: they hold unless others are given.
fn own_settings(args: &Args) -> Option<PathBuf> {
    let out = args.out.as_ref().filter(|out| args.resume && has_checkpoint(out))?;
    Some(out.join(SETTINGS)).filter(|path| path.exists())
}

/// A run and all that is to be said of it.
struct Run {
    summary: Summary,
    plan: MemoryPlan,
    data: DataReport,
    choice: Option<Choice>,
    ranks: Option<RankChoice>,
    learned: Option<Learned>,
    /// Nobody stopped the questions on what was learned.
    asked: bool,
}

/// Reads the data, drafts the settings where they are to be chosen, and lets the tokenizer go: training needs no text.
fn read(
    engine: &Engine,
    config: &mut TrainConfig,
    given: &dyn Fn(&str) -> bool,
    init: Option<&AdapterFile>,
    studied: Option<&Studied>,
    args: &Args,
) -> Result<(Material, Option<Draft>)> {
    let reader = engine.reader(init)?;
    let data = match studied {
        Some(studied) => studied.dataset(&reader, config.seq, args)?,
        None => reader.dataset(&args.data, config.seq)?,
    };
    let eval_data = config.eval_data.as_ref().map(|path| reader.held_out_dataset(path, config.seq)).transpose()?;
    data::say_unused("held-out data", eval_data.as_ref());
    DataCheck::new(&data.checks, &reader.text().tokenizer, &reader.text().template).warn();
    // What is studied has settings of its own.
    let chosen = args.auto == Auto::On && !args.resume && studied.is_none();
    let draft = chosen.then(|| reader.draft(config.clone(), given, &data)).transpose()?;
    if let Some(draft) = &draft {
        *config = draft.config.clone();
    }
    let mut material = reader.material(config, data, eval_data)?;
    if config.method == Kind::Cartridge && init.is_none() && config.prompt_init_text.is_none() {
        // Whatever is learned, it begins as the notes themselves.
        let notes = crate::study::read_notes(&args.data).ok().flatten();
        let text = notes.map(|notes| notes.into_iter().map(|note| note.text).collect::<Vec<_>>().join("\n\n"));
        material.prompt_ids = text.map(|text| reader.text().tokenizer.encode(&text, true)).transpose()?;
    }
    Ok((material, draft))
}

fn fit(
    engine: &Engine,
    chosen: Chosen,
    mut init: Option<AdapterFile>,
    studied: Option<&Studied>,
    args: &Args,
    end: Option<Instant>,
) -> Result<Run> {
    let Chosen { mut config, given } = chosen;
    let mut decided: &[&str] = &[];
    if let Some(file) = &mut init {
        // Before the data is read: here it is known what somebody chose, be it the default.
        config = config.with_adapter(engine.base().model.as_ref(), file, &|key| given.contains(key))?;
        file.method.set_in_training(&config.adapter());
        decided = file.method.kind().decides();
    }
    if !given.contains("lr") && config.method != Kind::Lora {
        config.lr = usual_rate(config.method, engine.base().model.config().hidden_size);
    }
    let given = |key: &str| given.contains(key) || decided.contains(&key);
    let (material, mut draft) = read(engine, &mut config, &given, init.as_ref(), studied, args)?;
    let ranks = if config.wants_ranks() && !args.resume {
        let mut watcher = Watcher::choosing(1);
        let chosen = engine.choose_ranks(&config, &material.data, &mut watcher);
        watcher.bar.finish_and_clear();
        let chosen = chosen?;
        eprint!("{}", chosen.text());
        config = chosen.apply(config);
        draft.iter_mut().for_each(|draft| draft.config = chosen.apply(draft.config.clone()));
        Some(chosen)
    } else {
        None
    };
    let choice = match draft {
        Some(draft) => {
            let mut watcher = Watcher::choosing(draft.probe_steps());
            let settled = engine.settle(draft, &material, init.as_ref(), args.out(), end, &mut watcher);
            watcher.bar.finish_and_clear();
            let (settled, choice) = settled?;
            config = settled;
            choice.lines.iter().for_each(|line| eprintln!("{line}"));
            choice.doubts.iter().for_each(|doubt| eprintln!("warning: {doubt}"));
            Some(choice)
        }
        None => None,
    };
    let asked = Learned::sample(&material.data, config.seed);
    let watched = material.eval_data.as_ref().map(|data| Learned::sample(data, config.seed));
    let (keep, check) = (config.keep, config.check);
    let mut trainer = engine.trainer_of(config, material, init.as_ref(), args.out())?;
    drop(init);
    if args.resume {
        trainer.resume().inspect_err(|_| {
            let edited = studied.and_then(|studied| studied.edited_text(args.out()));
            edited.into_iter().for_each(|note| eprintln!("{note}"));
        })?;
        eprintln!("resuming after step {}", trainer.step_number());
    } else {
        // The folder was looked at before the model was opened.
        trainer.replace_earlier();
    }
    if let Some(Err(e)) = ranks.as_ref().map(|ranks| ranks.write(args.out())) {
        eprintln!("warning: {e}");
    }
    let data = trainer.data_report();
    eprint!("{}", data::text(&data));
    eprintln!("adapter: {} trained values", trainer.trained_parameters());
    eprint!("{}", keep_text(&trainer, keep, check));
    let plan = trainer.plan();
    eprintln!("{}", plan_text(&plan));
    end.into_iter().for_each(|end| trainer.end_by(end));
    let mut watcher = Watcher::new(trainer.total_steps(), trainer.step_number(), args.json);
    let summary = trainer.run(&mut watcher);
    watcher.bar.finish_and_clear();
    let summary = summary?;
    drop(trainer);
    // What is studied is asked about by itself.
    let ask = summary.done && studied.is_none();
    let learned = if ask { learned(engine, &asked, watched.as_ref(), &summary.adapter, args)? } else { None };
    let asked = !ask || learned.is_some();
    Ok(Run { summary, plan, data, choice, ranks, learned, asked })
}

/// What the run taught; nothing where somebody would not wait for it.
fn learned(
    engine: &Engine,
    asked: &Dataset,
    watched: Option<&Dataset>,
    adapter: &Path,
    args: &Args,
) -> Result<Option<Learned>> {
    let init = args.init.as_deref().map(names::adapter).transpose()?;
    match eval::learned(engine, asked, watched, init.as_deref(), adapter, &mut |_| !interrupt::asked()) {
        Err(e) if e.code() == ErrorCode::Cancelled => Ok(None),
        found => found.map(Some),
    }
}
