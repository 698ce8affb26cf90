//! Functions of an element, factors of rows and columns, parts of rows, decays.

use super::harness::{EPS, Expected, Random, Report, affordable, buffer, case, poisoned, read, wide};
use super::oracle;
use pocketlora_kernels::{Backend, Call, Columns, Map};

fn map(kind: Map, x: f64) -> f64 {
    match kind {
        Map::Scale(factor) => f64::from(factor) * x,
        Map::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Map::Silu => oracle::silu(x),
        Map::Softcap(cap) => f64::from(cap) * (x / f64::from(cap)).tanh(),
        Map::GeluTanh => oracle::gelu(x),
        Map::SquaredRelu => x.max(0.0).powi(2),
        Map::ClampedSwish { alpha, limit } => {
            let x = x.min(f64::from(limit));
            x / (1.0 + (-f64::from(alpha) * x).exp())
        }
        Map::Clamp { limit, plus } => x.clamp(-f64::from(limit), f64::from(limit)) + f64::from(plus),
        Map::Xielu { positive, beta, .. } if x > 0.0 => f64::from(positive) * x * x + f64::from(beta) * x,
        Map::Xielu { negative, beta, eps, .. } => {
            f64::from(negative) * (x.min(f64::from(eps)).exp_m1() - x) + f64::from(beta) * x
        }
    }
}

#[test]
fn functions_of_an_element_and_their_gradients_meet_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(61);
    for kind in [
        Map::Scale(0.3),
        Map::Sigmoid,
        Map::Silu,
        Map::Softcap(3.0),
        Map::Softcap(0.7),
        Map::GeluTanh,
        Map::SquaredRelu,
        Map::ClampedSwish { alpha: 1.702, limit: 2.0 },
        Map::Clamp { limit: 2.5, plus: 1.0 },
        Map::Xielu { positive: 0.7, negative: 1.1, beta: 0.5, eps: -1e-6 },
    ] {
        for n in [0, 1, 9, 100, 16391] {
            if !affordable(n) {
                continue;
            }
            let x: Vec<f32> = random.vector(n).iter().map(|x| x * 8.0).collect();
            let dy = random.vector(n);
            let y = x.iter().map(|x| map(kind, f64::from(*x))).collect();
            let h = 1e-5;
            let slope = |(x, dy): (&f32, &f32)| {
                let x = f64::from(*x);
                f64::from(*dy) * (map(kind, x + h) - map(kind, x - h)) / (2.0 * h)
            };
            let dx = x.iter().zip(&dy).map(slope).collect();
            // An error of GELU's exponent, which is some times larger than `x`, is one of its slope.
            let steep = if matches!(kind, Map::GeluTanh | Map::Xielu { .. }) { 4.0 } else { 1.0 };
            let expected = [Expected::norm(y, 4.0 * EPS), Expected::new(dx, vec![8.0 * steep * EPS; n])];
            case!(report, &format!("{kind:?} of {n}"), &expected, |device| {
                let (x, dy) = (&buffer(device, &x), &buffer(device, &dy));
                let (mut y, mut dx) = (poisoned(device, n), poisoned(device, n));
                device.run(Call::Map { kind, x, y: &mut y }).unwrap();
                device.run(Call::MapVjp { kind, x, dy, dx: &mut dx }).unwrap();
                vec![read(device, &y), read(device, &dx)]
            });
        }
    }
    let special = [f32::NAN, 0.0, 1e-30, 1e30, -1e30, 88.0, -88.0, 0.625, -0.624];
    for kind in [Map::Sigmoid, Map::Softcap(2.0)] {
        let y: Vec<f64> = special.iter().map(|x| map(kind, f64::from(*x))).collect();
        case!(report, &format!("{kind:?} at its ends"), &[Expected::relative(y, 4.0 * EPS)], |device| {
            let mut y = poisoned(device, special.len());
            device.run(Call::Map { kind, x: &buffer(device, &special), y: &mut y }).unwrap();
            vec![read(device, &y)]
        });
    }
}

