//! Small square matrices in f64 on the host, and the orthonormal factor of a tall one.

use std::ops::{Index, IndexMut};

/// `[n, n]`, row by row.
#[derive(Clone, Debug)]
pub(super) struct Square {
    n: usize,
    values: Vec<f64>,
}

impl Square {
    pub fn zeros(n: usize) -> Self {
        Self { n, values: vec![0.0; n * n] }
    }

    pub fn one(n: usize) -> Self {
        let mut one = Self::zeros(n);
        (0..n).for_each(|i| one[(i, i)] = 1.0);
        one
    }

    pub fn of(n: usize, values: &[f32]) -> Self {
        Self { n, values: values.iter().map(|v| f64::from(*v)).collect() }
    }

    pub fn values(&self) -> &[f64] {
        &self.values
    }

    pub fn scaled(mut self, factor: f64) -> Self {
        self.values.iter_mut().for_each(|v| *v *= factor);
        self
    }

    /// The sum with `factor` times `other`.
    pub fn plus(mut self, factor: f64, other: &Self) -> Self {
        self.values.iter_mut().zip(&other.values).for_each(|(v, o)| *v += factor * o);
        self
    }

    pub fn transposed(&self) -> Self {
        let values = (0..self.n * self.n).map(|i| self[(i % self.n, i / self.n)]).collect();
        Self { n: self.n, values }
    }

    pub fn times(&self, other: &Self) -> Self {
        let n = self.n;
        let mut product = Self::zeros(n);
        for (i, row) in product.values.chunks_exact_mut(n.max(1)).enumerate() {
            for (k, other) in other.values.chunks_exact(n.max(1)).enumerate() {
                let own = self[(i, k)];
                row.iter_mut().zip(other).for_each(|(sum, o)| *sum += own * o);
            }
        }
        product
    }
}

impl Index<(usize, usize)> for Square {
    type Output = f64;

    fn index(&self, (row, col): (usize, usize)) -> &f64 {
        &self.values[row * self.n + col]
    }
}

impl IndexMut<(usize, usize)> for Square {
    fn index_mut(&mut self, (row, col): (usize, usize)) -> &mut f64 {
        &mut self.values[row * self.n + col]
    }
}

/// The inverse of `a` by Gauss and Jordan with the largest pivot of a column. For `1 - S` with a skew `S` there always is one.
pub(super) fn inverse(a: &Square) -> Square {
    let n = a.n;
    let (mut a, mut inverse) = (a.clone(), Square::one(n));
    for col in 0..n {
        let pivot = (col..n).max_by(|i, j| a[(*i, col)].abs().total_cmp(&a[(*j, col)].abs())).unwrap_or(col);
        for k in 0..n {
            a.values.swap(col * n + k, pivot * n + k);
            inverse.values.swap(col * n + k, pivot * n + k);
        }
        let scale = a[(col, col)].recip();
        for k in 0..n {
            a[(col, k)] *= scale;
            inverse[(col, k)] *= scale;
        }
        for row in (0..n).filter(|row| *row != col) {
            let factor = a[(row, col)];
            for k in 0..n {
                a[(row, k)] -= factor * a[(col, k)];
                inverse[(row, k)] -= factor * inverse[(col, k)];
            }
        }
    }
    inverse
}

/// The orthonormal factor `[out, r]` of `p` by Householder's reflections, each of which leaves `-sign(x) |x|` of its column.
pub(super) fn orthonormal(p: &[f32], rank: usize) -> Vec<f32> {
    let out = p.len() / rank.max(1);
    let mut columns: Vec<Vec<f64>> =
        (0..rank).map(|k| p.iter().skip(k).step_by(rank).map(|v| f64::from(*v)).collect()).collect();
    let mut vectors: Vec<Vec<f64>> = Vec::with_capacity(rank);
    let reflect = |v: &[f64], x: &mut [f64]| {
        let square: f64 = v.iter().map(|v| v * v).sum();
        let along: f64 = v.iter().zip(&*x).map(|(v, x)| v * x).sum();
        let factor = if square > 0.0 { 2.0 * along / square } else { 0.0 };
        x.iter_mut().zip(v).for_each(|(x, v)| *x -= factor * v);
    };
    for k in 0..rank.min(out) {
        let mut v = vec![0.0; out];
        v[k..].copy_from_slice(&columns[k][k..]);
        let norm = v.iter().map(|v| v * v).sum::<f64>().sqrt();
        // A column that is there already takes no reflection.
        if v[k + 1..].iter().all(|v| *v == 0.0) {
            v[k] = 0.0;
        } else {
            v[k] += norm.copysign(v[k]);
        }
        columns[k..].iter_mut().for_each(|column| reflect(&v, column));
        vectors.push(v);
    }
    let mut q = vec![0.0; out * rank];
    for k in 0..rank.min(out) {
        let mut column = vec![0.0; out];
        column[k] = 1.0;
        vectors.iter().rev().for_each(|v| reflect(v, &mut column));
        column.iter().enumerate().for_each(|(o, x)| q[o * rank + k] = *x as f32);
    }
    q
}
