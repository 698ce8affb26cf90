//! Beginnings that depend on a layer's weight, or on nothing but its shape.

use super::range::{columns, floats, largest, orthonormal, smallest};
use super::{ITERATIONS, Init, Operator, halves, transposed};
use crate::adapter::svd::{combined, orthogonal};
use crate::error::Result;
use crate::rng::normals;

/// `A` `[r, in]` and `B` `[out, r]` of the layer with the weight `w`, or of what was lost of it, with the factor
/// `scale` on `B A`; none for a beginning that asks for something else.
///
/// # Errors
/// Out of memory.
pub(super) fn from_weight(
    init: Init,
    w: &dyn Operator,
    rank: usize,
    scale: f32,
    seed: u64,
) -> Result<Option<[Vec<f32>; 2]>> {
    Ok(Some(match init {
        Init::Pissa(rounds) => halves(&largest(w, rank, rounds, seed)?, scale),
        Init::Loftq => halves(&largest(w, rank, ITERATIONS, seed)?, scale),
        Init::Milora => halves(&smallest(w, rank, seed)?, scale),
        Init::Olora => {
            // Q's first columns are the weight's own, made orthonormal; R = Qᵀ W.
            let [out, input] = w.shape();
            let mut unit = vec![0.0; rank * input];
            (0..rank).for_each(|i| unit[i * input + i] = 1.0);
            let q = floats(&orthonormal(&w.times(&unit)?, out));
            let r = w.back(&q)?;
            [r, transposed(&q, rank)]
        }
        _ => return Ok(None),
    }))
}

/// `V_rᵀ` `[r, in]` and `U_r S_r` `[out, r]` of the largest singular values of `w`.
///
/// # Errors
/// Out of memory.
pub(in crate::adapter) fn singular(w: &dyn Operator, rank: usize, seed: u64) -> Result<[Vec<f32>; 2]> {
    let mut svd = largest(w, rank, ITERATIONS, seed)?;
    svd.u.iter_mut().zip(&svd.s).for_each(|(u, s)| u.iter_mut().for_each(|u| *u *= s));
    Ok([floats(&svd.v), transposed(&floats(&svd.u), rank)])
}