#[test]
fn factors_of_elements_rows_and_columns_meet_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(62);
    for (t, c) in [(0, 3), (1, 1), (5, 8), (3, 130), (131, 9), (70, 300)] {
        if !affordable(t * c) {
            continue;
        }
        let [a, b] = [0; 2].map(|_| random.vector(t * c));
        let (rows, columns) = (random.vector(t), random.vector(c));
        let each =
            |f: &dyn Fn(usize) -> f32| Expected::new((0..t * c).map(|i| f64::from(f(i))).collect(), vec![0.0; t * c]);
        let product = |i: usize| f64::from(a[i]) * f64::from(b[i]);
        let dots = (0..t).map(|t| (0..c).map(|c_| product(t * c + c_)).sum()).collect();
        let sums = |f: &dyn Fn(usize) -> f64| {
            let sum = |column: usize| 0.5 + (0..t).map(|t| f(t * c + column)).sum::<f64>();
            Expected::new((0..c).map(sum).collect(), vec![EPS * (t as f64).max(4.0); c])
        };
        let expected = [
            each(&|i| a[i] * b[i]),
            each(&|i| rows[i / c] * a[i]),
            each(&|i| columns[i % c] * a[i]),
            Expected::new(dots, vec![EPS * (c as f64 / 8.0 + 8.0); t]),
            sums(&product),
            sums(&|i| f64::from(a[i])),
        ];
        case!(report, &format!("factors of [{t}, {c}]"), &expected, |device| {
            let [a, b, rows, columns] = [&a, &b, &rows, &columns].map(|x| buffer(device, x));
            let [mut product, mut by_row, mut by_column] = [0; 3].map(|_| poisoned(device, t * c));
            let mut dots = poisoned(device, t);
            let [mut sums, mut plain] = [0; 2].map(|_| buffer(device, &vec![0.5; c]));
            for call in [
                Call::Multiply { a: &a, b: &b, y: &mut product },
                Call::ScaleRows { factors: &rows, x: &a, y: &mut by_row },
                Call::ScaleColumns { factors: &columns, x: &a, y: &mut by_column },
                Call::DotRows { a: &a, b: &b, y: &mut dots },
                Call::SumColumns { a: &a, b: Some(&b), y: &mut sums },
                Call::SumColumns { a: &a, b: None, y: &mut plain },
            ] {
                device.run(call).unwrap();
            }
            [product, by_row, by_column, dots, sums, plain].map(|b| read(device, &b)).into()
        });
    }
}

#[test]
fn columns_are_copied_and_added_and_others_left_alone() {
    let mut report = Report::default();
    let mut random = Random(63);
    for (t, x_at, y_at, width) in [
        (3, Columns { of: 5, first: 2 }, Columns { of: 3, first: 0 }, 3),
        (2500, Columns { of: 4, first: 0 }, Columns { of: 9, first: 8 }, 1),
        (4, Columns { of: 6, first: 6 }, Columns { of: 2, first: 1 }, 0),
        (0, Columns { of: 2, first: 1 }, Columns { of: 1, first: 0 }, 1),
    ] {
        if !affordable(t * y_at.of) {
            continue;
        }
        let (x, y) = (random.vector(t * x_at.of), random.vector(t * y_at.of));
        let with = |accumulate: bool| {
            let mut y = y.clone();
            for row in 0..t {
                for i in 0..width {
                    let at = row * y_at.of + y_at.first + i;
                    y[at] = x[row * x_at.of + x_at.first + i] + if accumulate { y[at] } else { 0.0 };
                }
            }
            Expected::new(wide(&y), vec![0.0; y.len()])
        };
        let expected = [with(false), with(true)];
        case!(report, &format!("{width} columns of {t} rows from {x_at:?} to {y_at:?}"), &expected, |device| {
            let x = buffer(device, &x);
            let outputs = [false, true].map(|accumulate| {
                let mut y = buffer(device, &y);
                device.run(Call::CopyColumns { width, x: &x, x_at, y: &mut y, y_at, accumulate }).unwrap();
                read(device, &y)
            });
            outputs.into()
        });
    }
}

#[test]
fn decays_and_their_gradients_meet_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(64);
    let (t, heads) = (7, 5);
    let [rate, bias] = [0; 2].map(|_| random.vector(heads));
    let mut a: Vec<f32> = random.vector(t * heads).iter().map(|x| x * 6.0).collect();
    // Where `e^z` overflows and where it vanishes.
    (a[0], a[1]) = (200.0, -60.0);
    let dg = random.vector(t * heads);
    let decay = |a: &[f64]| {
        let one = |(i, a): (usize, &f64)| {
            let z = a + f64::from(bias[i % heads]);
            -f64::from(rate[i % heads]).exp() * if z > 40.0 { z } else { z.exp().ln_1p() }
        };
        a.iter().enumerate().map(one).collect::<Vec<_>>()
    };
    let da = oracle::gradient(&wide(&a), &wide(&dg), decay);
    let expected = [Expected::relative(decay(&wide(&a)), 8.0 * EPS), Expected::norm(da, 8.0 * EPS)];
    case!(report, "decay", &expected, |device| {
        let buffers = [&rate, &bias, &a, &dg].map(|x| buffer(device, x));
        let [rate, bias, a, dg] = buffers.each_ref();
        let (mut g, mut da) = (poisoned(device, t * heads), poisoned(device, t * heads));
        device.run(Call::Decay { rate, bias, a, g: &mut g }).unwrap();
        device.run(Call::DecayVjp { rate, bias, a, dg, da: &mut da }).unwrap();
        vec![read(device, &g), read(device, &da)]
    });
}
