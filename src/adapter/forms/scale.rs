//! Columns scaled by a trained vector: `y[t, c] = l[c] x[t, c]`.

use super::{Change, Context, Gradients};
use crate::adapter::held::TensorId;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};

/// Scales what a layer reads or gives by a vector `l`, `[C]`.
pub(crate) struct Scale {
    pub l: TensorId,
}

impl<B: Backend> Change<B> for Scale {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        // y = l x
        Ok(cx.backend.run(Call::ScaleColumns { factors: cx.held.buffer(self.l), x, y })?)
    }

    fn learns(&self, grads: &mut Gradients<B>) -> bool {
        grads.of(self.l).is_some()
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: Option<&B::Buffer>,
        dy: &B::Buffer,
        dx: &mut B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<()> {
        if let (Some(x), Some(dl)) = (x, grads.of(self.l)) {
            // dl[c] += sum over t of dy x: of the unscaled x, for where l is 0 the scaled one tells nothing.
            cx.backend.run(Call::SumColumns { a: dy, b: Some(x), y: dl })?;
        }
        // dx = l dy
        Ok(cx.backend.run(Call::ScaleColumns { factors: cx.held.buffer(self.l), x: dy, y: dx })?)
    }
}
