//! Singular value decompositions of what adapters do, in f64.
//!
//! A sum of low-rank terms needs one of a small matrix only: with `B = Q R` and `Aᵀ = P T`, `B A = Q (R Tᵀ) Pᵀ`, and the
//! middle is as wide as the ranks' sum. A change that was pruned has full rank: there the largest singular values are
//! found by bidiagonalization with full reorthogonalization (Golub & Kahan 1965), which reads the matrix some dozen times.
//! Small matrices are decomposed by one-sided Jacobi rotations (Hestenes 1958), the most exact of the simple ways.

use crate::rng::Rng;
use rayon::prelude::*;

/// The columns of a matrix.
pub(super) type Columns = Vec<Vec<f64>>;

/// `M = sum of s[i] u[i] v[i]ᵀ`, with the largest `s` first.
pub(super) struct Svd {
    pub u: Columns,
    pub s: Vec<f64>,
    pub v: Columns,
}

/// Sweeps of Jacobi rotations at most: ten are usual.
const SWEEPS: usize = 60;
/// What is left of a singular vector's residual beside the largest singular value when it counts as found. What comes in
/// has 24 bits.
const FOUND: f64 = 1e-11;

/// The largest `rank` singular values of `b a`, with `b` given as columns and `a` as rows, one for each of the inner
/// dimension.
pub(super) fn of_product(b: Columns, a: Columns, rank: usize) -> Svd {
    let (q, r) = orthogonal(b);
    let (p, t) = orthogonal(a);
    // (R Tᵀ)[i][j] = sum over k of R[i][k] T[j][k]; both are kept as columns, so that column j of R Tᵀ is built of R's.
    let n = r.len();
    let middle = (0..n).map(|j| {
        let mut column = vec![0.0; n];
        (0..n).for_each(|k| add(&mut column, t[k][j], &r[k]));
        column
    });
    let small = jacobi(middle.collect());
    let rank = rank.min(n);
    let back = |q: &Columns, of: &Columns| of[..rank].iter().map(|c| combined(q, c)).collect();
    Svd { u: back(&q, &small.u), s: small.s[..rank].to_vec(), v: back(&p, &small.v) }
}

/// The largest `rank` singular values of the dense `m` `[rows, cols]`.
pub(super) fn of_dense(m: &[f32], cols: usize, rank: usize) -> Svd {
    let rows = m.len() / cols;
    let forward = |x: &[f64]| -> Vec<f64> { m.par_chunks(cols).map(|row| mixed(row, x)).collect() };
    let backward = |x: &[f64]| -> Vec<f64> {
        let parts = m.par_chunks(cols * 64).zip(x.par_chunks(64)).map(|(rows, x)| {
            let mut sum = vec![0.0; cols];
            for (row, x) in rows.chunks(cols).zip(x) {
                sum.iter_mut().zip(row).for_each(|(sum, v)| *sum += x * f64::from(*v));
            }
            sum
        });
        // In order, so that the sum is the same whatever the number of threads.
        parts.collect::<Vec<_>>().into_iter().fold(vec![0.0; cols], |mut sum, part| {
            add(&mut sum, 1.0, &part);
            sum
        })
    };
    if cols <= rows {
        return bidiagonalized(cols, &forward, &backward, rank);
    }
    let Svd { u, s, v } = bidiagonalized(rows, &backward, &forward, rank);
    Svd { u: v, s, v: u }
}

