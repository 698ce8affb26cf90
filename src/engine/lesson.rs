//! A run from data and settings to its first step: what every front end does that has no words of its own to say about it.

use super::{Engine, Trainer};
use crate::adapter::{AUTO, AdapterFile, Kind};
use crate::error::{Error, ErrorCode, Result};
use crate::format::{create_folder, write_bytes};
use crate::train::auto::{Choice, usual_rate};
use crate::train::{Observer, SETTINGS, TrainConfig, has_checkpoint, refuse_model};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The name, in a run's folder, of data that was given from memory: so that the run can go on in another process.
pub const DATA: &str = "data.jsonl";

/// What is learned from.
#[derive(Clone, Copy, Debug)]
pub enum LessonData<'a> {
    /// A file or folder, as [`Dataset::open`](crate::Dataset::open) reads it.
    Path(&'a Path),
    /// Lines of JSON; they are kept in the run's folder as [`DATA`].
    Lines(&'a [u8]),
    /// The lines that an earlier process gave to this run.
    Kept,
}

/// What becomes of an earlier run in the folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// It is not touched: the new run is refused.
    #[default]
    New,
    /// The new run takes its place.
    Replace,
    /// It goes on from its checkpoint; without one a new run begins.
    Resume,
}

/// All that is known of a run before it begins.
#[derive(Clone, Debug)]
pub struct Lesson<'a> {
    /// What is learned from.
    pub data: LessonData<'a>,
    /// The keys of `train.toml` that are given, as TOML or as one object of JSON.
    pub settings: &'a str,
    /// The adapter that is trained on; a new one without.
    pub init: Option<&'a Path>,
    /// The run's folder.
    pub out: &'a Path,
    /// What becomes of an earlier run in it.
    pub start: Start,
    /// Settings that are not given are found by a short probe, as `pocketlora train` does; else they have their defaults.
    pub auto: bool,
    /// When the run is to end.
    pub end: Option<Instant>,
}

/// A trainer before its first step, and how it came to its settings.
pub struct Begun {
    /// The run.
    pub trainer: Trainer,
    /// What the probe chose; none where nothing was to be chosen.
    pub choice: Option<Choice>,
    /// It goes on from a checkpoint.
    pub resumed: bool,
}

/// Settings that somebody wrote as TOML, or as one object of JSON, their names as `train.toml` has them or as PEFT does.
fn table_of(text: &str) -> Result<toml::Table> {
    let text = text.trim();
    let table: toml::Table = if text.starts_with('{') {
        serde_json::from_str(text).map_err(|e| wrong(&format!("expected an object of JSON, got a broken one: {e}")))?
    } else {
        text.parse().map_err(|e: toml::de::Error| wrong(&e.to_string()))?
    };
    Ok(table.into_iter().map(|(key, value)| (key.replace('_', "-"), value)).collect())
}

fn config_of(table: toml::Table) -> Result<TrainConfig> {
    let config: TrainConfig =
        toml::Value::Table(table).try_into().map_err(|e: toml::de::Error| wrong(&e.to_string()))?;
    config.validate()?;
    Ok(config)
}

/// The error for settings that cannot be.
fn wrong(message: &str) -> Error {
    Error::new(ErrorCode::Config, "settings", message.trim_end())
}

impl TrainConfig {
    /// The settings in `text`, keys of `train.toml` as TOML or as one object of JSON, with the defaults for all others.
    ///
    /// # Errors
    /// A key is unknown, or a value is out of range.
    pub fn parse(text: &str) -> Result<Self> {
        config_of(table_of(text)?)
    }
}

impl<'a> Lesson<'a> {
    /// A new run that learns `data` into the folder `out`, its settings chosen.
    #[must_use]
    pub fn new(data: LessonData<'a>, out: &'a Path) -> Self {
        Self { data, settings: "", init: None, out, start: Start::New, auto: true, end: None }
    }

    /// Refuses a folder whose content the run would take away.
    fn check_folder(&self, resumed: bool) -> Result<()> {
        refuse_model(self.out)?;
        let next = match (has_checkpoint(self.out), AdapterFile::exists(self.out)) {
            (true, _) if self.start == Start::New => "an unfinished run; resume it, replace it, or name another folder",
            (false, true) if self.start == Start::New => "an adapter; replace it, or name another folder",
            (false, true) if self.start == Start::Resume && !resumed => {
                "an adapter whose run is finished; train on from it in another folder, or replace it"
            }
            _ => return Ok(()),
        };
        let message = format!("expected a folder for a new adapter, got one with {next}");
        Err(Error::new(ErrorCode::Config, format!("`{}`", self.out.display()), message))
    }

