//! The loss of a linear head without its logits.

use super::harness::{EPS, Expected, Random, Report, affordable, buffer, case, poisoned, read, wide};
use super::oracle;
use super::weights::{self, Kind};
use pocketlora_kernels::{Arithmetic, Backend, Call, FloatType, MatrixSource, Memory, Targets};

const KINDS: [Kind; 4] = [
    Kind::Dense(FloatType::F16),
    Kind::Dense(FloatType::F32),
    Kind::Dense(FloatType::BF16),
    Kind::Nf4 { block: 64, double: true, dtype: FloatType::F16 },
];

/// `[N, V, C]`: nothing, a single choice, parts of vectors, borders of bands of 512 rows and of tasks of 16 tokens.
const SHAPES: &[[usize; 3]] = &[
    [0, 5, 8],
    [1, 1, 3],
    [3, 7, 33],
    [2, 511, 16],
    [8, 512, 64],
    [17, 513, 40],
    [9, 1024, 24],
    [33, 1500, 96],
    [70, 90, 64],
];

/// Weights of the rows, in turn.
fn weights_of(n: usize) -> Vec<f32> {
    [0.25, 1.5, -0.5, 0.0].into_iter().cycle().take(n).collect()
}

/// Losses, and gradients by `x` of their sum with `weights`, with the sums of absolute values that bounds follow from.
fn definition(x: &[f64], w: &[f64], targets: &[u32], weights: &[f32], width: usize) -> [Vec<f64>; 4] {
    let (logits, sizes) = oracle::matmul(x, w, width);
    let vocab = w.len() / width;
    let [mut losses, mut gradients, mut logit_sizes, mut sums] = [const { Vec::new() }; 4];
    for ((l, size), (target, weight)) in
        logits.chunks(vocab).zip(sizes.chunks(vocab)).zip(targets.iter().zip(wide(weights)))
    {
        let (p, target) = (oracle::softmax(l), *target as usize);
        losses.push(-p[target].ln());
        logit_sizes.push(size.iter().fold(0.0_f64, |m, s| m.max(*s)));
        for c in 0..width {
            let column = || w.iter().skip(c).step_by(width);
            let mean: f64 = p.iter().zip(column()).map(|(p, w)| p * w).sum();
            let sum: f64 = p.iter().zip(column()).map(|(p, w)| p * w.abs()).sum();
            gradients.push(weight * (mean - w[target * width + c]));
            sums.push(weight.abs() * (sum + w[target * width + c].abs()));
        }
    }
    [losses, gradients, logit_sizes, sums]
}

/// Losses and gradients of the op, losses alone once more.
fn run<B: Backend>(
    device: &B,
    arithmetic: Arithmetic,
    source: &MatrixSource,
    targets: &[u32],
    x: &[f32],
) -> Vec<Vec<f32>> {
    let (w, x) = (device.matrix(source.clone()).unwrap(), buffer(device, x));
    let [mut losses, mut alone] = [0; 2].map(|_| poisoned(device, targets.len()));
    let (mut dx, weights) = (poisoned(device, device.len(&x)), &weights_of(targets.len()));
    let targets = Targets::of(targets);
    device
        .run(Call::LinearCrossEntropy {
            arithmetic,
            w: &w,
            targets,
            weights,
            x: &x,
            losses: &mut losses,
            dx: Some(&mut dx),
        })
        .unwrap();
    device
        .run(Call::LinearCrossEntropy { arithmetic, w: &w, targets, weights, x: &x, losses: &mut alone, dx: None })
        .unwrap();
    [losses, alone, dx].map(|b| read(device, &b)).into()
}

#[test]
fn linear_cross_entropy_meets_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(61);
    for (i, &[n, vocab, width]) in SHAPES.iter().enumerate() {
        if !affordable(n * vocab * width) {
            continue;
        }
        for (arithmetic, rounding) in [(Arithmetic::Exact, 0.0), (Arithmetic::Bf16, 1.0 / 256.0)] {
            let kind = KINDS[i % KINDS.len()];
            let (source, w) = weights::random(&mut random, kind, vocab, width);
            // Logits of some +-10, so that maxima and their places matter.
            let x: Vec<f32> = random.vector(n * width).iter().map(|x| x * 8.0).collect();
            let targets: Vec<u32> = (0..n).map(|_| (random.bits() % vocab as u64) as u32).collect();
            let [losses, gradients, sizes, sums] = definition(&wide(&x), &wide(&w), &targets, &weights_of(n), width);
            // A logit's error: a rounding of each operand, and of the sum. A loss has two of them, a probability the same
            // error in proportion; the products' own roundings come on top.
            let error = |size: f64| 2.0 * rounding * size + EPS * (width as f64 / 8.0 + 16.0) * (size + 1.0);
            let loss_bounds: Vec<f64> = sizes.iter().map(|size| 2.0 * error(*size) + 16.0 * EPS).collect();
            let bounds = sums.iter().enumerate().map(|(i, sum)| {
                let logit = error(sizes[i / width]);
                sum * (2.0 * (logit.exp() - 1.0) + 2.0 * rounding + EPS * (vocab as f64 / 8.0 + 32.0)) + 1e-30
            });
            let expected = [
                Expected::new(losses.clone(), loss_bounds.clone()),
                Expected::new(losses, loss_bounds),
                Expected::new(gradients, bounds.collect()),
            ];
            let name = format!("linear_cross_entropy {arithmetic:?} {kind:?} N={n} V={vocab} C={width}");
            case!(report, &name, &expected, |device| run(device, arithmetic, &source, &targets, &x));
        }
    }
}

