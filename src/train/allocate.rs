//! AdaLoRA's budget (Zhang et al. 2023): singular values that matter least are set to zero, so that over a run the ranks of all
//! modules together fall from what they begin with to a target. After each step every trained value has a sensitivity, `|p
//! dp|`; smoothed, times how much it varies, that is its importance. A singular value's is its own and the means of its row
//! of A and its column of B. The budget stays for `tinit` steps, falls with a cube, and has its target for the last `tfinal`.
//!
//! Or it grows (`grow-ranks`), as in IncreLoRA (Zhang et al. 2023): each module begins with one rank, and from step `tinit` on
//! those whose ranks matter most on average get one more at a time, until there are `target_r` for each on average at the step
//! before the last `tfinal`. What is not there yet has a singular value of zero; it has moments, so that it learns at once when
//! its time comes.

use super::trained::Trained;
use crate::adapter::{Adapters, Budget, Gradients};
use crate::base::Base;
use crate::error::{Error, Result};
use pocketlora_kernels::Backend;

/// Names of the state in a checkpoint.
pub(super) const PARTS: [&str; 2] = ["importance", "uncertainty"];

/// The state of a budget.
pub(super) struct Allocator {
    budget: Budget,
    total: u64,
    /// Whether the budget grows.
    grows: bool,
    /// Ranks of each module so far, where it does.
    pub counts: Vec<usize>,
    /// Of each trained tensor, smoothed: its sensitivity, and how much that varies.
    pub state: Vec<[Vec<f32>; 2]>,
}

impl Allocator {
    /// For a run of `total` steps that trains tensors of `lens` values, with a budget that falls or grows.
    pub fn new(budget: Budget, grows: bool, total: u64, lens: impl Iterator<Item = usize>) -> Self {
        let state = lens.map(|len| [vec![0.0; len], vec![0.0; len]]).collect();
        Self { budget, total, grows, counts: Vec::new(), state }
    }

    /// Of `modules` modules together, how many ranks there are after step `step` (0-based) of a budget that grows.
    fn grown(&self, step: u64, modules: usize) -> usize {
        let Budget { target, tinit, .. } = self.budget;
        let done = step.saturating_sub(tinit) as f64 / (self.end() - tinit) as f64;
        modules + ((target - 1) as f64 * modules as f64 * done.min(1.0)) as usize
    }

    /// The step that makes the last choice; what it keeps is kept from then on.
    fn end(&self) -> u64 {
        self.total.saturating_sub(self.budget.tfinal)
    }

    /// Refuses a schedule without a step between its beginning and its end.
    ///
    /// # Errors
    /// It has none.
    pub fn check(&self) -> Result<()> {
        if self.budget.tinit < self.end() {
            return Ok(());
        }
        let Budget { tinit, tfinal, .. } = self.budget;
        let expected = format!("`tinit` and `tfinal` that leave some of the run's {} steps to the budget", self.total);
        Err(Error::config("options", expected, format!("tinit={tinit}, tfinal={tfinal}")))
    }

    /// Of `ranks` in all modules together, how many step `step` (0-based) keeps; none where it changes nothing.
    fn keeps(&self, step: u64, ranks: usize, modules: usize) -> Option<usize> {
        let Budget { target, tinit, every, .. } = self.budget;
        let (target, end) = ((target * modules).min(ranks), self.end());
        if step >= end {
            return Some(target);
        }
        if step <= tinit || !step.is_multiple_of(every.max(1)) {
            return None;
        }
        let left = 1.0 - (step - tinit) as f64 / (end - tinit) as f64;
        Some(((ranks - target) as f64 * left.powi(3) + target as f64) as usize)
    }

