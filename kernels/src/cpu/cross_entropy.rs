//! Cross-entropy of softmax with integer targets, or the divergence from a distribution over some tokens, and its gradient
//! in place of the logits.
//!
//! `loss = log sum e^x - x[target]` (natural log), `d loss / d x = softmax(x) - onehot(target)`; for distributions see
//! [`Targets`].

use super::Cpu;
use super::elementwise::scale_part;
use super::soft_targets;
use super::split::{run, with_scratch};
use crate::Targets;

/// Rows `[N, V]` become gradients of `weights[n] * losses[n]`.
pub(crate) fn forward_vjp(cpu: &Cpu, targets: Targets<'_>, weights: &[f32], logits: &mut [f32], losses: &mut [f32]) {
    assert!(weights.len() == losses.len());
    if weights.is_empty() {
        return assert!(logits.is_empty());
    }
    let (vocab, width) = (logits.len() / weights.len(), targets.width(weights.len()));
    assert_eq!(logits.len(), vocab * weights.len());
    targets.check(weights.len(), vocab);
    let light = cpu.table.light();
    let rows = logits.chunks_exact_mut(vocab).zip(losses).zip(targets.ids.chunks_exact(width).zip(weights));
    if targets.shares.is_empty() {
        run(&cpu.team, rows.collect(), false, |((x, loss), (target, weight))| {
            let (target, weight) = (target[0] as usize, f64::from(*weight));
            let (max, picked) = (light.largest(x), x[target]);
            let sum = light.exp_sum(x, max);
            *loss = (sum.ln() + f64::from(max) - f64::from(picked)) as f32;
            let probability = f64::from(x[target]) / sum;
            scale_part((weight / sum) as f32, x);
            // In f64: `p - 1` of a sure prediction would lose its digits in f32.
            x[target] = (weight * (probability - 1.0)) as f32;
        });
        return;
    }
    let rows = rows.zip(targets.shares.chunks_exact(width)).collect();
    run(&cpu.team, rows, false, |(((x, loss), (ids, weight)), shares)| {
        with_scratch(width, |own| {
            own.iter_mut().zip(ids).for_each(|(own, id)| *own = x[*id as usize]);
            let max = light.largest(x);
            let sum = light.exp_sum(x, max);
            let (divergence, common) = soft_targets::row(shares, own, max, sum);
            *loss = divergence as f32;
            scale_part((f64::from(*weight) * common / sum) as f32, x);
            ids.iter().zip(own).for_each(|(id, own)| x[*id as usize] += weight * *own);
        });
    });
}
