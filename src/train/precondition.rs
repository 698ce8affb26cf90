//! Riemannian preconditioning of LoRA (Zhang & Pilanci 2024, <https://arxiv.org/abs/2402.02347>): before the optimizer moves
//! them, gradients of A and B are scaled by the size of the other one,
//!
//! `dA' = (Bᵀ B + δ)⁻¹ dA` and `dB' = dB (A Aᵀ + δ)⁻¹`,
//!
//! so that the change of `B A` does not depend on how it is shared between the two. With AdamW that is the paper's scaled AdamW.
//! Both inverses are `r` wide: they are computed on the host, in f64, by Cholesky's decomposition.

use super::Trainer;
use super::config::TrainConfig;
use super::trained::Trained;
use crate::adapter::{TensorSpec, low_rank_names};
use crate::error::{Error, Result};
use pocketlora_kernels::Backend;

impl TrainConfig {
    /// Checks the damping.
    ///
    /// # Errors
    /// It is out of range.
    pub(super) fn check_riemannian(&self) -> Result<()> {
        match self.riemannian {
            Some(delta) if !(delta > 0.0 && delta.is_finite()) => {
                Err(Error::config("riemannian", "a damping above 0, such as 1e-6", delta))
            }
            _ => Ok(()),
        }
    }

    /// Bytes on the host that a step takes for it, of a LoRA with tensors `specs`: both tensors of a module and their gradients.
    pub(super) fn riemannian_bytes<'s>(&self, specs: impl Iterator<Item = &'s TensorSpec>) -> u64 {
        let values: Vec<usize> = specs.map(TensorSpec::values).collect();
        let most = values.windows(2).map(|pair| pair[0] + pair[1]).max().unwrap_or(0);
        if self.riemannian.is_some() { 2 * 4 * most as u64 } else { 0 }
    }
}

impl<B: Backend> Trainer<B> {
    /// Scales the gradients that are there.
    ///
    /// # Errors
    /// Device lost.
    pub(super) fn precondition(&mut self) -> Result<()> {
        let Some(delta) = self.config.riemannian else { return Ok(()) };
        let Self { base, adapters, tensors, grads, .. } = self;
        let backend = &base.backend;
        for pair in tensors.windows(2).filter(|pair| low_rank_names(&pair[0].spec.name).is_some()) {
            let mut read = |t: &Trained<B>| -> Result<Option<[Vec<f32>; 2]>> {
                let Some(grad) = grads.of(t.id) else { return Ok(None) };
                let mut values = vec![0.0; backend.len(grad)];
                backend.read(grad, &mut values)?;
                Ok(Some([adapters.held().read(backend, t.id)?, values]))
            };
            let (Some([a, mut of_a]), Some([b, mut of_b])) = (read(&pair[0])?, read(&pair[1])?) else { continue };
            let rank = pair[0].spec.shape[0];
            scale(&a, &b, [&mut of_a, &mut of_b], rank, delta);
            for (t, values) in pair.iter().zip([of_a, of_b]) {
                grads.of(t.id).into_iter().for_each(|grad| backend.write(grad, &values));
            }
        }
        Ok(())
    }
}

/// Scales the gradients of `a` `[r, n]` and `b` `[m, r]`.
fn scale(a: &[f32], b: &[f32], [of_a, of_b]: [&mut [f32]; 2], rank: usize, delta: f64) {
    let input = a.len() / rank;
    let row = |i: usize| a[i * input..(i + 1) * input].iter().map(|v| f64::from(*v));
    let (mut of_rows, mut of_columns) = (vec![0.0; rank * rank], vec![0.0; rank * rank]);
    for i in 0..rank {
        for j in 0..=i {
            let sum: f64 = row(i).zip(row(j)).map(|(x, y)| x * y).sum();
            (of_rows[i * rank + j], of_rows[j * rank + i]) = (sum, sum);
        }
    }
    for row in b.chunks_exact(rank) {
        for i in 0..rank {
            for j in 0..rank {
                of_columns[i * rank + j] += f64::from(row[i]) * f64::from(row[j]);
            }
        }
    }
    let (of_rows, of_columns) = (factor(of_rows, rank, delta), factor(of_columns, rank, delta));
    let mut x = vec![0.0; rank];
    for column in 0..input {
        (0..rank).for_each(|i| x[i] = f64::from(of_a[i * input + column]));
        solve(&of_columns, &mut x);
        (0..rank).for_each(|i| of_a[i * input + column] = x[i] as f32);
    }
    for row in of_b.chunks_exact_mut(rank) {
        x.iter_mut().zip(row.iter()).for_each(|(x, v)| *x = f64::from(*v));
        solve(&of_rows, &mut x);
        row.iter_mut().zip(&x).for_each(|(v, x)| *v = *x as f32);
    }
}

/// `L` of `L Lᵀ = M + δ` for a symmetric `M` `[n, n]` without negative eigenvalues.
fn factor(mut m: Vec<f64>, n: usize, delta: f64) -> Vec<f64> {
    for i in 0..n {
        m[i * n + i] += delta;
        for j in 0..=i {
            let known: f64 = (0..j).map(|k| m[i * n + k] * m[j * n + k]).sum();
            let left = m[i * n + j] - known;
            // What rounding took below the damping.
            m[i * n + j] = if i == j { left.max(delta * 1e-3).sqrt() } else { left / m[j * n + j] };
        }
    }
    m
}

/// `x` becomes `(L Lᵀ)⁻¹ x`.
fn solve(l: &[f64], x: &mut [f64]) {
    let n = x.len();
    for i in 0..n {
        let known: f64 = (0..i).map(|k| l[i * n + k] * x[k]).sum();
        x[i] = (x[i] - known) / l[i * n + i];
    }
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|k| l[k * n + i] * x[k]).sum();
        x[i] = (x[i] - known) / l[i * n + i];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::normals;

    /// What comes out, multiplied by what was to be inverted, is what went in.
    #[test]
    fn gradients_are_those_of_the_inverse() {
        for (rank, input, out, size) in [(1, 3, 4, 1.0), (4, 9, 7, 1.0), (8, 5, 6, 1e-2), (3, 6, 5, 0.0)] {
            let delta = 1e-3;
            let of = |key, n: usize| normals(&[key], 1.0, n);
            let (a, b) = (of(1, rank * input), normals(&[2], size, out * rank));
            let (ga, gb) = (of(3, rank * input), of(4, out * rank));
            let (mut da, mut db) = (ga.clone(), gb.clone());
            scale(&a, &b, [&mut da, &mut db], rank, delta);
            let damped = |i: usize, j: usize| if i == j { delta } else { 0.0 };
            let f = f64::from;
            for (i, column) in (0..rank).flat_map(|i| (0..input).map(move |c| (i, c))) {
                let gram =
                    |j: usize| (0..out).map(|o| f(b[o * rank + i]) * f(b[o * rank + j])).sum::<f64>() + damped(i, j);
                let back: f64 = (0..rank).map(|j| gram(j) * f(da[j * input + column])).sum();
                assert!((back - f(ga[i * input + column])).abs() < 1e-2, "A of rank {rank}: {back}");
            }
            for (row, j) in (0..out).flat_map(|row| (0..rank).map(move |j| (row, j))) {
                let gram = |i: usize| {
                    (0..input).map(|c| f(a[i * input + c]) * f(a[j * input + c])).sum::<f64>() + damped(i, j)
                };
                let back: f64 = (0..rank).map(|i| f(db[row * rank + i]) * gram(i)).sum();
                assert!((back - f(gb[row * rank + j])).abs() < 1e-2, "B of rank {rank}: {back}");
            }
        }
    }
}
