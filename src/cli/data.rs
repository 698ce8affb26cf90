//! What `train` says about its data, and `train --dry-run`, which says no more than that.

use super::args::{megabytes, print_json};
use super::data_check::DataCheck;
use super::train::Chosen;
use super::{model, print_error};
use crate::adapter::AdapterFile;
use crate::base::architecture_of;
use crate::error::Result;
use crate::format::{folder_of, model_of, open_source};
use crate::text::{Text, open_with};
use crate::tokenizer::{SpecialText, Tokenizer};
use crate::train::auto::draft;
use crate::train::{DataReport, Dataset, Overlap, Sample, SampleLimits, hold_out};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::ops::Range;
use std::path::Path;

/// Samples that are shown.
const SHOWN: usize = 3;
/// Tokens of a sample that are shown.
const SHOWN_TOKENS: usize = 1024;
/// Widest bar of the histogram, in characters.
const BAR: usize = 40;

/// A run of which only the data and the choice of settings are shown.
pub(super) struct DryRun<'a> {
    pub model: &'a str,
    pub quantize: bool,
    pub special_text: SpecialText,
    pub init: Option<&'a AdapterFile>,
    pub data: &'a Path,
    pub chosen: &'a Chosen,
    /// Whether settings that nobody gave follow from the data.
    pub auto: bool,
    pub as_json: bool,
}

/// Shows the first samples and the figures of the data. Weights are not read; only a single-file model, whose tokenizer
/// comes with its conversion, is converted at first use.
pub(super) fn dry_run(run: &DryRun<'_>) -> Result<()> {
    let DryRun { model, quantize, special_text, init, data, chosen: Chosen { config, given }, as_json, .. } = *run;
    let path = model_of(&model::locate(model)?.path);
    let dir = if path.is_dir() { path } else { model::resolve(model, quantize)?.path };
    let source = open_source(&dir)?;
    let built = architecture_of(source.config(), &dir)?;
    let dir = if dir.is_dir() { dir } else { folder_of(&dir) };
    let new_rows = init.and_then(AdapterFile::vocabulary);
    let Text { tokenizer, template } =
        open_with(&dir, init.map(|file| (file.dir.as_path(), new_rows.is_some())), special_text)?;
    let vocab = new_rows.unwrap_or(built.config().vocab_size);
    let limits = SampleLimits { tokens: config.seq.min(built.config().max_positions), vocab };
    let all = Dataset::open(data, &tokenizer, &template, limits)?;
    let check = DataCheck::new(&all.checks, &tokenizer, &template);
    let held = config
        .eval_data
        .as_ref()
        .map(|path| Dataset::open_held_out(path, &tokenizer, &template, limits))
        .transpose()?;
    say_unused("held-out data", held.as_ref());
    let (mut config, mut decided): (_, &[&str]) = (config.clone(), &[]);
    if let Some(file) = init {
        config = config.with_adapter(built.as_ref(), file, &|key| given.contains(key))?;
        decided = file.method.kind().decides();
    }
    let given = |key: &str| given.contains(key) || decided.contains(&key);
    let drafted = run.auto.then(|| draft(config.clone(), &given, &all, built.as_ref())).transpose()?;
    let config = drafted.as_ref().map_or(&config, |draft| &draft.config);
    let (data, held) = hold_out(config, all, held)?;
    let report = DataReport::new(&data, config)?;
    let choice = drafted.as_ref().map(|draft| draft.rehearsed(report.total_steps));
    let doubts = choice.iter().flat_map(|choice| &choice.doubts);
    doubts.for_each(|doubt| eprintln!("warning: {doubt}"));
    let overlap = held.as_ref().map(|held| Overlap::of(&data, held));
    let learned_too = overlap.and_then(|overlap| overlap.warning(&held.as_ref()?.path));
    let too_warm = config.clone().fitted_to(report.total_steps).1;
    learned_too.iter().chain(&too_warm).for_each(|warning| print_error("warning", warning));
    let shown = data.samples.iter().take(SHOWN);
    if as_json {
        let samples: Vec<Value> = shown.map(|s| sample_json(s, &tokenizer)).collect::<Result<_>>()?;
        let check = json!({ "ok": check.faults.is_empty(), "facts": check.facts, "faults": check.faults });
        print_json(
            &json!({ "dry_run": true, "samples": samples, "data": report, "eval_overlap": overlap, "check": check,
                "auto": choice }),
        );
        return Ok(());
    }
    let marks = Marks::for_stdout();
    for (i, sample) in shown.enumerate() {
        println!("sample {} of {}: {} tokens, {}", i + 1, report.samples, sample.ids.len(), marks.legend(sample));
        println!("{}\n", marks.render(sample, &tokenizer)?);
    }
    print!("{}{}", text(&report), histogram(&report));
    println!("{}", check.line());
    choice.iter().flat_map(|choice| &choice.lines).for_each(|line| println!("{line}"));
    Ok(())
}

