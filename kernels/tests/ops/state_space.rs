//! Mamba 2's state space over segments and from a state.

use super::harness::{EPS, Expected, Random, Report, affordable, buffer, case, poisoned, read, wide};
use super::oracle;
use pocketlora_kernels::{Backend, Call, Memory, StateSpace};

/// `x`, `b`, `c`, `dt`, then `rate`, `bias`, `skip`.
type Inputs<T> = [Vec<T>; 7];

/// One state after the other, element by element, as the paper has it.
fn state_space(spec: &StateSpace, segments: &[usize], [x, b, c, dt, rate, bias, skip]: &Inputs<f64>) -> Vec<f64> {
    let StateSpace { heads, head_dim, groups, state_dim, limits } = *spec;
    let mut y = vec![0.0; x.len()];
    let mut start = 0;
    for len in segments {
        for head in 0..heads {
            let mut state = vec![vec![0.0; head_dim]; state_dim];
            for t in start..start + len {
                let group = (t * groups + head * groups / heads) * state_dim;
                let at = t * heads + head;
                let step = (dt[at] + bias[head]).exp().ln_1p().clamp(f64::from(limits.0), f64::from(limits.1));
                let decay = (-rate[head].exp() * step).exp();
                for p in 0..head_dim {
                    let x = x[at * head_dim + p];
                    for n in 0..state_dim {
                        state[n][p] = decay * state[n][p] + b[group + n] * step * x;
                    }
                    let seen: f64 = (0..state_dim).map(|n| state[n][p] * c[group + n]).sum();
                    y[at * head_dim + p] = seen + skip[head] * x;
                }
            }
        }
        start += len;
    }
    y
}

fn inputs(random: &mut Random, spec: &StateSpace, tokens: usize) -> Inputs<f32> {
    let StateSpace { heads, head_dim, groups, state_dim, .. } = *spec;
    let mut vector = |len: usize, scale: f32| random.vector(len).into_iter().map(|x| x * scale).collect::<Vec<_>>();
    let narrow = (state_dim as f32).sqrt().recip();
    let (x, b) = (vector(tokens * heads * head_dim, 1.0), vector(tokens * groups * state_dim, narrow));
    let (c, dt) = (vector(tokens * groups * state_dim, narrow), vector(tokens * heads, 2.0));
    [x, b, c, dt, vector(heads, 1.0), vector(heads, 1.0), vector(heads, 1.0)]
}

const fn spec(heads: usize, head_dim: usize, groups: usize, state_dim: usize) -> StateSpace {
    StateSpace { heads, head_dim, groups, state_dim, limits: (0.0, f32::INFINITY) }
}

/// Groups and heads that do not fill tasks, whole blocks of columns and rests, chunks of 64 tokens and their borders.
const CASES: &[(StateSpace, &[usize])] = &[
    (spec(1, 1, 1, 1), &[1]),
    (spec(2, 2, 1, 3), &[4]),
    (spec(6, 3, 2, 5), &[3, 0, 5]),
    (spec(5, 2, 1, 2), &[6]),
    (spec(10, 1, 1, 2), &[7, 2]),
    (spec(2, 70, 1, 4), &[5]),
    (spec(1, 4, 1, 33), &[6, 1]),
    (StateSpace { limits: (0.4, 1.1), ..spec(2, 2, 2, 2) }, &[9]),
    (spec(1, 2, 1, 3), &[63, 64]),
    (spec(2, 2, 1, 2), &[65]),
    (spec(1, 2, 1, 2), &[130, 1]),
    // Enough for two threads.
    (spec(16, 1, 1, 64), &[65]),
];

#[test]
fn state_spaces_and_their_gradients_meet_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(61);
    for (spec, segments) in CASES {
        let tokens: usize = segments.iter().sum();
        if !affordable(tokens * spec.state_len()) {
            continue;
        }
        let x = inputs(&mut random, spec, tokens);
        let dy = random.vector(x[0].len());
        let (x64, dy64) = (x.each_ref().map(|x| wide(x)), wide(&dy));
        let mut expected = vec![Expected::norm(state_space(spec, segments, &x64), 32.0 * EPS)];
        for which in 0..4 {
            let gradient = oracle::gradient(&x64[which], &dy64, |changed| {
                let mut x = x64.clone();
                x[which] = changed.to_vec();
                state_space(spec, segments, &x)
            });
            expected.push(Expected::norm(gradient, 64.0 * EPS));
        }
        case!(report, &format!("state_space {spec:?} {segments:?}"), &expected, |device| {
            let buffers = x.each_ref().map(|x| buffer(device, x));
            let [x, b, c, dt, rate, bias, skip] = buffers.each_ref();
            let (mut y, dy) = (poisoned(device, dy.len()), &buffer(device, &dy));
            device.run(Call::StateSpace { spec, segments, rate, bias, skip, x, b, c, dt, y: &mut y }).unwrap();
            let mut d = [x, b, c, dt].map(|x| poisoned(device, device.len(x)));
            let [dx, db, dc, ddt] = d.each_mut();
            let call = Call::StateSpaceVjp { spec, segments, rate, bias, skip, x, b, c, dt, dy, dx, db, dc, ddt };
            device.run(call).unwrap();
            [&y].into_iter().chain(&d).map(|b| read(device, b)).collect()
        });
    }
}

/// Whatever the parts in which a text comes, and whatever other rows stand beside it.
#[test]
fn a_state_space_goes_on_from_its_state() {
    let mut report = Report::default();
    let mut random = Random(62);
    for (spec, parts) in [
        (spec(2, 5, 1, 3), [1, 2, 0, 1]),
        (spec(4, 40, 2, 8), [1, 1, 5, 2]),
        (spec(2, 64, 1, 64), [70, 1, 1, 20]),
        (spec(8, 64, 1, 128), [1, 3, 1, 4]),
    ] {
        let tokens: usize = parts.iter().sum();
        if !affordable(tokens * spec.state_len()) {
            continue;
        }
        let x = inputs(&mut random, &spec, tokens);
        let y = state_space(&spec, &[tokens], &x.each_ref().map(|x| wide(x)));
        let (name, expected) = (format!("state_space {spec:?} in parts {parts:?}"), [Expected::norm(y, 64.0 * EPS)]);
        case!(report, &name, &expected, |device| {
            let buffers = x.each_ref().map(|x| buffer(device, x));
            let (mut y, spec) = (poisoned(device, x[0].len()), &spec);
            let [x, b, c, dt, rate, bias, skip] = buffers.each_ref();
            let (mut state, mut at) = (device.buffer(spec.state_len()).unwrap(), 0);
            for len in parts {
                let (state, y, rows) = (&mut state, &mut y, at..at + len);
                let call = Call::StateSpaceFrom { spec, rate, bias, skip, x, b, c, dt, state, y, rows };
                device.run(call).unwrap();
                at += len;
            }
            vec![read(device, &y)]
        });
    }
}
