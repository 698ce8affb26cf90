//! A short probe: a few steps with each of some learning rates, all from the same adapter and on the same samples. A bound
//! in time ends it early, with what was found until then.

use super::Tried;
use crate::error::{Error, ErrorCode, Result};
use crate::rng::{Rng, mix};
use crate::train::first;
use crate::train::optimizer::Moments;
use crate::train::{Dataset, Observer, StepReport, Trainer};
use pocketlora_kernels::Backend;
use std::ops::ControlFlow;
use std::time::Instant;

/// Samples that are looked at after them, and their tokens.
const LOOKED_AT: usize = 16;
const LOOKED_AT_TOKENS: usize = 2048;
/// A look costs a token so much of what a step costs it, which runs forward twice and backward.
pub(crate) const LOOK: f64 = 1.0 / 3.0;
/// Stream of random numbers for the choice of samples.
const SAMPLES: u64 = 7;
/// A lower rate is taken if it gets so much of the fall that the best gets: it forgets less, and a longer run will get the
/// rest.
const ENOUGH: f64 = 0.9;

/// What a probe found.
pub(crate) struct Probe {
    pub tried: Vec<Tried>,
    /// Loss before the first step, if there was time to look.
    pub before: Option<f64>,
    /// The rate to take.
    pub lr: f32,
    /// Tokens of all steps and looks.
    pub tokens: u64,
    /// Seconds that a token of a step took, or takes at least where no step was done in time.
    pub token_seconds: f64,
    /// Seconds in all.
    pub seconds: f64,
}

impl Probe {
    /// Steps with each rate: from zero, an adapter needs some for its gradient to have a direction.
    pub const STEPS: usize = 5;
}

/// Rates to try, rising, and the one to take where there is no time to compare them.
pub(crate) struct Rates {
    pub all: Vec<f32>,
    pub usual: f32,
    /// When to stop trying.
    pub until: Option<Instant>,
}

/// An observer that stops the work at some time.
struct Until<'o> {
    inner: &'o mut dyn Observer,
    end: Option<Instant>,
}

impl Until<'_> {
    fn is_over(&self) -> bool {
        self.end.is_some_and(|end| Instant::now() >= end)
    }

    /// What was found, if it was found in time.
    fn in_time<R>(&mut self, found: Result<R>) -> Result<Option<R>> {
        match found {
            Err(e) if e.code() == ErrorCode::Cancelled && self.is_over() && self.inner.keep_going() => Ok(None),
            found => found.map(Some),
        }
    }
}

impl Observer for Until<'_> {
    fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
        self.inner.on_step(report)
    }

    fn keep_going(&mut self) -> bool {
        self.inner.keep_going() && !self.is_over()
    }

    fn on_warning(&mut self, warning: &Error) {
        self.inner.on_warning(warning);
    }
}

/// Some of `data` in no order: at most `count` samples, and no more of them than have `tokens`, but one.
pub(crate) fn few(data: &Dataset, count: usize, tokens: usize, seed: u64) -> Dataset {
    let order = Rng::new(mix(seed, SAMPLES)).permutation(data.samples.len());
    let some = order.into_iter().take(count).map(|i| data.samples[i].clone());
    let mut some = Dataset::new(data.path.clone(), some.collect());
    while some.samples.len() > 1 && some.tokens() > tokens {
        some.samples.pop();
    }
    some
}

