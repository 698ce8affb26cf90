//! A change of what a layer reads along a few directions: `y = x + (x Uᵀ) Vᵀ` with `U` `[r, in]`, `V` `[in, r]`. Backward
//! computes `x Uᵀ` once more from `x`.

use super::{Change, Context, Gradients};
use crate::adapter::held::TensorId;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};

/// See the module's text.
pub(crate) struct Reflect {
    pub u: TensorId,
    pub v: TensorId,
}

impl Reflect {
    /// `x Uᵀ`.
    fn low<B: Backend>(&self, cx: &mut Context<'_, B>, x: &B::Buffer) -> Result<B::Buffer> {
        let u = cx.held.matrix(self.u);
        let (rank, width) = cx.backend.shape(u);
        let mut low = cx.pool.take(cx.backend, cx.backend.len(x) / width * rank)?;
        cx.backend.run(Call::Matmul { arithmetic: cx.arithmetic, w: u, x, y: &mut low, accumulate: false })?;
        Ok(low)
    }
}

impl<B: Backend> Change<B> for Reflect {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        let low = self.low(cx, x)?;
        cx.backend.run(Call::Copy { x, y })?;
        let v = cx.held.matrix(self.v);
        cx.backend.run(Call::Matmul { arithmetic: cx.arithmetic, w: v, x: &low, y, accumulate: true })?;
        cx.pool.put(cx.backend, low);
        Ok(())
    }

    fn learns(&self, grads: &mut Gradients<B>) -> bool {
        grads.of(self.u).is_some() || grads.of(self.v).is_some()
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: Option<&B::Buffer>,
        dy: &B::Buffer,
        dx: &mut B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<()> {
        let (backend, arithmetic) = (cx.backend, cx.arithmetic);
        let (u, v) = (cx.held.matrix(self.u), cx.held.matrix(self.v));
        let (rank, width) = backend.shape(u);
        let tokens = backend.len(dy) / width;
        // y = x + low Vᵀ with low = x Uᵀ
        let mut dlow = cx.pool.take(backend, tokens * rank)?;
        backend.run(Call::MatmulVjpX { arithmetic, terms: &[(v, dy)], dx: &mut dlow, accumulate: false })?;
        if let Some(x) = x {
            let low = self.low(cx, x)?;
            if let Some(dv) = grads.of(self.v) {
                backend.run(Call::MatmulVjpW { tokens, dy, x: &low, dw: dv })?;
            }
            if let Some(du) = grads.of(self.u) {
                backend.run(Call::MatmulVjpW { tokens, dy: &dlow, x, dw: du })?;
            }
            cx.pool.put(backend, low);
        }
        backend.run(Call::Copy { x: dy, y: dx })?;
        backend.run(Call::MatmulVjpX { arithmetic, terms: &[(u, &dlow)], dx, accumulate: true })?;
        cx.pool.put(backend, dlow);
        Ok(())
    }
}
