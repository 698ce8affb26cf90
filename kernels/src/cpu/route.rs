//! Which experts a token goes to in a mixture of experts (Shazeer et al. 2017), and how much each counts.
//!
//! With `p = softmax(l)` over the `E` logits of a token, the `k` largest are chosen, of equals the first. Their weights
//! are `w = p` or, normalized, `w = p / (sum of the chosen p)`, which is the softmax of the chosen logits alone.
//! Backward, with the choice as it is: `dl_e = p_e (dw_e - D)` with `D = sum_j w_j dw_j`; of an expert not chosen `dw` is 0
//! and, normalized, its `p` counts as 0, too.
//!
//! With sigmoids `s`, `w = s` or, normalized, `w = s / (sum of the chosen s + 1e-6)`, and `dl_e = w_e (dw_e - D) (1 - s_e)`
//! with `D` as above or, not normalized, 0; that of an expert not chosen is 0.

use super::Cpu;
use super::light::Light;
use super::split::run;
use crate::Scores;

/// Added to a sum of sigmoids, which may be as small.
const LEAST: f32 = 1e-6;
/// Tokens of a task.
const ROWS: usize = 16;

/// `chosen[T, k]` (numbers of experts, the likeliest first) from `logits[T, E]`.
pub(crate) fn top_k(cpu: &Cpu, k: usize, logits: &[f32], chosen: &mut [f32]) {
    let experts = experts(k, logits, chosen);
    let tasks = logits.chunks(ROWS * experts).zip(chosen.chunks_mut(ROWS * k)).collect();
    run(&cpu.team, tasks, false, |(logits, chosen)| {
        logits
            .chunks_exact(experts)
            .zip(chosen.chunks_exact_mut(k))
            .for_each(|(logits, chosen)| choose(logits, chosen));
    });
}

/// `weights[T, k]` of the experts `chosen[T, k]` from `logits[T, E]`.
pub(crate) fn forward(
    cpu: &Cpu,
    top_k: usize,
    (scores, normalize): (Scores, bool),
    logits: &[f32],
    chosen: &[f32],
    weights: &mut [f32],
) {
    let experts = experts(top_k, logits, chosen);
    assert_eq!(chosen.len(), weights.len());
    let rows = chosen.chunks(ROWS * top_k).zip(weights.chunks_mut(ROWS * top_k));
    let tasks = logits.chunks(ROWS * experts).zip(rows).collect();
    run(&cpu.team, tasks, false, |(logits, (chosen, weights))| {
        let mut p = vec![0.0; experts];
        let rows = chosen.chunks_exact(top_k).zip(weights.chunks_exact_mut(top_k));
        for (logits, (chosen, weights)) in logits.chunks_exact(experts).zip(rows) {
            if scores == Scores::Sigmoid {
                sigmoids(logits, chosen, normalize, weights);
                continue;
            }
            probabilities(cpu.table.light(), logits, chosen, normalize, &mut p);
            chosen.iter().zip(weights).for_each(|(expert, weight)| *weight = p[*expert as usize]);
        }
    });
}

/// `dlogits[T, E]` from `dweights[T, k]`.
pub(crate) fn vjp(
    cpu: &Cpu,
    top_k: usize,
    (scores, normalize): (Scores, bool),
    logits: &[f32],
    chosen: &[f32],
    dweights: &[f32],
    dlogits: &mut [f32],
) {
    let experts = experts(top_k, logits, chosen);
    assert!(chosen.len() == dweights.len() && logits.len() == dlogits.len());
    let inputs = chosen.chunks(ROWS * top_k).zip(dweights.chunks(ROWS * top_k));
    let tasks = logits.chunks(ROWS * experts).zip(dlogits.chunks_mut(ROWS * experts)).zip(inputs).collect();
    run(&cpu.team, tasks, false, |((logits, dlogits), (chosen, dweights))| {
        let rows = logits.chunks_exact(experts).zip(dlogits.chunks_exact_mut(experts));
        let inputs = chosen.chunks_exact(top_k).zip(dweights.chunks_exact(top_k));
        for ((logits, p), (chosen, dweights)) in rows.zip(inputs) {
            if scores == Scores::Sigmoid {
                sigmoids_vjp(logits, chosen, normalize, dweights, p);
                continue;
            }
            probabilities(cpu.table.light(), logits, chosen, normalize, p);
            let terms = chosen.iter().zip(dweights);
            let along: f32 = terms.clone().map(|(expert, dw)| p[*expert as usize] * dw).sum();
            // A chosen expert's own term, while its place still holds `p`.
            let own = terms.map(|(expert, dw)| (*expert as usize, p[*expert as usize] * dw)).collect::<Vec<_>>();
            p.iter_mut().for_each(|p| *p *= -along);
            own.into_iter().for_each(|(expert, own)| p[expert] += own);
        }
    });
}

/// The experts with the largest logits. A NaN among them is passed over as long as there are others.
fn choose(logits: &[f32], chosen: &mut [f32]) {
    for i in 0..chosen.len() {
        let (before, rest) = chosen.split_at_mut(i);
        let free = |e: &usize| !before.contains(&(*e as f32));
        let larger = |best: usize, e: usize| {
            if logits[e] > logits[best] || logits[best].is_nan() && !logits[e].is_nan() { e } else { best }
        };
        rest[0] = (0..logits.len()).filter(free).reduce(larger).expect("no more are chosen than there are") as f32;
    }
}

/// The softmax over all experts or, normalized, over the chosen ones with zeros for the others.
fn probabilities(light: &Light, logits: &[f32], chosen: &[f32], normalize: bool, p: &mut [f32]) {
    p.copy_from_slice(logits);
    if normalize {
        p.fill(f32::NEG_INFINITY);
        chosen.iter().for_each(|expert| p[*expert as usize] = logits[*expert as usize]);
    }
    let max = light.largest(p);
    let sum = light.exp_sum(p, max);
    p.iter_mut().for_each(|p| *p = (f64::from(*p) / sum) as f32);
}

/// The weights of the `chosen` by their sigmoids.
fn sigmoids(logits: &[f32], chosen: &[f32], normalize: bool, weights: &mut [f32]) {
    chosen.iter().zip(&mut *weights).for_each(|(expert, weight)| *weight = sigmoid(logits[*expert as usize]));
    if normalize {
        let sum = weights.iter().sum::<f32>() + LEAST;
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
}

/// Their gradient by the logits.
fn sigmoids_vjp(logits: &[f32], chosen: &[f32], normalize: bool, dweights: &[f32], dlogits: &mut [f32]) {
    let mut weights = vec![0.0; chosen.len()];
    sigmoids(logits, chosen, normalize, &mut weights);
    let terms = weights.iter().zip(dweights);
    let along = if normalize { terms.clone().map(|(w, dw)| w * dw).sum() } else { 0.0 };
    dlogits.fill(0.0);
    for (expert, (w, dw)) in chosen.iter().zip(terms) {
        let expert = *expert as usize;
        dlogits[expert] = w * (dw - along) * (1.0 - sigmoid(logits[expert]));
    }
}

/// Of so few that vectors would not pay.
fn sigmoid(x: f32) -> f32 {
    (1.0 / (1.0 + (-f64::from(x)).exp())) as f32
}

fn experts(top_k: usize, logits: &[f32], chosen: &[f32]) -> usize {
    assert!(top_k > 0 && chosen.len().is_multiple_of(top_k));
    let tokens = chosen.len() / top_k;
    let experts = logits.len() / tokens.max(1);
    assert!(logits.len() == tokens * experts && (tokens == 0 || (top_k..1 << 24).contains(&experts)));
    experts.max(1)
}
