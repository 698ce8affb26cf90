//! The loss of a micro-batch and its gradient by the last layer's output.

use super::step::{MicroBatch, Watch};
use super::sums::Sums;
use crate::adapter::Gradients;
use crate::base::Pool;
use crate::error::Result;
use crate::exec::train::Pass;
use pocketlora_kernels::{Backend, Call, Targets};
use pocketlora_models::Value;

/// Rows of logits held at once where they must be made: `[64, V]`, not `[T, V]`.
const LOGIT_ROWS: usize = 64;
/// Rows given at once to the loss that needs no logits; bounds its memory, and is enough to pay for reading the head.
const LOSS_ROWS: usize = 512;

/// Adds the learned tokens' losses (natural log) over the last layer's output `x` `[T, C]` to number `at` of `sums`. Returns
/// the gradient by `x` of `scale` times the sum of the losses times their weights, which nobody asks for without `grads`. No logits are held where the head is a product and nothing else;
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
    sums: (&mut Sums<B>, usize),
    watch: &mut Watch<'_>,
) -> Result<Option<B::Buffer>> {
    let backend = &pass.base().backend;
    let width = pass.base().model.config().hidden_size;
    let chunk = at_once.clamp(1, if pass.plain_head().is_some() { LOSS_ROWS } else { LOGIT_ROWS });
    let mut dx = grads.is_some().then(|| pool.take(backend, backend.len(&x))).transpose()?;
    if let Some(dx) = &mut dx {
        backend.run(Call::Zero { x: dx })?;
    }
    let (sums, at) = sums;
    let weights = micro.scaled_weights(scale);
    let each = micro.target_width();
    let mut shares = micro.shares.chunks(chunk * each.max(1));
    let targets = micro.targets.chunks(chunk * each.max(1)).zip(weights.chunks(chunk));
    for (rows, (ids, weights)) in micro.rows.chunks(chunk).zip(targets) {
        watch.check()?;
        let targets = (Targets { ids, shares: shares.next().unwrap_or_default() }, weights);
        let mut h = pool.take(backend, rows.len() * width)?;
        backend.run(Call::GatherRows { x: &x, rows, y: &mut h })?;
        let (losses, dh) = rows_loss(pass, h, targets, grads.as_deref_mut(), pool, watch)?;
        if let (Some(dh), Some(dx)) = (dh, &mut dx) {
            backend.run(Call::ScatterAddRows { x: &dh, rows, y: dx })?;
            pool.put(backend, dh);
        }
        sums.add(backend, at, &losses)?;
        pool.put(backend, losses);
    }
    pool.put(backend, x);
    Ok(dx)
}

/// The losses of the rows `h`, whose targets have weights, and the gradient by `h` if there are `grads`.
fn rows_loss<B: Backend>(
    pass: &Pass<'_, B>,
    h: B::Buffer,
    (targets, weights): (Targets<'_>, &[f32]),
    grads: Option<&mut Gradients<B>>,
    pool: &mut Pool<B>,
    watch: &mut Watch<'_>,
) -> Result<(B::Buffer, Option<B::Buffer>)> {
    let (model, backend) = (&pass.base().model, &pass.base().backend);
    let mut losses = pool.take(backend, weights.len())?;
    let Some(head) = pass.plain_head() else {
        let mut tape = pass.tape(Some(h), true, pool);
        let y = model.head(&mut tape, Value(0));
        backend.run(Call::CrossEntropy { targets, weights, logits: tape.value(y)?, losses: &mut losses })?;
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
    backend.run(Call::LinearCrossEntropy {
        arithmetic,
        w: head,
        targets,
        weights,
        x: normed,
        losses: &mut losses,
        dx: dy.as_mut(),
    })?;
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
