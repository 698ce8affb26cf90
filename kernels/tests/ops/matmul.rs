//! Products with a weight, forward and backward.

use super::harness::{
    EPS, Expected, Random, Report, affordable, buffer, case, gradient_x, poisoned, product, product_of, read, wide,
};
use super::oracle;
use super::weights::{self, KINDS, Kind};
use Arithmetic::{Bf16, Exact};
use pocketlora_kernels::{Arithmetic, Backend, Call, FloatType, Memory, WorkType};

/// `[T, O, K]`, some of them large enough for several threads: the matrix-vector paths, tails of every tile, blocks that run over row ends, odd rows, several
/// panels and tasks, thin adapters, nothing at all.
const SHAPES: &[[usize; 3]] = &[
    [1, 1, 1],
    [1, 5, 64],
    [1, 9, 96],
    [1, 7, 63],
    [1, 6, 65],
    [1, 3, 48],
    [1, 1030, 64],
    [2, 3, 8],
    [2, 33, 128],
    [3, 4, 65],
    [5, 37, 43],
    [7, 6, 64],
    [7, 17, 80],
    [17, 35, 130],
    [64, 40, 72],
    [131, 8, 66],
    [64, 131, 8],
    [3, 5, 2050],
    [40, 70, 100],
    [66, 520, 8],
    [0, 4, 64],
    [2, 0, 64],
];

/// Error of a sum of `k` products whose absolute values add up to `size`, in any order, with one rounding more.
fn bounds(size: &[f64], k: usize) -> Vec<f64> {
    size.iter().map(|size| EPS * (k as f64 / 8.0 + 16.0) * (size + 1.0)).collect()
}

#[test]
fn matmul_and_its_gradients_meet_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(1);
    let large = if cfg!(miri) { 0 } else { 100_000 };
    for &[t, o, k] in SHAPES {
        for (n, kind) in KINDS.into_iter().enumerate() {
            // Emulated CPUs are slow: large shapes see a kind of each family.
            if t * o * k > large && n % 3 != 1 || !affordable(t * o * k) {
                continue;
            }
            let (source, w) = weights::random(&mut random, kind, o, k);
            let (x, dy) = (random.vector(t * k), random.vector(t * o));
            let (w64, x64, dy64) = (wide(&w), wide(&x), wide(&dy));
            let (y, y_size) = oracle::matmul(&x64, &w64, k);
            let (dx, dx_size) = if o == 0 {
                (vec![0.0; t * k], vec![0.0; t * k])
            } else {
                oracle::matmul(&dy64, &oracle::transpose(&w64, k), o)
            };
            let more = |y: &[f64]| y.iter().map(|y| y + 1.0).collect::<Vec<_>>();
            let expected = [
                Expected::new(y.clone(), bounds(&y_size, k)),
                Expected::new(more(&y), bounds(&y_size, k)),
                Expected::new(dx.clone(), bounds(&dx_size, o)),
                Expected::new(more(&dx), bounds(&dx_size, o)),
            ];
            case!(report, &format!("matmul {kind:?} T={t} O={o} K={k}"), &expected, |cpu| {
                let w = cpu.matrix(source.clone()).unwrap();
                assert_eq!(cpu.shape(&w), (o, k));
                let [y, y1] = [false, true].map(|accumulate| product(cpu, Exact, &w, &x, accumulate));
                let [dx, dx1] = [false, true].map(|accumulate| gradient_x(cpu, Exact, &[(&w, &dy)], t, accumulate));
                vec![y, y1, dx, dx1]
            });
        }
    }
}

#[test]
fn the_gradient_by_the_weight_meets_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(2);
    for [t, o, k] in
        [[1, 1, 1], [1, 8, 65], [2, 3, 8], [5, 50, 17], [17, 8, 300], [300, 9, 8], [300, 50, 18], [3, 0, 4], [0, 3, 4]]
    {
        if !affordable(t * o * k) {
            continue;
        }
        let (x, dy) = (random.vector(t * k), random.vector(t * o));
        let (dw, size) = if t == 0 {
            (vec![0.0; o * k], vec![0.0; o * k])
        } else {
            oracle::matmul(&oracle::transpose(&wide(&dy), o), &oracle::transpose(&wide(&x), k), t)
        };
        let dw: Vec<f64> = dw.iter().map(|dw| dw - 2.0).collect();
        let expected = [Expected::new(dw, bounds(&size, t))];
        case!(report, &format!("matmul_vjp_w T={t} O={o} K={k}"), &expected, |cpu| {
            let mut dw = buffer(cpu, &vec![-2.0; o * k]);
            cpu.run(Call::MatmulVjpW { tokens: t, dy: &buffer(cpu, &dy), x: &buffer(cpu, &x), dw: &mut dw }).unwrap();
            vec![read(cpu, &dw)]
        });
    }
}

