//! The decode loop: prompt in, tokens out, with the cache reused across turns.

mod filter;
mod sampler;

pub use filter::{LogitFilter, TokenBias};
pub use sampler::{Sampler, Sampling};

use crate::adapter::Adapters;
use crate::base::Base;
use crate::error::{Error, ErrorCode, Result};
use crate::exec::infer::{Numbers, PREFILL_CHUNK, Sequence, Step, Workspace};
use pocketlora_kernels::Backend;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
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

/// A text that grows by prompts and answers; its keys and values are kept, so that a chat's next turn costs only its
/// new tokens.
pub struct Context<B: Backend> {
    sequence: Sequence<B>,
    work: Workspace<B>,
    ids: Vec<u32>,
}

impl<B: Backend> Context<B> {
    /// An empty context.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(base: &Base<B>, numbers: Numbers) -> Result<Self> {
        let (sequence, work) = (Sequence::new(base, numbers.cache)?, Workspace::new(numbers.arithmetic));
        Ok(Self { sequence, work, ids: Vec::new() })
    }

    /// Forgets everything, as when another adapter changes what the kept keys should have been.
    pub fn clear(&mut self, base: &Base<B>) {
        self.rewind(base, 0);
    }

    /// Continues `prompt` by up to `max_tokens` tokens. `on_token` sees each and may stop the answer.
    ///
    /// # Errors
    /// An empty prompt, one longer than the context, an id outside the vocabulary, logits that are not numbers, out of
    /// memory.
    pub fn generate(
        &mut self,
        base: &Base<B>,
        adapters: &Adapters<B>,
        prompt: &[u32],
        max_tokens: usize,
        sampling: &Sampling,
        stop: &[u32],
        on_token: &mut dyn FnMut(u32) -> Result<ControlFlow<()>>,
    ) -> Result<Generated> {
        let limit = base.model.config().max_positions;
        if prompt.is_empty() {
            return Err(Error::new(ErrorCode::Data, "prompt", "expected at least one token, got none"));
        }
        if prompt.len() >= limit {
            let message =
                format!("expected fewer than the context's {limit} tokens, got `{}`; shorten it", prompt.len());
            return Err(Error::new(ErrorCode::Data, "prompt", message));
        }
        let start = Instant::now();
        // The last prompt token is always run again: its logits choose the first new token.
        let kept = self.ids.iter().zip(&prompt[..prompt.len() - 1]).take_while(|(a, b)| a == b).count();
        let kept = self.rewind(base, kept);
        let prefilled = prompt.len() - kept;
        let mut logits = self.advance(base, adapters, &prompt[kept..])?;

        let mut sampler = Sampler::new(sampling.clone());
        let (mut ids, mut finish) = (Vec::new(), Finish::Length);
        let mut prefill = start.elapsed();
        let decode_start = Instant::now();
        while ids.len() < max_tokens {
            let id = sampler.sample(&mut logits, &self.ids)?;
            if ids.is_empty() {
                prefill = start.elapsed();
            }
            if stop.contains(&id) {
                finish = Finish::Stop;
                break;
            }
            ids.push(id);
            if on_token(id)?.is_break() {
                finish = Finish::Cancelled;
                break;
            }
            if self.ids.len() + 1 >= limit {
                finish = Finish::Context;
                break;
            }
            if ids.len() < max_tokens {
                logits = self.advance(base, adapters, &[id])?;
            }
        }
        let decode = decode_start.elapsed();
        Ok(Generated { ids, prompt_tokens: prompt.len(), prefilled, prefill, decode, finish })
    }

    /// Keeps the first `to` tokens, or fewer where the model cannot go back so far; returns how many.
    fn rewind(&mut self, base: &Base<B>, to: usize) -> usize {
        let kept = self.sequence.rewind(base, to);
        self.ids.truncate(kept);
        kept
    }

    /// Runs `ids` after what is held and returns the logits after the last of them: for code that picks tokens itself.
    ///
    /// # Errors
    /// An id outside the vocabulary, out of memory.
    pub fn advance(&mut self, base: &Base<B>, adapters: &Adapters<B>, ids: &[u32]) -> Result<Vec<f32>> {
        let mut logits = Vec::new();
        let last_chunk = ids.len().div_ceil(PREFILL_CHUNK).saturating_sub(1);
        for (i, chunk) in ids.chunks(PREFILL_CHUNK).enumerate() {
            let wanted = if i == last_chunk { chunk.len() - 1..chunk.len() } else { 0..0 };
            let step = Step { sequence: &mut self.sequence, ids: chunk, adapters, logits: wanted };
            let result = base.forward(&mut self.work, &mut [step], &mut || true, &mut |made| {
                logits = made.values;
                Ok(())
            });
            if let Err(e) = result {
                self.ids.truncate(self.sequence.len());
                return Err(e);
            }
            self.ids.extend_from_slice(chunk);
        }
        Ok(logits)
    }
}
