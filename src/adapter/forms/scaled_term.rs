//! A low-rank term of fixed matrices with trained scales: `y = x Wᵀ + s b ((d (x Aᵀ)) Bᵀ)` with `A` `[r, in]`, `B` `[out, r]`,
//! `d` `[r]`, `b` `[out]`. Backward keeps nothing: `x Aᵀ` and the term are computed once more from `x`.

use super::{Context, Gradients, Term};
use crate::adapter::held::{Held, TensorId};
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};

/// See the module's text.
pub(crate) struct ScaledTerm {
    pub a: TensorId,
    pub b: TensorId,
    /// `d`.
    pub inner: TensorId,
    /// `b`.
    pub outer: TensorId,
    /// `s`.
    pub factor: f32,
}

impl ScaledTerm {
    /// What it is multiplied by.
    fn strength<B: Backend>(&self, held: &Held<B>) -> f32 {
        self.factor * held.strength(self.a)
    }

    /// `x Aᵀ` and `(d (x Aᵀ)) Bᵀ`.
    fn parts<B: Backend>(&self, cx: &mut Context<'_, B>, x: &B::Buffer) -> Result<[B::Buffer; 2]> {
        let (backend, held, arithmetic) = (cx.backend, cx.held, cx.arithmetic);
        let (a, b) = (held.matrix(self.a), held.matrix(self.b));
        let ((rank, input), (out, _)) = (backend.shape(a), backend.shape(b));
        let tokens = backend.len(x) / input;
        let mut low = cx.pool.take(backend, tokens * rank)?;
        let mut scaled = cx.pool.take(backend, tokens * rank)?;
        let mut high = cx.pool.take(backend, tokens * out)?;
        backend.run(Call::Matmul { arithmetic, w: a, x, y: &mut low, accumulate: false })?;
        backend.run(Call::ScaleColumns { factors: held.buffer(self.inner), x: &low, y: &mut scaled })?;
        backend.run(Call::Matmul { arithmetic, w: b, x: &scaled, y: &mut high, accumulate: false })?;
        cx.pool.put(backend, scaled);
        Ok([low, high])
    }
}

impl<B: Backend> Term<B> for ScaledTerm {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        let [low, high] = self.parts(cx, x)?;
        let (backend, held) = (cx.backend, cx.held);
        let mut term = cx.pool.take(backend, backend.len(&high))?;
        backend.run(Call::ScaleColumns { factors: held.buffer(self.outer), x: &high, y: &mut term })?;
        if self.strength(cx.held) != 1.0 {
            backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut term })?;
        }
        backend.run(Call::AddAssign { x: &term, y })?;
        [low, high, term].into_iter().for_each(|buffer| cx.pool.put(backend, buffer));
        Ok(())
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: &B::Buffer,
        dy: &B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<B::Buffer> {
        let [low, high] = self.parts(cx, x)?;
        let (backend, held) = (cx.backend, cx.held);
        // y += s b high
        let mut dhigh = cx.pool.take(backend, backend.len(dy))?;
        let mut dterm = cx.pool.take(backend, backend.len(dy))?;
        backend.run(Call::Copy { x: dy, y: &mut dterm })?;
        backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut dterm })?;
        if let Some(db) = grads.of(self.outer) {
            backend.run(Call::SumColumns { a: &dterm, b: Some(&high), y: db })?;
        }
        backend.run(Call::ScaleColumns { factors: held.buffer(self.outer), x: &dterm, y: &mut dhigh })?;
        // high = (d low) Bᵀ
        let mut dscaled = cx.pool.take(backend, backend.len(&low))?;
        let terms = [(held.matrix(self.b), &dhigh)];
        let arithmetic = cx.arithmetic;
        backend.run(Call::MatmulVjpX { arithmetic, terms: &terms, dx: &mut dscaled, accumulate: false })?;
        if let Some(dd) = grads.of(self.inner) {
            backend.run(Call::SumColumns { a: &dscaled, b: Some(&low), y: dd })?;
        }
        let mut dlow = cx.pool.take(backend, backend.len(&low))?;
        backend.run(Call::ScaleColumns { factors: held.buffer(self.inner), x: &dscaled, y: &mut dlow })?;
        [low, high, dhigh, dterm, dscaled].into_iter().for_each(|buffer| cx.pool.put(backend, buffer));
        Ok(dlow)
    }

    fn backward_x(&self, cx: &mut Context<'_, B>, dlow: &B::Buffer, dx: &mut B::Buffer) -> Result<()> {
        // low = x Aᵀ
        let terms = [(cx.held.matrix(self.a), dlow)];
        Ok(cx.backend.run(Call::MatmulVjpX { arithmetic: cx.arithmetic, terms: &terms, dx, accumulate: true })?)
    }
}