    /// Takes note of step `step` (0-based), and sets singular values to zero as the budget asks for.
    pub fn step<B: Backend>(
        &mut self,
        step: u64,
        base: &Base<B>,
        adapters: &mut Adapters<B>,
        grads: &mut Gradients<B>,
        tensors: &[Trained<B>],
    ) -> Result<()> {
        let backend = &base.backend;
        let values = |t: &Trained<B>, adapters: &Adapters<B>| adapters.held().read(backend, t.id);
        if step < self.end() {
            for (t, [importance, uncertainty]) in tensors.iter().zip(&mut self.state) {
                let own = values(t, adapters)?;
                let mut grad = vec![0.0; own.len()];
                backend.read(grads.of(t.id).expect("what is trained has a gradient"), &mut grad)?;
                let (beta1, beta2) = (self.budget.beta1, self.budget.beta2);
                for (((p, g), mean), varies) in own.iter().zip(&grad).zip(importance).zip(uncertainty) {
                    let sensitivity = (p * g).abs();
                    *mean = beta1 * *mean + (1.0 - beta1) * sensitivity;
                    *varies = beta2 * *varies + (1.0 - beta2) * (sensitivity - *mean).abs();
                }
            }
        }
        let triples = triples(tensors);
        if self.grows {
            return self.grow(step, base, adapters, tensors, &triples);
        }
        let ranks: usize = triples.iter().map(|[.., e]| tensors[*e].spec.values()).sum();
        let Some(kept) = self.keeps(step, ranks, triples.len()) else { return Ok(()) };
        let scores: Vec<Vec<f32>> = triples.iter().map(|triple| self.scores(*triple, tensors)).collect();
        let bound = bound(&scores, ranks - kept);
        for ([.., e], scores) in triples.iter().zip(&scores) {
            let t = &tensors[*e];
            let mut own = values(t, adapters)?;
            let dropped: Vec<bool> = match step > self.end() {
                // The choice was made: what the optimizer has moved since is zero again.
                true => self.state[*e][0].iter().map(|mark| *mark < 0.0).collect(),
                false => scores.iter().map(|score| bound.is_some_and(|bound| *score <= bound)).collect(),
            };
            if step == self.end() {
                // Importances are not needed any more; their sign remembers the choice.
                self.state[*e][0] = dropped.iter().map(|dropped| if *dropped { -1.0 } else { 1.0 }).collect();
            }
            own.iter_mut().zip(&dropped).filter(|(_, dropped)| **dropped).for_each(|(e, _)| *e = 0.0);
            adapters.held_mut().update(backend, t.id, &mut |buffer| backend.write(buffer, &own));
        }
        Ok(())
    }

    /// Gives ranks to the modules that matter most, as step `step` asks for, and keeps the others at zero.
    fn grow<B: Backend>(
        &mut self,
        step: u64,
        base: &Base<B>,
        adapters: &mut Adapters<B>,
        tensors: &[Trained<B>],
        triples: &[[usize; 3]],
    ) -> Result<()> {
        self.counts.resize(triples.len(), 1);
        if step >= self.end() || step.is_multiple_of(self.budget.every.max(1)) {
            let scores = triples.iter().map(|triple| self.scores(*triple, tensors));
            let means: Vec<f32> = scores
                .zip(&self.counts)
                .map(|(scores, count)| scores[..*count].iter().sum::<f32>() / *count as f32)
                .collect();
            let most: Vec<usize> = triples.iter().map(|[.., e]| tensors[*e].spec.values()).collect();
            let total = self.grown(step, triples.len());
            add_ranks(&mut self.counts, &means, &most, total);
        }
        for ([.., e], count) in triples.iter().zip(&self.counts) {
            let t = &tensors[*e];
            let mut own = adapters.held().read(&base.backend, t.id)?;
            own[*count..].fill(0.0);
            adapters.held_mut().update(&base.backend, t.id, &mut |buffer| base.backend.write(buffer, &own));
        }
        Ok(())
    }

    /// The importance of each singular value of a module.
    fn scores<B: Backend>(&self, [a, b, e]: [usize; 3], tensors: &[Trained<B>]) -> Vec<f32> {
        let score = |i: usize, at: usize| self.state[i][0][at] * self.state[i][1][at];
        let rank = tensors[e].spec.values();
        let (input, out) = (tensors[a].spec.shape[1], tensors[b].spec.shape[0]);
        let one = |k: usize| {
            let row = (0..input).map(|j| score(a, k * input + j)).sum::<f32>() / input as f32;
            let column = (0..out).map(|j| score(b, j * rank + k)).sum::<f32>() / out as f32;
            score(e, k) + row + column
        };
        (0..rank).map(one).collect()
    }
}

