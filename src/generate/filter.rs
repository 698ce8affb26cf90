//! What may change logits between the model and the sampler.

use crate::error::Result;

/// Has a say in which token comes next: a grammar, a list of forbidden words, a watermark. It may move between threads, as
/// the chat does that it works for.
pub trait LogitFilter: Send {
    /// An answer to `prompt` begins: what was kept of an earlier one is over.
    fn begin(&mut self, prompt: &[u32]) {
        let _ = prompt;
    }

    /// Changes `logits` `[V]`, the natural logarithms of what the model finds likely up to a constant. `-inf` forbids a
    /// token; at least one must be left. `context` is what the model has read: the prompt and the answer so far.
    ///
    /// # Errors
    /// The filter cannot go on, which ends the answer.
    fn apply(&mut self, logits: &mut [f32], context: &[u32]) -> Result<()>;

    /// Sees each token of the answer as it is accepted, in order.
    fn accept(&mut self, id: u32) {
        let _ = id;
    }
}

/// Adds to the logits of some tokens; `-inf` forbids them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenBias(Vec<(u32, f32)>);

impl TokenBias {
    /// What is added to the logit of each id. Ids that the model does not have are passed over.
    pub fn new(biases: impl IntoIterator<Item = (u32, f32)>) -> Self {
        Self(biases.into_iter().collect())
    }
}

impl LogitFilter for TokenBias {
    fn apply(&mut self, logits: &mut [f32], _: &[u32]) -> Result<()> {
        for &(id, bias) in &self.0 {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        Ok(())
    }
}
