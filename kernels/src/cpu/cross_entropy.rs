//! Cross-entropy of softmax with integer targets, and its gradient in place of the logits.
//!
//! `loss = log sum e^x - x[target]` (natural log), `d loss / d x = softmax(x) - onehot(target)`.

use super::Cpu;
use super::elementwise::scale_part;
use super::split::run;

/// Rows `[N, V]` become gradients of `weights[n] * losses[n]`.
pub(crate) fn forward_vjp(cpu: &Cpu, targets: &[u32], weights: &[f32], logits: &mut [f32], losses: &mut [f32]) {
    assert!(targets.len() == losses.len() && targets.len() == weights.len());
    if targets.is_empty() {
        return assert!(logits.is_empty());
    }
    let vocab = logits.len() / targets.len();
    assert_eq!(logits.len(), vocab * targets.len());
    assert!(targets.iter().all(|target| (*target as usize) < vocab), "target beyond the `{vocab}` logits");
    let rows = logits.chunks_exact_mut(vocab).zip(losses).zip(targets.iter().zip(weights)).collect();
    let light = cpu.table.light();
    run(&cpu.team, rows, false, |((x, loss), (target, weight))| {
        let (target, weight) = (*target as usize, f64::from(*weight));
        let (max, picked) = (light.largest(x), x[target]);
        let sum = light.exp_sum(x, max);
        *loss = (sum.ln() + f64::from(max) - f64::from(picked)) as f32;
        let probability = f64::from(x[target]) / sum;
        scale_part((weight / sum) as f32, x);
        // In f64: `p - 1` of a sure prediction would lose its digits in f32.
        x[target] = (weight * (probability - 1.0)) as f32;
    });
}
