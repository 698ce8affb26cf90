//! How well a model, with its adapters, predicts given text, and how well it answers.

mod general;
mod likelihood;
#[cfg(feature = "metrics")]
mod metrics;
mod recall;

pub use general::{General, general};
pub(crate) use likelihood::Likelihood;
#[cfg(feature = "metrics")]
pub use metrics::*;
pub use recall::{learned, recall};

use crate::base::Pool;
use crate::engine::{AdapterSet, Engine, Transcript};
use crate::error::{Error, ErrorCode, Result};
use crate::memory::Peak;
use crate::train::{Dataset, Depth, Layout, MicroBatch, Sample, Sums, Watch, micro_step};
use std::sync::Arc;

/// Losses over a text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Tokens whose probability was taken.
    pub tokens: usize,
    /// Sum of their negative log-likelihoods (natural log).
    pub nll_sum: f64,
}

impl Score {
    /// Mean negative log-likelihood.
    #[must_use]
    pub fn nll(&self) -> f64 {
        self.nll_sum / self.tokens as f64
    }

    /// `exp` of the mean negative log-likelihood.
    #[must_use]
    pub fn perplexity(&self) -> f64 {
        self.nll().exp()
    }

    /// The score, if it is a number: broken weights give none.
    fn checked(self) -> Result<Self> {
        if self.nll_sum.is_finite() {
            return Ok(self);
        }
        let message = format!(
            "expected a finite number, got `{}`; the weights or an attached adapter are broken, or too large for 16 bits: try \
             `Precision::Exact`, leave out the adapter, or use another copy of the model",
            self.nll_sum
        );
        Err(Error::new(ErrorCode::Diverged, "loss", message))
    }
}

impl std::ops::Add for Score {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { tokens: self.tokens + other.tokens, nll_sum: self.nll_sum + other.nll_sum }
    }
}

/// Runs `ids` as one text and hands the logits `[V]` after each token to `on_row`. `progress` hears of tokens done and
/// may stop the work.
///
/// # Errors
/// Too long for the context, an id outside the vocabulary, stopped.
pub fn logits_of(
    engine: &Engine,
    ids: &[u32],
    progress: &mut dyn FnMut(usize) -> bool,
    on_row: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
) -> Result<()> {
    logits_of_from(engine, ids, 0, progress, on_row)
}

/// As [`logits_of`], with the logits after token number `first` and later ones alone.
fn logits_of_from(
    engine: &Engine,
    ids: &[u32],
    first: usize,
    progress: &mut dyn FnMut(usize) -> bool,
    on_row: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
) -> Result<()> {
    let set = engine.set_for(&[ids.to_vec()])?;
    let limit = engine.own_tokens(&set.adapters);
    if ids.len() > limit {
        return Err(engine.context_full("text", ids.len(), limit, "use windows"));
    }
    let mut transcript = Transcript::new(engine.base(), engine.numbers())?;
    let mut told = 0;
    transcript.read(engine.on(&set.adapters), ids, first, &mut || true, on_row, &mut |done| {
        let new = done - std::mem::replace(&mut told, done);
        if progress(new) { Ok(()) } else { Err(stopped()) }
    })
}

/// The error of an evaluation that somebody stopped.
fn stopped() -> Error {
    Error::new(ErrorCode::Cancelled, "evaluation", "stopped")
}

/// Scores every token of `ids` but the first of each window of `window` tokens; windows do not overlap.
///
/// # Errors
/// As [`logits_of`]; fewer than two tokens, in all or in a window, a loss that is not a number.
pub fn score_text(
    engine: &Engine,
    ids: &[u32],
    window: usize,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<Score> {
    if ids.len() < 2 {
        let message = format!("expected at least two tokens, got `{}`; give a longer text", ids.len());
        return Err(Error::new(ErrorCode::Data, "text", message));
    }
    if window < 2 {
        return Err(Error::config("window", "0 for the whole text, or a whole number of tokens from 2", window));
    }
    let mut score = Score::default();
    for part in ids.chunks(window) {
        logits_of(engine, part, progress, &mut |row, logits| {
            if let Some(&next) = part.get(row + 1) {
                score.tokens += 1;
                score.nll_sum += nll(logits, next as usize);
            }
            Ok(())
        })?;
    }
    score.checked()
}

/// Scores the learned tokens of a data file.
///
/// # Errors
/// An id outside the vocabulary, a loss that is not a number, stopped, out of memory.
pub fn score_data(engine: &Engine, data: &Dataset, progress: &mut dyn FnMut(usize) -> bool) -> Result<Score> {
    score_each(engine, |sample| engine.set_for_sample(sample), data, progress)
}

/// As [`score_data`], with the adapters that `set` gives for each sample.
fn score_each(
    engine: &Engine,
    set: impl Fn(&Sample) -> Result<Arc<AdapterSet>>,
    data: &Dataset,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<Score> {
    let (base, arithmetic) = (engine.base(), engine.numbers().arithmetic);
    let (mut score, mut pool, mut peak) = (Score::default(), Pool::default(), Peak::default());
    for sample in &data.samples {
        let micro = MicroBatch::new([sample]);
        let mut watch = Watch { keep_going: &mut || true, peak: &mut peak };
        pool.clear();
        let set = set(sample)?;
        let turn = engine.turn().take();
        let mut sums = Sums::new(&base.backend, 1)?;
        let (layout, sum) = (Layout::fast(false), (&mut sums, 0));
        let learned = (None, &mut Depth::default());
        micro_step(base, &set.adapters, &micro, 1.0, None, arithmetic, &layout, learned, &mut pool, sum, &mut watch)?;
        score.nll_sum += sums.read(&base.backend)?[0];
        drop(turn);
        score.tokens += micro.trained();
        if !progress(micro.tokens()) {
            return Err(stopped());
        }
    }
    score.checked()
}

/// `-log softmax(logits)[target]`, in f64; NaN where a logit is not finite.
fn nll(logits: &[f32], target: usize) -> f64 {
    if !logits.iter().all(|l| l.is_finite()) {
        return f64::NAN;
    }
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
    max + sum.ln() - f64::from(logits[target])
}
