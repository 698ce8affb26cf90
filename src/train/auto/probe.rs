//! A short probe: a few steps with each of some learning rates, all from the same adapter and on the same samples.

use super::Tried;
use crate::error::{ErrorCode, Result};
use crate::rng::{Rng, mix};
use crate::train::optimizer::Moments;
use crate::train::{Dataset, Observer, Trainer};
use pocketlora_kernels::Backend;
use std::time::Instant;

/// Samples that are looked at after them.
const LOOKED_AT: usize = 16;
/// Stream of random numbers for the choice of samples.
const SAMPLES: u64 = 7;
/// A lower rate is taken if it gets so much of the fall that the best gets: it forgets less, and a longer run will get the
/// rest.
const ENOUGH: f64 = 0.8;

/// What a probe found.
pub(crate) struct Probe {
    pub tried: Vec<Tried>,
    /// Loss before the first step.
    pub before: f64,
    /// The rate to take.
    pub lr: f32,
    /// Tokens of all steps and looks.
    pub tokens: u64,
    /// Seconds that a token of a step took.
    pub token_seconds: f64,
    /// Seconds in all.
    pub seconds: f64,
}

impl Probe {
    /// Steps with each rate: from zero, an adapter needs some for its gradient to have a direction.
    pub const STEPS: usize = 5;
}

/// Some of `data`, at most `count` samples in no order.
pub(crate) fn few(data: &Dataset, count: usize, seed: u64) -> Dataset {
    let order = Rng::new(mix(seed, SAMPLES)).permutation(data.samples.len());
    let some = order.into_iter().take(count).map(|i| data.samples[i].clone());
    Dataset::new(data.path.clone(), some.collect())
}

impl<B: Backend> Trainer<B> {
    /// Tries `rates`, which rise, on a trainer that was made for it: it has `steps` of at least [`Probe::STEPS`] and a constant
    /// rate. `watched` tells how well each does, or the learned samples where there is none.
    ///
    /// # Errors
    /// Stopped by the observer, out of memory.
    pub(crate) fn probe(
        &mut self,
        rates: &[f32],
        watched: Option<&Dataset>,
        observer: &mut dyn Observer,
    ) -> Result<Probe> {
        let start = Instant::now();
        let watched = few(watched.unwrap_or(&self.data), LOOKED_AT, self.config.seed);
        let begin = self.tensors.iter().map(|t| self.adapters.held().read(&self.base.backend, t.id));
        let begin = begin.collect::<Result<Vec<_>>>()?;
        let before = self.mean_loss(&watched, observer)?;
        let (mut tried, mut learned, mut learning) = (Vec::with_capacity(rates.len()), 0, 0.0);
        for &lr in rates {
            self.begin_again(&begin, lr)?;
            let loss = (|| {
                for _ in 0..Probe::STEPS {
                    let report = self.step(observer)?;
                    learned += report.tokens;
                    learning += report.time.as_secs_f64();
                    let _ = observer.on_step(&report);
                }
                self.mean_loss(&watched, observer)
            })();
            let loss = match loss {
                Err(e) if e.code() == ErrorCode::Diverged => f64::INFINITY,
                other => other?,
            };
            tried.push(Tried { lr, loss: if loss.is_nan() { f64::INFINITY } else { loss } });
        }
        let looks = (1 + rates.len()) * watched.tokens();
        Ok(Probe {
            lr: best(&tried, before),
            tried,
            before,
            tokens: (learned + looks) as u64,
            token_seconds: learning / learned.max(1) as f64,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// Forgets all steps.
    fn begin_again(&mut self, begin: &[Vec<f32>], lr: f32) -> Result<()> {
        let Self { base, config, adapters, tensors, facts, .. } = self;
        for (t, values) in tensors.iter_mut().zip(begin) {
            adapters.held_mut().update(&base.backend, t.id, &mut |master| base.backend.write(master, values));
            t.moments = Moments::new(&base.backend, config, t.spec.values())?;
        }
        (config.lr, facts.step) = (lr, 0);
        Ok(())
    }
}

/// The lowest rate whose loss fell by enough from `before`; the lowest of all where none fell.
fn best(tried: &[Tried], before: f64) -> f32 {
    let fall = |t: &Tried| before - t.loss;
    let most = tried.iter().map(fall).fold(f64::NEG_INFINITY, f64::max);
    let enough = |t: &&Tried| most > 0.0 && fall(t) >= ENOUGH * most;
    tried.iter().find(enough).or(tried.first()).map_or(0.0, |t| t.lr)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_rate_that_is_about_as_good_as_the_best_is_taken() {
        let of = |losses: [f64; 4]| {
            let tried: Vec<Tried> = (1u8..).zip(losses).map(|(i, loss)| Tried { lr: f32::from(i), loss }).collect();
            best(&tried, 3.0)
        };
        assert_eq!(of([2.9, 2.5, 2.0, 1.95]), 3.0);
        assert_eq!(of([2.9, 2.5, 2.0, 1.5]), 4.0);
        assert_eq!(of([2.0, 2.0, f64::INFINITY, f64::INFINITY]), 1.0);
        assert_eq!(of([3.0, 3.5, 4.0, f64::INFINITY]), 1.0);
    }
}
