//! How likely a model finds a text after another.

use super::nll;
use crate::error::{Error, ErrorCode, Result};
use crate::exec::infer::{PREFILL_CHUNK, Sequence, Step, Workspace};
use crate::session::Session;
use pocketlora_kernels::{Backend, Cpu};
use std::ops::Range;

/// Scores continuations; what the texts share at their beginning is run once.
pub(super) struct Likelihood<'s> {
    session: &'s Session,
    sequence: Sequence<Cpu>,
    work: Workspace<Cpu>,
    held: Vec<u32>,
    /// Tokens run.
    pub tokens: usize,
}

impl<'s> Likelihood<'s> {
    pub fn new(session: &'s Session) -> Result<Self> {
        let numbers = session.numbers();
        let sequence = Sequence::new(session.base(), numbers.cache)?;
        Ok(Self { session, sequence, work: Workspace::new(numbers.arithmetic), held: Vec::new(), tokens: 0 })
    }

    /// Log-likelihood (natural) of the tokens of `text` that reach beyond its first `given` bytes. A token across the
    /// border counts: it is part of what is said after what was given. `plain` as in [`Tokenizer::encode_chat`]; a text
    /// that is no chat gets what stands before every text.
    ///
    /// [`Tokenizer::encode_chat`]: crate::tokenizer::Tokenizer::encode_chat
    pub fn of(&mut self, text: &str, plain: &[Range<usize>], given: usize, chat: bool) -> Result<f64> {
        let tokenizer = self.session.tokenizer()?;
        let tokens = tokenizer.encode_with_offsets(text, plain)?;
        let mut ids: Vec<u32> = tokens.iter().map(|t| t.0).collect();
        let mut from = tokens.iter().filter(|t| t.1.end <= given).count();
        if !chat && !tokenizer.starts_with_prefix(&ids) {
            ids.splice(0..0, tokenizer.prefix_ids().iter().copied());
            from += tokenizer.prefix_ids().len();
        }
        // Nothing comes before the first token that could make it likely.
        self.of_ids(&ids, from.max(1))
    }

    /// Log-likelihood of `ids[from..]` after `ids[..from]`.
    fn of_ids(&mut self, ids: &[u32], from: usize) -> Result<f64> {
        let (base, adapters) = (self.session.base(), self.session.adapters());
        let (limit, vocab) = (base.model.config().max_positions, adapters.replaced().vocabulary(base));
        if ids.len() > limit {
            let message = format!("expected at most the context's {limit} tokens, got `{}`; shorten it", ids.len());
            return Err(Error::new(ErrorCode::Data, "text", message));
        }
        if from >= ids.len() {
            let message = "expected a choice of at least one token after the prompt, got none; give it text";
            return Err(Error::new(ErrorCode::Data, "text", message));
        }
        adapters.replaced().check_ids(base, ids)?;
        // The token before the first that counts is always run: its logits are needed.
        let kept = self.held.iter().zip(&ids[..from - 1]).take_while(|(a, b)| a == b).count();
        let kept = self.sequence.rewind(base, kept);
        self.held.truncate(kept);
        let mut sum = 0.0;
        base.backend.scope(|| {
            let mut start = kept;
            for chunk in ids[kept..ids.len() - 1].chunks(PREFILL_CHUNK) {
                let wanted = from.saturating_sub(start + 1).min(chunk.len())..chunk.len();
                let step = Step { sequence: &mut self.sequence, ids: chunk, adapters, logits: wanted };
                base.forward(&mut self.work, &mut [step], &mut || true, &mut |made| {
                    for ((_, row), logits) in made.places.iter().zip(made.values.chunks_exact(vocab)) {
                        sum -= nll(logits, ids[start + row + 1] as usize);
                    }
                    Ok(())
                })?;
                start += chunk.len();
            }
            Ok::<_, Error>(())
        })?;
        self.tokens += ids.len() - 1 - kept;
        self.held.extend(&ids[kept..ids.len() - 1]);
        if sum.is_finite() {
            return Ok(sum);
        }
        let message = format!(
            "expected a finite number, got `{sum}`; the weights or an attached adapter are broken, or too large for 16 bits: try \
             `--precision exact`, leave out the adapter, or use another copy of the model"
        );
        Err(Error::new(ErrorCode::Diverged, "likelihood", message))
    }
}