/// Of the matrix with at least as many rows as `cols` that `forward` multiplies with, and `backward` its transpose.
fn bidiagonalized(
    cols: usize,
    forward: &dyn Fn(&[f64]) -> Vec<f64>,
    backward: &dyn Fn(&[f64]) -> Vec<f64>,
    rank: usize,
) -> Svd {
    let rank = rank.min(cols);
    let mut rng = Rng::new(0);
    let mut random = |n: usize| -> Vec<f64> { (0..n).map(|_| f64::from(rng.unit()) - 0.5).collect() };
    let (mut us, mut vs): (Columns, Columns) = (Vec::new(), Vec::new());
    // M V = U B with `alphas` on the diagonal of B and `betas` above it.
    let (mut alphas, mut betas): (Vec<f64>, Vec<f64>) = (Vec::new(), Vec::new());
    let mut largest = 0.0f64;
    let mut v = random(cols);
    normalize_against(&mut v, &vs, 0.0, &mut random);
    let mut check = (2 * rank + 8).min(cols);
    loop {
        vs.push(v);
        let mut u = forward(&vs[vs.len() - 1]);
        if let (Some(beta), Some(before)) = (betas.last(), us.last()) {
            add(&mut u, -beta, before);
        }
        let alpha = normalize_against(&mut u, &us, largest, &mut random);
        largest = largest.max(alpha);
        alphas.push(alpha);
        v = backward(&u);
        add(&mut v, -alpha, &vs[vs.len() - 1]);
        us.push(u);
        let done = vs.len() == cols;
        let beta = if done { 0.0 } else { normalize_against(&mut v, &vs, largest, &mut random) };
        largest = largest.max(beta);
        if done || vs.len() == check {
            let n = vs.len();
            let column = |j: usize| {
                let mut column = vec![0.0; n];
                column[j] = alphas[j];
                if j > 0 {
                    column[j - 1] = betas[j - 1];
                }
                column
            };
            let small = jacobi((0..n).map(column).collect());
            let residual = |i: usize| beta * small.u[i][n - 1].abs();
            if done || (0..rank).all(|i| residual(i) <= FOUND * largest) {
                let back = |q: &Columns, of: &Columns| of[..rank].iter().map(|c| combined(q, c)).collect();
                return Svd { u: back(&us, &small.u), s: small.s[..rank].to_vec(), v: back(&vs, &small.v) };
            }
            check = (check * 3 / 2 + 1).min(cols);
        }
        betas.push(beta);
    }
}

/// Takes the parts along `others`, which are orthonormal, out of `x` and makes its length 1; returns the length. Where
/// nothing beyond rounding is left beside `scale`, the length is 0, and `x` becomes some other direction.
fn normalize_against(x: &mut Vec<f64>, others: &Columns, scale: f64, random: &mut dyn FnMut(usize) -> Vec<f64>) -> f64 {
    let clear = |x: &mut Vec<f64>| {
        // Twice: the first time leaves rounding errors along `others` where most of `x` went.
        for _ in 0..2 {
            let along: Vec<f64> = others.par_iter().map(|other| dot(other, x)).collect();
            others.iter().zip(along).for_each(|(other, along)| add(x, -along, other));
        }
        dot(x, x).sqrt()
    };
    let before = dot(x, x).sqrt().max(scale);
    let length = clear(x);
    if length > before * 1e-14 && length > 0.0 {
        x.iter_mut().for_each(|x| *x /= length);
        return length;
    }
    // A space that others fill has no further direction: that of a zero column stays zero.
    for _ in 0..3 {
        *x = random(x.len());
        let length = clear(x);
        if length > 1e-8 {
            x.iter_mut().for_each(|x| *x /= length);
            return 0.0;
        }
    }
    x.fill(0.0);
    0.0
}

/// `M = Q R` of the columns of `M`: orthonormal columns, or zero ones where `M` has no further direction, and the columns
/// of the upper triangle.
pub(super) fn orthogonal(columns: Columns) -> (Columns, Columns) {
    let n = columns.len();
    let (mut q, mut r): (Columns, Columns) = (Vec::with_capacity(n), Vec::with_capacity(n));
    for mut x in columns {
        let before = dot(&x, &x).sqrt();
        let mut of_x = vec![0.0; n];
        for _ in 0..2 {
            for (i, other) in q.iter().enumerate() {
                let along = dot(other, &x);
                of_x[i] += along;
                add(&mut x, -along, other);
            }
        }
        let length = dot(&x, &x).sqrt();
        if length > before * 1e-14 {
            x.iter_mut().for_each(|x| *x /= length);
            of_x[q.len()] = length;
        } else {
            x.fill(0.0);
        }
        q.push(x);
        r.push(of_x);
    }
    (q, r)
}

/// The whole decomposition of a small matrix of `columns`, of which there are no more than rows.
pub(super) fn jacobi(mut columns: Columns) -> Svd {
    let n = columns.len();
    let unit = |i: usize| (0..n).map(|j| f64::from(u8::from(i == j))).collect();
    let mut v: Columns = (0..n).map(unit).collect();
    for _ in 0..SWEEPS {
        let mut turned = false;
        for p in 0..n {
            for q in p + 1..n {
                let (a, b) = (dot(&columns[p], &columns[p]), dot(&columns[q], &columns[q]));
                let c = dot(&columns[p], &columns[q]);
                if c == 0.0 || c.abs() <= 1e-15 * (a * b).sqrt() {
                    continue;
                }
                turned = true;
                let zeta = (b - a) / (2.0 * c);
                let tan = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let cos = (1.0 + tan * tan).sqrt().recip();
                rotate(&mut columns, p, q, cos, cos * tan);
                rotate(&mut v, p, q, cos, cos * tan);
            }
        }
        if !turned {
            break;
        }
    }
    let lengths: Vec<f64> = columns.iter().map(|c| dot(c, c).sqrt()).collect();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| lengths[j].total_cmp(&lengths[i]));
    let direction = |i: &usize| -> Vec<f64> {
        let length = if lengths[*i] > 0.0 { lengths[*i] } else { 1.0 };
        columns[*i].iter().map(|x| x / length).collect()
    };
    Svd {
        u: order.iter().map(direction).collect(),
        s: order.iter().map(|&i| lengths[i]).collect(),
        v: order.iter().map(|&i| v[i].clone()).collect(),
    }
}

