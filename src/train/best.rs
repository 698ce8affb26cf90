//! Which of the adapters that a run passes through becomes its result.
//!
//! After every evaluation the adapter is a candidate. One that is kept lies in a folder of its own in the output folder,
//! as a whole PEFT adapter, until a better one replaces it; at the end it becomes the result. What was found is part of
//! a checkpoint. A resumed run may find a candidate of a later step than its own on the disk: it comes by that step again
//! and writes the same bytes.

use super::Known;
use serde::{Deserialize, Serialize};

/// Folder of the candidate that is kept, in the output folder.
pub(super) const FOLDER: &str = "best";

/// A step and what the evaluation after it found.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Steps done.
    pub step: u64,
    /// Mean loss on the held-out data, if there is any.
    pub loss: Option<f64>,
    /// Mean loss on the general text, if it is watched.
    #[serde(default)]
    pub general: Option<f64>,
    /// General questions that were answered rightly, if they were asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known: Option<Known>,
}

/// What is asked of a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Rule {
    /// Keep the one with the lowest held-out loss.
    pub lowest: bool,
    /// Keep the last one that passes a check; with `lowest`, the lowest of those that pass.
    pub must_pass: bool,
}

impl Rule {
    /// Whether candidates are kept at all.
    #[must_use]
    pub fn keeps(self) -> bool {
        self.lowest || self.must_pass
    }
}

/// What the evaluations of a run have found so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Candidates {
    /// Step of the last evaluation.
    pub evaluated: u64,
    /// Lowest held-out loss, or the last that was lower by enough.
    lowest: Option<f64>,
    /// Evaluations since it fell last.
    stale: u64,
    /// The candidate on the disk.
    pub kept: Option<Candidate>,
}

impl Candidates {
    /// Takes note of a candidate that passed a check, or had none to pass, if `passes`. Returns whether it is to be kept;
    /// the caller sets [`Candidates::kept`] once it lies on the disk. For patience, a loss counts as lower if it is by more
    /// than `least`.
    pub fn judge(&mut self, candidate: Candidate, passes: bool, rule: Rule, least: f64) -> bool {
        let below = |old: Option<f64>| candidate.loss.is_some_and(|new| old.is_none_or(|old| new < old));
        self.evaluated = candidate.step;
        if below(self.lowest.map(|old| old - least)) {
            (self.lowest, self.stale) = (candidate.loss, 0);
        } else if candidate.loss.is_some() {
            self.stale += 1;
        }
        match rule {
            Rule { must_pass: true, .. } if !passes => false,
            Rule { lowest: true, .. } => below(self.kept.and_then(|kept| kept.loss)),
            Rule { must_pass, .. } => must_pass,
        }
    }

    /// Whether the held-out loss has not fallen for `patience` evaluations; never for 0.
    #[must_use]
    pub fn exhausted(&self, patience: u64) -> bool {
        patience > 0 && self.stale >= patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps whose candidates are kept, and whether patience has run out, for losses and results of a check.
    fn run(rule: Rule, patience: u64, found: &[(f64, bool)]) -> (Vec<u64>, Vec<bool>) {
        run_by(0.0, rule, patience, found)
    }

    fn run_by(least: f64, rule: Rule, patience: u64, found: &[(f64, bool)]) -> (Vec<u64>, Vec<bool>) {
        let mut candidates = Candidates::default();
        let (mut kept, mut exhausted) = (Vec::new(), Vec::new());
        for (step, &(loss, passes)) in (1..).zip(found) {
            let candidate = Candidate { step, loss: Some(loss), general: None, known: None };
            if candidates.judge(candidate, passes, rule, least) {
                candidates.kept = Some(candidate);
                kept.push(step);
            }
            exhausted.push(candidates.exhausted(patience));
        }
        (kept, exhausted)
    }

    #[test]
    fn the_lowest_or_the_last_that_passes_is_kept() {
        let found = [(3.0, true), (2.0, false), (2.5, true), (f64::NAN, true), (2.4, true), (9.0, false)];
        for (rule, kept) in [
            (Rule::default(), vec![]),
            (Rule { lowest: true, must_pass: false }, vec![1, 2]),
            (Rule { lowest: false, must_pass: true }, vec![1, 3, 4, 5]),
            (Rule { lowest: true, must_pass: true }, vec![1, 3, 5]),
        ] {
            assert_eq!(run(rule, 0, &found).0, kept, "{rule:?}");
        }
    }

    #[test]
    fn patience_counts_evaluations_without_a_lower_loss() {
        let found = [(3.0, true), (3.0, true), (2.0, true), (2.1, true), (2.2, true)];
        assert_eq!(run(Rule::default(), 2, &found).1, [false, false, false, false, true]);
        assert_eq!(run(Rule::default(), 0, &found).1, [false; 5]);
        // A loss that creeps down is kept, and patience with it ends.
        let creeping = [(3.0, true), (2.0, true), (1.99, true), (1.98, true)];
        let lowest = Rule { lowest: true, must_pass: false };
        assert_eq!(run_by(0.05, lowest, 2, &creeping), (vec![1, 2, 3, 4], vec![false, false, false, true]));
    }
}
