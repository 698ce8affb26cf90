//! `pocketlora bench`: how fast a model runs and learns here, against the machine's limits.

use super::args::{PrecisionArg, at_least_one, megabytes, options, print_json, stopped};
use super::{interrupt, model, names, outputs, progress};
use crate::bench::{self, Figure, Kernel, Options, Profile, Report, Run, TrainReport, shape};
use crate::engine;
use crate::error::{Error, ErrorCode, Result};
use crate::format::write_bytes;
use crate::train::{TrainConfig, TrainPrecision};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Directory, .gguf file, or name of a model in the cache.
    #[arg(short, long, default_value = model::DEFAULT, conflicts_with = "shape")]
    model: String,
    /// Instead of a model: random weights in the shape of smollm2-135m, qwen2.5-0.5b, llama-1b, qwen2.5-1.5b,
    /// qwen2.5-3b, qwen3-0.6b, gemma3-1b, qwen3.5-0.8b, gemma4-e2b, lfm2-1.2b, granite-3.3-2b, granite-4.0-h-350m,
    /// phi4-mini, smollm3-3b or ministral3-3b.
    #[arg(long, value_name = "NAME")]
    shape: Option<String>,
    /// With --shape: keep its files in this folder and use them again next time.
    #[arg(long, value_name = "DIR", requires = "shape", value_parser = names::path())]
    keep: Option<PathBuf>,
    /// Numbers of threads to measure, such as 1,2; 0 is all cores.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    threads: Vec<usize>,
    /// Trials of each figure, after a warm-up.
    #[arg(long, default_value_t = 5, value_parser = at_least_one)]
    trials: usize,
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 512, value_parser = at_least_one)]
    prefill: usize,
    /// Tokens decoded one by one.
    #[arg(long, default_value_t = 128, value_parser = at_least_one)]
    decode: usize,
    /// Tokens of a training sequence.
    #[arg(long, default_value_t = 256, value_parser = at_least_one)]
    seq: usize,
    /// Measure training alone, in a process that does nothing else: its memory is then training's.
    #[arg(long, conflicts_with = "no_train")]
    train: bool,
    /// With --train: optimizer.
    #[arg(long, value_name = "NAME", requires = "train", default_value = "adamw")]
    optimizer: String,
    /// With --train: anonymous memory that the process may hold, in MB.
    #[arg(long, value_name = "MB", requires = "train")]
    memory_budget: Option<u64>,
    /// Leave training out.
    #[arg(long)]
    no_train: bool,
    /// With --train: measure it once more, by operation.
    #[arg(long, requires = "train")]
    profile: bool,
    /// Leave single kernels out.
    #[arg(long)]
    no_kernels: bool,
    /// Arithmetic of inference; with --train that of training, where `fast` means `bf16`.
    #[arg(long, value_enum, default_value = "fast")]
    precision: PrecisionArg,
    /// Run 16- and 32-bit weights as they are instead of quantizing them at first use.
    #[arg(long)]
    no_quantize: bool,
    #[cfg(feature = "ggml")]
    #[command(flatten)]
    against: super::against::Args,
    /// Write the report, with the command that made it, to this file. An older report there is replaced, nothing else.
    #[arg(long, value_name = "FILE", value_parser = names::path())]
    record: Option<PathBuf>,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    args.threads.iter().try_for_each(|&threads| engine::check_threads(threads))?;
    let settings = settings(args)?;
    if let Some(record) = &args.record {
        outputs::check(record, [], outputs::has_record)?;
    }
    let work = tempfile::tempdir().map_err(|e| Error::io("create a folder in", &std::env::temp_dir(), e))?;
    let mut open = engine::Options { precision: args.precision.into(), ids_only: true, ..options() };
    let folder = args.keep.as_deref().unwrap_or(work.path());
    let dir = match &args.shape {
        Some(name) => {
            // The head's copy goes where the shape goes, not into the cache of real models.
            open.cache_dir = Some(folder.join("int8"));
            synthetic(name, folder)?
        }
        None => model::resolve(&args.model, !args.no_quantize)?.path,
    };
    let wanted = Options {
        threads: args.threads.clone(),
        trials: args.trials,
        prefill: args.prefill,
        decode: args.decode,
        sequence: args.seq,
        train: !args.no_train,
        profile: args.profile,
        settings,
        kernels: !args.no_kernels,
    };
    let bar = progress::steps("bench");
    let mut tell = |what: &str| {
        bar.set_message(what.to_owned());
        !interrupt::asked()
    };
    if args.train {
        let report = bench::train(&dir, &open, &wanted, &mut tell);
        bar.finish_and_clear();
        let report = report.map_err(|e| if e.code() == ErrorCode::Cancelled { stopped("bench") } else { e })?;
        if let Some(path) = &args.record {
            record(path, &json!(report))?;
        }
        if args.json {
            print_json(&json!(report));
        } else {
            print!("{}", train_text(&report));
        }
        return Ok(());
    }
    let measured = (|| {
        let report = bench::run(&dir, &open, &wanted, &mut tell)?;
        #[cfg(feature = "ggml")]
        let against = args.against.measure(args.shape.as_deref(), folder, &dir, &open, &wanted, &mut tell)?;
        #[cfg(not(feature = "ggml"))]
        let against: Option<(Value, String)> = None;
        Ok((report, against))
    })();
    bar.finish_and_clear();
    let stop = |e: Error| if e.code() == ErrorCode::Cancelled { stopped("bench") } else { e };
    let (report, against) = measured.map_err(stop)?;
    let mut value = json!(report);
    if let (Some((against, _)), Some(value)) = (&against, value.as_object_mut()) {
        value.insert("against".to_owned(), against.clone());
    }
    if let Some(path) = &args.record {
        record(path, &value)?;
    }
    if args.json {
        print_json(&value);
    } else {
        print!("{}{}", text(&report), against.map_or_else(String::new, |(_, text)| text));
    }
    Ok(())
}

