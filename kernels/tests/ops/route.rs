//! Routing to experts.

use super::harness::{EPS, Expected, Random, Report, affordable, buffer, case, poisoned, read, wide};
use super::oracle;
use pocketlora_kernels::{Backend, Call, Scores};

/// The weights of the experts `chosen` `[T, k]`.
fn weights(scores: Scores, normalize: bool, experts: usize, chosen: &[usize], logits: &[f64]) -> Vec<f64> {
    let rows = logits.chunks(experts);
    let top_k = chosen.len() / rows.len();
    let row = |(logits, chosen): (&[f64], &[usize])| {
        let (p, least) = match scores {
            Scores::Softmax => (oracle::softmax(logits), 0.0),
            Scores::Sigmoid => (logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect(), 1e-6),
        };
        let sum = if normalize { chosen.iter().map(|e| p[*e]).sum::<f64>() + least } else { 1.0 };
        chosen.iter().map(|e| p[*e] / sum).collect::<Vec<f64>>()
    };
    rows.zip(chosen.chunks(top_k)).flat_map(row).collect()
}

#[test]
fn routing_and_its_gradient_meet_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(71);
    for (t, experts, top_k) in [(1, 1, 1), (3, 4, 2), (40, 8, 3), (5, 128, 8), (2, 6, 6)] {
        let ways = [Scores::Softmax, Scores::Sigmoid].map(|scores| [(scores, false), (scores, true)]);
        for (scores, normalize) in ways.into_iter().flatten() {
            if !affordable(t * experts * t) {
                continue;
            }
            let logits: Vec<f32> = random.vector(t * experts).iter().map(|x| x * 5.0).collect();
            let dweights = random.vector(t * top_k);
            let largest = |row: &[f32]| {
                let mut order: Vec<usize> = (0..experts).collect();
                order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
                order[..top_k].to_vec()
            };
            let chosen: Vec<usize> = logits.chunks(experts).flat_map(largest).collect();
            let of = |logits: &[f64]| weights(scores, normalize, experts, &chosen, logits);
            let dlogits = oracle::gradient(&wide(&logits), &wide(&dweights), of);
            let expected = [
                Expected::new(chosen.iter().map(|e| *e as f64).collect(), vec![0.0; t * top_k]),
                Expected::new(of(&wide(&logits)), vec![8.0 * EPS; t * top_k]),
                Expected::new(dlogits, vec![16.0 * EPS; t * experts]),
            ];
            let name = format!("route of {t} tokens to {top_k} of {experts}, {scores:?}, normalized: {normalize}");
            case!(report, &name, &expected, |device| {
                let (logits, dweights) = (&buffer(device, &logits), &buffer(device, &dweights));
                let (mut chosen, mut weights) = (poisoned(device, t * top_k), poisoned(device, t * top_k));
                device.run(Call::TopK { k: top_k, x: logits, chosen: &mut chosen }).unwrap();
                let weights_now = &mut weights;
                let call = Call::Route { top_k, scores, normalize, logits, chosen: &chosen, weights: weights_now };
                device.run(call).unwrap();
                let mut dlogits = poisoned(device, t * experts);
                let (chosen_then, dlogits_now) = (&chosen, &mut dlogits);
                device
                    .run(Call::RouteVjp {
                        top_k,
                        scores,
                        normalize,
                        logits,
                        chosen: chosen_then,
                        dweights,
                        dlogits: dlogits_now,
                    })
                    .unwrap();
                [chosen, weights, dlogits].map(|b| read(device, &b)).into()
            });
        }
    }
}

/// Equal logits go to the first experts; a NaN is no reason to choose one twice or none.
#[test]
fn ties_and_nan_choose_distinct_experts() {
    let mut report = Report::default();
    let nan = f32::NAN;
    for (logits, chosen) in [
        ([1.0, 2.0, 2.0, 2.0], [1.0, 2.0, 3.0]),
        ([nan, nan, nan, nan], [0.0, 1.0, 2.0]),
        ([nan, 0.5, nan, 0.7], [3.0, 1.0, 0.0]),
    ] {
        case!(report, &format!("choice of {logits:?}"), &[Expected::new(chosen.into(), vec![0.0; 3])], |device| {
            let mut chosen = poisoned(device, 3);
            device.run(Call::TopK { k: 3, x: &buffer(device, &logits), chosen: &mut chosen }).unwrap();
            vec![read(device, &chosen)]
        });
    }
}
