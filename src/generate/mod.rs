//! How tokens are chosen, and what an answer took.

mod filter;
mod greedy;
mod guard;
mod recommended;
mod sampler;

pub use filter::{LogitFilter, TokenBias};
pub(crate) use greedy::Greedy;
pub use guard::{Dry, Guard};
pub(crate) use recommended::FILE as GENERATION_CONFIG;
pub use recommended::{Recommended, SamplingSource};
pub(crate) use sampler::check_finite;
pub use sampler::{Sampler, Sampling};

use std::time::Duration;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Finish {
    /// The model said it was done.
    Stop,
    /// The asked-for number of tokens was reached.
    Length,
    /// The context is full.
    Context,
    /// The caller stopped it.
    Cancelled,
}

impl Finish {
    /// Whether the answer would have gone on: what is there is a part of it.
    #[must_use]
    pub fn is_cut(self) -> bool {
        matches!(self, Self::Length | Self::Context)
    }
}

/// What a generation did.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Generated {
    /// New tokens, without the one that ended the answer.
    pub ids: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the prompt that were not in the cache yet.
    pub prefilled: usize,
    /// Time until the first token was chosen.
    pub prefill: Duration,
    /// Time for the tokens after the first.
    pub decode: Duration,
    /// Why it ended.
    pub finish: Finish,
}

impl Generated {
    /// Prompt tokens per second.
    #[must_use]
    pub fn prefill_rate(&self) -> f64 {
        rate(self.prefilled, self.prefill)
    }

    /// New tokens per second, the first (which the prompt's pass yields) not counted.
    #[must_use]
    pub fn decode_rate(&self) -> f64 {
        rate(self.ids.len().saturating_sub(1), self.decode)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() }
}
