//! Orthogonal matrices of skew ones, by Cayley: `M = (1 - S)^-1 (1 + S) = 2 (1 - S)^-1 - 1`, or by the series of that, and how
//! gradients go back.

use super::made::Map;
use super::square::{Square, inverse};
use super::weight::LayerWeight;
use crate::error::Result;
use rayon::prelude::*;

/// The matrices `M`.
pub(super) struct Rotations {
    /// Columns of a block.
    pub size: usize,
    /// Terms of the series, where it is used.
    pub series: Option<usize>,
    /// Bound on the norm of each `S`.
    pub bound: Option<f64>,
}

impl Rotations {
    /// Places of the upper triangle, row by row.
    fn places(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let n = self.size;
        (0..n).flat_map(move |i| (i + 1..n).map(move |j| (i, j)))
    }

    /// Factor that brings `triangle` into the bound.
    fn factor(&self, triangle: &[f32]) -> f64 {
        let norm = (2.0 * triangle.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>()).sqrt();
        self.bound.filter(|bound| norm > *bound).map_or(1.0, |bound| bound / norm)
    }

    fn skew(&self, triangle: &[f32]) -> Square {
        let (mut s, factor) = (Square::zeros(self.size), self.factor(triangle));
        for ((i, j), v) in self.places().zip(triangle) {
            s[(i, j)] = f64::from(*v) * factor;
            s[(j, i)] = -f64::from(*v) * factor;
        }
        s
    }

    fn triangle(&self) -> usize {
        self.size * (self.size - 1) / 2
    }

    /// The factors of `Q`, `Q²` and so on.
    fn coefficients(terms: usize) -> impl DoubleEndedIterator<Item = f64> + ExactSizeIterator {
        (1..terms).map(move |k| if k + 1 < terms { 2.0 } else { 1.0 })
    }
}

impl Rotations {
    /// `M` of one block.
    fn rotation(&self, triangle: &[f32]) -> Square {
        let (s, one) = (self.skew(triangle), Square::one(self.size));
        let Some(terms) = self.series else {
            return inverse(&one.clone().plus(-1.0, &s)).scaled(2.0).plus(-1.0, &one);
        };
        let q = s.scaled(-1.0);
        let (mut power, mut m) = (one.clone(), one);
        for (k, factor) in Self::coefficients(terms).enumerate() {
            power = if k == 0 { q.clone() } else { power.times(&q) };
            m = m.plus(factor, &power);
        }
        m
    }

    /// The gradient of one block's triangle, given that of its `M`.
    fn pull(&self, triangle: &[f32], grad: &[f32]) -> Vec<f32> {
        let (s, dm) = (self.skew(triangle), Square::of(self.size, grad));
        let ds = match self.series {
            // M = 2 X - 1 with X = (1 - S)^-1, so dS = Xᵀ (2 dM) Xᵀ.
            None => {
                let x = inverse(&Square::one(self.size).plus(-1.0, &s)).transposed();
                x.times(&dm).times(&x).scaled(2.0)
            }
            Some(terms) => {
                let q = s.scaled(-1.0);
                let mut powers = vec![q.clone()];
                for k in 2..terms.saturating_sub(1) {
                    powers.push(powers[k - 2].times(&q));
                }
                let (turned, mut dq, mut dpower) = (q.transposed(), Square::zeros(self.size), Square::zeros(self.size));
                for (k, factor) in (1..terms).zip(Self::coefficients(terms)).rev() {
                    // P_k = P_{k-1} Q, and P_0 = 1
                    dpower = dpower.plus(factor, &dm);
                    if k == 1 {
                        dq = dq.plus(1.0, &dpower);
                    } else {
                        dq = dq.plus(1.0, &powers[k - 2].transposed().times(&dpower));
                        dpower = dpower.times(&turned);
                    }
                }
                dq.scaled(-1.0)
            }
        };
        self.places().map(|(i, j)| (ds[(i, j)] - ds[(j, i)]) as f32).collect()
    }
}

// Blocks are apart from each other, so that the threads on which they are computed change nothing.
impl Map for Rotations {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let one =
            |triangle: &[f32]| -> Vec<f32> { self.rotation(triangle).values().iter().map(|v| *v as f32).collect() };
        let all: Vec<Vec<f32>> = own[0].par_chunks(self.triangle().max(1)).map(one).collect();
        Ok(vec![all.concat()])
    }

    /// What the bound took away is taken away from the tensor itself: no gradient goes through it.
    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let blocks = own[0].par_chunks(self.triangle().max(1)).zip(grads[0].par_chunks(self.size * self.size));
        let all: Vec<Vec<f32>> = blocks.map(|(triangle, grad)| self.pull(triangle, grad)).collect();
        vec![all.concat()]
    }

    fn settled(&self, own: &[&[f32]]) -> Option<(usize, Vec<f32>)> {
        self.bound?;
        let bounded = own[0].chunks(self.triangle().max(1)).flat_map(|triangle| {
            let factor = self.factor(triangle);
            triangle.iter().map(move |v| (f64::from(*v) * factor) as f32)
        });
        Some((0, bounded.collect()))
    }
}