    /// The settings, and the names of those that somebody gave. A run that goes on has those that it began with.
    fn settled(&self, resumed: bool) -> Result<(TrainConfig, BTreeSet<String>)> {
        let mut table = toml::Table::new();
        if resumed {
            let path = self.out.join(SETTINGS);
            let text = fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
            let wrong = |e: toml::de::Error| Error::format(&path, "settings", "TOML", e.message());
            table = text.parse().map_err(wrong)?;
        }
        table.extend(table_of(self.settings)?);
        let given = table.keys().cloned().collect();
        let method = table.get("method").and_then(|method| method.clone().try_into::<Kind>().ok()).unwrap_or_default();
        if method != Kind::Lora && method.reads("targets") {
            table.entry("targets").or_insert_with(|| vec![AUTO].into());
        }
        if !resumed {
            table.entry("keep").or_insert_with(|| "auto".into());
            table.entry("check").or_insert(true.into());
        }
        Ok((config_of(table)?, given))
    }

    /// Where the data lies; what was given from memory is written there.
    fn data(&self, resumed: bool) -> Result<PathBuf> {
        let kept = self.out.join(DATA);
        match self.data {
            LessonData::Path(path) => return Ok(path.to_owned()),
            LessonData::Kept if kept.exists() => {}
            LessonData::Kept => {
                let message = "expected the data that the run began with, got none; give the data";
                return Err(Error::new(ErrorCode::Data, format!("`{}`", kept.display()), message));
            }
            LessonData::Lines(lines) if resumed => {
                let before = fs::read(&kept).map_err(|e| Error::io("read", &kept, e))?;
                if before != lines {
                    let message = "expected the data that the run began with, got other data; give none, or begin anew";
                    return Err(Error::new(ErrorCode::Data, format!("`{}`", kept.display()), message));
                }
            }
            LessonData::Lines(lines) => {
                create_folder(self.out)?;
                write_bytes(&kept, lines)?;
            }
        }
        Ok(kept)
    }
}

impl Engine {
    /// Prepares the run of `lesson`: reads its data, chooses the settings that are not given where that is asked for, and
    /// goes on from a checkpoint where there is one. `observer` hears of the probe, and may stop it.
    ///
    /// # Errors
    /// The folder holds what would be lost; a setting, the data or the adapter to train on is wrong; more memory is needed
    /// than the budget; stopped.
    pub fn begin(&self, lesson: &Lesson<'_>, observer: &mut dyn Observer) -> Result<Begun> {
        let resumed = lesson.start == Start::Resume && has_checkpoint(lesson.out);
        lesson.check_folder(resumed)?;
        let (mut config, given) = lesson.settled(resumed)?;
        let mut init = lesson.init.map(AdapterFile::open).transpose()?;
        let mut decided: &[&str] = &[];
        if let Some(file) = &mut init {
            config = config.with_adapter(self.base().model.as_ref(), file, &|key| given.contains(key))?;
            file.method.set_in_training(&config.adapter());
            decided = file.method.kind().decides();
        }
        if !given.contains("lr") && config.method != Kind::Lora {
            config.lr = usual_rate(config.method, self.base().model.config().hidden_size);
        }
        let path = lesson.data(resumed)?;
        let reader = self.reader(init.as_ref())?;
        let data = reader.dataset(&path, config.seq)?;
        let eval_data = config.eval_data.as_ref().map(|path| reader.held_out_dataset(path, config.seq)).transpose()?;
        let given = |key: &str| given.contains(key) || decided.contains(&key);
        let mut draft = (lesson.auto && !resumed).then(|| reader.draft(config.clone(), &given, &data)).transpose()?;
        if let Some(draft) = &draft {
            config = draft.config.clone();
        }
        let material = reader.material(&config, data, eval_data)?;
        drop(reader);
        if config.wants_ranks() && !resumed {
            let ranks = self.choose_ranks(&config, &material.data, observer)?;
            config = ranks.apply(config);
            draft.iter_mut().for_each(|draft| draft.config = ranks.apply(draft.config.clone()));
        }
        let mut choice = None;
        if let Some(draft) = draft {
            let (settled, chosen) = self.settle(draft, &material, init.as_ref(), lesson.out, lesson.end, observer)?;
            (config, choice) = (settled, Some(chosen));
        }
        let mut trainer = self.trainer_of(config, material, init.as_ref(), lesson.out)?;
        match lesson.start {
            Start::Resume if resumed => trainer.resume()?,
            Start::Replace => trainer.replace_earlier(),
            Start::New | Start::Resume => {}
        }
        lesson.end.into_iter().for_each(|end| trainer.end_by(end));
        Ok(Begun { trainer, choice, resumed })
    }
}
