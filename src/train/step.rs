//! Forward, loss and backward of one micro-batch, one layer at a time.

use super::{data::Sample, loss};
use crate::adapter::{Adapters, Dropout};
use crate::error::{Error, ErrorCode, Result};
use crate::exec::train::{Batch, Gradients, Pass};
use crate::exec::{Base, Pool};
use crate::memory::Peak;
use pocketlora_kernels::{Arithmetic, Backend};

/// Samples laid end to end with the rows whose next token is learned.
pub struct MicroBatch {
    batch: Batch,
    /// Rows whose next token is learned.
    pub(super) rows: Vec<u32>,
    /// That token, for each of `rows`.
    pub(super) targets: Vec<u32>,
}

impl MicroBatch {
    /// Joins samples; nothing is padded.
    pub fn new<'s>(samples: impl IntoIterator<Item = &'s Sample>) -> Self {
        let mut out = Self { batch: Batch::default(), rows: Vec::new(), targets: Vec::new() };
        for sample in samples {
            let start = out.batch.ids.len();
            for i in sample.trained.iter().filter(|&i| i > 0) {
                out.rows.push((start + i - 1) as u32);
                out.targets.push(sample.ids[i]);
            }
            out.batch.ids.extend(&sample.ids);
            out.batch.segments.push(sample.ids.len());
        }
        out
    }

    /// Tokens in all.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.batch.ids.len()
    }

    /// Ids of each sample.
    pub(super) fn segments(&self) -> impl Iterator<Item = &[u32]> {
        let mut rest = &self.batch.ids[..];
        self.batch.segments.iter().map(move |&n| {
            let (ids, after) = rest.split_at(n);
            rest = after;
            ids
        })
    }

    /// Tokens learned.
    #[must_use]
    pub fn trained(&self) -> usize {
        self.targets.len()
    }
}

/// Where a pass may be told to stop, and where it measures memory.
pub struct Watch<'a> {
    /// Asked between layers; `false` abandons the pass.
    pub keep_going: &'a mut (dyn FnMut() -> bool + Send),
    /// Sampled where most is held.
    pub peak: &'a mut Peak,
}

impl Watch<'_> {
    pub(super) fn check(&mut self) -> Result<()> {
        if (self.keep_going)() {
            return Ok(());
        }
        Err(Error::new(ErrorCode::Cancelled, "training", "stopped between two layers; the step is not counted"))
    }
}

/// Sum of the losses (natural log) of the learned tokens; adds the gradient of `scale` times that sum to `grads`.
/// Without `grads` only the loss is computed.
///
/// # Errors
/// Out of memory, a stop, an id outside the vocabulary.
pub fn micro_step<B: Backend>(
    base: &Base<B>,
    adapters: &Adapters<B>,
    micro: &MicroBatch,
    scale: f32,
    dropout: Option<Dropout>,
    arithmetic: Arithmetic,
    mut grads: Option<&mut Gradients<B>>,
    pool: &mut Pool<B>,
    watch: &mut Watch<'_>,
) -> Result<f64> {
    base.check_ids(&micro.targets)?;
    let (model, backend) = (&base.model, &base.backend);
    let pass = Pass::new(base, adapters, &micro.batch, dropout, arithmetic, pool)?;

    // Forward: of each layer only the input stays.
    let mut inputs = Vec::new();
    let mut tape = pass.tape(None, false, pool);
    let x = model.embed(&mut tape);
    let mut x = tape.into_value(x)?;
    for layer in 0..model.config().layers {
        watch.check()?;
        let mut tape = pass.tape(Some(x), layer > 0, pool);
        let y = model.layer(&mut tape, layer, pocketlora_models::Tensor(0));
        let (input, output) = tape.into_input_and(y)?;
        if grads.is_some() {
            inputs.push(input);
        } else {
            pool.put(backend, input);
        }
        x = output;
    }

    let (total, mut dx) = loss::loss(&pass, x, micro, scale, grads.as_deref_mut(), pool, watch)?;

    // Backward: each layer runs once more, now with its tape kept until its gradient is through,
    // and without what no gradient needs.
    if let Some(grads) = grads {
        for (layer, input) in inputs.into_iter().enumerate().rev() {
            watch.check()?;
            let mut tape = pass.replay(input, layer > 0, pool);
            let y = model.layer(&mut tape, layer, pocketlora_models::Tensor(0));
            watch.peak.sample();
            match tape.backward(y, dx, grads)? {
                Some(next) => dx = next,
                None => {
                    pass.finish(pool);
                    return Ok(total);
                }
            }
        }
    }
    pool.put(backend, dx);
    pass.finish(pool);
    Ok(total)
}
