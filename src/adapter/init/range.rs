//! Singular vectors of a matrix that is only multiplied with: what a layer's weight, in its few bits, does to some
//! rows.
//!
//! The largest are found by a randomized range finder with power iterations (Halko, Martinsson & Tropp 2011): `Q` spans
//! what the matrix makes of random rows, better with each pair of products, and `Qᵀ M` is small. The smallest are the
//! directions that `(M Mᵀ)⁻¹` stretches most, on the shorter side of `M`. Products are the device's, in f32; what is
//! orthogonal is made so in f64. Results depend on the matrix and the seed alone: products are cut by shapes, and the
//! rest runs in order.

use super::super::svd::{Columns, Svd, combined, dot, jacobi, of_product, orthogonal};
use crate::error::Result;
use crate::rng::normals;
use rayon::prelude::*;

/// A shorter side up to which all of the range is taken at once: nothing is left to chance then.
const WHOLE: usize = 128;
/// Directions beyond twice the wanted ones.
const SPARE: usize = 8;
/// Rows of the unit matrix that are multiplied at a time.
const BLOCK: usize = 64;
/// Rounds of inverse iteration.
const ROUNDS: usize = 12;
/// What is added to `M Mᵀ`, of the sum of its diagonal: more than f32 leaves of it in products, and less than any
/// direction that counts.
const RIDGE: f64 = 1e-8;

/// A matrix `M` `[rows, cols]` from outside.
pub(in crate::adapter) trait Operator {
    /// `[rows, cols]`.
    fn shape(&self) -> [usize; 2];

    /// `x Mᵀ` `[n, rows]` of `x` `[n, cols]`.
    ///
    /// # Errors
    /// Out of memory.
    fn times(&self, x: &[f32]) -> Result<Vec<f32>>;

    /// `y M` `[n, cols]` of `y` `[n, rows]`.
    ///
    /// # Errors
    /// Out of memory.
    fn back(&self, y: &[f32]) -> Result<Vec<f32>>;
}

/// How many directions are followed for `rank` of a matrix with the shorter side `side`.
pub(super) fn width(rank: usize, side: usize) -> usize {
    if side <= WHOLE { side } else { (2 * rank + SPARE).min(side) }
}

/// The largest `rank` singular values of `m`, after `iterations` pairs of products; `rank` is at most the shorter side.
///
/// # Errors
/// Out of memory.
pub(super) fn largest(m: &dyn Operator, rank: usize, iterations: usize, seed: u64) -> Result<Svd> {
    let [rows, cols] = m.shape();
    let width = width(rank, rows.min(cols));
    let mut x = normals(&[seed], 1.0, width * cols);
    let mut round = 0;
    loop {
        let q = orthonormal(&m.times(&x)?, rows);
        // Qᵀ M
        let z = m.back(&floats(&q))?;
        if round == iterations || width == rows.min(cols) {
            return Ok(of_product(q, columns(&z, cols), rank));
        }
        x = floats(&orthonormal(&z, cols));
        round += 1;
    }
}

/// The smallest `rank` singular values of `m`, the largest of them first; `rank` is at most the shorter side.
///
/// # Errors
/// Out of memory.
pub(super) fn smallest(m: &dyn Operator, rank: usize, seed: u64) -> Result<Svd> {
    let [rows, cols] = m.shape();
    let turned = rows < cols;
    let side = rows.min(cols);
    let width = width(rank, side);
    let gram = gram(m, turned)?;
    let ridge = RIDGE * (0..side).map(|i| gram[i * side + i]).sum::<f64>();
    let factor = cholesky(gram, side, ridge);
    // (MᵀM)⁻¹, or (MMᵀ)⁻¹, again and again.
    let mut x = orthonormal(&normals(&[seed], 1.0, width * side), side);
    for _ in 0..if width == side { 0 } else { ROUNDS } {
        x.par_iter_mut().for_each(|column| solve(&factor, side, column));
        x = orthogonal(x).0;
    }
    // What M makes of the directions says which of them are the smallest, and what is on its other side.
    let images = if turned { m.back(&floats(&x))? } else { m.times(&floats(&x))? };
    let (q, r) = orthogonal(columns(&images, rows.max(cols)));
    let small = jacobi(r);
    let wanted = small.s.len() - rank..small.s.len();
    let turn = |basis: &Columns, of: &Columns| of[wanted.clone()].iter().map(|c| combined(basis, c)).collect();
    let (other, own) = (turn(&q, &small.u), turn(&x, &small.v));
    let (u, v) = if turned { (own, other) } else { (other, own) };
    Ok(Svd { u, s: small.s[wanted].to_vec(), v })
}

/// `M Mᵀ` where the rows are the fewer, or else `MᵀM`, from what `m` makes of the unit matrix.
fn gram(m: &dyn Operator, of_rows: bool) -> Result<Vec<f64>> {
    let [rows, cols] = m.shape();
    let side = if of_rows { rows } else { cols };
    let mut gram = Vec::with_capacity(side * side);
    for first in (0..side).step_by(BLOCK) {
        let count = BLOCK.min(side - first);
        let mut unit = vec![0.0; count * side];
        (0..count).for_each(|i| unit[i * side + first + i] = 1.0);
        let block = if of_rows { m.times(&m.back(&unit)?)? } else { m.back(&m.times(&unit)?)? };
        gram.extend(block.into_iter().map(f64::from));
    }
    Ok(gram)
}

/// The lower triangle `L` with `L Lᵀ = G + ridge`, of the symmetric `G` `[n, n]`, in its place.
pub(super) fn cholesky(mut g: Vec<f64>, n: usize, ridge: f64) -> Vec<f64> {
    for j in 0..n {
        let (above, below) = g.split_at_mut((j + 1) * n);
        let row = &mut above[j * n..];
        let left = dot(&row[..j], &row[..j]);
        // Rounding may leave less than nothing of a direction that is not there.
        let diagonal = (row[j] + ridge - left).max(ridge.max(f64::MIN_POSITIVE)).sqrt();
        row[j] = diagonal;
        let row = &*row;
        below.par_chunks_exact_mut(n.max(1)).for_each(|other| {
            other[j] = (other[j] - dot(&row[..j], &other[..j])) / diagonal;
        });
    }
    g
}

/// `x` becomes `(L Lᵀ)⁻¹ x`.
pub(super) fn solve(factor: &[f64], n: usize, x: &mut [f64]) {
    for i in 0..n {
        x[i] = (x[i] - dot(&factor[i * n..][..i], &x[..i])) / factor[i * n + i];
    }
    for i in (0..n).rev() {
        x[i] /= factor[i * n + i];
        let value = x[i];
        x[..i].iter_mut().zip(&factor[i * n..][..i]).for_each(|(x, l)| *x -= l * value);
    }
}

/// The rows of `x`, each of `length`, in f64.
pub(super) fn columns(x: &[f32], length: usize) -> Columns {
    x.chunks_exact(length.max(1)).map(|row| row.iter().copied().map(f64::from).collect()).collect()
}

/// The same, made orthonormal: zero ones where there is no further direction.
pub(super) fn orthonormal(x: &[f32], length: usize) -> Columns {
    orthogonal(columns(x, length)).0
}

/// All values in f32, column by column.
pub(super) fn floats(columns: &Columns) -> Vec<f32> {
    columns.iter().flatten().map(|v| *v as f32).collect()
}