/// What is in `data`, which is called `what`, and not used; that of what is learned is among its figures.
pub(super) fn say_unused(what: &str, data: Option<&Dataset>) {
    let text = data.map(|data| data.unused.text()).unwrap_or_default();
    text.lines().for_each(|line| eprintln!("{what}: {line}"));
}

/// The figures in a few lines.
pub(super) fn text(r: &DataReport) -> String {
    let mut out = String::new();
    let share = 100.0 * r.trained_tokens as f64 / r.tokens as f64;
    let _ = writeln!(
        out,
        "data: {} records, {} samples, {} tokens, {} of them learned ({share:.0} %), {} padded; {}",
        r.records,
        r.samples,
        r.tokens,
        r.trained_tokens,
        r.batches.padded_tokens,
        megabytes(r.bytes as u64)
    );
    let (l, b, s) = (&r.lengths, &r.batches, &r.splits);
    let _ =
        writeln!(out, "lengths: half have up to {} tokens, nine of ten up to {}, the longest {}", l.p50, l.p90, l.max);
    if s.samples > 0 {
        let _ = writeln!(
            out,
            "split: {} too long for one sample became {}; left out were {} tokens and {} turns that \
                              are only read, and the system's turn in {} parts",
            s.samples, s.parts, s.left_out_tokens, s.left_out_turns, s.without_system
        );
    }
    out += &r.unused.text();
    let _ = writeln!(
        out,
        "passes: {} in an epoch, {:.1} samples in each, at most {} tokens, {:.0} % of batch x seq; {} steps \
                          in all",
        b.micro_batches,
        b.samples_per_micro_batch,
        b.largest_tokens,
        100.0 * b.fill,
        r.total_steps
    );
    out
}

/// Bars of the samples' lengths.
fn histogram(r: &DataReport) -> String {
    let most = r.lengths.histogram.iter().map(|b| b.samples).max().unwrap_or(1).max(1);
    let bar = |n: usize| "#".repeat((n * BAR).div_ceil(most));
    r.lengths
        .histogram
        .iter()
        .map(|b| format!("  up to {:>7} {:>8} {}\n", b.up_to, b.samples, bar(b.samples)))
        .collect()
}

fn sample_json(sample: &Sample, tokenizer: &Tokenizer) -> Result<Value> {
    let parts: Vec<Value> = parts(sample, tokenizer)?
        .into_iter()
        .map(|(text, trained)| json!({ "text": text, "trained": trained }))
        .collect();
    Ok(json!({ "tokens": sample.ids.len(), "trained_tokens": sample.trained_tokens(), "parts": parts }))
}

/// The text of a sample's first tokens, in stretches that are learned or not.
fn parts(sample: &Sample, tokenizer: &Tokenizer) -> Result<Vec<(String, bool)>> {
    let len = sample.ids.len().min(SHOWN_TOKENS);
    let mut stretches: Vec<(Range<usize>, bool)> = Vec::new();
    for i in 0..len {
        let trained = sample.trained.contains(i);
        match stretches.last_mut() {
            Some((stretch, same)) if *same == trained => stretch.end = i + 1,
            _ => stretches.push((i..i + 1, trained)),
        }
    }
    // Decoders treat the start of a text differently, so each stretch is what it adds to the text before it.
    let mut shown = 0;
    let mut piece = |(stretch, trained): (Range<usize>, bool)| {
        let text = tokenizer.decode_with_special(&sample.ids[..stretch.end])?;
        let piece = text.get(shown..).unwrap_or_default().to_owned();
        shown = text.len();
        Ok((piece, trained))
    };
    stretches.into_iter().map(&mut piece).collect()
}

/// How learned text is set off.
struct Marks {
    start: &'static str,
    end: &'static str,
    name: &'static str,
}

impl Marks {
    /// Colour on a terminal, unless the user wants none; guillemets elsewhere.
    fn for_stdout() -> Self {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        if colour {
            Self { start: "\x1b[1;32m", end: "\x1b[0m", name: "\x1b[1;32mlearned\x1b[0m" }
        } else {
            Self { start: "\u{ab}", end: "\u{bb}", name: "\u{ab}learned\u{bb}" }
        }
    }

    fn legend(&self, sample: &Sample) -> String {
        format!("{} of them {}", sample.trained_tokens(), self.name)
    }

    fn render(&self, sample: &Sample, tokenizer: &Tokenizer) -> Result<String> {
        let mut out = String::new();
        for (text, trained) in parts(sample, tokenizer)? {
            let text = visible(&text);
            out += &if trained { format!("{}{text}{}", self.start, self.end) } else { text };
        }
        if sample.ids.len() > SHOWN_TOKENS {
            let _ = write!(out, " ... and {} more tokens", sample.ids.len() - SHOWN_TOKENS);
        }
        Ok(out)
    }
}

/// Text whose control characters cannot reach the terminal.
fn visible(text: &str) -> String {
    let control = |c: char| c.is_control() && c != '\n' && c != '\t';
    text.chars().flat_map(|c| if control(c) { c.escape_default().collect::<Vec<_>>() } else { vec![c] }).collect()
}