/// `A` and `B` of a layer `[out, in]` whose product is zero, for an even `rank`: `A = Q_oᵀ X / 10` and `B = Y Q_e / 10`
/// with normal `X` and `Y`, and the odd and even rows of an orthogonal `Q` `[r, r]`.
pub(super) fn orthogonal_halves([out, input]: [usize; 2], rank: usize, seed: u64) -> [Vec<f32>; 2] {
    let q = orthogonal(columns(&normals(&[seed, 0], 1.0, rank * rank), rank)).0;
    let half = |first: usize, width: usize| -> Vec<f32> {
        let x = columns(&normals(&[seed, 1 + first as u64], 0.1, rank / 2 * width), width);
        // Row k of Q_oᵀ X: the sum over the half's rows q of q[k] X.
        let rows: Vec<&Vec<f64>> = q.iter().skip(first).step_by(2).collect();
        let row = |k: usize| combined(&x, &rows.iter().map(|q| q[k]).collect::<Vec<_>>());
        floats(&(0..rank).map(row).collect())
    };
    [half(0, input), transposed(&half(1, out), rank)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::svd::{Columns, Svd, dot, jacobi};

    /// A matrix on the host, which is multiplied with in f64.
    struct Plain {
        values: Vec<f64>,
        shape: [usize; 2],
    }

    impl Operator for Plain {
        fn shape(&self) -> [usize; 2] {
            self.shape
        }

        fn times(&self, x: &[f32]) -> Result<Vec<f32>> {
            let rows = |x: Vec<f64>| self.values.chunks(self.shape[1]).map(|w| dot(w, &x) as f32).collect::<Vec<_>>();
            Ok(columns(x, self.shape[1]).into_iter().flat_map(rows).collect())
        }

        fn back(&self, y: &[f32]) -> Result<Vec<f32>> {
            let rows: Columns = self.values.chunks(self.shape[1]).map(<[f64]>::to_vec).collect();
            Ok(columns(y, self.shape[0]).iter().flat_map(|y| floats(&vec![combined(&rows, y)])).collect())
        }
    }

    /// A matrix whose singular values fall by `fall` each, with its whole decomposition by rotations.
    fn matrix(shape: [usize; 2], fall: f64) -> (Plain, Svd) {
        let [rows, cols] = shape;
        let side = rows.min(cols);
        let basis = |key: u64, n: usize| orthogonal(columns(&normals(&[key], 1.0, side * n), n)).0;
        let (u, v) = (basis(1, rows), basis(2, cols));
        let s: Vec<f64> = (0..side).map(|i| 3.0 * fall.powi(i as i32)).collect();
        let value = |at: usize| (0..side).map(|i| s[i] * u[i][at / cols] * v[i][at % cols]).sum();
        let values: Vec<f64> = (0..rows * cols).map(value).collect();
        // Of the columns, or of the rows, whichever are fewer.
        let own: Columns = match rows < cols {
            true => values.chunks(cols).map(<[f64]>::to_vec).collect(),
            false => (0..cols).map(|c| values.iter().skip(c).step_by(cols).copied().collect()).collect(),
        };
        let Svd { u, s, v } = jacobi(own);
        let whole = if rows < cols { Svd { u: v, s, v: u } } else { Svd { u, s, v } };
        (Plain { values, shape }, whole)
    }

    /// `s B A` `[out, in]`.
    fn product([a, b]: &[Vec<f32>; 2], rank: usize, scale: f64) -> Vec<f64> {
        let cols = a.len() / rank;
        let row = |b: &[f32]| {
            let along: Vec<f64> = b.iter().map(|b| scale * f64::from(*b)).collect();
            combined(&columns(a, cols), &along)
        };
        b.chunks(rank).flat_map(row).collect()
    }

    fn error(found: &[f64], expected: &[f64]) -> f64 {
        found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f64::max)
    }

    #[test]
    fn the_largest_and_the_smallest_values_are_those_of_the_whole_decomposition() {
        let scale = 2.0;
        for (shape, fall, rank, init) in [
            ([24, 17], 0.9, 4, Init::Pissa(8)),
            ([17, 24], 0.9, 4, Init::Pissa(1)),
            ([170, 132], 0.8, 5, Init::Pissa(8)),
            ([132, 170], 0.8, 5, Init::Loftq),
            ([24, 17], 0.9, 4, Init::Milora),
            ([17, 24], 0.9, 4, Init::Milora),
            ([170, 132], 0.97, 3, Init::Milora),
            ([132, 170], 0.97, 3, Init::Milora),
        ] {
            let (plain, whole) = matrix(shape, fall);
            let side = whole.s.len();
            let kept = if init == Init::Milora { side - rank..side } else { 0..rank };
            let halves = from_weight(init, &plain, rank, scale, 7).unwrap().unwrap();
            let [a, b] = &halves;
            let value = |at: usize| -> f64 {
                kept.clone().map(|i| whole.s[i] * whole.u[i][at / shape[1]] * whole.v[i][at % shape[1]]).sum()
            };
            let expected: Vec<f64> = (0..shape[0] * shape[1]).map(value).collect();
            let name = format!("{shape:?} {init:?}");
            let off = error(&product(&halves, rank, scale.into()), &expected);
            assert!(off < 2e-5, "{name}: {off}");
            // PEFT's A and B, up to the sign that both share.
            for (k, i) in kept.clone().enumerate() {
                let root = (whole.s[i] / f64::from(scale)).sqrt();
                let row: Vec<f64> = a[k * shape[1]..][..shape[1]].iter().map(|a| f64::from(*a) / root).collect();
                let column: Vec<f64> = b.chunks(rank).map(|row| f64::from(row[k]) / root).collect();
                let (cos_a, cos_b) = (dot(&row, &whole.v[i]), dot(&column, &whole.u[i]));
                assert!((cos_a.abs() - 1.0).abs() < 1e-3, "{name}: row {k} is {cos_a} off");
                assert!((cos_a - cos_b).abs() < 1e-3, "{name}: rank {k} has two signs");
            }
        }
    }

    #[test]
    fn olora_has_the_first_columns_and_rows_of_q_and_r() {
        for shape in [[24, 17], [17, 24]] {
            let ((plain, _), rank) = (matrix(shape, 0.9), 5);
            let halves = from_weight(Init::Olora, &plain, rank, 2.0, 0).unwrap().unwrap();
            let [r, q] = &halves;
            for (i, j) in (0..rank).flat_map(|i| (0..rank).map(move |j| (i, j))) {
                let along: f64 = q.chunks(rank).map(|row| f64::from(row[i]) * f64::from(row[j])).sum();
                assert!((along - f64::from(u8::from(i == j))).abs() < 1e-5, "columns {i} and {j} of Q: {along}");
                assert!(i <= j || r[i * shape[1] + j].abs() < 1e-5, "R is a triangle");
            }
            // Q_r R_r has the first columns of W.
            let product = product(&halves, rank, 1.0);
            let off = (0..shape[0] * shape[1]).filter(|at| at % shape[1] < rank);
            let off = off.map(|at| (product[at] - plain.values[at]).abs()).fold(0.0, f64::max);
            assert!(off < 1e-5, "{off}");
        }
    }

    #[test]
    fn orthogonal_halves_are_large_and_their_product_is_nothing() {
        let halves = orthogonal_halves([12, 20], 6, 3);
        assert!(product(&halves, 6, 1.0).iter().all(|v| v.abs() < 1e-6));
        for half in &halves {
            let deviation = (half.iter().map(|v| v * v).sum::<f32>() / half.len() as f32).sqrt();
            // Half of the ranks of a deviation of a tenth.
            assert!((0.05..0.1).contains(&deviation), "{deviation}");
        }
    }
}
