//! Products with several weights at once, with and without adapters.

use super::harness::{EPS, Expected, Random, Report, affordable, buffer, case, gradient_x, poisoned, read, wide};
use super::int8::{LEVELS, coarse, rounded};
use super::oracle;
use super::weights::{self, KINDS, Kind};
use Arithmetic::{Bf16, Exact, Int8};
use pocketlora_kernels::{
    ALL_ROWS, Arithmetic, Backend, Call, FloatType, LowRank, MatrixData, Memory, Product, WorkType,
};

#[test]
fn grouped_products_with_adapters_equal_the_single_ones() {
    let mut report = Report::default();
    let mut random = Random(46);
    let cases = [0, 1, 2, 9].map(|t| (t, Exact)).into_iter().chain([9, 17].map(|t| (t, Bf16)));
    // Terms on all rows, or on some of them as in a batch.
    for ((t, arithmetic), rows) in cases.flat_map(|case| [(case, ALL_ROWS), (case, case.0 / 3..case.0 - case.0 / 4)]) {
        // Of two operands, and of what the adapter's way down leaves.
        let rounding = if arithmetic == Bf16 { 4.0 / 256.0 } else { 0.0 };
        for k in [64, 200, 576] {
            let shapes =
                if cfg!(miri) { [(7, 2), (3, 1), (9, 3), (5, 0)] } else { [(70, 16), (24, 8), (300, 3), (5, 0)] };
            if !affordable(t * k * shapes.iter().map(|s| s.0).sum::<usize>() / 4) {
                continue;
            }
            let x = random.vector(t * k);
            let mut expected = Vec::new();
            let mut parts = Vec::new();
            for (i, (o, rank)) in shapes.into_iter().enumerate() {
                let (source, w) = weights::random(&mut random, KINDS[[3, 1, 4, 3][i]], o, k);
                let (mut y, size) = oracle::matmul(&wide(&x), &wide(&w), k);
                let bound = |s: &f64| EPS * (k as f64 / 8.0 + 16.0) * (s + 1.0) + rounding * s;
                let mut bounds: Vec<f64> = size.iter().map(bound).collect();
                // The second layer has two adapters, the last none.
                let adapters: Vec<_> = (0..[1, 2, 1, 0][i])
                    .map(|_| (random.vector(rank * k), random.vector(o * rank), 0.5 + random.uniform()))
                    .collect();
                for (a, b, scale) in &adapters {
                    let (h, h_size) = oracle::matmul(&wide(&x), &wide(a), k);
                    let (low, low_size) = oracle::matmul(&h, &wide(b), rank);
                    let (_, all_size) = oracle::matmul(&h_size, &wide(b), rank);
                    for (i, low) in low.iter().enumerate().filter(|(i, _)| rows.contains(&(i / o))) {
                        y[i] += f64::from(*scale) * low;
                        bounds[i] +=
                            EPS * k as f64 * (low_size[i] + 1.0) + rounding * f64::from(scale.abs()) * all_size[i];
                    }
                }
                expected.push(Expected::new(y, bounds));
                parts.push((source, adapters, o, rank));
            }
            case!(report, &format!("matmul_group {arithmetic:?} T={t} K={k} {rows:?}"), &expected, |cpu| {
                let matrix = |rows: usize, cols: usize, values: &[f32]| {
                    let mut matrix = cpu.work_matrix(rows, cols, WorkType::F32).unwrap();
                    cpu.set_matrix(&mut matrix, &buffer(cpu, values));
                    matrix
                };
                let weights: Vec<_> = parts
                    .iter()
                    .map(|(source, adapters, o, rank)| {
                        let put =
                            |(a, b, s): &(Vec<f32>, Vec<f32>, f32)| (matrix(*rank, k, a), matrix(*o, *rank, b), *s);
                        (cpu.matrix(source.clone()).unwrap(), adapters.iter().map(put).collect::<Vec<_>>())
                    })
                    .collect();
                let mut ys: Vec<_> = parts.iter().map(|part| poisoned(cpu, t * part.2)).collect();
                let mut products: Vec<_> = weights
                    .iter()
                    .zip(&mut ys)
                    .map(|((w, adapters), y)| {
                        let low_rank = adapters
                            .iter()
                            .map(|(a, b, scale)| LowRank { a, b, scale: *scale, rows: rows.clone() })
                            .collect();
                        Product { w, low_rank, y }
                    })
                    .collect();
                cpu.run(Call::MatmulGroup { arithmetic, x: &buffer(cpu, &x), products: &mut products }).unwrap();
                ys.iter().map(|y| read(cpu, y)).collect()
            });
        }
    }
}