impl<B: Backend> Trainer<B> {
    /// Tries `rates` on a trainer that was made for it: it has `steps` of at least [`Probe::STEPS`] and a constant rate.
    /// `watched` tells how well each does, or the learned samples where there is none.
    ///
    /// # Errors
    /// Stopped by the observer, out of memory.
    pub(crate) fn probe(
        &mut self,
        rates: &Rates,
        watched: Option<&Dataset>,
        observer: &mut dyn Observer,
    ) -> Result<Probe> {
        let start = Instant::now();
        let observer = &mut Until { inner: observer, end: rates.until };
        let begun = self.begin(observer);
        observer.in_time(begun)?;
        let watched = few(watched.unwrap_or(&self.data), LOOKED_AT, LOOKED_AT_TOKENS, self.config.seed);
        let begin = self.tensors.iter().map(|t| self.adapters.held().read(&self.base.backend, t.id));
        let begin = begin.collect::<Result<Vec<_>>>()?;
        let before = self.mean_loss(&watched, observer);
        let before = observer.in_time(before)?;
        // Steps and looks, in tokens and seconds.
        let (mut looks, looking) = (1, start.elapsed().as_secs_f64());
        let (mut tried, mut learned, mut learning) = (Vec::with_capacity(rates.all.len()), 0, 0.0);
        for &lr in &rates.all {
            if observer.is_over() {
                break;
            }
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
                other => match observer.in_time(other)? {
                    Some(loss) => loss,
                    None => break,
                },
            };
            looks += 1;
            tried.push(Tried { lr, loss: if loss.is_nan() { f64::INFINITY } else { loss } });
        }
        let looked_at = watched.tokens();
        let token_seconds = match learned {
            0 => looking / looked_at as f64 / LOOK,
            tokens => learning / tokens as f64,
        };
        Ok(Probe {
            lr: before.map_or(rates.usual, |before| rates.choose(&tried, before)),
            tried,
            before,
            tokens: (learned + looks * looked_at) as u64,
            token_seconds,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// Forgets all steps.
    fn begin_again(&mut self, begin: &[Vec<f32>], lr: f32) -> Result<()> {
        let Self { base, config, adapters, tensors, facts, allocator, file, .. } = self;
        for (t, values) in tensors.iter_mut().zip(begin) {
            adapters.held_mut().update(&base.backend, t.id, &mut |master| base.backend.write(master, values));
            t.moments = Moments::new(&base.backend, config, t.spec.values())?;
        }
        if let Some(allocator) = allocator {
            allocator.counts.clear();
            allocator.state.iter_mut().flatten().for_each(|values| values.fill(0.0));
        }
        first::hold(base, adapters, file, 0)?;
        adapters.renew(base, 0)?;
        facts.layer_steps.clear();
        facts.drop_rates.clear();
        (config.lr, facts.step) = (lr, 0);
        Ok(())
    }
}

impl Rates {
    /// The rate to take after those that were tried; one alone says nothing of the others, unless it diverged.
    fn choose(&self, tried: &[Tried], before: f64) -> f32 {
        match tried {
            [] => self.usual,
            [one] if self.all.len() > 1 && one.loss.is_finite() => self.usual,
            tried => best(tried, before),
        }
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

    #[test]
    fn a_probe_that_was_cut_short_takes_what_it_knows() {
        let rates = Rates { all: vec![1.0, 2.0, 4.0], usual: 2.0, until: None };
        let tried = |losses: &[f64]| {
            let tried: Vec<Tried> = rates.all.iter().zip(losses).map(|(&lr, &loss)| Tried { lr, loss }).collect();
            rates.choose(&tried, 3.0)
        };
        assert_eq!([tried(&[]), tried(&[2.9]), tried(&[2.9, 2.0])], [2.0, 2.0, 2.0]);
        assert_eq!([tried(&[2.0, 2.0]), tried(&[f64::INFINITY])], [1.0, 1.0]);
        let given = Rates { all: vec![5.0], usual: 5.0, until: None };
        assert_eq!(given.choose(&[Tried { lr: 5.0, loss: 2.0 }], 3.0), 5.0);
    }

    /// Goes on until it is told otherwise.
    struct Going(bool);

    impl Observer for Going {
        fn on_step(&mut self, _: &StepReport) -> ControlFlow<()> {
            ControlFlow::Continue(())
        }

        fn keep_going(&mut self) -> bool {
            self.0
        }
    }

    #[test]
    fn what_takes_too_long_is_told_from_what_somebody_stopped() {
        let stopped = || Err::<(), _>(Error::new(ErrorCode::Cancelled, "here", "stopped"));
        for (end, going, keeps_going, is_error) in [
            (None, true, true, true),
            (Some(Instant::now()), true, false, false),
            (Some(Instant::now()), false, false, true),
        ] {
            let mut until = Until { inner: &mut Going(going), end };
            assert_eq!(
                (until.keep_going(), until.in_time(stopped()).is_err()),
                (keeps_going, is_error),
                "{end:?} {going}"
            );
        }
    }
}
