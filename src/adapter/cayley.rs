//! Orthogonal matrices of skew ones, by Cayley: `M = (1 - S)^-1 (1 + S) = 2 (1 - S)^-1 - 1`, or by the series of that, and how
//! gradients go back.

use super::made::Map;
use super::square::{Square, inverse};
use super::weight::LayerWeight;
use crate::error::Result;

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

impl Map for Rotations {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let mut all = Vec::new();
        for triangle in own[0].chunks(self.triangle().max(1)) {
            let s = self.skew(triangle);
            let m = match self.series {
                None => inverse(&Square::one(self.size).plus(-1.0, &s)).scaled(2.0).plus(-1.0, &Square::one(self.size)),
                Some(terms) => {
                    let (q, mut power, mut m) = (s.scaled(-1.0), Square::one(self.size), Square::one(self.size));
                    for factor in Self::coefficients(terms) {
                        power = power.times(&q);
                        m = m.plus(factor, &power);
                    }
                    m
                }
            };
            all.extend(m.values().iter().map(|v| *v as f32));
        }
        Ok(vec![all])
    }

    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let mut all = Vec::with_capacity(own[0].len());
        let blocks = own[0].chunks(self.triangle().max(1)).zip(grads[0].chunks(self.size * self.size));
        for (triangle, grad) in blocks {
            let (s, dm) = (self.skew(triangle), Square::of(self.size, grad));
            let ds = match self.series {
                // M = 2 X - 1 with X = (1 - S)^-1, so dS = Xᵀ (2 dM) Xᵀ.
                None => {
                    let x = inverse(&Square::one(self.size).plus(-1.0, &s)).transposed();
                    x.times(&dm).times(&x).scaled(2.0)
                }
                Some(terms) => {
                    let q = s.scaled(-1.0);
                    let mut powers = vec![Square::one(self.size)];
                    for k in 1..terms {
                        powers.push(powers[k - 1].times(&q));
                    }
                    let (mut dq, mut dpower) = (Square::zeros(self.size), Square::zeros(self.size));
                    for (k, factor) in (1..terms).zip(Self::coefficients(terms)).rev() {
                        // P_k = P_{k-1} Q
                        dpower = dpower.plus(factor, &dm);
                        dq = dq.plus(1.0, &powers[k - 1].transposed().times(&dpower));
                        dpower = dpower.times(&q.transposed());
                    }
                    dq.scaled(-1.0)
                }
            };
            // What the bound took away is taken away from the tensor itself: no gradient goes through it.
            all.extend(self.places().map(|(i, j)| (ds[(i, j)] - ds[(j, i)]) as f32));
        }
        vec![all]
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
