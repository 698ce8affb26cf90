//! A change of what a layer gives, column by column: `y = c x + t swap(x) + s`, where `swap` exchanges the halves of each
//! group of columns and `c`, `t`, `s` are `[out]`; each of the three may be absent. Backward of `c` and `t` reads `x`.

use super::{Change, Context, Gradients};
use crate::adapter::held::TensorId;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call, Columns};

/// See the module's text.
pub(crate) struct Affine {
    /// `c`; ones where it is absent.
    pub scale: Option<TensorId>,
    /// `t`, with the width of half a group.
    pub turn: Option<(TensorId, usize)>,
    /// `s`.
    pub shift: Option<TensorId>,
}

/// `x` with the halves of each group of columns exchanged; a half has `half` of them.
fn swap<B: Backend>(cx: &mut Context<'_, B>, half: usize, x: &B::Buffer) -> Result<B::Buffer> {
    let mut y = cx.pool.take(cx.backend, cx.backend.len(x))?;
    for (from, to) in [(0, half), (half, 0)] {
        let at = |first| Columns { of: 2 * half, first };
        let call = Call::CopyColumns { width: half, x, x_at: at(from), y: &mut y, y_at: at(to), accumulate: false };
        cx.backend.run(call)?;
    }
    Ok(y)
}

impl<B: Backend> Change<B> for Affine {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        let (backend, held) = (cx.backend, cx.held);
        match self.scale {
            Some(c) => backend.run(Call::ScaleColumns { factors: held.buffer(c), x, y })?,
            None => backend.run(Call::Copy { x, y })?,
        }
        if let Some((t, half)) = self.turn {
            let swapped = swap(cx, half, x)?;
            let mut turned = cx.pool.take(backend, backend.len(x))?;
            backend.run(Call::ScaleColumns { factors: held.buffer(t), x: &swapped, y: &mut turned })?;
            backend.run(Call::AddAssign { x: &turned, y })?;
            [swapped, turned].into_iter().for_each(|buffer| cx.pool.put(backend, buffer));
        }
        if let Some(s) = self.shift {
            backend.run(Call::AddBias { bias: held.buffer(s), y })?;
        }
        Ok(())
    }

    fn learns(&self, grads: &mut Gradients<B>) -> bool {
        [self.scale, self.turn.map(|(t, _)| t)].into_iter().flatten().any(|id| grads.of(id).is_some())
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: Option<&B::Buffer>,
        dy: &B::Buffer,
        dx: &mut B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<()> {
        let (backend, held) = (cx.backend, cx.held);
        if let (Some(x), Some(dc)) = (x, self.scale.and_then(|id| grads.of(id))) {
            backend.run(Call::SumColumns { a: dy, b: Some(x), y: dc })?;
        }
        if let Some(ds) = self.shift.and_then(|id| grads.of(id)) {
            backend.run(Call::SumColumns { a: dy, b: None, y: ds })?;
        }
        match self.scale {
            Some(c) => backend.run(Call::ScaleColumns { factors: held.buffer(c), x: dy, y: dx })?,
            None => backend.run(Call::Copy { x: dy, y: dx })?,
        }
        if let Some((t, half)) = self.turn {
            if let (Some(x), Some(dt)) = (x, grads.of(t)) {
                let swapped = swap(cx, half, x)?;
                backend.run(Call::SumColumns { a: dy, b: Some(&swapped), y: dt })?;
                cx.pool.put(backend, swapped);
            }
            // Exchanging twice changes nothing, so swap(t dy) is what flows back.
            let mut scaled = cx.pool.take(backend, backend.len(dy))?;
            backend.run(Call::ScaleColumns { factors: held.buffer(t), x: dy, y: &mut scaled })?;
            let swapped = swap(cx, half, &scaled)?;
            backend.run(Call::AddAssign { x: &swapped, y: dx })?;
            [scaled, swapped].into_iter().for_each(|buffer| cx.pool.put(backend, buffer));
        }
        Ok(())
    }
}
