//! Norms, activations, loss and other light ops.

use super::harness::{EPS, Expected, Random, Report, affordable, buffer, case, poisoned, read, wide};
use super::oracle;
use pocketlora_kernels::{Activation, Backend, Call, Targets};

/// Lengths around a vector and around a task.
const LENGTHS: [usize; 8] = [0, 1, 7, 8, 9, 100, 16384, 16391];

#[test]
fn elementwise_ops_meet_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(21);
    for n in LENGTHS {
        if !affordable(n) {
            continue;
        }
        let (a, b) = (random.vector(n), random.vector(n));
        let with = |f: fn(f32, f32) -> f32| {
            let values: Vec<f64> = a.iter().zip(&b).map(|(a, b)| f64::from(f(*a, *b))).collect();
            Expected::new(values, vec![0.0; n])
        };
        let expected = [with(|a, b| a + b), with(|a, b| a + b), with(|a, _| a * 0.3), with(|_, _| 0.0)];
        case!(report, &format!("add, add_assign, scale, zero of {n}"), &expected, |cpu| {
            let (x, z) = (buffer(cpu, &a), buffer(cpu, &b));
            let mut sum = poisoned(cpu, n);
            cpu.run(Call::Add { a: &x, b: &z, y: &mut sum }).unwrap();
            let mut assigned = buffer(cpu, &b);
            cpu.run(Call::AddAssign { x: &x, y: &mut assigned }).unwrap();
            let mut scaled = buffer(cpu, &a);
            cpu.run(Call::Scale { factor: 0.3, x: &mut scaled }).unwrap();
            let mut zero = poisoned(cpu, n);
            cpu.run(Call::Zero { x: &mut zero }).unwrap();
            [sum, assigned, scaled, zero].map(|b| read(cpu, &b)).into()
        });
    }
    let (bias, x) = (random.vector(13), random.vector(13 * 5));
    let values = x.iter().enumerate().map(|(i, x)| f64::from(x + bias[i % 13])).collect::<Vec<_>>();
    case!(report, "add_bias", &[Expected::new(values, vec![0.0; 65])], |cpu| {
        let mut y = buffer(cpu, &x);
        cpu.run(Call::AddBias { bias: &buffer(cpu, &bias), y: &mut y }).unwrap();
        vec![read(cpu, &y)]
    });
}

#[test]
fn dropout_falls_by_key_and_index_and_keeps_the_mean() {
    let mut report = Report::default();
    let (n, p, key) = (if cfg!(miri) { 1000 } else { 40_000 }, 0.25_f32, 7);
    let ones = vec![1.0; n];
    // The definition, spelled out: element i falls if the upper half of its random bits lies below p.
    let falls = |i: usize| (pocketlora_kernels::mix(key, i as u64) >> 32) as f64 / 2f64.powi(32) < f64::from(p);
    let values: Vec<f64> = (0..n).map(|i| if falls(i) { 0.0 } else { 1.0 / 0.75 }).collect();
    let kept = values.iter().filter(|v| **v > 0.0).count() as f64 / n as f64;
    assert!((kept - 0.75).abs() < 0.01 || cfg!(miri), "{kept}");
    let expected = || Expected::relative(values.clone(), 2.0 * EPS);
    case!(report, "dropout", &[expected(), expected()], |cpu| {
        let mut y = poisoned(cpu, n);
        cpu.run(Call::Dropout { p, key, first: 0, x: &buffer(cpu, &ones), y: &mut y }).unwrap();
        // In two parts, the second counted from where it stands.
        let mut parts = [poisoned(cpu, 777), poisoned(cpu, n - 777)];
        cpu.run(Call::Dropout { p, key, first: 0, x: &buffer(cpu, &ones[..777]), y: &mut parts[0] }).unwrap();
        cpu.run(Call::Dropout { p, key, first: 777, x: &buffer(cpu, &ones[777..]), y: &mut parts[1] }).unwrap();
        vec![read(cpu, &y), parts.iter().flat_map(|part| read(cpu, part)).collect()]
    });
}