/// What is learned leaves no gradient, in bf16 either: its rounding must not stay behind.
#[test]
#[cfg_attr(miri, ignore = "too long")]
fn a_sure_target_leaves_no_gradient() {
    let mut report = Report::default();
    let mut random = Random(62);
    let (n, vocab, width) = (16, 1100, 64);
    let (source, w) = weights::random(&mut random, KINDS[0], vocab, width);
    let targets: Vec<u32> = (0..n).map(|_| (random.bits() % vocab as u64) as u32).collect();
    // Rows of the head themselves, so long that nothing else comes near.
    let rows = targets.iter().flat_map(|t| &w[*t as usize * width..][..width]);
    let x: Vec<f32> = rows.map(|w| w * 30.0).collect();
    let zeros = |len, bound| Expected::new(vec![0.0; len], vec![bound; len]);
    let expected = [zeros(n, 1e-5), zeros(n, 1e-5), zeros(n * width, 1e-6)];
    for arithmetic in [Arithmetic::Exact, Arithmetic::Bf16] {
        case!(report, &format!("sure targets, {arithmetic:?}"), &expected, |device| {
            run(device, arithmetic, &source, &targets, &x)
        });
    }
}

#[test]
#[cfg_attr(miri, ignore = "too long")]
fn linear_cross_entropy_carries_the_special_values() {
    let mut report = Report::default();
    let (vocab, width) = (1030, 8);
    let nan = |len| Expected::new(vec![f64::NAN; len], vec![0.0; len]);
    let (source, w) = weights::random(&mut Random(63), KINDS[1], vocab, width);
    // Beyond the first rows, the others must not notice.
    let good: Vec<f32> = Random(64).vector(9 * width);
    let targets = [1029, 0, 511, 512, 700, 3, 4, 5, 6, 7];
    let [losses, gradients, ..] = definition(&wide(&good), &wide(&w), &targets[1..], &weights_of(10)[1..], width);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let x = [&[bad; 8][..], &good].concat();
        let expected = [
            nan(1),
            Expected::norm(losses.clone(), 64.0 * EPS),
            nan(1),
            Expected::norm(losses.clone(), 64.0 * EPS),
            nan(width),
            Expected::norm(gradients.clone(), 256.0 * EPS),
        ];
        case!(report, &format!("linear_cross_entropy with {bad}"), &expected, |device| {
            let got = run(device, Arithmetic::Exact, &source, &targets, &x);
            let parts = |x: &[f32], at: usize| [x[..at].to_vec(), x[at..].to_vec()];
            [parts(&got[0], 1), parts(&got[1], 1), parts(&got[2], width)].concat()
        });
    }
    // Rows of the head that rule themselves out, the whole first band among them.
    let values: Vec<f32> = (0..vocab).flat_map(|v| [if v < 520 { f32::NEG_INFINITY } else { w[v * width] }]).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let column = MatrixSource {
        rows: vocab,
        cols: 1,
        data: pocketlora_kernels::MatrixData::Dense(FloatType::F32, bytes.into()),
    };
    let possible: Vec<f64> = values[520..].iter().map(|v| f64::from(*v)).collect();
    let loss = |target: usize| -oracle::softmax(&possible)[target - 520].ln();
    let losses = Expected::new(vec![loss(520), loss(1029), f64::INFINITY], vec![1e-5; 3]);
    case!(report, "linear_cross_entropy with impossible tokens", &[losses], |device| {
        let w = device.matrix(column.clone()).unwrap();
        let (x, mut losses) = (buffer(device, &[1.0; 3]), poisoned(device, 3));
        device
            .run(Call::LinearCrossEntropy {
                arithmetic: Arithmetic::Exact,
                w: &w,
                targets: Targets::of(&[520, 1029, 3]),
                weights: &[1.0; 3],
                x: &x,
                losses: &mut losses,
                dx: None,
            })
            .unwrap();
        vec![read(device, &losses)]
    });
}

#[test]
#[should_panic(expected = "target beyond")]
fn a_target_beyond_the_head_is_a_bug() {
    let cpu = pocketlora_kernels::Cpu::new(1);
    let (source, _) = weights::random(&mut Random(65), KINDS[0], 4, 8);
    let w = cpu.matrix(source).unwrap();
    let [x, mut losses] = [8, 1].map(|n| cpu.buffer(n).unwrap());
    let _ = cpu.run(Call::LinearCrossEntropy {
        arithmetic: Arithmetic::Exact,
        w: &w,
        targets: Targets::of(&[4]),
        weights: &[1.0],
        x: &x,
        losses: &mut losses,
        dx: None,
    });
}
