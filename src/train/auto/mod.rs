//! Settings that find themselves: learning rate, rank, batch, length and course of a run from the model, the data and a
//! short probe.
//!
//! `survey` reads the records once more as text, `rule` says what follows from numbers alone, `watch` makes what tells
//! that a run gets no better, `probe` tries learning rates, and `time` keeps a bound. All but a bound in time depends on
//! the data, the model and the seed alone, so that the same command makes the same adapter.

mod probe;
mod reword;
mod rule;
mod survey;
mod time;
mod watch;

pub(crate) use probe::{LOOK, Probe, Rates, few};
pub(crate) use rule::Size;
pub use rule::{usual_prompt_dropout, usual_rate};
pub use survey::Conflict;
pub(crate) use survey::Survey;
pub(crate) use time::steps_within;
pub use time::{parse_time, spoken};
pub(crate) use watch::watched;

use super::{Dataset, TrainConfig};
use crate::error::Result;
#[cfg(feature = "cli")]
use pocketlora_models::Model;
use rule::Numbers;
use serde::Serialize;

/// A learning rate that was tried.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Tried {
    /// The rate.
    pub lr: f32,
    /// Mean loss (natural log) after a few steps with it; infinite where they diverged, null in JSON.
    pub loss: f64,
}

/// What was chosen for a run, and why.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Choice {
    /// Rates that were tried, from the lowest to the highest; none where one was given.
    pub tried: Vec<Tried>,
    /// Mean loss of what the probe looked at before anything was learned.
    pub loss_before: Option<f64>,
    /// Steps of the run if it does not end sooner.
    pub most_steps: u64,
    /// Samples that tell when the run gets no better.
    pub watched: usize,
    /// Tokens that the probe ran, each of them forward at least.
    pub probe_tokens: u64,
    /// Seconds that the probe took.
    pub probe_seconds: f64,
    /// Seconds that the run will take at most, as far as the probe tells.
    pub run_seconds: Option<f64>,
    /// What looks wrong with the data, in sentences.
    pub doubts: Vec<String>,
    /// The choice in two lines.
    pub lines: [String; 2],
}

/// Settings before the probe, and what it will need.
pub struct Draft {
    /// The settings so far.
    pub config: TrainConfig,
    /// Whether the probe is to choose the learning rate.
    pub(crate) open_rate: bool,
    /// Whether the run is to end by itself.
    pub(crate) own_length: bool,
    /// Whether the check, and holding, may be left out for want of time: nobody asked for them.
    pub(crate) own_extras: [bool; 2],
    /// Some of the data as plain text, and a general text, with their characters: whether the model knows the language.
    pub(crate) language: Option<[(Dataset, usize); 2]>,
    pub(crate) doubts: Vec<String>,
    numbers: Numbers,
}

/// What follows for `config` without the model's weights: the language of the data is not looked at.
///
/// # Errors
/// A setting is out of range; the data cannot be read again.
#[cfg(feature = "cli")]
pub(crate) fn draft(
    config: TrainConfig,
    given: &dyn Fn(&str) -> bool,
    data: &Dataset,
    model: &dyn Model,
) -> Result<Draft> {
    let survey = Survey::read(&data.path, config.seed)?;
    Draft::new(config, given, data, &survey, Size::of(model), None)
}

impl Draft {
    /// What follows for `config`, of which somebody has `given` some keys, from the data and the size of the model.
    pub(crate) fn new(
        config: TrainConfig,
        given: &dyn Fn(&str) -> bool,
        data: &Dataset,
        survey: &Survey,
        size: Size,
        language: Option<[(Dataset, usize); 2]>,
    ) -> Result<Self> {
        let numbers = Numbers::new(data, survey, size);
        let config = rule::settings(config, given, &numbers);
        config.validate()?;
        let doubts = survey.conflict_text(&data.path).into_iter().collect();
        let own_length = !given("epochs") && !given("steps");
        let own_extras = [!given("check") && config.max_forgetting.is_none(), !given("keep")];
        Ok(Self { config, open_rate: !given("lr"), own_length, own_extras, language, doubts, numbers })
    }

    /// Rates to try, rising; the given one alone where one was given.
    pub(crate) fn rates(&self) -> Vec<f32> {
        if self.open_rate { rule::rates(self.config.method, self.numbers.size) } else { vec![self.config.lr] }
    }

    /// Steps of the probe.
    #[must_use]
    pub fn probe_steps(&self) -> u64 {
        (self.rates().len() * Probe::STEPS) as u64
    }

    /// The choice without a probe, for a run of so many steps.
    #[must_use]
    pub fn rehearsed(&self, most_steps: u64) -> Choice {
        let mut choice = Choice { most_steps, doubts: self.doubts.clone(), ..Choice::default() };
        choice.lines = self.told(&self.config, &choice, false);
        if self.open_rate {
            let rates: Vec<String> = self.rates().iter().map(|rate| format!("{rate:e}")).collect();
            choice.lines[0].push_str(&format!("; a probe will choose the lr among {}", rates.join(", ")));
        }
        choice
    }

    /// The choice as it is told.
    pub(crate) fn told(&self, config: &TrainConfig, choice: &Choice, bounded: bool) -> [String; 2] {
        rule::told(&self.numbers, config, choice, self.open_rate, bounded)
    }
}