/// How far rounding to 8 bits with a scale for each row may move an element, row by row.
fn half_steps(w: &[f32], cols: usize) -> Vec<f64> {
    let step = |row: &[f32]| row.iter().fold(0.0_f32, |m, x| m.max(x.abs())) / 127.0;
    // Scales of up-projections are rounded up to bf16.
    w.chunks(cols).map(|row| f64::from(step(row)) * 0.5 * (1.0 + 1.0 / 128.0)).collect()
}

/// One token's product in 8 bits with low-rank terms, which are then in 8 bits, too: each term is off by what rounding
/// `x`, `A` and `B` can make of it, and no more.
#[test]
fn adapters_beside_products_in_8_bits_err_by_no_more_than_their_rounding() {
    let mut report = Report::default();
    let mut random = Random(49);
    for (o, k, rank) in [(1, 64, 1), (33, 128, 3), (70, 576, 16), (300, 1088, 8), (31, 64, 70), (600, 192, 32)] {
        if !affordable(o * k) {
            continue;
        }
        for bad in [None, Some(f32::NAN), Some(f32::INFINITY)] {
            let (source, _) = weights::random(&mut random, KINDS[4], o, k);
            let MatrixData::Nf4(nf4) = &source.data else { unreachable!("`KINDS` has nothing else") };
            let (mut x, a, b) = (random.vector(k), random.vector(rank * k), random.vector(o * rank));
            let scale = 0.5 + random.uniform().abs();
            let (base, size) = oracle::matmul(&rounded(&x), &coarse(nf4, o * k, LEVELS[0]), k);
            let (h, h_size) = oracle::matmul(&wide(&x), &wide(&a), k);
            let (low, _) = oracle::matmul(&h, &wide(&b), rank);
            let largest = x.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            let (a_steps, b_steps) = (half_steps(&a, k), half_steps(&b, rank));
            let x_size: f64 = x.iter().map(|x| f64::from(x.abs())).sum();
            // Of each `h[i]`: `x` off by half a unit, and `A` by half a step; f16 and f32 come on top.
            let off: Vec<f64> = (0..rank)
                .map(|i| {
                    let a_size: f64 = a[i * k..][..k].iter().map(|a| f64::from(a.abs())).sum();
                    let x_unit = f64::from(largest) / 254.0;
                    a_size * x_unit + (x_size + k as f64 * x_unit) * a_steps[i] + 2e-3 * h_size[i]
                })
                .collect();
            // Of each eight of `h`, the largest that their largest can be.
            let most = |h: &[f64], off: &[f64]| h.iter().zip(off).fold(0.0_f64, |m, (h, off)| m.max(h.abs() + off));
            let h_steps: Vec<f64> = h.chunks(8).zip(off.chunks(8)).map(|(h, off)| most(h, off) / 254.0).collect();
            let mut bounds = Vec::new();
            for (row, size) in size.iter().enumerate() {
                let part = |i: usize| {
                    let b = f64::from(b[row * rank + i].abs());
                    (b + b_steps[row]) * (off[i] + h_steps[i / 8]) + (b_steps[row] + 1e-3 * b) * h[i].abs()
                };
                let low: f64 = (0..rank).map(part).sum();
                bounds.push(f64::from(scale) * low + EPS * (k as f64 / 16.0 + 16.0) * (size + 1.0));
            }
            let mut y: Vec<f64> = base.iter().zip(&low).map(|(base, low)| base + f64::from(scale) * low).collect();
            if let Some(bad) = bad {
                x[k - 1] = bad;
                y.fill(f64::NAN);
            }
            let name = format!("matmul_group int8 O={o} K={k} rank {rank}, bad element {bad:?}");
            // Not by way of `case!`: other devices multiply one token exactly.
            report.cpus(&name, &[Expected::new(y, bounds)], |cpu| {
                let matrix = |rows: usize, cols: usize, values: &[f32]| {
                    let mut matrix = cpu.work_matrix(rows, cols, WorkType::F16).unwrap();
                    // What is set first must leave no trace in copies made of it.
                    cpu.set_matrix(&mut matrix, &buffer(cpu, &vec![3.0; values.len()]));
                    (matrix, buffer(cpu, values))
                };
                let (mut a, a_values) = matrix(rank, k, &a);
                let (mut b, b_values) = matrix(o, rank, &b);
                let (w, x) = (cpu.matrix(source.clone()).unwrap(), buffer(cpu, &x));
                let mut y = poisoned(cpu, o);
                for pass in 0..2 {
                    let low_rank = vec![LowRank { a: &a, b: &b, scale, rows: ALL_ROWS }];
                    let mut products = [Product { w: &w, low_rank, y: &mut y }];
                    cpu.run(Call::MatmulGroup { arithmetic: Int8, x: &x, products: &mut products }).unwrap();
                    if pass == 0 {
                        cpu.set_matrix(&mut a, &a_values);
                        cpu.set_matrix(&mut b, &b_values);
                    }
                }
                vec![read(cpu, &y)]
            });
        }
    }
}