#[test]
fn rows_are_gathered_and_scattered() {
    let mut report = Report::default();
    let mut random = Random(22);
    let (x, y, rows) = (random.vector(7 * 9), random.vector(7 * 9), [6_u32, 0, 3, 6]);
    let gathered: Vec<f32> = rows.iter().flat_map(|r| x[*r as usize * 9..][..9].to_vec()).collect();
    let mut scattered = y.clone();
    for (t, row) in rows.iter().enumerate() {
        for c in 0..9 {
            scattered[*row as usize * 9 + c] += gathered[t * 9 + c];
        }
    }
    let exact = |x: &[f32]| Expected::new(wide(x), vec![0.0; x.len()]);
    case!(report, "gather_rows, scatter_add_rows", &[exact(&gathered), exact(&scattered)], |cpu| {
        let mut picked = poisoned(cpu, 36);
        cpu.run(Call::GatherRows { x: &buffer(cpu, &x), rows: &rows, y: &mut picked }).unwrap();
        let mut all = buffer(cpu, &y);
        cpu.run(Call::ScatterAddRows { x: &picked, rows: &rows, y: &mut all }).unwrap();
        vec![read(cpu, &picked), read(cpu, &all)]
    });
}

/// How the factors of a norm are stored: as they are, less one, or not at all.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stored {
    Whole,
    LessOne,
    Absent,
    /// Those of two rows one after the other.
    Pairs,
}

#[test]
fn rms_norm_meets_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(23);
    // Rows of a width: those of tokens, or of their heads.
    for (t, c) in [(0, 8), (1, 1), (1, 7), (3, 8), (5, 65), (2, 300)] {
        for stored in [Stored::Whole, Stored::LessOne, Stored::Absent, Stored::Pairs] {
            let t = if stored == Stored::Pairs { 2 * t } else { t };
            if affordable(t * c * t * c) {
                rms_norm(&mut report, &mut random, stored, t, c);
            }
        }
    }
}

fn rms_norm(report: &mut Report, random: &mut Random, stored: Stored, t: usize, c: usize) {
    let rows = if stored == Stored::Pairs { 2 } else { 1 };
    let (w, x, dy) = (random.vector(rows * c), random.vector(t * c), random.vector(t * c));
    let (x64, dy64) = (wide(&x), wide(&dy));
    let factors: Vec<f64> = match stored {
        Stored::Whole | Stored::Pairs => wide(&w),
        Stored::LessOne => wide(&w).iter().map(|w| w + 1.0).collect(),
        Stored::Absent => vec![1.0; c],
    };
    let eps = 1e-5_f32;
    let norm = |x: &[f64]| -> Vec<f64> {
        let normed = oracle::rms_norm(&vec![1.0; c], f64::from(eps), x);
        normed.iter().zip(factors.iter().cycle()).map(|(x, w)| x * w).collect()
    };
    let y = norm(&x64);
    let dx = oracle::gradient(&x64, &dy64, norm);
    let dx = dx.iter().map(|dx| dx + 0.5).collect();
    // One division and a sum of c / 8 terms; differences in f64 are good to 1e-9.
    let bound = EPS * (c as f64 / 8.0 + 16.0);
    let expected = [Expected::relative(y, bound), Expected::norm(dx, bound + 1e-8)];
    case!(report, &format!("rms_norm [{t}, {c}] {stored:?}"), &expected, |cpu| {
        let (w, x, dy) = (buffer(cpu, &w), buffer(cpu, &x), buffer(cpu, &dy));
        let (mut y, mut dx) = (poisoned(cpu, t * c), buffer(cpu, &vec![0.5; t * c]));
        let (w, plus_one) = ((stored != Stored::Absent).then_some(&w), stored == Stored::LessOne);
        cpu.run(Call::RmsNorm { width: c, w, plus_one, eps, x: &x, y: &mut y }).unwrap();
        cpu.run(Call::RmsNormVjpX { width: c, w, plus_one, eps, x: &x, dy: &dy, dx: &mut dx }).unwrap();
        vec![read(cpu, &y), read(cpu, &dx)]
    });
}

