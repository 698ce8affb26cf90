//! What a run made of the model, in numbers that people understand.

use super::Dataset;
use super::auto::few;
use serde::Serialize;

/// Samples that are asked of what was learned, and their tokens: a matter of seconds.
const ASKED: usize = 24;
const ASKED_TOKENS: usize = 2048;

/// Share of the loss that has to go for something to be learned.
const SOME: f64 = 0.1;
/// Share of the loss, of one nat at least, by which it has to rise for a run to have done harm.
const WORSE: f64 = 0.02;
/// Share of right answers above which a model knew them.
const KNEW: f64 = 0.9;

/// How well a model knows answers or texts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Recall {
    /// Answers or texts that were looked at.
    pub asked: usize,
    /// Those that the model gives word for word when it always says what is likeliest.
    pub right: usize,
    /// Learned tokens in them.
    pub tokens: usize,
    /// Mean loss of these tokens (natural log).
    pub loss: f64,
}

impl Recall {
    /// `exp` of the loss.
    #[must_use]
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

/// What a model knew before a run, and knows after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Change {
    /// Before the first step.
    pub before: Recall,
    /// With the adapter that was written.
    pub after: Recall,
}

impl Change {
    /// Whether the run made next to no difference.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        let Self { before, after } = self;
        after.right <= before.right && (after.loss > before.loss * (1.0 - SOME) || !after.loss.is_finite())
    }

    /// Whether the run made the model worse at it: its steps were too large.
    #[must_use]
    pub fn is_worse(&self) -> bool {
        let Self { before, after } = self;
        let most = before.loss + WORSE * before.loss.max(1.0);
        after.right <= before.right && (after.loss > most || !after.loss.is_finite())
    }

    /// Whether there was next to nothing to learn.
    #[must_use]
    pub fn was_known(&self) -> bool {
        self.before.asked > 0 && self.before.right as f64 >= KNEW * self.before.asked as f64
    }
}

/// What a run taught, on some of what it learned from and on other wordings or what was held out.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Learned {
    /// Whether these are answers to questions; texts otherwise.
    pub answers: bool,
    /// On what was learned.
    pub taught: Change,
    /// On what the run watched and did not learn.
    pub watched: Option<Change>,
}

impl Learned {
    /// Some of `data`, to be asked about before and after a run.
    #[must_use]
    pub fn sample(data: &Dataset, seed: u64) -> Dataset {
        few(data, ASKED, ASKED_TOKENS, seed)
    }

    /// One line.
    #[must_use]
    pub fn text(&self) -> String {
        let one = |change: &Change| {
            let Change { before, after } = change;
            if self.answers {
                format!("{} of {} word for word ({} before)", after.right, after.asked, before.right)
            } else {
                format!("perplexity {:.1} ({:.1} before)", after.perplexity(), before.perplexity())
            }
        };
        let what = if self.answers { "answers" } else { "texts" };
        let mut text = format!("learned: {what}: {}", one(&self.taught));
        if let Some(watched) = &self.watched {
            let what = if self.answers { "not trained in these words" } else { "not trained" };
            text += &format!("; {what}: {}", one(watched));
        }
        text
    }

    /// Whether next to nothing was learned: of answers, also where none is right and what was watched got no likelier.
    fn is_nothing(&self) -> bool {
        let none_right = self.answers && self.taught.after.right == 0;
        let no_likelier = |watched: &Change| watched.after.right == 0 && watched.after.loss >= watched.before.loss;
        self.taught.is_nothing() || none_right && self.watched.as_ref().is_some_and(no_likelier)
    }

    /// What is to be said where nothing was learned.
    #[must_use]
    pub fn warning(&self) -> Option<&'static str> {
        if self.taught.is_worse() {
            return Some(
                "the model knows less of what was to be learned than before: the learning rate was too high; train with a \
                 lower `--lr`, or leave it out so that it is chosen",
            );
        }
        if self.answers && self.taught.was_known() {
            return Some("the model knew nearly all of these answers before; there was next to nothing to learn");
        }
        self.is_nothing().then_some(
            "the adapter learned next to nothing: train longer (`--epochs`, `--time`) or with a higher `--lr`, leave out \
             settings that were given so that they are chosen, or look at what is learned with `train --dry-run`",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_that_was_learned_is_called_so() {
        let known = |right, loss| Recall { asked: 20, right, tokens: 100, loss };
        for (before, after, nothing, knew) in [
            (known(0, 3.0), known(0, 2.9), true, false),
            (known(0, 3.0), known(0, 1.0), false, false),
            (known(0, 3.0), known(9, 2.9), false, false),
            (known(0, 3.0), known(0, f64::NAN), true, false),
            (known(19, 0.1), known(19, 0.1), true, true),
        ] {
            let change = Change { before, after };
            assert_eq!((change.is_nothing(), change.was_known()), (nothing, knew), "{change:?}");
            let told = Learned { answers: true, taught: change, watched: None };
            assert_eq!(told.warning().is_some(), nothing || knew);
            assert!(told.text().contains(&format!("{} of 20 word for word", after.right)));
        }
    }

    #[test]
    fn a_warning_gives_the_advice_that_helps() {
        let change = |before, after, right| Change {
            before: Recall { asked: 20, right: 0, tokens: 100, loss: before },
            after: Recall { asked: 20, right, tokens: 100, loss: after },
        };
        let told =
            |answers, taught, watched| Learned { answers, taught, watched: Some(watched) }.warning().unwrap_or("");
        // One step: the answers are a little likelier, and what is held out is not.
        let short = change(2.5, 2.1, 0);
        assert!(told(true, short, change(2.212, 2.219, 0)).contains("higher `--lr`"));
        // Texts are learned without being said word for word, and so are answers that others profit from.
        assert_eq!(told(false, short, change(2.212, 2.219, 0)), "");
        assert_eq!(told(true, short, change(2.2, 1.9, 0)), "");
        assert_eq!(told(true, change(2.5, 0.5, 15), change(2.2, 2.3, 0)), "");
        for loss in [9.0, f64::NAN, f64::INFINITY] {
            let said = told(true, change(2.5, loss, 0), change(2.2, loss, 0));
            assert!(said.contains("lower `--lr`") && !said.contains("higher"), "{loss}: {said}");
        }
    }
}
