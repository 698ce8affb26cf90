//! A sum of low-rank terms, brought to a bounded rank.

use super::svd::{Columns, of_product};

/// The nearest `[A, B]` of rank `rank` to the sum of `B A` over `terms`, each A `[r, input]` and B `[out, r]`: `A = sqrt(S) Vᵀ` and
/// `B = U sqrt(S)`, both of one size. Where the terms have fewer ranks, zeros are behind them.
pub(crate) fn low_rank_sum(terms: &[(&[f32], &[f32])], input: usize, rank: usize) -> [Vec<f32>; 2] {
    let (mut rows, mut columns) = (Columns::new(), Columns::new());
    let mut out = 0;
    for (a, b) in terms.iter().filter(|(a, _)| !a.is_empty()) {
        let own = a.len() / input;
        out = b.len() / own;
        rows.extend(a.chunks_exact(input).map(|row| row.iter().map(|v| f64::from(*v)).collect()));
        columns.extend((0..own).map(|j| b.iter().skip(j).step_by(own).map(|v| f64::from(*v)).collect()));
    }
    let svd = of_product(columns, rows, rank);
    let (mut a, mut b) = (vec![0.0; rank * input], vec![0.0; out * rank]);
    for (i, s) in svd.s.iter().enumerate() {
        let root = s.sqrt();
        a[i * input..(i + 1) * input].iter_mut().zip(&svd.v[i]).for_each(|(a, v)| *a = (root * v) as f32);
        b.iter_mut().skip(i).step_by(rank).zip(&svd.u[i]).for_each(|(b, u)| *b = (root * u) as f32);
    }
    [a, b]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::normals;

    fn product([a, b]: [&[f32]; 2], input: usize) -> Vec<f64> {
        let rank = a.len() / input;
        let one = |row: &[f32], c: usize| {
            row.iter().enumerate().map(|(k, b)| f64::from(*b) * f64::from(a[k * input + c])).sum()
        };
        b.chunks_exact(rank).flat_map(|row| (0..input).map(move |c| one(row, c))).collect()
    }

    #[test]
    fn a_sum_that_fits_is_what_it_was() {
        let (a, b) = (normals(&[1], 1.0, 2 * 7), normals(&[2], 1.0, 5 * 2));
        let (c, d) = (normals(&[3], 1.0, 7), normals(&[4], 1.0, 5));
        let sum: Vec<f64> = product([&a, &b], 7).iter().zip(product([&c, &d], 7)).map(|(x, y)| x + y).collect();
        for rank in [3, 4] {
            let [found_a, found_b] = low_rank_sum(&[(&a, &b), (&c, &d)], 7, rank);
            assert_eq!([found_a.len(), found_b.len()], [rank * 7, 5 * rank]);
            let worst =
                product([&found_a, &found_b], 7).iter().zip(&sum).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
            assert!(worst < 1e-5, "rank {rank}: {worst}");
        }
        // Of one rank less, what is missing is the smallest singular value, and no more than the smaller of the terms.
        let [found_a, found_b] = low_rank_sum(&[(&a, &b), (&c, &d)], 7, 2);
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let left = norm(&mut product([&found_a, &found_b], 7).iter().zip(&sum).map(|(x, y)| x - y));
        assert!(left > 1e-3 && left <= norm(&mut product([&c, &d], 7).into_iter()) + 1e-5, "{left}");
    }
}