/// Settings of training.
fn settings(args: &Args) -> Result<TrainConfig> {
    let optimizer = serde_json::from_value(json!(args.optimizer))
        .map_err(|e| Error::config("optimizer", "`adamw`, `adamw8bit`, `sgd` or `lion`", e))?;
    let precision = match args.precision {
        PrecisionArg::Exact if args.train => TrainPrecision::Exact,
        _ => TrainPrecision::Bf16,
    };
    Ok(TrainConfig { optimizer, precision, memory_budget: args.memory_budget, ..Options::default().settings })
}

/// Writes the model of shape `name` into `folder`, unless it is there.
fn synthetic(name: &str, folder: &Path) -> Result<PathBuf> {
    // Asked first, so that a wrong name makes no folder.
    shape::config(name)?;
    crate::format::create_folder(folder)?;
    let (out, bar) = (folder.join(name), progress::count(0, "weights"));
    let written = shape::write(name, &out, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        !interrupt::asked()
    });
    bar.finish_and_clear();
    written.map(|()| out)
}

/// One indented JSON file, with the command as it was typed, but without the folders of files: they say nothing to
/// others.
fn record(path: &Path, report: &Value) -> Result<()> {
    let name = |part: &str| match Path::new(part).file_name() {
        Some(name) if Path::new(part).is_absolute() => name.to_string_lossy().into_owned(),
        _ => part.to_owned(),
    };
    let plain = |arg: String| arg.split(',').map(name).collect::<Vec<_>>().join(",");
    let command: Vec<String> = std::env::args().skip(1).map(plain).collect();
    let mut record = json!({ "command": format!("pocketlora {}", command.join(" ")) });
    if let (Some(isa), Some(record)) = (std::env::var_os("POCKETLORA_ISA"), record.as_object_mut()) {
        record.insert("POCKETLORA_ISA".to_owned(), isa.to_string_lossy().into());
    }
    if let (Some(record), Some(report)) = (record.as_object_mut(), report.as_object()) {
        record.extend(report.clone());
    }
    let mut text = serde_json::to_string_pretty(&record).unwrap_or_default();
    text.push('\n');
    write_bytes(path, text.as_bytes())
}

fn text(report: &Report) -> String {
    let Report { model, machine, runs, kernels, tokens, trials, .. } = report;
    let mut table = new_table(&["", "tok/s", "", "of the limit", "limit", "anonymous"]);
    for run in runs {
        rows(run, &mut table);
    }
    let mut text = format!(
        "{} ({}) on {}; medians of {trials} trials, best and spread in brackets\n{} mapped, {} to read for each token; \
         prompt {}, decode {}, training sequence {}\n{table}\n",
        model.name,
        model.model_type,
        machine.cpu,
        megabytes(model.mapped_bytes),
        megabytes(model.work.bytes_per_token),
        tokens.prefill,
        tokens.decode,
        tokens.train
    );
    if !kernels.is_empty() {
        text.push_str(&format!("{}\n", kernel_table(kernels)));
    }
    text
}

