//! Texts as vectors.

use super::{Cancel, Engine, Transcript};
use crate::error::{Error, ErrorCode, Result};

/// Which of a text's tokens become its vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pooling {
    /// The mean of all.
    #[default]
    Mean,
    /// The last, which has read all others.
    Last,
}

impl Engine {
    /// A text as a vector `[C]` of length 1: the states of its tokens after the last layer and its norm, pooled. Attached
    /// adapters take part.
    ///
    /// # Errors
    /// The model has no tokenizer; the text is empty or longer than the context; stopped; out of memory; states that are not
    /// numbers.
    pub fn embed(&self, text: &str, pooling: Pooling, cancel: &Cancel) -> Result<Vec<f32>> {
        let set = self.all();
        let ids = self.text_of(&set)?.tokenizer.encode(text, true)?;
        let limit = self.own_tokens(&set.adapters);
        if ids.is_empty() {
            return Err(Error::new(ErrorCode::Data, "text", "expected at least one token, got none"));
        }
        if ids.len() > limit {
            return Err(self.context_full("text", ids.len(), limit, "shorten it"));
        }
        set.adapters.replaced().check_ids(self.base(), &ids)?;
        let first = if pooling == Pooling::Last { ids.len() - 1 } else { 0 };
        let mut sum = vec![0.0f64; self.base().model.config().hidden_size];
        let mut transcript = Transcript::of_states(self.base(), self.numbers())?;
        let add = &mut |_, state: &[f32]| {
            sum.iter_mut().zip(state).for_each(|(sum, value)| *sum += f64::from(*value));
            Ok(())
        };
        transcript.read(self.on(&set.adapters), &ids, first, &mut || !cancel.is_cancelled(), add, &mut |_| Ok(()))?;
        let length = sum.iter().map(|value| value * value).sum::<f64>().sqrt();
        if !length.is_finite() || length == 0.0 {
            let message = "expected states that are numbers, got others; the weights or an adapter are broken";
            return Err(Error::new(ErrorCode::Format, format!("`{}`", self.dir().display()), message));
        }
        // A mean has the direction of the sum.
        Ok(sum.into_iter().map(|value| (value / length) as f32).collect())
    }
}
