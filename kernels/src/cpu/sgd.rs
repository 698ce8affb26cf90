//! Optimizers with one moment or none: SGD with momentum (Polyak 1964, as `torch.optim.SGD` with dampening 0) and Lion
//! (Chen et al. 2023, <https://arxiv.org/abs/2302.06675>), both with decoupled weight decay.
//!
//! No product and sum are rounded at once, so that every instruction set gives the same bits.

use super::Cpu;
use super::adamw::{CHUNK, decimal, keep};
use super::split::run;
use crate::{Lion, Sgd};

/// `p = (1 - lr wd) p - lr g`, or with a moment `m = momentum m + g; p = (1 - lr wd) p - lr m`.
pub(crate) fn sgd(cpu: &Cpu, settings: &Sgd, grad: &[f32], param: &mut [f32], m: Option<&mut [f32]>) {
    assert!(grad.len() == param.len() && m.as_ref().is_none_or(|m| m.len() == param.len()));
    let (keep, light) = (keep(settings.lr, settings.weight_decay), cpu.table.light());
    let (lr, momentum) = (settings.lr, settings.momentum);
    let chunks = param.chunks_mut(CHUNK).zip(grad.chunks(CHUNK));
    match m {
        None => run(&cpu.team, chunks.collect(), false, |(param, grad)| light.sgd(keep, lr, grad, param)),
        Some(m) => {
            let chunks = chunks.zip(m.chunks_mut(CHUNK)).collect();
            run(&cpu.team, chunks, false, |((param, grad), m)| light.sgd_momentum(keep, lr, momentum, grad, param, m));
        }
    }
}

/// `p = (1 - lr wd) p - lr sign(b1 m + (1 - b1) g); m = b2 m + (1 - b2) g`, with `sign(0) = 0`.
pub(crate) fn lion(cpu: &Cpu, settings: &Lion, grad: &[f32], param: &mut [f32], m: &mut [f32]) {
    assert!(grad.len() == param.len() && m.len() == param.len());
    let (keep, lr, light) = (keep(settings.lr, settings.weight_decay), settings.lr, cpu.table.light());
    let betas = [settings.beta1, settings.beta2].map(decimal).map(|b| (b as f32, (1.0 - b) as f32));
    let chunks = param.chunks_mut(CHUNK).zip(grad.chunks(CHUNK)).zip(m.chunks_mut(CHUNK)).collect();
    run(&cpu.team, chunks, false, |((param, grad), m)| light.lion(keep, lr, betas, grad, param, m));
}

#[inline(always)]
pub(super) fn plain(keep: f32, lr: f32, grad: &[f32], param: &mut [f32]) {
    param.iter_mut().zip(grad).for_each(|(p, g)| *p = keep * *p - lr * g);
}

#[inline(always)]
pub(super) fn with_momentum(keep: f32, lr: f32, momentum: f32, grad: &[f32], param: &mut [f32], m: &mut [f32]) {
    for ((p, g), m) in param.iter_mut().zip(grad).zip(m) {
        *m = momentum * *m + g;
        *p = keep * *p - lr * *m;
    }
}

#[inline(always)]
pub(super) fn by_sign(keep: f32, lr: f32, betas: [(f32, f32); 2], grad: &[f32], param: &mut [f32], m: &mut [f32]) {
    let [(stale1, fresh1), (stale2, fresh2)] = betas;
    for ((p, g), m) in param.iter_mut().zip(grad).zip(m) {
        let along = stale1 * *m + fresh1 * g;
        let sign = f32::from(u8::from(along > 0.0)) - f32::from(u8::from(along < 0.0));
        *p = keep * *p - lr * sign;
        *m = stale2 * *m + fresh2 * g;
    }
}
