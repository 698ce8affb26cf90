//! What a run leaves beside its adapter: `log.jsonl`, a line for each step; `loss.svg`, the same as a picture;
//! `train.toml`, the settings that were in force; and of ranks that were measured `ranks.txt` and `ranks.svg`.

#[cfg(feature = "charts")]
mod chart;
#[cfg(feature = "charts")]
mod curves;
#[cfg(feature = "charts")]
mod draw;
mod journal;
mod log;
#[cfg(feature = "charts")]
mod rank_map;

pub(super) use journal::Journal;
pub use log::LogLine;

use super::{RankChoice, TrainConfig};
#[cfg(feature = "charts")]
use crate::error::Error;
use crate::error::Result;
use std::path::{Path, PathBuf};

/// Names in the output folder.
const LOG: &str = "log.jsonl";
const CHART: &str = "loss.svg";
const RANKS: [&str; 2] = ["ranks.txt", "ranks.svg"];
/// Name of the settings in a run's output folder.
pub const SETTINGS: &str = "train.toml";

/// The output folder of a run that is going on.
#[derive(Debug)]
pub struct RunFolder {
    dir: PathBuf,
}

/// Takes away what a run that was killed has left half-written beside its adapter.
pub(super) fn sweep(out: &Path) {
    [CHART, SETTINGS].iter().chain(&RANKS).for_each(|name| crate::format::sweep(&out.join(name)));
}

/// Writes what ranks were chosen into the folder `dir`; without the feature `charts` nothing is drawn.
///
/// # Errors
/// The files cannot be written.
pub(super) fn write_ranks(dir: &Path, choice: &RankChoice) -> Result<()> {
    crate::format::write_bytes(&dir.join(RANKS[0]), choice.text().as_bytes())?;
    #[cfg(feature = "charts")]
    {
        let path = dir.join(RANKS[1]);
        let svg = rank_map::svg(choice).map_err(|e| Error::format(&path, "picture", "ranks that can be drawn", e))?;
        crate::format::write_bytes(&path, svg.as_bytes())?;
    }
    Ok(())
}

impl RunFolder {
    /// Begins at `step` in the folder `dir`, which exists: 0 begins anew, another goes on and cuts off what was logged
    /// after it. Writes the settings.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn open(dir: &Path, config: &TrainConfig, step: u64) -> Result<Self> {
        let path = dir.join(SETTINGS);
        crate::format::write_bytes(&path, config.to_toml()?.as_bytes())?;
        log::cut(&dir.join(LOG), step)?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Adds a line to the log.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn log(&self, line: &LogLine) -> Result<()> {
        log::append(&self.dir.join(LOG), line)
    }

    /// Draws what the log holds; without the feature `charts` nothing is drawn.
    ///
    /// # Errors
    /// The log cannot be read or the picture not written.
    #[cfg(feature = "charts")]
    pub fn draw(&self) -> Result<()> {
        let curves = curves::curves(&self.dir.join(LOG))?;
        let path = self.dir.join(CHART);
        let svg = chart::svg(&curves).map_err(|e| Error::format(&path, "picture", "curves that can be drawn", e))?;
        crate::format::write_bytes(&path, svg.as_bytes())
    }

    /// Draws nothing: the feature `charts` is off.
    ///
    /// # Errors
    /// None.
    #[cfg(not(feature = "charts"))]
    pub fn draw(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn line(step: u64) -> LogLine {
        let evaluated = step.is_multiple_of(10);
        LogLine {
            step,
            loss: (step > 0).then(|| 3.0 - step as f64 / 100.0),
            lr: (step > 0).then_some(2e-4),
            eval_loss: evaluated.then_some(3.1),
            general_loss: evaluated.then_some(2.9),
            ..LogLine::default()
        }
    }

    fn steps(dir: &Path) -> Vec<u64> {
        let text = fs::read_to_string(dir.join(LOG)).unwrap();
        text.lines().map(|l| serde_json::from_str::<LogLine>(l).unwrap().step).collect()
    }

    #[test]
    fn a_resumed_log_goes_on_where_the_checkpoint_stands() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, config) = (dir.path(), TrainConfig::default());
        let folder = RunFolder::open(dir, &config, 0).unwrap();
        (0..=7).for_each(|step| folder.log(&line(step)).unwrap());
        // A kill in the middle of a line.
        let whole = fs::read_to_string(dir.join(LOG)).unwrap();
        fs::write(dir.join(LOG), format!("{whole}{{\"step\":8,\"lo")).unwrap();
        for (resumed, expected) in [(7, 7), (5, 5), (6, 5)] {
            RunFolder::open(dir, &config, resumed).unwrap();
            assert_eq!(steps(dir), (0..=expected).collect::<Vec<_>>(), "resumed after step {resumed}");
        }
        folder.log(&line(6)).unwrap();
        assert_eq!(steps(dir), [0, 1, 2, 3, 4, 5, 6]);
        RunFolder::open(dir, &config, 0).unwrap();
        assert!(steps(dir).is_empty(), "a new run has a new log");
    }

    #[test]
    fn the_settings_that_were_in_force_can_be_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let config = TrainConfig { steps: Some(7), eval_data: Some("held out.jsonl".into()), ..TrainConfig::default() };
        RunFolder::open(dir.path(), &config, 0).unwrap();
        let read: TrainConfig = toml::from_str(&fs::read_to_string(dir.path().join(SETTINGS)).unwrap()).unwrap();
        assert_eq!(read, config);
    }

    #[cfg(feature = "charts")]
    #[test]
    fn the_picture_names_its_curves_and_is_small_however_long_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::open(dir.path(), &TrainConfig::default(), 0).unwrap();
        folder.draw().unwrap();
        let text: String =
            (0..20_000).map(|step| format!("{}\n", serde_json::to_string(&line(step)).unwrap())).collect();
        fs::write(dir.path().join(LOG), text).unwrap();
        folder.draw().unwrap();
        let svg = fs::read_to_string(dir.path().join(CHART)).unwrap();
        for name in ["train", "held-out", "general text", "learning rate", "step"] {
            assert!(svg.contains(name), "{name}");
        }
        assert!(svg.len() < 200_000, "{} bytes", svg.len());
        let numbers = svg.matches("<text").count();
        assert!(numbers >= 12, "{numbers} texts: ticks are missing");
    }
}