#[test]
fn layer_norm_meets_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(27);
    for (t, c, biased) in
        [(0, 8, true), (1, 1, true), (1, 7, true), (3, 8, true), (5, 65, true), (2, 300, true), (3, 9, false)]
    {
        if !affordable(t * c * t * c) {
            continue;
        }
        let [w, b] = [0; 2].map(|_| random.vector(c));
        let b = if biased { b } else { vec![0.0; c] };
        // Their mean is far from zero.
        let x: Vec<f32> = random.vector(t * c).iter().map(|x| x + 1.0).collect();
        let dy = random.vector(t * c);
        let eps = 1e-5_f32;
        let norm = |x: &[f64]| oracle::layer_norm(&wide(&w), &wide(&b), f64::from(eps), x);
        // In a row of one element nothing is left of it, and differences of nothing are only noise.
        let dx = if c == 1 { vec![0.0; t] } else { oracle::gradient(&wide(&x), &wide(&dy), norm) };
        let dx = dx.iter().map(|dx| dx + 0.5).collect();
        let bound = EPS * (c as f64 / 4.0 + 32.0);
        let expected = [Expected::norm(norm(&wide(&x)), bound), Expected::norm(dx, bound + 1e-8)];
        case!(report, &format!("layer_norm [{t}, {c}]"), &expected, |cpu| {
            let [w, b, x, dy] = [&w, &b, &x, &dy].map(|x| buffer(cpu, x));
            let (mut y, mut dx) = (poisoned(cpu, t * c), buffer(cpu, &vec![0.5; t * c]));
            cpu.run(Call::LayerNorm { w: &w, b: biased.then_some(&b), eps, x: &x, y: &mut y }).unwrap();
            cpu.run(Call::LayerNormVjpX { w: &w, eps, x: &x, dy: &dy, dx: &mut dx }).unwrap();
            vec![read(cpu, &y), read(cpu, &dx)]
        });
    }
}

#[test]
fn rope_turns_and_turns_back() {
    let mut report = Report::default();
    let mut random = Random(24);
    // Pairs that are turned of each head: all of it, a part, nothing.
    let shapes =
        [(1, 1, 2, 1), (5, 3, 6, 3), (3, 2, 64, 32), (70, 9, 32, 16), (5, 3, 6, 2), (70, 2, 64, 8), (2, 2, 3, 0)];
    for ((t, heads, d, r), pairs) in shapes.into_iter().flat_map(|shape| [(shape, false), (shape, true)]) {
        if !affordable(t * heads * d) {
            continue;
        }
        let x = random.vector(t * heads * d);
        let angles = random.vector(t * r);
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| ((a * 9.0).cos(), (a * 9.0).sin())).unzip();
        let turn = |sign: f64| {
            let mut y = wide(&x);
            for (at, y) in y.iter_mut().enumerate().filter(|(at, _)| at % d < 2 * r) {
                let (token, i) = (at / (heads * d), at % d);
                // How far the other element of the pair is, whether it comes behind, and the pair's number.
                let (far, first, pair) = if pairs { (1, i % 2 == 0, i / 2) } else { (r, i < r, i % r) };
                let angle = token * r + pair;
                let (c, s) = (f64::from(cos[angle]), sign * f64::from(sin[angle]));
                let other = if first { -f64::from(x[at + far]) } else { f64::from(x[at - far]) };
                *y = f64::from(x[at]) * c + other * s;
            }
            Expected::new(y, vec![4.0 * EPS; x.len()])
        };
        case!(report, &format!("rope T={t} H={heads} D={d} R={r} pairs: {pairs}"), &[turn(1.0), turn(-1.0)], |cpu| {
            let (cos, sin, x) = (buffer(cpu, &cos), buffer(cpu, &sin), buffer(cpu, &x));
            let (mut y, mut back) = (poisoned(cpu, t * heads * d), poisoned(cpu, t * heads * d));
            for (inverse, y) in [(false, &mut y), (true, &mut back)] {
                cpu.run(Call::Rope { heads, head_dim: d, cos: &cos, sin: &sin, x: &x, inverse, pairs, y }).unwrap();
            }
            vec![read(cpu, &y), read(cpu, &back)]
        });
    }
}