fn train_text(report: &TrainReport) -> String {
    let TrainReport { runs, model, machine, sequence, trials } = report;
    let mut text = format!("{} on {}, sequences of {sequence} tokens, median of {trials}\n", model.name, machine.cpu);
    for run in runs {
        let (memory, plan) = (&run.train_memory, &run.train_memory.plan);
        let peak = run.peak_anonymous_bytes.map_or_else(|| "unknown".to_owned(), megabytes);
        let off = memory.deviation_percent.map_or_else(String::new, |d| format!(", {d:+.1} % off its plan"));
        text.push_str(&format!(
            "train@{} x{}: {:.1} tok/s, {peak} anonymous at most{off}\n{}\n",
            run.isa,
            run.threads,
            run.train_tok_s,
            super::train::plan_text(plan)
        ));
        if let Some(profile) = &run.profile {
            text.push_str(&format!("a step, {:.1} ms:\n{}\n", profile.step_ms, profile_table(profile)));
        }
    }
    text
}

fn rows(run: &Run, table: &mut Table) {
    let at = format!("@{} x{}", run.isa, run.threads);
    let (l, f, peaks) = (&run.limits, &run.figures, &run.peak_anonymous_bytes);
    let percent = |share: f64| format!("{:.0} %", 100.0 * share);
    let peak = |bytes: Option<u64>| bytes.map_or_else(String::new, megabytes);
    let spread = |f: &Figure| format!("({:.1}, {:.0} %)", f.best, 100.0 * f.spread);
    let rate = |f: &Figure| format!("{:.1}", f.median);
    let read = format!("{:.1} GB/s read", l.read_gb_s);
    table.add_row([
        format!("decode{at}"),
        rate(&f.decode),
        spread(&f.decode),
        percent(run.share.read),
        read,
        peak(peaks.decode),
    ]);
    let tax = format!("adapter costs {:.1} %", run.adapter_tax);
    table.add_row([format!("decode, adapter{at}"), rate(&f.adapter_decode), spread(&f.adapter_decode), tax]);
    let int8 = format!("{:.0} GOP/s in 8 bits", l.int8_gops);
    table.add_row([format!("prefill{at}"), rate(&f.prefill), spread(&f.prefill), percent(run.share.int8), int8]);
    if let (Some(train), Some(share)) = (&f.train, run.share.train) {
        let limit = match l.bf16_gflops {
            Some(limit) => format!("{limit:.0} GFLOP/s in bf16"),
            None => format!("{:.0} GFLOP/s in f32", l.f32_gflops),
        };
        let name = format!("train{at}");
        table.add_row([name, rate(train), spread(train), percent(share), limit, peak(peaks.train)]);
    }
}

fn profile_table(profile: &Profile) -> Table {
    let mut table = new_table(&["op", "weight", "calls", "ms", "of the step"]);
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    for op in &profile.ops {
        let shape = op.shape.map_or_else(String::new, |(rows, cols)| format!("O={rows} K={cols}"));
        table.add_row([
            op.op.to_owned(),
            shape,
            format!("{:.0}", op.calls),
            format!("{:.2}", op.ms),
            percent(op.share),
        ]);
    }
    let rest = format!("{:.2}", profile.rest * profile.step_ms);
    table.add_row(["rest".to_owned(), String::new(), String::new(), rest, percent(profile.rest)]);
    table
}

fn kernel_table(kernels: &[Kernel]) -> Table {
    let mut table = new_table(&["kernel", "shape", "threads", "us", "GB/s", "G(FL)OP/s", "of the limit", ""]);
    for k in kernels {
        table.add_row([
            if k.arithmetic == "exact" { k.name.clone() } else { format!("{} ({})", k.name, k.arithmetic) },
            k.shape.clone(),
            k.threads.to_string(),
            format!("{:.1}", k.microseconds),
            format!("{:.1}", k.gb_s),
            format!("{:.1}", k.gflops.or(k.gops).unwrap_or(0.0)),
            format!("{:.0} %", 100.0 * k.share),
            k.bound.to_owned(),
        ]);
    }
    table
}

/// Without frames: text to be read and copied. The first column is left, numbers are right.
pub(super) fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
