//! Products with one small matrix for each block of columns, and with few values.

use super::harness::{EPS, Expected, Random, Report, affordable, buffer, case, poisoned, read, wide};
use super::oracle;
use pocketlora_kernels::{Backend, Blocks, Call};

/// The definition: `y[t, g, o, s] = sum_k w[g, o, k] x[t, g, k, s]`.
fn product(spec: Blocks, tokens: usize, w: &[f64], x: &[f64]) -> Vec<f64> {
    let Blocks { count, shape: [out, input], inner } = spec;
    let mut y = vec![0.0; tokens * count * out * inner];
    for t in 0..tokens {
        for g in 0..count {
            for (o, s) in (0..out).flat_map(|o| (0..inner).map(move |s| (o, s))) {
                y[((t * count + g) * out + o) * inner + s] = (0..input)
                    .map(|k| w[(g * out + o) * input % w.len() + k] * x[((t * count + g) * input + k) * inner + s])
                    .sum();
            }
        }
    }
    y
}

/// Each matrix of `w` with rows for columns.
fn transposed(spec: Blocks, w: &[f64]) -> Vec<f64> {
    let [out, input] = spec.shape;
    w.chunks(out * input).flat_map(|w| oracle::transpose(w, input)).collect()
}

/// The gradient by `w`, of as many matrices as blocks with one column side by side.
fn by_hand(spec: Blocks, tokens: usize, dy: &[f64], x: &[f64]) -> Vec<f64> {
    let Blocks { count, shape: [out, input], .. } = spec;
    let at = |i: usize| (i / (out * input), i / input % out, i % input);
    let one = |(g, o, k): (usize, usize, usize)| {
        (0..tokens).map(|t| dy[(t * count + g) * out + o] * x[(t * count + g) * input + k]).sum()
    };
    (0..count * out * input).map(|i| one(at(i))).collect()
}

/// Tokens, blocks, matrices, `[out, in]`, columns side by side.
const CASES: &[(usize, usize, usize, [usize; 2], usize)] = &[
    (1, 1, 1, [1, 1], 1),
    (3, 4, 4, [8, 8], 1),
    (2, 6, 1, [5, 7], 1),
    (2, 6, 3, [4, 9], 3),
    (5, 1, 1, [6, 4], 17),
    (0, 2, 2, [3, 3], 1),
    (6, 4, 4, [32, 32], 1),
    (3, 1, 1, [8, 12], 40),
    // Several tasks.
    (70, 8, 8, [32, 32], 1),
];

/// Values of `x` up to which gradients are taken by complex steps.
const SMALL: usize = 2000;

#[test]
fn products_of_blocks_and_their_gradients_meet_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(91);
    for &(tokens, count, matrices, shape, inner) in CASES {
        let [out, input] = shape;
        let (wide_x, wide_y) = (count * input * inner, count * out * inner);
        if !affordable(tokens * wide_x * out) {
            continue;
        }
        let spec = Blocks { count, shape, inner };
        let (w, x) = (random.vector(matrices * out * input), random.vector(tokens * wide_x));
        let (dy, dw) = (random.vector(tokens * wide_y), random.vector(w.len()));
        let (w64, x64, dy64) = (wide(&w), wide(&x), wide(&dy));
        let (small, turned) = (x.len() <= SMALL, transposed(spec, &w64));
        let dx = match small {
            true => oracle::gradient(&x64, &dy64, |x| product(spec, tokens, &w64, x)),
            false => product(Blocks { shape: [input, out], ..spec }, tokens, &turned, &dy64),
        };
        let mut grad = match small {
            true => oracle::gradient(&w64, &dy64, |w| product(spec, tokens, w, &x64)),
            false => by_hand(spec, tokens, &dy64, &x64),
        };
        grad.iter_mut().zip(&dw).for_each(|(grad, old)| *grad += f64::from(*old));
        let terms = (tokens * inner * count / matrices) as f64;
        let bound = |values: Vec<f64>, terms: f64| {
            let bounds = vec![4.0 * EPS * (terms + 4.0) + 1e-7; values.len()];
            Expected::new(values, bounds)
        };
        let expected =
            [bound(product(spec, tokens, &w64, &x64), input as f64), bound(dx, out as f64), bound(grad, terms)];
        let name = format!("{tokens} tokens, {count} blocks of {matrices} matrices {shape:?}, {inner} side by side");
        case!(report, &name, &expected, |device| {
            let [w, x, dy] = [&w, &x, &dy].map(|values| buffer(device, values));
            let (mut y, mut dx) = (poisoned(device, tokens * wide_y), poisoned(device, tokens * wide_x));
            let mut dw = buffer(device, &dw);
            device.run(Call::BlockProduct { spec, transposed: false, w: &w, x: &x, y: &mut y }).unwrap();
            device.run(Call::BlockProduct { spec, transposed: true, w: &w, x: &dy, y: &mut dx }).unwrap();
            device.run(Call::BlockProductVjpW { spec, dy: &dy, x: &x, dw: &mut dw }).unwrap();
            [y, dx, dw].map(|b| read(device, &b)).into()
        });
    }
}

