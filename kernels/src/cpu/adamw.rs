//! AdamW (Loshchilov & Hutter 2019) in the order of operations of `torch.optim.AdamW`, and the sum of squares
//! that gradient clipping needs.
//!
//! No product and sum are rounded at once, so that every instruction set gives the same bits.

use super::Cpu;
use super::split::run;
use super::team::Team;
use crate::AdamW;
use wide::f64x4;

/// Elements per task: whole blocks of the 8-bit states.
pub(super) const CHUNK: usize = 4096;

/// What the settings of a step come to for its elements.
pub(crate) struct Factors {
    /// On the parameter.
    pub keep: f32,
    /// On the update: the learning rate over the first moment's bias correction.
    pub rate: f32,
    /// On the root of the second moment: one over the root of its bias correction.
    pub inverse_root: f32,
    /// On what is new in the first and in the second moment, and on what was in the second.
    pub fresh1: f32,
    pub fresh2: f32,
    pub stale2: f32,
    pub eps: f32,
}

impl Factors {
    pub(super) fn new(settings: &AdamW) -> Self {
        let AdamW { lr, beta1, beta2, eps, weight_decay, step } = *settings;
        let (beta1, beta2) = (decimal(beta1), decimal(beta2));
        let correction = |beta: f64| 1.0 - beta.powi(step.cast_signed());
        Self {
            keep: keep(lr, weight_decay),
            rate: (f64::from(lr) / correction(beta1)) as f32,
            inverse_root: (1.0 / correction(beta2).sqrt()) as f32,
            fresh1: (1.0 - beta1) as f32,
            fresh2: (1.0 - beta2) as f32,
            stale2: beta2 as f32,
            eps,
        }
    }
}

/// `1 - lr wd`, what decoupled weight decay leaves of a parameter.
pub(super) fn keep(lr: f32, weight_decay: f32) -> f32 {
    (1.0 - f64::from(lr) * f64::from(weight_decay)) as f32
}

/// The decimal that was meant before it became an f32: `1 - 0.999` of the f32 is off by 1e-5 of itself, which
/// would part us from torch's doubles.
pub(super) fn decimal(beta: f32) -> f64 {
    (f64::from(beta) * 1e7).round() / 1e7
}

/// `p *= 1 - lr wd; m += (1 - b1)(g - m); v = b2 v + (1 - b2) g²;
/// p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)`.
pub(crate) fn step(cpu: &Cpu, settings: &AdamW, grad: &[f32], param: &mut [f32], m: &mut [f32], v: &mut [f32]) {
    assert!(grad.len() == param.len() && m.len() == param.len() && v.len() == param.len());
    let (factors, light) = (Factors::new(settings), cpu.table.light());
    let moments = m.chunks_mut(CHUNK).zip(v.chunks_mut(CHUNK));
    let chunks = param.chunks_mut(CHUNK).zip(grad.chunks(CHUNK)).zip(moments).collect();
    run(&cpu.team, chunks, false, |((param, grad), (m, v))| light.adamw(&factors, grad, param, m, v));
}

/// The elements of one task.
#[inline(always)]
pub(super) fn elements(f: &Factors, grad: &[f32], param: &mut [f32], m: &mut [f32], v: &mut [f32]) {
    let n = param.len();
    let (grad, m, v) = (&grad[..n], &mut m[..n], &mut v[..n]);
    for i in 0..n {
        let g = grad[i];
        m[i] += f.fresh1 * (g - m[i]);
        v[i] = f.stale2 * v[i] + f.fresh2 * g * g;
        let update = f.rate * m[i] / (v[i].sqrt() * f.inverse_root + f.eps);
        param[i] = f.keep * param[i] - update;
    }
}

/// `sum x²` in f64: chunks in parallel, their sums in order.
pub(crate) fn sum_squares(team: &Team, x: &[f32]) -> f64 {
    let mut sums = vec![0.0; x.len().div_ceil(CHUNK)];
    run(team, sums.iter_mut().zip(x.chunks(CHUNK)).collect(), false, |(sum, x)| {
        let mut total = f64x4::ZERO;
        for x in x.chunks(4) {
            let mut lanes = [0.0; 4];
            lanes.iter_mut().zip(x).for_each(|(lane, x)| *lane = f64::from(*x));
            let lanes = f64x4::new(lanes);
            total += lanes * lanes;
        }
        *sum = total.reduce_add();
    });
    sums.iter().sum()
}
