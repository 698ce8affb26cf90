//! The state of a run between two steps, in one safetensors file that replaces the one before in a single step.
//!
//! Two generations are kept: a file that turns out to be damaged costs the steps since the one before it, not the run.
//! What a checkpoint holds is all that the next step depends on: the adapter's masters, the optimizer's moments, and
//! [`RunFacts`]. Random numbers are functions of the seed and the step (see [`crate::rng`]), and so is the place in the
//! data: both are in the facts. The settings stand there in full rather than as a hash, so that differences can be named.

use super::best::Candidates;
use super::hold_out::Evaluation;
use crate::adapter::AdapterFile;
use crate::checksum::{add, sum_of};
use crate::error::{Error, ErrorCode, Result};
use crate::format::foreign::{CHECKPOINT, CHECKPOINTS};
use crate::format::safetensors::{Tensor, TensorFile};
use crate::format::{Entry, Staged, Writer};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

/// Names of the file in the output folder and of the one before it.
pub(super) const FILES: [&str; 2] = CHECKPOINTS;
const FILE: &str = FILES[0];
const PREVIOUS: &str = FILES[1];
/// The settings that may change, by their keys in the facts: no adapter depends on them.
const FREE: [&str; 4] = [BUDGET, "check", "save-every", "save-seconds"];
const BUDGET: &str = "memory-budget";
/// Key of the run's facts in the file's metadata.
const META: &str = CHECKPOINT;
/// A tensor of 8 bytes: a sum over the facts and all other tensors, which tells flipped bits.
const CHECKSUM: &str = "checksum";

/// What a checkpoint belongs to and where it stands. A resumed run must agree on all but `step`, `candidates`, `start` and what is
/// known of layers,
/// and may have another memory budget or save at other times.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunFacts {
    /// Steps done.
    pub step: u64,
    /// Steps in all.
    pub total_steps: u64,
    /// The run's settings as JSON.
    pub config: serde_json::Value,
    /// Fingerprint of the data.
    pub data: u64,
    /// Fingerprint of the base model.
    pub base: u64,
    /// The adapter that training continues from, as a fingerprint; 0 for a fresh one.
    pub init: u64,
    /// Fingerprint of the prompts on which the model is held to what it says; 0 for none.
    #[serde(default)]
    pub held: u64,
    /// What evaluations have found so far.
    #[serde(default)]
    pub candidates: Candidates,
    /// What the evaluation before the first step found.
    #[serde(default)]
    pub start: Option<Evaluation>,
    /// In how many steps each layer was moved, where not all are in each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layer_steps: Vec<u64>,
    /// How often backward leaves each layer out, once that is known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drop_rates: Vec<f64>,
    /// Ranks of each module, where they grow.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub grown: Vec<usize>,
}

impl RunFacts {
    /// Names what differs from `other`, apart from how far the runs have come, when they save and what memory they may have:
    /// a device gives now more and now less, and what is given up for it changes the order of sums alone.
    fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        if let (Some(a), Some(b)) = (self.config.as_object(), other.config.as_object()) {
            let budgeted = [a, b].iter().any(|run| run.get(BUDGET).is_some_and(|megabytes| !megabytes.is_null()));
            let keys = a.keys().chain(b.keys().filter(|k| !a.contains_key(*k)));
            for key in keys.filter(|key| !FREE.contains(&key.as_str())) {
                let text = |v: Option<&serde_json::Value>| v.map_or_else(|| "nothing".to_owned(), as_typed);
                if a.get(key) != b.get(key) {
                    // Nobody may have asked for moments in 8 bits.
                    let why = if budgeted && key == "optimizer" {
                        " (a `memory-budget` takes `adamw8bit` where it must)"
                    } else {
                        ""
                    };
                    found.push(format!("`{key}` was {}, is {}{why}", text(a.get(key)), text(b.get(key))));
                }
            }
        }
        for (name, a, b) in [
            ("data", self.data, other.data),
            ("base model", self.base, other.base),
            ("initial adapter", self.init, other.init),
            ("set of general prompts", self.held, other.held),
        ] {
            if a != b {
                found.push(format!("the {name} changed"));
            }
        }
        if found.is_empty() && self.total_steps != other.total_steps {
            found.push(format!("{} steps in all became {}", self.total_steps, other.total_steps));
        }
        found
    }
}

/// A setting as somebody would type it: one that was an f32 is not shown with the digits of its f64.
fn as_typed(value: &serde_json::Value) -> String {
    match value.as_f64() {
        Some(x) if !value.is_u64() && f64::from(x as f32) == x => (x as f32).to_string(),
        _ => value.to_string(),
    }
}

/// Whether the folder holds the checkpoint of a run that was not finished.
#[must_use]
pub fn has_checkpoint(out: &Path) -> bool {
    FILES.iter().any(|name| out.join(name).exists())
}

/// Takes a checkpoint's tensors.
pub struct Sink<'a> {
    writer: Writer<BufWriter<&'a mut File>>,
    sum: u64,
    path: &'a Path,
}

impl Sink<'_> {
    /// Writes the tensor `name`.
    ///
    /// # Errors
    /// The system refuses.
    pub fn put(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.sum = self.sum.wrapping_add(sum_of(name, bytes));
        self.writer.write(name, 0, bytes).map_err(|e| Error::io("write", self.path, e))
    }
}

