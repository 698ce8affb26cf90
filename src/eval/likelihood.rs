//! How likely a model finds a text after another.

use super::nll;
use crate::engine::{AdapterSet, Engine, Transcript};
use crate::error::{Error, ErrorCode, Result};
use crate::text::Text;
use std::ops::Range;
use std::sync::Arc;

/// Scores continuations; what the texts share at their beginning is run once.
pub(crate) struct Likelihood<'a> {
    engine: &'a Engine,
    text: &'a Text,
    set: Arc<AdapterSet>,
    transcript: Transcript,
    /// Tokens run.
    pub tokens: usize,
}

impl<'a> Likelihood<'a> {
    pub fn new(engine: &'a Engine, text: &'a Text, set: Arc<AdapterSet>) -> Result<Self> {
        let transcript = Transcript::new(engine.base(), engine.numbers())?;
        Ok(Self { engine, text, set, transcript, tokens: 0 })
    }

    /// Goes on with other adapters.
    #[cfg(feature = "metrics")]
    pub fn with(&mut self, set: Arc<AdapterSet>) {
        if !Arc::ptr_eq(&set, &self.set) {
            // What is remembered was read with those before.
            self.transcript.keep(self.engine.base(), &[]);
            self.set = set;
        }
    }

    /// The tokenizer and template that it reads with.
    pub fn text(&self) -> &'a Text {
        self.text
    }

    /// Log-likelihood (natural) of the tokens of `text` that reach beyond its first `given` bytes. A token across the
    /// border counts: it is part of what is said after what was given. `plain` as in [`Tokenizer::encode_chat`]; a text
    /// that is no chat gets what stands before every text.
    ///
    /// [`Tokenizer::encode_chat`]: crate::tokenizer::Tokenizer::encode_chat
    pub fn of(&mut self, text: &str, plain: &[Range<usize>], given: usize, chat: bool) -> Result<f64> {
        let tokenizer = &self.text.tokenizer;
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
        let (base, limit) = (self.engine.base(), self.engine.own_tokens(&self.set.adapters));
        if ids.len() > limit {
            let message = format!("expected at most the context's {limit} tokens, got `{}`; shorten it", ids.len());
            return Err(Error::new(ErrorCode::Data, "text", message));
        }
        if from >= ids.len() {
            let message = "expected a choice of at least one token after the prompt, got none; give it text";
            return Err(Error::new(ErrorCode::Data, "text", message));
        }
        self.set.adapters.replaced().check_ids(base, ids)?;
        // The token before the first that counts is always run: its logits are needed.
        let kept = self.transcript.keep(base, &ids[..from - 1]);
        let mut sum = 0.0;
        let on_logits = &mut |row, logits: &[f32]| {
            sum -= nll(logits, ids[kept + row + 1] as usize);
            Ok(())
        };
        let (on, rest) = (self.engine.on(&self.set.adapters), &ids[kept..ids.len() - 1]);
        self.transcript.read(on, rest, from - 1 - kept, &mut || true, on_logits, &mut |_| Ok(()))?;
        self.tokens += rest.len();
        if sum.is_finite() {
            return Ok(sum);
        }
        let message = format!(
            "expected a finite number, got `{sum}`; the weights or an attached adapter are broken, or too large for 16 bits: try \
             `Precision::Exact`, leave out the adapter, or use another copy of the model"
        );
        Err(Error::new(ErrorCode::Diverged, "likelihood", message))
    }
}
