//! The loss of a micro-batch and its gradient by the last layer's output.

use super::step::{MicroBatch, Watch};
use crate::error::Result;
use crate::exec::Pool;
use crate::exec::train::{Gradients, Pass};
use pocketlora_kernels::Backend;
use pocketlora_models::Tensor;

/// Rows of logits held at once: `[64, V]`, not `[T, V]`.
pub(crate) const LOGIT_ROWS: usize = 64;

/// Sum of the learned tokens' losses (natural log) over the last layer's output `x` `[T, C]`, and `scale` times its
/// gradient by `x`, which is zero without `grads`. Logits exist for learned tokens only and a chunk of them at a time.
///
/// # Errors
/// Out of memory, a stop.
pub(super) fn loss<B: Backend>(
    pass: &Pass<'_, B>,
    x: B::Buffer,
    micro: &MicroBatch,
    scale: f32,
    mut grads: Option<&mut Gradients<B>>,
    pool: &mut Pool<B>,
    watch: &mut Watch<'_>,
) -> Result<(f64, B::Buffer)> {
    let (model, backend) = (&pass.base().model, &pass.base().backend);
    let width = model.config().hidden_size;
    let mut dx = pool.take(backend, backend.len(&x))?;
    backend.zero(&mut dx);
    let mut total = 0.0;
    for (rows, targets) in micro.rows.chunks(LOGIT_ROWS).zip(micro.targets.chunks(LOGIT_ROWS)) {
        watch.check()?;
        let mut h = pool.take(backend, rows.len() * width)?;
        backend.gather_rows(&x, rows, &mut h);
        let mut losses = pool.take(backend, rows.len())?;
        let mut tape = pass.tape(Some(h), true, pool);
        let y = model.head(&mut tape, Tensor(0));
        backend.cross_entropy(targets, scale, tape.value(y)?, &mut losses);
        watch.peak.sample();
        let dy = tape.take(y);
        let dh = match grads.as_deref_mut() {
            Some(grads) => tape.backward(y, dy, grads)?,
            None => None,
        };
        if let Some(dh) = dh {
            backend.scatter_add_rows(&dh, rows, &mut dx);
            pool.put(backend, dh);
        }
        let mut host = vec![0.0; rows.len()];
        backend.read(&losses, &mut host)?;
        total += host.iter().map(|&l| f64::from(l)).sum::<f64>();
        pool.put(backend, losses);
    }
    pool.put(backend, x);
    Ok((total, dx))
}