/// Writes a checkpoint of the tensors `entries`, which `fill` puts one after the other, and keeps the one before it
/// where `keep_previous` says that it belongs to the same run.
///
/// # Errors
/// The file cannot be written; the ones before it are kept then.
pub fn save(
    out: &Path,
    facts: &RunFacts,
    keep_previous: bool,
    entries: Vec<Entry>,
    fill: impl FnOnce(&mut Sink<'_>) -> Result<()>,
) -> Result<()> {
    let (path, previous) = (out.join(FILE), out.join(PREVIOUS));
    let text = serde_json::to_string(facts).expect("plain data serializes");
    let staged = Staged::write(&path, |file| {
        let room = vec![(CHECKSUM.to_owned(), 8)];
        let writer = Writer::new(BufWriter::new(file), json!({ META: text }), entries, room);
        let mut sink = Sink { writer, sum: add(0, text.as_bytes()), path: &path };
        fill(&mut sink)?;
        let Sink { mut writer, sum, .. } = sink;
        let ended = writer.append(CHECKSUM.to_owned(), &sum.to_le_bytes()).and_then(|()| writer.finish());
        ended.map(|_| ()).map_err(|e| Error::io("write", &path, e))
    })?;
    if keep_previous && path.exists() {
        // A kill between the two renames leaves the older one alone, which `load` then takes.
        fs::rename(&path, &previous).map_err(|e| Error::io("rename", &path, e))?;
    }
    staged.commit()?;
    if keep_previous { Ok(()) } else { remove_file(&previous) }
}

/// A checkpoint that belongs to the run, whole and with all of its tensors.
pub struct Loaded {
    /// Where the run stood.
    pub facts: RunFacts,
    /// The tensors.
    pub file: TensorFile,
    /// Why the newest one was passed over.
    pub warning: Option<Error>,
}

/// Opens the newest sound checkpoint in `out`, if it belongs to the run that `facts` describe and has the tensors
/// `entries`.
///
/// # Errors
/// There is none, all are broken, or it belongs to a run with other settings, data or base (the differences are listed).
pub fn load(out: &Path, facts: &RunFacts, entries: &[Entry]) -> Result<Loaded> {
    if !has_checkpoint(out) {
        let message = match AdapterFile::exists(out) {
            true => {
                "expected the checkpoint of an unfinished run, got a finished adapter; train on from it with `--init`, the \
                 folder, and a new folder as the output"
            }
            false => "expected a checkpoint to resume from, got none; start without `--resume`",
        };
        return Err(Error::new(ErrorCode::Data, format!("`{}`", out.join(FILE).display()), message));
    }
    let newest = match read(&out.join(FILE), facts, entries) {
        Ok((facts, file)) => return Ok(Loaded { facts, file, warning: None }),
        Err(e) if e.code() == ErrorCode::Config => return Err(e),
        Err(e) => e,
    };
    match read(&out.join(PREVIOUS), facts, entries) {
        Ok((facts, file)) => Ok(Loaded { facts, file, warning: Some(newest) }),
        Err(e) if e.code() == ErrorCode::Config => Err(e),
        Err(_) => Err(newest),
    }
}

fn read(path: &Path, facts: &RunFacts, entries: &[Entry]) -> Result<(RunFacts, TensorFile)> {
    let broken = |what: &str, got: &dyn std::fmt::Display| {
        let message = format!("expected {what}, got {got}; if no other is left, start again with `--overwrite`");
        Error::new(ErrorCode::Format, format!("`{}`", path.display()), message)
    };
    let file = TensorFile::open(path)
        .map_err(|e| broken("a complete checkpoint", &"one that is cut or damaged").caused_by(e))?;
    let text = file.metadata().get(META).ok_or_else(|| broken("the run's facts", &"none"))?;
    let saved: RunFacts = serde_json::from_str(text).map_err(|e| broken("the run's facts", &e))?;
    // Before anything is compared, for a flipped bit could look like a difference.
    let stored = file.find(CHECKSUM).and_then(|t| Some(u64::from_le_bytes(t.bytes[..].try_into().ok()?)));
    let tensors = || file.tensors().filter(|(name, _)| *name != CHECKSUM);
    let sum = tensors().fold(add(0, text.as_bytes()), |sum, (name, t)| sum.wrapping_add(sum_of(name, &t.bytes)));
    if stored != Some(sum) {
        return Err(broken("what its checksum says", &"something else"));
    }
    let differences = saved.differences(facts);
    if !differences.is_empty() {
        let message = format!(
            "the run to resume differs: {}; use the same settings, data and base. Other settings begin a new run: with \
             `--overwrite`, or once this one is finished with `--init`, its folder, and a new folder as the output",
            differences.join("; ")
        );
        return Err(Error::new(ErrorCode::Config, format!("`{}`", path.display()), message));
    }
    for entry in entries {
        let fits = |t: &Tensor| t.dtype == entry.dtype && t.shape == entry.shape;
        if !file.find(&entry.name).is_some_and(fits) {
            let expected = format!("tensor `{}` in {:?} of shape `{:?}`", entry.name, entry.dtype, entry.shape);
            return Err(broken(&expected, &"another or none"));
        }
    }
    Ok((saved, file))
}

/// Removes the checkpoints of a finished run, the older one first.
///
/// # Errors
/// The system refuses.
pub fn remove(out: &Path) -> Result<()> {
    remove_previous(out)?;
    remove_file(&out.join(FILE))
}

/// Removes the older of the two.
///
/// # Errors
/// The system refuses.
pub fn remove_previous(out: &Path) -> Result<()> {
    remove_file(&out.join(PREVIOUS))
}

fn remove_file(path: &PathBuf) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path, e)),
        _ => Ok(()),
    }
}
