//! Sharpness-aware steps (SAM, Foret et al. 2021): the gradient that the optimizer gets is that of the loss a little way up the
//! hill, at `w + rho g / |g|` with `g` the gradient at `w`, so that flat places are preferred. `w` is the adapter's tensors
//! alone. A step takes twice the time, and a copy of the adapter.

use super::config::TrainConfig;
use super::{MicroBatch, Observer, Trainer};
use crate::error::{Error, Result};
use pocketlora_kernels::{Backend, Call, Sgd};

/// Beyond that, nothing is left of the adapter up there, whose tensors have a norm of some tens.
const FARTHEST: f32 = 100.0;

impl TrainConfig {
    /// Checks `rho`.
    ///
    /// # Errors
    /// It is out of range.
    pub(super) fn check_sam(&self) -> Result<()> {
        match self.sam {
            Some(rho) if !(rho > 0.0 && rho <= FARTHEST) => {
                Err(Error::config("sam", format!("a distance above 0, up to {FARTHEST}, such as 0.05"), rho))
            }
            _ => Ok(()),
        }
    }
}

impl<B: Backend> Trainer<B> {
    /// In place of the gradient of norm `norm` that is there, the one up the hill; returns its norm. The tensors are as they were
    /// afterwards, to the bit, whatever went wrong.
    ///
    /// # Errors
    /// As a step.
    pub(super) fn up_the_hill(
        &mut self,
        number: u64,
        micros: &[MicroBatch],
        trained: usize,
        norm: f64,
        observer: &mut dyn Observer,
    ) -> Result<f64> {
        let Some(rho) = self.config.sam.filter(|_| norm > 0.0) else { return Ok(norm) };
        // Downhill by a negative rate.
        let lr = -(f64::from(rho) / norm) as f32;
        let mut before = Vec::with_capacity(self.tensors.len());
        let climbed = self.climb(lr, &mut before).and_then(|()| self.gradient(number, micros, trained, observer));
        let Self { base, adapters, tensors, facts, .. } = self;
        for (t, copy) in tensors.iter().zip(&before) {
            let mut done = Ok(());
            let back = &mut |master: &mut B::Buffer| done = base.backend.run(Call::Copy { x: copy, y: master });
            adapters.held_mut().update(&base.backend, t.id, back);
            done?;
        }
        adapters.renew(base, facts.step)?;
        climbed.map(|found| found.norm)
    }

    /// Moves all tensors along their gradients by `-lr`, after copies were put into `before`.
    fn climb(&mut self, lr: f32, before: &mut Vec<B::Buffer>) -> Result<()> {
        let Self { base, adapters, tensors, grads, facts, .. } = self;
        let backend = &base.backend;
        let step = Sgd { lr, momentum: 0.0, weight_decay: 0.0 };
        for t in tensors.iter() {
            let mut copy = backend.buffer(t.spec.values())?;
            let mut done = Ok(());
            let grad = grads.of(t.id);
            adapters.held_mut().update(backend, t.id, &mut |master| {
                done = backend.run(Call::Copy { x: master, y: &mut copy });
                if let (Ok(()), Some(grad)) = (&done, &grad) {
                    done = backend.run(Call::Sgd { step: &step, grad, param: master, m: None });
                }
            });
            done?;
            before.push(copy);
        }
        adapters.renew(base, facts.step)
    }
}