/// The gated ops by name, with the activation's oracle.
type Gated = (&'static str, fn(f64) -> f64);

#[test]
fn gated_activations_meet_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(25);
    let activations: [Gated; 2] = [("swiglu", oracle::silu), ("geglu", oracle::gelu)];
    for (name, act) in activations {
        for n in [0, 1, 8, 9, 100, 16390] {
            if !affordable(n) {
                continue;
            }
            let gate: Vec<f32> = random.vector(n).iter().map(|x| x * 12.0).collect();
            let (up, dy) = (random.vector(n), random.vector(n));
            let (g, u, d) = (wide(&gate), wide(&up), wide(&dy));
            let each = |f: &dyn Fn(f64, f64, f64) -> f64| (0..n).map(|i| f(g[i], u[i], d[i])).collect::<Vec<_>>();
            // The op is element-wise, so one difference quotient an element does.
            let h = 1e-5;
            // An error of z, whose terms are some times larger than 1, is one of e^-z in proportion: of a few EPS, where
            // `g e^-z` is small, too.
            let wide_z = if name == "geglu" { 1.0 } else { 0.0 };
            let value = |values: Vec<f64>, factors: &[f64]| {
                let bound = |(v, f): (&f64, &f64)| EPS * (8.0 * v.abs() + 2.0 * wide_z * f.abs()) + 1e-15;
                let bounds = values.iter().zip(factors).map(bound).collect();
                Expected::new(values, bounds)
            };
            let expected = [
                value(each(&|g, u, _| act(g) * u), &u),
                Expected::norm(
                    each(&|g, u, d| d * u * (act(g + h) - act(g - h)) / (2.0 * h)),
                    (8.0 + 8.0 * wide_z) * EPS,
                ),
                value(each(&|g, _, d| d * act(g)), &d),
            ];
            case!(report, &format!("{name} of {n}"), &expected, |cpu| gated(cpu, name, [&gate, &up, &dy]));
        }
    }
}

/// Limits for gates so large that powers of them overflow, zeros, infinities and NaN.
#[test]
fn gated_activations_carry_the_special_values() {
    let mut report = Report::default();
    let nan = f64::NAN;
    // Gate, activation, slope. At an infinity `inf * 0` remains, as in the reference stack.
    let common = [
        (3e38, f64::from(3e38_f32), 1.0),
        (1e15, f64::from(1e15_f32), 1.0),
        (-1e15, 0.0, 0.0),
        (-3e38, 0.0, 0.0),
        (0.0, 0.0, 0.5),
        (f32::NAN, nan, nan),
        (f32::NEG_INFINITY, nan, nan),
    ];
    // The slope of gelu's logistic function is taken at a bound, which saves it.
    for (name, at_infinity) in [("swiglu", nan), ("geglu", 1.0)] {
        let cases = [&common[..], &[(f32::INFINITY, f64::INFINITY, at_infinity)]].concat();
        let n = cases.len();
        let gate: Vec<f32> = cases.iter().map(|case| case.0).collect();
        let slopes: Vec<f64> = match name {
            "geglu" => cases.iter().map(|case| if case.0 == f32::NEG_INFINITY { 0.0 } else { case.2 }).collect(),
            _ => cases.iter().map(|case| case.2).collect(),
        };
        let values: Vec<f64> = cases.iter().map(|case| case.1).collect();
        let exact = |x: Vec<f64>| Expected::new(x, vec![0.0; n]);
        let expected = [exact(values.clone()), exact(slopes), exact(values)];
        case!(report, &format!("{name} of special values"), &expected, |cpu| {
            gated(cpu, name, [&gate, &vec![1.0; n], &vec![1.0; n]])
        });
        // What comes in beside the gate is carried, too.
        let expected = [exact(vec![nan; n]), exact(vec![nan; n]), exact(vec![nan; n])];
        case!(report, &format!("{name} with NaN"), &expected, |cpu| {
            gated(cpu, name, [&vec![1.0; n], &vec![f32::NAN; n], &vec![f32::NAN; n]])
        });
    }
}

/// `y`, `dgate` and `dup` of the op called `name`.
fn gated<B: Backend>(cpu: &B, name: &str, inputs: [&[f32]; 3]) -> Vec<Vec<f32>> {
    let [gate, up, dy] = inputs.map(|x| buffer(cpu, x));
    let [mut y, mut dgate, mut dup] = [0; 3].map(|_| poisoned(cpu, inputs[0].len()));
    let activation = if name == "geglu" { Activation::GeluTanh } else { Activation::Silu };
    cpu.run(Call::Gate { activation, gate: &gate, up: &up, y: &mut y }).unwrap();
    cpu.run(Call::GateVjp { activation, gate: &gate, up: &up, dy: &dy, dgate: &mut dgate, dup: &mut dup }).unwrap();
    let (mut in_gate, mut in_up) = (poisoned(cpu, cpu.len(&gate)), poisoned(cpu, cpu.len(&up)));
    cpu.run(Call::Copy { x: &gate, y: &mut in_gate }).unwrap();
    cpu.run(Call::Copy { x: &up, y: &mut in_up }).unwrap();
    cpu.run(Call::GateVjpInPlace { activation, dy: &dy, gate: &mut in_gate, up: &mut in_up }).unwrap();
    // One NaN is as good as another.
    let bits =
        |buffer: &_| read(cpu, buffer).iter().map(|x| if x.is_nan() { 1 } else { x.to_bits() }).collect::<Vec<_>>();
    assert_eq!([bits(&in_gate), bits(&in_up)], [bits(&dgate), bits(&dup)]);
    [y, dgate, dup].map(|b| read(cpu, &b)).into()
}

