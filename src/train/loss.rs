//! The loss of a micro-batch and its gradient by the last layer's output.

use super::step::{MicroBatch, Watch};
use crate::adapter::Gradients;
use crate::base::Pool;
use crate::error::Result;
use crate::exec::train::Pass;
use pocketlora_kernels::Backend;
use pocketlora_models::Value;

/// Rows of logits held at once where they must be made: `[64, V]`, not `[T, V]`.
const LOGIT_ROWS: usize = 64;
/// Rows given at once to the loss that needs no logits; bounds its memory, and is enough to pay for reading the head.
const LOSS_ROWS: usize = 512;

/// Sum of the learned tokens' losses (natural log) over the last layer's output `x` `[T, C]`, and `scale` times its
/// gradient by `x`, which nobody asks for without `grads`. No logits are held where the head is a product and nothing else;
/// elsewhere they exist for learned tokens only and a chunk of them at a time. `at_once` bounds the chunk further.
///
/// # Errors
/// Out of memory, a stop.
pub(super) fn loss<B: Backend>(
    pass: &Pass<'_, B>,
    x: B::Buffer,
    micro: &MicroBatch,
    scale: f32,
    at_once: usize,
    mut grads: Option<&mut Gradients<B>>,
    pool: &mut Pool<B>,
    watch: &mut Watch<'_>,
) -> Result<(f64, Option<B::Buffer>)> {
    let backend = &pass.base().backend;
    let width = pass.base().model.config().hidden_size;
    let chunk = at_once.clamp(1, if pass.plain_head().is_some() { LOSS_ROWS } else { LOGIT_ROWS });
    let mut dx = grads.is_some().then(|| pool.take(backend, backend.len(&x))).transpose()?;
    dx.iter_mut().for_each(|dx| backend.zero(dx));
    let mut total = 0.0;
    for (rows, targets) in micro.rows.chunks(chunk).zip(micro.targets.chunks(chunk)) {
        watch.check()?;
        let mut h = pool.take(backend, rows.len() * width)?;
        backend.gather_rows(&x, rows, &mut h);
        let (losses, dh) = rows_loss(pass, h, targets, scale, grads.as_deref_mut(), pool, watch)?;
        if let (Some(dh), Some(dx)) = (dh, &mut dx) {
            backend.scatter_add_rows(&dh, rows, dx);
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

/// The losses of the rows `h`, and the gradient by `h` if there are `grads`.
fn rows_loss<B: Backend>(
    pass: &Pass<'_, B>,
    h: B::Buffer,
    targets: &[u32],
    scale: f32,
    grads: Option<&mut Gradients<B>>,
    pool: &mut Pool<B>,
    watch: &mut Watch<'_>,
) -> Result<(B::Buffer, Option<B::Buffer>)> {
    let (model, backend) = (&pass.base().model, &pass.base().backend);
    let mut losses = pool.take(backend, targets.len())?;
    let Some(head) = pass.plain_head() else {
        let mut tape = pass.tape(Some(h), true, pool);
        let y = model.head(&mut tape, Value(0));
        backend.cross_entropy(targets, &vec![scale; targets.len()], tape.value(y)?, &mut losses);
        watch.peak.sample();
        let dh = match grads {
            Some(grads) => {
                let dy = tape.take(y);
                tape.backward(y, dy, grads)?
            }
            None => {
                let logits = tape.into_value(y)?;
                pool.put(backend, logits);
                None
            }
        };
        return Ok((losses, dh));
    };
    let mut dy = match grads {
        Some(_) => Some(pool.take(backend, backend.len(&h))?),
        None => None,
    };
    let mut tape = pass.tape(Some(h), true, pool);
    let y = model.norm(&mut tape, Value(0));
    let normed = tape.value(y)?;
    let arithmetic = pass.arithmetic();
    backend.linear_cross_entropy(
        arithmetic,
        head,
        targets,
        &vec![scale; targets.len()],
        normed,
        &mut losses,
        dy.as_mut(),
    )?;
    watch.peak.sample();
    let dh = match (dy, grads) {
        (Some(dy), Some(grads)) => tape.backward(y, dy, grads)?,
        _ => {
            let normed = tape.into_value(y)?;
            pool.put(backend, normed);
            None
        }
    };
    Ok((losses, dh))
}
