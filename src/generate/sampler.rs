//! Choosing the next token from logits.

use super::{Dry, LogitFilter};
use crate::error::{Error, ErrorCode, Result};
use crate::rng::Rng;
use serde::{Deserialize, Serialize};

/// How the next token is chosen. The defaults choose the likeliest one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Divides the logits; 0 chooses the likeliest token.
    pub temperature: f32,
    /// Keeps the `k` likeliest tokens; 0 keeps all (Fan et al. 2018).
    pub top_k: usize,
    /// Keeps the likeliest tokens that together reach this probability; 1 keeps all (Holtzman et al. 2020).
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the likeliest; 0 keeps all (Nguyen et al. 2024).
    pub min_p: f32,
    /// Divides positive logits of tokens seen in the context and multiplies negative ones; 1 does nothing (Keskar et
    /// al. 2019).
    pub repetition_penalty: f32,
    /// What keeps an answer from repeating itself; does nothing by default. Chats and decoders use it, a [`Sampler`] by
    /// itself does not: it does not know where an answer begins.
    pub dry: Dry,
    /// Seed of the random stream.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, dry: Dry::OFF, seed: 0 }
    }
}

impl Sampling {
    /// Checks the ranges.
    ///
    /// # Errors
    /// The first setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        let Self { temperature, top_p, min_p, repetition_penalty: penalty, .. } = *self;
        for (name, value, ok, range) in [
            ("temperature", temperature, (0.0..=100.0).contains(&temperature), "0 <= temperature <= 100"),
            ("top-p", top_p, top_p > 0.0 && top_p <= 1.0, "0 < top-p <= 1"),
            ("min-p", min_p, (0.0..=1.0).contains(&min_p), "0 <= min-p <= 1"),
            ("repetition-penalty", penalty, (0.01..=100.0).contains(&penalty), "0.01 <= repetition-penalty <= 100"),
        ] {
            if !ok {
                return Err(Error::config(name, format!("a number in `{range}`"), value));
            }
        }
        self.dry.validate()
    }

    /// The settings by their names, but for the seed, for reports.
    #[cfg(feature = "cli")]
    pub(crate) fn named(&self) -> [(&'static str, f64); 9] {
        // In the digits in which they were given.
        let plain = |value: f32| value.to_string().parse().unwrap_or(f64::from(value));
        [
            ("temperature", plain(self.temperature)),
            ("top_k", self.top_k as f64),
            ("top_p", plain(self.top_p)),
            ("min_p", plain(self.min_p)),
            ("repetition_penalty", plain(self.repetition_penalty)),
            ("dry_multiplier", plain(self.dry.multiplier)),
            ("dry_base", plain(self.dry.base)),
            ("dry_allowed_length", self.dry.allowed_length as f64),
            ("dry_after", self.dry.after as f64),
        ]
    }
}

/// A sampler in the middle of an answer.
pub struct Sampler {
    settings: Sampling,
    rng: Rng,
}

impl Sampler {
    /// The start of an answer.
    #[must_use]
    pub fn new(settings: Sampling) -> Self {
        let rng = Rng::new(settings.seed);
        Self { settings, rng }
    }

    /// The next token, given the logits (which are changed) and the context so far. A token with a logit of `-inf` is
    /// never chosen.
    ///
    /// # Errors
    /// A logit is NaN or `inf`: the weights, an adapter or a filter are broken. All are `-inf`: filters left no token.
    pub fn sample(&mut self, logits: &mut [f32], context: &[u32]) -> Result<u32> {
        self.penalize(logits, context);
        self.choose(logits)
    }

    /// As [`Sampler::sample`], with `filters` applied in their order after the repetition penalty. They hear of the
    /// choice by [`LogitFilter::accept`] when it is the caller's turn to accept it.
    ///
    /// # Errors
    /// As there; a filter refuses to go on.
    pub fn sample_filtered(
        &mut self,
        logits: &mut [f32],
        context: &[u32],
        filters: &mut [&mut dyn LogitFilter],
    ) -> Result<u32> {
        self.penalize(logits, context);
        if filters.is_empty() {
            return self.choose(logits);
        }
        filters.iter_mut().try_for_each(|filter| filter.apply(logits, context))?;
        if let Some(at) = logits.iter().position(|&l| broken(l)) {
            let message = format!("expected numbers or `-inf`, got `{}` from a filter; mend the filter", logits[at]);
            return Err(Error::new(ErrorCode::Config, format!("logits: token {at}"), message));
        }
        self.choose(logits)
    }

    fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        let best = argmax(logits)?;
        if self.settings.temperature == 0.0 {
            return Ok(best as u32);
        }
        let mut kept = self.candidates(logits, logits[best]);
        let total: f32 = kept.iter().map(|&(_, p)| p).sum();
        let mut mass = 0.0;
        let wanted = self.settings.top_p * total;
        let enough = kept.iter().position(|&(_, p)| {
            mass += p;
            mass >= wanted
        });
        kept.truncate(enough.map_or(kept.len(), |i| i + 1));

        let total: f32 = kept.iter().map(|&(_, p)| p).sum();
        let mut left = self.rng.unit() * total;
        for &(id, p) in &kept {
            left -= p;
            if left < 0.0 {
                return Ok(id);
            }
        }
        Ok(kept.last().map_or(best as u32, |&(id, _)| id)) // rounding may leave a sliver
    }

    fn penalize(&self, logits: &mut [f32], context: &[u32]) {
        let penalty = self.settings.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut seen = context.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    /// Tokens that top-k and min-p leave, likeliest first, with `exp` of their tempered distance to the likeliest.
    fn candidates(&self, logits: &[f32], best: f32) -> Vec<(u32, f32)> {
        let s = &self.settings;
        // Below this the probability is under 1e-7 of the likeliest one's, beyond what 24 random bits can reach.
        let floor = if s.min_p > 0.0 { s.min_p.ln() } else { -17.0 };
        let scaled = |&l: &f32| (l - best) / s.temperature;
        let mut kept: Vec<(u32, f32)> =
            logits.iter().enumerate().map(|(i, l)| (i as u32, scaled(l))).filter(|&(_, d)| d >= floor).collect();
        kept.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if s.top_k > 0 {
            kept.truncate(s.top_k);
        }
        for (_, d) in &mut kept {
            *d = d.exp();
        }
        kept
    }
}

/// Whether a logit is neither a number nor `-inf`, which is a token that must not come.
fn broken(logit: f32) -> bool {
    logit.is_nan() || logit == f32::INFINITY
}

/// Checks what a model gives, before filters: it masks nothing itself.
pub(crate) fn check_finite(logits: &[f32]) -> Result<()> {
    check(logits, |logit| !logit.is_finite())
}

fn check(logits: &[f32], broken: impl Fn(f32) -> bool) -> Result<()> {
    // Of a whole vocabulary at each token: without a way out in the loop, it is done some at a time.
    if !logits.iter().fold(false, |any, &l| any | broken(l)) {
        return Ok(());
    }
    let at = logits.iter().position(|&l| broken(l)).unwrap_or(0);
    let message = format!(
        "expected finite numbers, got `{}`; the weights or an attached adapter are broken, or too large for 16 bits: try \
         `Precision::Exact`, detach the adapter, or use another copy of the model",
        logits[at]
    );
    Err(Error::new(ErrorCode::Diverged, format!("logits: token {at}"), message))
}

/// Index of the first of the largest.
pub(super) fn argmax(logits: &[f32]) -> Result<usize> {
    check(logits, broken)?;
    let largest = largest(logits);
    match logits.iter().position(|&l| l == largest) {
        Some(at) if largest > f32::NEG_INFINITY => Ok(at),
        _ => {
            let message = "expected a token that may come next, got `-inf` for every one; have the filters leave one";
            Err(Error::new(ErrorCode::Config, "logits", message))
        }
    }
}

/// The largest of numbers; in lanes, for a whole vocabulary is looked through at each token.
fn largest(logits: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (lanes, rest) = logits.as_chunks::<16>();
    let mut most = [f32::NEG_INFINITY; 16];
    for lane in lanes {
        most.iter_mut().zip(lane).for_each(|(most, l)| *most = larger(*most, *l));
    }
    most.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}

#[cfg(test)]
mod tests {
    use super::super::TokenBias;
    use super::*;

    fn draw(settings: Sampling, logits: &[f32], n: u64) -> Vec<u32> {
        let one = |seed| Sampler::new(Sampling { seed, ..settings.clone() }).sample(&mut logits.to_vec(), &[]).unwrap();
        let mut ids: Vec<u32> = (0..n).map(one).collect();
        ids.sort_unstable();
        ids
    }

    #[test]
    fn zero_temperature_takes_the_first_of_the_likeliest() {
        assert_eq!(draw(Sampling::default(), &[0.0, 3.0, 3.0, 1.0], 1), [1]);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [0.0, (3.0f32).ln()];
        let ids = draw(Sampling { temperature: 1.0, ..Default::default() }, &logits, 4000);
        let ones = ids.iter().filter(|&&i| i == 1).count() as f64 / 4000.0;
        assert!((ones - 0.75).abs() < 0.03, "{ones}");
    }

