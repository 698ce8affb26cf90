//! A figure of several trials.

use serde::Serialize;

/// What trials of one thing gave. All values are rates: more is better.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// The middle one, or the mean of the middle two.
    pub median: f64,
    /// The highest: what the machine does when nothing disturbs it.
    pub best: f64,
    /// Highest less lowest, as a fraction of the median.
    pub spread: f64,
    /// All, in the order in which they were taken.
    pub trials: Vec<f64>,
}

impl Figure {
    /// Of at least one trial.
    #[must_use]
    pub fn new(trials: Vec<f64>) -> Self {
        let mut sorted = trials.clone();
        sorted.sort_by(f64::total_cmp);
        let (lowest, best) = (sorted.first().copied().unwrap_or(0.0), sorted.last().copied().unwrap_or(0.0));
        let median = median(&sorted);
        Self { median, best, spread: if median > 0.0 { (best - lowest) / median } else { 0.0 }, trials }
    }

    /// The same trials in another unit.
    #[must_use]
    pub fn times(&self, factor: f64) -> Self {
        Self::new(self.trials.iter().map(|x| x * factor).collect())
    }

    /// Median of the ratios of trials that were taken in turn: a change of the machine's speed between two pairs does
    /// not touch it.
    #[must_use]
    pub fn ratio(&self, other: &Self) -> f64 {
        let mut ratios: Vec<f64> = self.trials.iter().zip(&other.trials).map(|(a, b)| a / b).collect();
        ratios.sort_by(f64::total_cmp);
        median(&ratios)
    }
}

fn median(sorted: &[f64]) -> f64 {
    let n = sorted.len();
    match n {
        0 => 0.0,
        _ => (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::Figure;

    #[test]
    fn a_figure_sums_up_its_trials() {
        let even = Figure::new(vec![4.0, 1.0, 2.0, 3.0]);
        assert_eq!((even.median, even.best, even.spread), (2.5, 4.0, 1.2));
        let odd = Figure::new(vec![2.0, 8.0, 4.0]);
        assert_eq!((odd.median, odd.best), (4.0, 8.0));
        assert_eq!(odd.times(0.5).median, 2.0);
        // In pairs 2, 2, 4: the slow last pair does not move the middle one.
        assert_eq!(odd.ratio(&Figure::new(vec![1.0, 4.0, 1.0])), 2.0);
    }
}
