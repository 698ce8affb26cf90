//! Short convolutions over segments and from a state.

use super::harness::{EPS, Expected, Random, Report, affordable, buffer, case, poisoned, read, wide};
use super::oracle;
use pocketlora_kernels::{Backend, Call, Memory};

/// `y[t, c] = bias[c] + sum_j w[c, j] x[t - (taps - 1) + j, c]` inside each segment.
fn conv(taps: usize, w: &[f64], bias: Option<&[f64]>, segments: &[usize], x: &[f64]) -> Vec<f64> {
    let channels = w.len() / taps;
    let (mut y, mut start) = (Vec::new(), 0);
    for len in segments {
        for t in 0..*len {
            for c in 0..channels {
                let term = |j: usize| match (t + j + 1).checked_sub(taps) {
                    Some(at) => w[c * taps + j] * x[(start + at) * channels + c],
                    None => 0.0,
                };
                y.push(bias.map_or(0.0, |bias| bias[c]) + (0..taps).map(term).sum::<f64>());
            }
        }
        start += len;
    }
    y
}

/// Taps, channels, segments: every form of the loop, vectors and rests, segments shorter than the taps, an empty one.
const CASES: &[(usize, usize, &[usize])] = &[
    (3, 1, &[1]),
    (3, 8, &[5]),
    (4, 13, &[2, 0, 9, 1]),
    (2, 7, &[3, 3]),
    (7, 20, &[4, 17]),
    (1, 5, &[3]),
    (4, 96, &[70]),
];

#[test]
fn convolutions_and_their_gradients_meet_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(41);
    for &(taps, channels, segments) in CASES {
        let n = segments.iter().sum::<usize>() * channels;
        if !affordable(n * taps) {
            continue;
        }
        let [x, dy] = [0; 2].map(|_| random.vector(n));
        let (w, bias) = (random.vector(taps * channels), random.vector(channels));
        let (w64, bias64, x64, dy64) = (wide(&w), wide(&bias), wide(&x), wide(&dy));
        let bound = |y: Vec<f64>| Expected::new(y, vec![EPS * (taps as f64 + 2.0); n]);
        let dx = oracle::gradient(&x64, &dy64, |x| conv(taps, &w64, None, segments, x));
        let expected = [
            bound(conv(taps, &w64, None, segments, &x64)),
            bound(conv(taps, &w64, Some(&bias64), segments, &x64)),
            Expected::new(dx, vec![EPS * (taps as f64 + 2.0) + 1e-8; n]),
        ];
        case!(report, &format!("conv of {taps} taps, {channels} channels, {segments:?}"), &expected, |device| {
            let [w, bias, x, dy] = [&w, &bias, &x, &dy].map(|x| buffer(device, x));
            let [mut plain, mut biased, mut dx] = [0; 3].map(|_| poisoned(device, n));
            for call in [
                Call::Conv { w: &w, bias: None, segments, x: &x, y: &mut plain },
                Call::Conv { w: &w, bias: Some(&bias), segments, x: &x, y: &mut biased },
                Call::ConvVjpX { w: &w, segments, dy: &dy, dx: &mut dx },
            ] {
                device.run(call).unwrap();
            }
            [plain, biased, dx].map(|b| read(device, &b)).into()
        });
    }
}

/// Whatever the parts in which a text comes, and whatever other rows stand beside it.
#[test]
fn a_convolution_goes_on_from_its_state() {
    let mut report = Report::default();
    let mut random = Random(42);
    for taps in [1, 3, 4, 6] {
        let (channels, tokens) = (9, 23);
        let n = tokens * channels;
        if !affordable(n * taps) {
            continue;
        }
        let (x, w, bias) = (random.vector(n), random.vector(taps * channels), random.vector(channels));
        let y = conv(taps, &wide(&w), Some(&wide(&bias)), &[tokens], &wide(&x));
        let expected = [Expected::new(y, vec![EPS * (taps as f64 + 2.0); n])];
        case!(report, &format!("conv of {taps} taps from a state"), &expected, |device| {
            let [w, bias, x] = [&w, &bias, &x].map(|x| buffer(device, x));
            let (mut whole, mut parts) = (poisoned(device, n), poisoned(device, n));
            let (w, bias, x) = (&w, Some(&bias), &x);
            device.run(Call::Conv { w, bias, segments: &[tokens], x, y: &mut whole }).unwrap();
            let (mut state, mut at) = (device.buffer((taps - 1) * channels).unwrap(), 0);
            for len in [1, 1, 0, 2, 7, 3, 1, 8] {
                let (state, rows) = (&mut state, at..at + len);
                device.run(Call::ConvFrom { w, bias, state, x, y: &mut parts, rows }).unwrap();
                at += len;
            }
            assert_eq!((read(device, &whole), at), (read(device, &parts), tokens));
            vec![read(device, &parts)]
        });
    }
}
