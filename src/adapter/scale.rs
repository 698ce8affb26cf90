//! Columns scaled by a trained vector: `y[t, c] = l[c] x[t, c]`.

use super::form::{Change, Context, Gradients};
use super::held::TensorId;
use crate::error::Result;
use pocketlora_kernels::Backend;

/// Scales what a layer reads or gives by a vector `l`, `[C]`.
pub(super) struct Scale {
    pub l: TensorId,
}

impl<B: Backend> Change<B> for Scale {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        // y = l x
        scale_columns(cx.backend, cx.held.buffer(self.l), x, y)
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
            sum_columns(cx.backend, dy, x, dl)?;
        }
        // dx = l dy
        scale_columns(cx.backend, cx.held.buffer(self.l), dy, dx)
    }
}

fn host<B: Backend>(backend: &B, x: &B::Buffer) -> Result<Vec<f32>> {
    let mut out = vec![0.0; backend.len(x)];
    backend.read(x, &mut out)?;
    Ok(out)
}

fn scale_columns<B: Backend>(backend: &B, l: &B::Buffer, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
    let (l, mut x) = (host(backend, l)?, host(backend, x)?);
    x.chunks_mut(l.len()).for_each(|row| row.iter_mut().zip(&l).for_each(|(x, l)| *x *= l));
    backend.write(y, &x);
    Ok(())
}

fn sum_columns<B: Backend>(backend: &B, a: &B::Buffer, b: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
    let (a, b, mut sum) = (host(backend, a)?, host(backend, b)?, host(backend, y)?);
    let n = sum.len();
    for (a, b) in a.chunks(n).zip(b.chunks(n)) {
        sum.iter_mut().zip(a.iter().zip(b)).for_each(|(s, (a, b))| *s += a * b);
    }
    backend.write(y, &sum);
    Ok(())
}