/// The places of A, B and the singular values of each module.
fn triples<B: Backend>(tensors: &[Trained<B>]) -> Vec<[usize; 3]> {
    let find = |name: String| tensors.iter().position(|t| t.spec.name == name);
    let modules = tensors.iter().filter_map(|t| t.spec.name.strip_suffix(".lora_E"));
    modules
        .filter_map(|module| {
            let [a, b, e] = ["lora_A", "lora_B", "lora_E"].map(|part| find(format!("{module}.{part}")));
            Some([a?, b?, e?])
        })
        .collect()
}

/// Gives one rank after the other to modules with `counts` of them, of which each may have its `most`, until there are `total`:
/// first one to each in the order of the scores, then a second one, and so on.
fn add_ranks(counts: &mut [usize], scores: &[f32], most: &[usize], total: usize) {
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_by(|i, j| scores[*j].total_cmp(&scores[*i]));
    let mut there: usize = counts.iter().sum();
    while there < total {
        let before = there;
        for i in &order {
            if there < total && counts[*i] < most[*i] {
                counts[*i] += 1;
                there += 1;
            }
        }
        if there == before {
            break;
        }
    }
}

/// The largest of the `count` smallest scores.
fn bound(scores: &[Vec<f32>], count: usize) -> Option<f32> {
    let mut all: Vec<f32> = scores.iter().flatten().copied().collect();
    all.sort_unstable_by(f32::total_cmp);
    all.get(count.checked_sub(1)?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PEFT's `RankAllocator.budget_schedule`, worked out by hand for 6 modules of rank 6 that are to keep 3 each.
    #[test]
    fn the_budget_falls_with_a_cube() {
        let budget = Budget { target: 3, tinit: 2, tfinal: 4, every: 1, beta1: 0.85, beta2: 0.85 };
        let allocator = Allocator::new(budget, false, 12, [].into_iter());
        let kept: Vec<Option<usize>> = (0..12).map(|step| allocator.keeps(step, 36, 6)).collect();
        let falling = [3, 4, 5, 6, 7].map(|step: u64| {
            let left = 1.0 - (step - 2) as f64 / 6.0;
            Some((18.0 * left * left * left + 18.0) as usize)
        });
        let expected = [None, None, None].into_iter().chain(falling).chain([Some(18); 4]).collect::<Vec<_>>();
        assert_eq!(kept, expected);
        assert_eq!(falling, [Some(28), Some(23), Some(20), Some(18), Some(18)]);
        assert_eq!(bound(&[vec![3.0, 1.0], vec![2.0]], 2), Some(2.0));
        assert_eq!(bound(&[vec![3.0, 1.0]], 0), None);
    }

    #[test]
    fn a_budget_grows_where_it_matters() {
        let budget = Budget { target: 3, tinit: 2, tfinal: 4, every: 1, beta1: 0.85, beta2: 0.85 };
        let allocator = Allocator::new(budget, true, 12, [].into_iter());
        let grown: Vec<usize> = (0..12).map(|step| allocator.grown(step, 6)).collect();
        assert_eq!(grown, [6, 6, 6, 8, 10, 12, 14, 16, 18, 18, 18, 18]);
        for (counts, total, expected) in [
            ([1, 1, 1], 4, [1, 2, 1]),
            ([1, 1, 1], 5, [1, 2, 2]),
            ([1, 2, 1], 7, [2, 3, 2]),
            // The second may have three alone.
            ([1, 3, 1], 8, [2, 3, 3]),
            ([4, 3, 4], 99, [4, 3, 4]),
        ] {
            let mut found = counts;
            add_ranks(&mut found, &[0.1, 0.9, 0.5], &[4, 3, 4], total);
            assert_eq!(found, expected, "{counts:?} to {total}");
        }
    }
}