#[test]
fn cross_entropy_meets_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(26);
    for (n, vocab) in [(0, 5), (1, 1), (3, 7), (2, 8), (4, 1031), (1, 5000)] {
        if !affordable(n * vocab) {
            continue;
        }
        let logits: Vec<f32> = random.vector(n * vocab).iter().map(|x| x * 15.0).collect();
        let targets: Vec<u32> = (0..n).map(|_| (random.bits() % vocab as u64) as u32).collect();
        let (mut losses, mut gradients) = (Vec::new(), Vec::new());
        let weights: Vec<f32> = [0.25, -2.0, 0.0].into_iter().cycle().take(n).collect();
        for ((x, target), weight) in logits.chunks(vocab).zip(&targets).zip(wide(&weights)) {
            let mut p = oracle::softmax(&wide(x));
            losses.push(-p[*target as usize].ln());
            p[*target as usize] -= 1.0;
            gradients.extend(p.iter().map(|p| weight * p));
        }
        // Differences of logits up to 30 are exact to EPS * 30 / 2; `p - 1` of a sure target to the EPS of 1.
        let bounds = gradients.iter().map(|g| EPS * (32.0 * g.abs() + 2.0)).collect();
        let expected = [Expected::new(losses, vec![32.0 * EPS; n]), Expected::new(gradients, bounds)];
        case!(report, &format!("cross_entropy [{n}, {vocab}]"), &expected, |cpu| {
            let (mut logits, mut losses) = (buffer(cpu, &logits), poisoned(cpu, n));
            cpu.run(Call::CrossEntropy {
                targets: Targets::of(&targets),
                weights: &weights,
                logits: &mut logits,
                losses: &mut losses,
            })
            .unwrap();
            vec![read(cpu, &losses), read(cpu, &logits)]
        });
    }
    let nan = [1.0, f32::NAN, 2.0];
    case!(report, "cross_entropy of NaN", &[Expected::new(vec![f64::NAN; 4], vec![0.0; 4])], |cpu| {
        let (mut logits, mut losses) = (buffer(cpu, &nan), poisoned(cpu, 1));
        let targets = Targets::of(&[0]);
        cpu.run(Call::CrossEntropy { targets, weights: &[1.0], logits: &mut logits, losses: &mut losses }).unwrap();
        vec![[read(cpu, &losses), read(cpu, &logits)].concat()]
    });
}

#[test]
fn narrow_rows_keep_eleven_bits_and_never_overflow() {
    let mut report = Report::default();
    let mut random = Random(29);
    for (rows, width) in [(0, 5), (1, 1), (3, 64), (19, 65), (40, 576)] {
        if !affordable(rows * width) {
            continue;
        }
        let mut x = random.vector(rows * width);
        for (row, scale) in x.chunks_mut(width).zip([1.0, 1e-30, 3e9, 1e37, 0.0].into_iter().cycle()) {
            row.iter_mut().for_each(|x| *x *= scale);
            // An outlier, as activations have them.
            row[0] *= 1000.0;
        }
        // Half a unit in the last place of an f16; below 2^-28 of the row's largest, that of its smallest numbers.
        let bounds = x.chunks(width).flat_map(|row| {
            let largest = row.iter().fold(0.0_f64, |most, x| most.max(f64::from(x.abs())));
            row.iter()
                .map(move |x| (f64::from(x.abs()) * 2f64.powi(-11)).max(largest * 2f64.powi(-38)))
                .collect::<Vec<_>>()
        });
        let expected = Expected::new(wide(&x), bounds.collect());
        case!(report, &format!("narrow, widen {rows} rows of {width}"), &[expected], |cpu| {
            let mut packed = poisoned(cpu, rows * pocketlora_kernels::narrow_width(width));
            cpu.run(Call::Narrow { width, x: &buffer(cpu, &x), y: &mut packed }).unwrap();
            let mut y = poisoned(cpu, rows * width);
            cpu.run(Call::Widen { width, x: &packed, y: &mut y }).unwrap();
            vec![read(cpu, &y)]
        });
    }
}