#[test]
fn embed_returns_the_exact_values_of_every_kind() {
    let mut report = Report::default();
    let mut random = Random(3);
    for [rows, cols] in [[3, 1], [5, 7], [3, 43], [4, 64], [7, 96], [2, 129], [3, 4100]] {
        if !affordable(rows * cols * 4) {
            continue;
        }
        for kind in KINDS {
            let (source, w) = weights::random(&mut random, kind, rows, cols);
            let ids: Vec<u32> = (0..rows as u32).rev().chain([1, 1]).collect();
            let values = ids.iter().flat_map(|id| wide(&w[*id as usize * cols..][..cols])).collect::<Vec<_>>();
            let expected = [Expected::new(values.clone(), vec![0.0; values.len()])];
            case!(report, &format!("embed {kind:?} [{rows}, {cols}]"), &expected, |cpu| {
                let mut y = poisoned(cpu, ids.len() * cols);
                cpu.run(Call::Embed { table: &cpu.matrix(source.clone()).unwrap(), ids: &ids, y: &mut y }).unwrap();
                vec![read(cpu, &y)]
            });
        }
    }
}

#[test]
fn work_matrices_hold_the_rounded_master() {
    let mut report = Report::default();
    let mut random = Random(4);
    for (dtype, float) in [(WorkType::F32, FloatType::F32), (WorkType::F16, FloatType::F16)] {
        for [t, rows, cols] in [[1, 8, 96], [1, 70, 8], [9, 8, 40], [9, 40, 8]] {
            if !affordable(t * rows * cols) {
                continue;
            }
            let master = random.vector(rows * cols);
            let rounded: Vec<f64> = match float {
                FloatType::F16 => master.iter().map(|x| half::f16::from_f32(*x).to_f64()).collect(),
                _ => wide(&master),
            };
            let x = random.vector(t * cols);
            let (y, size) = oracle::matmul(&wide(&x), &rounded, cols);
            case!(
                report,
                &format!("work matrix {dtype:?} T={t} [{rows}, {cols}]"),
                &[Expected::new(y, bounds(&size, cols))],
                |cpu| {
                    let mut w = cpu.work_matrix(rows, cols, dtype).unwrap();
                    cpu.set_matrix(&mut w, &buffer(cpu, &master));
                    vec![product(cpu, Exact, &w, &x, false)]
                },
            );
        }
    }
}

#[test]
fn nan_and_infinity_are_carried() {
    let mut report = Report::default();
    let mut random = Random(5);
    for t in [1, 4] {
        for kind in [KINDS[3], Kind::Dense(FloatType::F16)] {
            let (source, w) = weights::random(&mut random, kind, 6, 64);
            let mut x = random.vector(t * 64);
            x[17] = f32::NAN;
            if t > 1 {
                x[64 + 5] = f32::INFINITY;
            }
            let (y, size) = oracle::matmul(&wide(&x), &wide(&w), 64);
            case!(report, &format!("special values {kind:?} T={t}"), &[Expected::new(y, bounds(&size, 64))], |cpu| {
                vec![product_of(cpu, Exact, &source, &x)]
            });
        }
    }
}

#[test]
fn products_in_bf16_err_by_no_more_than_their_rounding() {
    let mut report = Report::default();
    let mut random = Random(45);
    let shapes = [[8, 3, 5], [9, 40, 64], [33, 70, 43], [17, 8, 576], [20, 100, 8], [13, 33, 530], [70, 530, 16]];
    // Sums cut into panels, several panels at a time, and tokens after whole dozens.
    for [t, o, k] in shapes.into_iter().chain([[28, 1040, 33], [29, 65, 1088], [16, 9, 2112]]) {
        if !affordable(t * o * k) {
            continue;
        }
        for kind in [Kind::Dense(FloatType::F16), KINDS[4], KINDS[6]] {
            let (source, w) = weights::random(&mut random, kind, o, k);
            let (x, dy) = (random.vector(t * k), random.vector(t * o));
            let (y, y_size) = oracle::matmul(&wide(&x), &wide(&w), k);
            let (dx, dx_size) = oracle::matmul(&wide(&dy), &oracle::transpose(&wide(&w), k), o);
            // Two operands of 8 bits of mantissa, the sum in f32.
            let bound = |s: &[f64], n: usize| {
                s.iter().map(|s| (s + 1e-30) * (2.0 / 256.0 + 1e-5 + EPS * n as f64)).collect::<Vec<_>>()
            };
            let more = |y: &[f64]| y.iter().map(|y| y + 1.0).collect::<Vec<_>>();
            let expected = [
                Expected::new(y, bound(&y_size, k)),
                Expected::new(more(&dx), bound(&dx_size, o).iter().map(|b| b + EPS).collect()),
            ];
            case!(report, &format!("matmul bf16 {kind:?} T={t} O={o} K={k}"), &expected, |cpu| {
                let w = cpu.matrix(source.clone()).unwrap();
                vec![product(cpu, Bf16, &w, &x, false), gradient_x(cpu, Bf16, &[(&w, &dy)], t, true)]
            });
        }
    }
}