fn rotate(columns: &mut Columns, p: usize, q: usize, cos: f64, sin: f64) {
    let (left, right) = columns.split_at_mut(q);
    for (x, y) in left[p].iter_mut().zip(&mut right[0]) {
        (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
    }
}

/// `Q c`.
pub(super) fn combined(q: &Columns, c: &[f64]) -> Vec<f64> {
    let mut sum = vec![0.0; q.first().map_or(0, Vec::len)];
    q.iter().zip(c).for_each(|(column, c)| add(&mut sum, *c, column));
    sum
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn mixed(a: &[f32], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * b).sum()
}

pub(super) fn add(to: &mut [f64], factor: f64, x: &[f64]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += factor * x);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rng: &mut Rng, count: usize, length: usize) -> Columns {
        (0..count).map(|_| (0..length).map(|_| f64::from(rng.unit()) - 0.5).collect()).collect()
    }

    /// What is left of `m` `[rows, cols]` beside the decomposition, in its largest value.
    fn left(m: &[f64], cols: usize, svd: &Svd) -> f64 {
        let value =
            |at: usize| -> f64 { (0..svd.s.len()).map(|i| svd.s[i] * svd.u[i][at / cols] * svd.v[i][at % cols]).sum() };
        (0..m.len()).map(|at| (m[at] - value(at)).abs()).fold(0.0, f64::max)
    }

    #[test]
    fn products_and_dense_matrices_are_decomposed_alike() {
        let mut rng = Rng::new(5);
        // More ranks than rows, repeated directions, a zero one, and single rows.
        for (rows, cols, rank) in [(20, 33, 5), (33, 20, 7), (4, 9, 6), (1, 5, 1), (5, 1, 2), (64, 64, 64)] {
            let (mut b, a) = (random(&mut rng, rank, rows), random(&mut rng, rank, cols));
            if rank > 4 {
                b[3] = b[2].clone();
                b[1].fill(0.0);
            }
            let mut m = vec![0.0; rows * cols];
            for (b, a) in b.iter().zip(&a) {
                (0..m.len()).for_each(|at| m[at] += b[at / cols] * a[at % cols]);
            }
            let single: Vec<f32> = m.iter().map(|v| *v as f32).collect();
            let product = of_product(b, a, rank);
            let dense = of_dense(&single, cols, rank);
            assert!(left(&m, cols, &product) < 1e-12, "{rows} x {cols} of {rank}: {}", left(&m, cols, &product));
            assert!(left(&m, cols, &dense) < 1e-6, "{rows} x {cols} of {rank}: {}", left(&m, cols, &dense));
            for (one, other) in product.s.iter().zip(&dense.s) {
                assert!((one - other).abs() < 1e-6 * product.s[0], "{rows} x {cols}: {one} and {other}");
            }
        }
    }

    #[test]
    fn the_largest_of_many_values_are_found() {
        // Householder reflections around known singular values, of which the wanted ones are hardly larger than the rest.
        let n = 300;
        let reflect = |seed: u64, x: &mut [f64]| {
            let w = &random(&mut Rng::new(seed), 1, n)[0];
            let along = 2.0 * dot(w, x) / dot(w, w);
            add(x, -along, w);
        };
        let value = |i: usize| 1.0 + 0.9f64.powi(i as i32) * 0.05;
        let mut m = vec![0.0f32; n * n];
        for j in 0..n {
            let mut x = vec![0.0; n];
            x[j] = 1.0;
            reflect(1, &mut x);
            x.iter_mut().enumerate().for_each(|(i, x)| *x *= value(i));
            reflect(2, &mut x);
            (0..n).for_each(|i| m[i * n + j] = x[i] as f32);
        }
        let svd = of_dense(&m, n, 4);
        for (i, s) in svd.s.iter().enumerate() {
            assert!((s - value(i)).abs() < 1e-5, "value {i} is {s} instead of {}", value(i));
        }
    }
}
