//! Singular values folded into a low-rank term, `E A`, and the penalty that keeps ranks apart: `|P Pᵀ - 1|` of the rows of A and
//! of the columns of B.

use super::made::Map;
use super::weight::LayerWeight;
use crate::error::Result;

/// `E A`, and what keeps ranks apart.
pub(super) struct Singular {
    pub rank: usize,
    pub orth_reg_weight: f64,
}

impl Map for Singular {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let input = own[0].len() / self.rank.max(1);
        Ok(vec![own[0].iter().enumerate().map(|(i, a)| a * own[2][i / input.max(1)]).collect()])
    }

    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let input = (own[0].len() / self.rank.max(1)).max(1);
        let da = grads[0].iter().enumerate().map(|(i, g)| g * own[2][i / input]).collect();
        let rows = grads[0].chunks(input).zip(own[0].chunks(input));
        let de = rows.map(|(g, a)| g.iter().zip(a).map(|(g, a)| g * a).sum()).collect();
        vec![da, Vec::new(), de]
    }

    fn penalty(&self, own: &[&[f32]], weight: f32, grads: &mut [Vec<f32>]) -> f64 {
        let weight = self.orth_reg_weight * f64::from(weight) / 2.0;
        let mut sum = 0.0;
        grads[1].resize(own[1].len(), 0.0);
        for (i, by_rows) in [(0, true), (1, false)] {
            let (values, rank) = (own[i], self.rank);
            let width = values.len() / rank.max(1);
            let at = |k: usize, j: usize| if by_rows { k * width + j } else { j * rank + k };
            let mut gram = vec![0.0; rank * rank];
            for (kl, gram) in gram.iter_mut().enumerate() {
                let (k, l) = (kl / rank, kl % rank);
                let dot = (0..width).map(|j| f64::from(values[at(k, j)]) * f64::from(values[at(l, j)])).sum::<f64>();
                *gram = dot - f64::from(u8::from(k == l));
            }
            let norm = gram.iter().map(|g| g * g).sum::<f64>().sqrt();
            sum += weight * norm;
            // The gradient of |P Pᵀ - 1| is 2 (P Pᵀ - 1) P / |P Pᵀ - 1|.
            for k in (0..rank).filter(|_| norm > 0.0) {
                for j in 0..width {
                    let row = (0..rank).map(|l| gram[k * rank + l] * f64::from(values[at(l, j)])).sum::<f64>();
                    grads[i][at(k, j)] += (2.0 * weight * row / norm) as f32;
                }
            }
        }
        sum
    }
}