#[test]
fn a_sum_of_gradients_by_x_equals_the_single_ones() {
    let mut report = Report::default();
    let mut random = Random(51);
    for (t, arithmetic) in [(1, Exact), (9, Exact), (17, Bf16)] {
        let rounding = if arithmetic == Bf16 { 2.0 / 256.0 + 1e-5 } else { 0.0 };
        for (k, rows) in [(70, [40, 3, 0]), (128, [600, 200, 16])] {
            if !affordable(t * k * rows.iter().sum::<usize>()) {
                continue;
            }
            let mut terms = Vec::new();
            let (mut dx, mut size) = (vec![1.0; t * k], vec![1.0; t * k]);
            for (o, kind) in rows.into_iter().zip([KINDS[4], Kind::Dense(FloatType::F16), Kind::Dense(FloatType::F16)])
            {
                let (source, w) = weights::random(&mut random, kind, o, k);
                let dy = random.vector(t * o);
                if o > 0 {
                    let (part, part_size) = oracle::matmul(&wide(&dy), &oracle::transpose(&wide(&w), k), o);
                    dx.iter_mut().zip(part).for_each(|(dx, part)| *dx += part);
                    size.iter_mut().zip(part_size).for_each(|(size, part)| *size += part);
                }
                terms.push((source, dy));
            }
            let depth = rows.iter().sum::<usize>() as f64;
            let bound: Vec<f64> = size.iter().map(|s| s * (rounding + EPS * depth) + EPS).collect();
            let without = dx.iter().map(|dx| dx - 1.0).collect();
            let expected = [Expected::new(dx, bound.clone()), Expected::new(without, bound)];
            case!(report, &format!("matmul_vjp_x_sum {arithmetic:?} T={t} K={k} O={rows:?}"), &expected, |cpu| {
                let held: Vec<_> = terms.iter().map(|(w, dy)| (cpu.matrix(w.clone()).unwrap(), dy)).collect();
                let held: Vec<_> = held.iter().map(|(w, dy)| (w, &dy[..])).collect();
                [true, false].map(|accumulate| gradient_x(cpu, arithmetic, &held, t, accumulate)).into()
            });
        }
    }
}
