//! Losses against distributions over some tokens, with logits in memory and without.
//!
//! The oracle is the divergence as it is defined, and its differences.

use super::harness::{Expected, Random, Report, buffer, case, poisoned, read, wide};
use super::oracle;
use super::weights::{self, Kind};
use pocketlora_kernels::{Arithmetic, Backend, Call, FloatType, Memory, Targets};

/// `sum p log(p / q) + p_rest log(p_rest / q_rest)`.
fn divergence(logits: &[f64], ids: &[u32], shares: &[f64]) -> f64 {
    let q = oracle::softmax(logits);
    let sum: f64 = shares.iter().sum();
    let p_rest = if 1.0 - sum < 1e-3 { 0.0 } else { 1.0 - sum };
    let chosen: Vec<(&u32, &f64)> = ids.iter().zip(shares).filter(|(_, p)| **p > 0.0).collect();
    // Token by token, for a difference from 1 loses digits.
    let others = (0..q.len()).filter(|v| chosen.iter().all(|(id, _)| **id as usize != *v));
    let q_rest: f64 = others.map(|v| q[v]).sum();
    let mut loss: f64 = chosen.iter().map(|(id, p)| **p * (**p / q[**id as usize]).ln()).sum();
    if p_rest > 0.0 {
        let tangent = p_rest / 16.0;
        loss += if q_rest >= tangent {
            p_rest * (p_rest / q_rest).ln()
        } else {
            p_rest * (16f64.ln() - (q_rest - tangent) / tangent)
        };
    }
    loss
}

/// The slope of `f` by each of `x`.
fn slopes(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let at = |i: usize, by: f64| {
        let mut x = x.to_vec();
        x[i] += by;
        f(&x)
    };
    (0..x.len()).map(|i| (at(i, STEP) - at(i, -STEP)) / (2.0 * STEP)).collect()
}

struct Case {
    name: &'static str,
    /// Of the distribution's tokens, by their number and what the logits give them.
    share: fn(usize, f64) -> f64,
    /// Rows are so many times the weight of their first token: of 0, they are random.
    sure: f32,
}

const CASES: &[Case] = &[
    Case { name: "that agree", share: |_, q| q, sure: 0.0 },
    Case { name: "that differ", share: |k, _| 0.5 / (k + 1) as f64, sure: 0.0 },
    Case { name: "without a rest", share: |_, _| 0.25, sure: 0.0 },
    Case { name: "with a token that has no share", share: |k, _| if k == 1 { 0.0 } else { 0.2 }, sure: 0.0 },
    Case { name: "whose rest is gone", share: |k, _| 0.3 / (k + 1) as f64, sure: 4.0 },
];

/// Tokens of a distribution.
const K: usize = 4;
/// `[N, V, C]`: borders of bands of 512 rows and of tasks of 16 rows.
const SHAPES: [[usize; 3]; 3] = [[1, 5, 3], [17, 513, 8], [34, 1030, 16]];

#[test]
#[cfg_attr(miri, ignore = "too long")]
fn distributions_meet_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(71);
    let kinds = [Kind::Dense(FloatType::F32), Kind::Nf4 { block: 64, double: true, dtype: FloatType::F16 }];
    for (shape, case) in SHAPES.iter().flat_map(|shape| CASES.iter().map(move |case| (shape, case))) {
        let &[n, vocab, width] = shape;
        let (source, w) = weights::random(&mut random, kinds[vocab % 2], vocab, width);
        let ids: Vec<u32> = (0..n * K).map(|i| ((i / K * 31 + i % K * (vocab / K)) % vocab) as u32).collect();
        let x: Vec<f32> = match case.sure {
            0.0 => random.vector(n * width).iter().map(|x| x * 3.0).collect(),
            sure => {
                ids.iter().step_by(K).flat_map(|id| &w[*id as usize * width..][..width]).map(|w| w * sure).collect()
            }
        };
        let weights: Vec<f32> = [0.5, 2.0, 0.0].into_iter().cycle().take(n).collect();
        let w = wide(&w);
        let logits_of = |x: &[f64]| oracle::matmul(x, &w, width).0;
        let logits = logits_of(&wide(&x));
        let rows = || logits.chunks(vocab).zip(ids.chunks(K));
        let shares: Vec<f32> = rows()
            .flat_map(|(l, ids)| {
                let q = oracle::softmax(l);
                ids.iter().enumerate().map(|(k, id)| (case.share)(k, q[*id as usize]) as f32).collect::<Vec<_>>()
            })
            .collect();
        let [mut losses, mut by_logits, mut by_x] = [const { Vec::new() }; 3];
        for (((l, ids), p), (x, weight)) in rows().zip(shares.chunks(K)).zip(wide(&x).chunks(width).zip(wide(&weights)))
        {
            let p = wide(p);
            losses.push(divergence(l, ids, &p));
            by_logits.extend(slopes(l, |l| divergence(l, ids, &p)).into_iter().map(|slope| weight * slope));
            by_x.extend(slopes(x, |x| divergence(&logits_of(x), ids, &p)).into_iter().map(|slope| weight * slope));
        }
        let within = |values: &[f64], bound: f64| Expected::new(values.to_vec(), vec![bound; values.len()]);
        // A logit of up to 50 is exact to EPS of itself, and the slope of a rest that is gone is 16.
        let expected = [within(&losses, 2e-4), within(&by_logits, 2e-4)];
        case!(report, &format!("distributions {}, {shape:?}", case.name), &expected, |device| {
            let (mut l, mut losses) =
                (buffer(device, &logits.iter().map(|l| *l as f32).collect::<Vec<_>>()), poisoned(device, n));
            let targets = Targets { ids: &ids, shares: &shares };
            device.run(Call::CrossEntropy { targets, weights: &weights, logits: &mut l, losses: &mut losses }).unwrap();
            vec![read(device, &losses), read(device, &l)]
        });
        for (arithmetic, rounding) in [(Arithmetic::Exact, 1e-4), (Arithmetic::Bf16, 0.1)] {
            let expected = [within(&losses, rounding), within(&losses, rounding), within(&by_x, 4.0 * rounding)];
            case!(report, &format!("distributions {}, {arithmetic:?} {shape:?}", case.name), &expected, |device| {
                let (w, x) = (device.matrix(source.clone()).unwrap(), buffer(device, &x));
                let [mut losses, mut alone] = [0; 2].map(|_| poisoned(device, n));
                let mut dx = poisoned(device, device.len(&x));
                for (losses, dx) in [(&mut losses, Some(&mut dx)), (&mut alone, None)] {
                    let targets = Targets { ids: &ids, shares: &shares };
                    let weights = &weights;
                    let call = Call::LinearCrossEntropy { arithmetic, w: &w, targets, weights, x: &x, losses, dx };
                    device.run(call).unwrap();
                }
                [losses, alone, dx].map(|b| read(device, &b)).into()
            });
        }
    }
}