    #[test]
    fn filters_keep_what_they_promise() {
        let logits = [(0.5f32).ln(), (0.3f32).ln(), (0.15f32).ln(), (0.05f32).ln()];
        let base = Sampling { temperature: 1.0, ..Default::default() };
        for (settings, last) in [
            (Sampling { top_k: 2, ..base.clone() }, 1),
            (Sampling { top_p: 0.79, ..base.clone() }, 1),
            (Sampling { min_p: 0.25, ..base.clone() }, 2),
            (Sampling { top_k: 1, ..base.clone() }, 0),
        ] {
            assert_eq!(draw(settings.clone(), &logits, 500).last(), Some(&last), "{settings:?}");
        }
    }

    #[test]
    fn the_penalty_turns_away_from_seen_tokens() {
        let settings = Sampling { repetition_penalty: 2.0, ..Default::default() };
        assert_eq!(Sampler::new(settings.clone()).sample(&mut [3.0, 2.0], &[0]).unwrap(), 1);
        assert_eq!(Sampler::new(settings).sample(&mut [-1.0, -1.5], &[0]).unwrap(), 1);
    }

    #[test]
    fn settings_out_of_range_name_themselves_and_the_range() {
        let none = Sampling::default();
        for (settings, what) in [
            (Sampling { temperature: -1.0, ..none.clone() }, "`0 <= temperature <= 100`, got `-1`"),
            (Sampling { temperature: f32::NAN, ..none.clone() }, "got `NaN`"),
            (Sampling { top_p: 1.5, ..none.clone() }, "`0 < top-p <= 1`, got `1.5`"),
            (Sampling { top_p: 0.0, ..none.clone() }, "`0 < top-p <= 1`, got `0`"),
            (Sampling { min_p: 2.0, ..none.clone() }, "`0 <= min-p <= 1`, got `2`"),
            (
                Sampling { dry: Dry { multiplier: -1.0, ..Dry::OFF }, ..none.clone() },
                "dry-multiplier <= 100`, got `-1`",
            ),
            (Sampling { dry: Dry { base: 0.5, ..Dry::GUARD }, ..none.clone() }, "`1 <= dry-base <= 100`, got `0.5`"),
            (Sampling { repetition_penalty: 0.0, ..none.clone() }, "`0.01 <= repetition-penalty <= 100`, got `0`"),
        ] {
            let error = settings.validate().unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
        none.validate().unwrap();
    }

    #[test]
    fn broken_logits_are_errors_and_masked_ones_are_not_chosen() {
        const NONE: f32 = f32::NEG_INFINITY;
        let hot = Sampling { temperature: 50.0, repetition_penalty: 1.3, ..Default::default() };
        for (settings, seen) in [(Sampling::default(), vec![]), (hot, vec![0, 1, 2])] {
            let sample = |logits: &[f32]| {
                let code = |e: Error| e.code();
                Sampler::new(settings.clone()).sample(&mut logits.to_vec(), &seen).map_err(code)
            };
            assert_eq!(sample(&[f32::NAN, 0.0]), Err(ErrorCode::Diverged));
            assert_eq!(sample(&[0.0, f32::INFINITY]), Err(ErrorCode::Diverged));
            assert_eq!(sample(&[NONE, NONE]), Err(ErrorCode::Config));
            assert_eq!(sample(&[NONE, -3e30, NONE]), Ok(1));
        }
        for k in [0, 3] {
            let even = Sampling { temperature: 1.0, top_k: k, ..Default::default() };
            assert!(draw(even, &[0.0, NONE, 0.0], 200).iter().all(|&id| id != 1));
        }
    }

    #[test]
    fn filters_mask_and_bias_and_a_broken_one_is_told() {
        let sample = |filters: &mut [&mut dyn LogitFilter]| {
            let mut sampler = Sampler::new(Sampling::default());
            sampler.sample_filtered(&mut [3.0, 2.0, 1.0], &[], filters)
        };
        let (mut without, mut more) = (TokenBias::new([(0, f32::NEG_INFINITY), (99, 1.0)]), TokenBias::new([(2, 1.5)]));
        assert_eq!(sample(&mut []).unwrap(), 0);
        assert_eq!(sample(&mut [&mut without]).unwrap(), 1);
        assert_eq!(sample(&mut [&mut without, &mut more]).unwrap(), 2);
        let error = sample(&mut [&mut TokenBias::new([(1, f32::NAN)])]).unwrap_err();
        assert_eq!((error.code(), error.item()), (ErrorCode::Config, "token 1"));
    }
}
