//! AdamW (Loshchilov & Hutter 2019) in the order of operations of `torch.optim.AdamW`, and the sum of squares
//! that gradient clipping needs.

use super::lanes::{LANES, load, store};
use super::split::run;
use super::team::Team;
use crate::AdamW;
use wide::{f32x8, f64x4};

/// Elements per task.
const CHUNK: usize = 4096;

/// `p *= 1 - lr wd; m += (1 - b1)(g - m); v = b2 v + (1 - b2) g²;
/// p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)`.
pub(crate) fn step(team: &Team, settings: &AdamW, grad: &[f32], param: &mut [f32], m: &mut [f32], v: &mut [f32]) {
    assert!(grad.len() == param.len() && m.len() == param.len() && v.len() == param.len());
    let AdamW { lr, beta1, beta2, eps, weight_decay, step } = *settings;
    let (beta1, beta2) = (decimal(beta1), decimal(beta2));
    let correction = |beta: f64| 1.0 - beta.powi(step.cast_signed());
    let splat = |x: f64| f32x8::splat(x as f32);
    let rate = splat(f64::from(lr) / correction(beta1));
    let inverse_root = splat(1.0 / correction(beta2).sqrt());
    let keep = splat(1.0 - f64::from(lr) * f64::from(weight_decay));
    let (fresh1, fresh2, stale2, eps) = (splat(1.0 - beta1), splat(1.0 - beta2), splat(beta2), f32x8::splat(eps));
    let moments = m.chunks_mut(CHUNK).zip(v.chunks_mut(CHUNK));
    let chunks = param.chunks_mut(CHUNK).zip(grad.chunks(CHUNK)).zip(moments).collect();
    run(team, chunks, false, |((param, grad), (m, v))| {
        for i in (0..param.len()).step_by(LANES) {
            let g = load(&grad[i..]);
            let first = load(&m[i..]) + fresh1 * (g - load(&m[i..]));
            let second = stale2 * load(&v[i..]) + fresh2 * g * g;
            let update = rate * first / (second.sqrt() * inverse_root + eps);
            let kept = keep * load(&param[i..]);
            store(&mut param[i..], kept - update);
            store(&mut m[i..], first);
            store(&mut v[i..], second);
        }
    });
}

/// The decimal that was meant before it became an f32: `1 - 0.999` of the f32 is off by 1e-5 of itself, which
/// would part us from torch's doubles.
fn decimal(beta: f32) -> f64 {
    (f64::from(beta) * 1e7).round() / 1e7
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
