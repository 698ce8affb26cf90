//! What rows of logits are to predict.

/// For each of `N` rows one token, or a distribution over some tokens and the rest of the vocabulary as a whole.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// One token of each row, or `[N, K]` tokens; those of a row that have a share are distinct.
    pub ids: &'a [u32],
    /// The probabilities `p` `[N, K]` of these tokens, which sum to at most 1 in a row; empty where each row has one token.
    /// A token of probability 0 counts with the rest.
    ///
    /// With the probabilities `q` of a row's logits, what is left `p_rest = 1 - sum p`, and `q_rest` the sum of `q` over all
    /// other tokens, the row's loss is the divergence of the two distributions with that rest as one event,
    /// `sum p log(p / q) + p_rest log(p_rest / q_rest)`, in nats. It is zero, and so is its gradient, where `q` agrees. A
    /// `p_rest` below [`Targets::LEAST_REST`] counts as none. Where `q_rest` has fallen below a sixteenth of `p_rest`, the
    /// last logarithm goes on as the tangent there: its slope in 16 bits would be that of rounding errors.
    pub shares: &'a [f32],
}

impl<'a> Targets<'a> {
    /// What less of `p_rest` is no event of its own.
    pub const LEAST_REST: f32 = 1e-3;

    /// One token a row.
    #[must_use]
    pub fn of(ids: &'a [u32]) -> Self {
        Self { ids, shares: &[] }
    }

    /// Tokens of each of `rows` rows.
    pub(crate) fn width(&self, rows: usize) -> usize {
        self.ids.len().checked_div(rows).unwrap_or(1).max(1)
    }

    /// Asserts what is said above of `rows` rows and a vocabulary of `vocab`.
    pub(crate) fn check(&self, rows: usize, vocab: usize) {
        let Self { ids, shares } = self;
        let whole = ids.len() == rows * self.width(rows);
        assert!(whole && (shares.len() == ids.len() || shares.is_empty() && ids.len() == rows));
        assert!(ids.iter().all(|id| (*id as usize) < vocab), "target beyond the `{vocab}` tokens");
    }
}
