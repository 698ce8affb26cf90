//! The loss of one row against a distribution over some tokens and the rest, and its gradient by the logits: see
//! [`crate::Targets`] for the formula.
//!
//! With `f = p_rest / 16` as the least `q_rest` of which the logarithm is taken and `slope = p_rest / max(q_rest, f)`, the
//! gradient by logit `l_v` is `common q_v` for every token, and `own_k = slope q_k - p_k` more for a token of the target:
//! `common = sum p + slope q_rest - slope`.

use crate::Targets;

/// The slope of the rest's logarithm is at most so many times that of a rest that agrees.
const STEEPEST: f64 = 16.0;

/// The loss and the factor `common`; `own` (which held the logits of the target's tokens) becomes the rest of the gradient.
/// `max` and `sum` are those of the row's softmax: `sum = sum_v e^(l_v - max)`.
pub(super) fn row(shares: &[f32], own: &mut [f32], max: f32, sum: f64) -> (f64, f64) {
    let share = shares.iter().map(|p| f64::from(*p)).sum::<f64>();
    let rest = Some(1.0 - share).filter(|rest| *rest >= f64::from(Targets::LEAST_REST)).unwrap_or(0.0);
    let logarithm = sum.ln() + f64::from(max);
    let likelihood = |l: f32| f64::from(l) - logarithm;
    let told_apart = own.iter().zip(shares).filter(|(_, p)| **p > 0.0);
    let q_rest = 1.0 - told_apart.map(|(l, _)| likelihood(*l).exp()).sum::<f64>();
    let least = rest / STEEPEST;
    let slope = if rest > 0.0 { rest / q_rest.max(least) } else { 0.0 };
    let mut loss = 0.0;
    for (own, p) in own.iter_mut().zip(shares) {
        let (log_q, p) = (likelihood(*own), f64::from(*p));
        if p > 0.0 {
            loss += p * (p.ln() - log_q);
            *own = (slope * log_q.exp() - p) as f32;
        } else {
            *own = 0.0;
        }
    }
    if rest > 0.0 {
        let below = (q_rest - least).min(0.0) / least;
        loss += rest * ((rest / q_rest.max(least)).ln() - below);
    }
    (loss, share + slope * q_rest - slope)
}