#[test]
fn sparse_products_and_their_gradients_meet_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(92);
    for (tokens, [out, input], n) in
        [(1, [1, 1], 1), (3, [7, 5], 9), (0, [4, 4], 2), (2, [6, 9], 0), (60, [96, 64], 2500)]
    {
        if !affordable(tokens * n) {
            continue;
        }
        let rows: Vec<u32> = (0..n).map(|_| (random.bits() % out as u64) as u32).collect();
        let cols: Vec<u32> = (0..n).map(|_| (random.bits() % input as u64) as u32).collect();
        let (w, x, dy) = (random.vector(n), random.vector(tokens * input), random.vector(tokens * out));
        let (y, dw) = (random.vector(tokens * out), random.vector(n));
        let (w64, x64, dy64) = (wide(&w), wide(&x), wide(&dy));
        let f = |w: &[f64], x: &[f64]| {
            let mut y = vec![0.0; tokens * out];
            for t in 0..tokens {
                for ((row, col), w) in rows.iter().zip(&cols).zip(w) {
                    y[t * out + *row as usize] += w * x[t * input + *col as usize];
                }
            }
            y
        };
        let on = |mut values: Vec<f64>, old: &[f32], terms: usize| {
            values.iter_mut().zip(old).for_each(|(value, old)| *value += f64::from(*old));
            let bounds = vec![4.0 * EPS * (terms as f64 + 4.0) + 1e-7; values.len()];
            Expected::new(values, bounds)
        };
        let expected = [
            on(f(&w64, &x64), &y, n / out + n),
            on(oracle::gradient(&x64, &dy64, |x| f(&w64, x)), &x, n / input + n),
            on(oracle::gradient(&w64, &dy64, |w| f(w, &x64)), &dw, tokens),
        ];
        case!(report, &format!("{tokens} tokens, {n} values of {out} by {input}"), &expected, |device| {
            let [w, read_x, given] = [&w, &x, &dy].map(|values| buffer(device, values));
            let [mut y, mut dx, mut dw] = [&y, &x, &dw].map(|values| buffer(device, values));
            let (rows, cols) = (&rows[..], &cols[..]);
            device.run(Call::SparseProduct { rows, cols, tokens, w: &w, x: &read_x, y: &mut y }).unwrap();
            device.run(Call::SparseProduct { rows: cols, cols: rows, tokens, w: &w, x: &given, y: &mut dx }).unwrap();
            device.run(Call::SparseProductVjpW { rows, cols, tokens, dy: &given, x: &read_x, dw: &mut dw }).unwrap();
            [y, dx, dw].map(|b| read(device, &b)).into()
        });
    }
}
