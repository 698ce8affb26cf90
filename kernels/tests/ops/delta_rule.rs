//! The gated delta rule over segments and from a state.

use super::harness::{EPS, Expected, Random, Report, affordable, buffer, case, poisoned, read, wide};
use super::oracle;
use pocketlora_kernels::{Backend, Call, DeltaRule, Memory};

/// `q`, `k`, `v`, `g`, `beta`.
type Inputs<T> = [Vec<T>; 5];

/// One state matrix after the other, row by row, as the paper has it.
fn delta_rule(spec: &DeltaRule, segments: &[usize], [q, k, v, g, beta]: &Inputs<f64>) -> Vec<f64> {
    let DeltaRule { key_heads, value_heads, key_dim, value_dim } = *spec;
    let mut y = vec![0.0; v.len()];
    let mut start = 0;
    for len in segments {
        for head in 0..value_heads {
            let mut state = vec![vec![0.0; value_dim]; key_dim];
            for t in start..start + len {
                let key = (t * key_heads + head * key_heads / value_heads) * key_dim;
                let at = t * value_heads + head;
                state.iter_mut().flatten().for_each(|s| *s *= g[at].exp());
                for j in 0..value_dim {
                    let known: f64 = (0..key_dim).map(|i| state[i][j] * k[key + i]).sum();
                    let news = beta[at] * (v[at * value_dim + j] - known);
                    for i in 0..key_dim {
                        state[i][j] += k[key + i] * news;
                    }
                    y[at * value_dim + j] = (0..key_dim).map(|i| state[i][j] * q[key + i]).sum();
                }
            }
        }
        start += len;
    }
    y
}

/// Queries and keys of length 1 at most, decays and strengths in their ranges.
fn inputs(random: &mut Random, spec: &DeltaRule, tokens: usize) -> Inputs<f32> {
    let DeltaRule { key_heads, value_heads, key_dim, value_dim } = *spec;
    let mut keys = || {
        let x = random.vector(tokens * key_heads * key_dim);
        x.into_iter().map(|x| x / (key_dim as f32).sqrt()).collect()
    };
    let (q, k) = (keys(), keys());
    let v = random.vector(tokens * value_heads * value_dim);
    let mut gates = |scale: f32| random.vector(tokens * value_heads).into_iter().map(|x| (x + 1.0) * scale).collect();
    [q, k, v, gates(-0.4), gates(0.5)]
}

fn spec(key_heads: usize, value_heads: usize, key_dim: usize, value_dim: usize) -> DeltaRule {
    DeltaRule { key_heads, value_heads, key_dim, value_dim }
}

/// Heads that share keys and that do not, whole blocks of 32 columns and rests, chunks of 32 tokens and their borders.
const CASES: &[(DeltaRule, &[usize])] = &[
    (DeltaRule { key_heads: 1, value_heads: 1, key_dim: 1, value_dim: 1 }, &[1]),
    (DeltaRule { key_heads: 1, value_heads: 2, key_dim: 3, value_dim: 2 }, &[4]),
    (DeltaRule { key_heads: 2, value_heads: 6, key_dim: 5, value_dim: 7 }, &[3, 0, 2]),
    (DeltaRule { key_heads: 1, value_heads: 1, key_dim: 4, value_dim: 32 }, &[6]),
    (DeltaRule { key_heads: 2, value_heads: 2, key_dim: 33, value_dim: 70 }, &[3, 1]),
    (DeltaRule { key_heads: 1, value_heads: 1, key_dim: 2, value_dim: 3 }, &[31, 32]),
    (DeltaRule { key_heads: 1, value_heads: 2, key_dim: 3, value_dim: 2 }, &[33]),
    (DeltaRule { key_heads: 1, value_heads: 1, key_dim: 2, value_dim: 2 }, &[130, 1]),
];

#[test]
fn delta_rules_and_their_gradients_meet_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(51);
    for (spec, segments) in CASES {
        let tokens: usize = segments.iter().sum();
        if !affordable(tokens * spec.state_len()) {
            continue;
        }
        let x = inputs(&mut random, spec, tokens);
        let dy = random.vector(x[2].len());
        let (x64, dy64) = (x.each_ref().map(|x| wide(x)), wide(&dy));
        let mut expected = vec![Expected::norm(delta_rule(spec, segments, &x64), 32.0 * EPS)];
        for which in 0..5 {
            let gradient = oracle::gradient(&x64[which], &dy64, |changed| {
                let mut x = x64.clone();
                x[which] = changed.to_vec();
                delta_rule(spec, segments, &x)
            });
            expected.push(Expected::norm(gradient, 64.0 * EPS));
        }
        case!(report, &format!("delta_rule {spec:?} {segments:?}"), &expected, |device| {
            let buffers = x.each_ref().map(|x| buffer(device, x));
            let [q, k, v, g, beta] = buffers.each_ref();
            let (mut y, dy) = (poisoned(device, dy.len()), &buffer(device, &dy));
            device.run(Call::DeltaRule { spec, segments, q, k, v, g, beta, y: &mut y }).unwrap();
            let mut d = x.each_ref().map(|x| poisoned(device, x.len()));
            let [dq, dk, dv, dg, dbeta] = d.each_mut();
            let call = Call::DeltaRuleVjp { spec, segments, q, k, v, g, beta, dy, dq, dk, dv, dg, dbeta };
            device.run(call).unwrap();
            [&y].into_iter().chain(&d).map(|b| read(device, b)).collect()
        });
    }
}

/// Whatever the parts in which a text comes, and whatever other rows stand beside it: the same bits.
#[test]
fn a_delta_rule_goes_on_from_its_state() {
    let mut report = Report::default();
    let mut random = Random(52);
    for (spec, parts) in [
        (spec(1, 2, 3, 5), [1, 2, 0, 1]),
        (spec(2, 4, 8, 40), [1, 1, 5, 2]),
        (spec(2, 2, 64, 64), [70, 1, 1, 20]),
        (spec(4, 8, 128, 128), [1, 3, 1, 0]),
    ] {
        let tokens: usize = parts.iter().sum();
        if !affordable(tokens * spec.state_len()) {
            continue;
        }
        let x = inputs(&mut random, &spec, tokens);
        let y = delta_rule(&spec, &[tokens], &x.each_ref().map(|x| wide(x)));
        case!(report, &format!("delta_rule {spec:?} in parts {parts:?}"), &[Expected::norm(y, 64.0 * EPS)], |device| {
            let buffers = x.each_ref().map(|x| buffer(device, x));
            let (mut whole, mut by_parts) = (poisoned(device, x[2].len()), poisoned(device, x[2].len()));
            let ([q, k, v, g, beta], spec) = (buffers.each_ref(), &spec);
            device.run(Call::DeltaRule { spec, segments: &[tokens], q, k, v, g, beta, y: &mut whole }).unwrap();
            let (mut state, mut at) = (device.buffer(spec.state_len()).unwrap(), 0);
            for len in parts {
                let (state, y, rows) = (&mut state, &mut by_parts, at..at + len);
                device.run(Call::DeltaRuleFrom { spec, q, k, v, g, beta, state, y, rows }).unwrap();
                at += len;
            }
            assert_eq!(read(device, &whole), read(device, &by_parts));
            vec![read(device, &by_parts)]
        });
    }
}
