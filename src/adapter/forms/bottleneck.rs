//! A bottleneck, `f(x Dᵀ + d) Uᵀ + u` with `D` `[r, in]`, `d` `[r]`, `U` `[out, r]`, `u` `[out]` and a function `f` of
//! single values: behind a layer, where `x` is what it gave and is added to, or beside one, as a term. Backward
//! computes `x Dᵀ + d` and `f` of it once more from `x`.

use super::{Change, Context, Gradients, Term};
use crate::adapter::held::{Held, TensorId};
use crate::error::Result;
use pocketlora_kernels::{Backend, Call, Map};

/// See the module's text; the whole is multiplied by `factor`.
pub(in crate::adapter) struct Bottleneck {
    pub down: TensorId,
    pub down_bias: TensorId,
    pub up: TensorId,
    pub up_bias: TensorId,
    pub function: Map,
    pub factor: f32,
}

impl Bottleneck {
    /// What it is multiplied by.
    fn strength<B: Backend>(&self, held: &Held<B>) -> f32 {
        self.factor * held.strength(self.up)
    }

    /// `x Dᵀ + d` and `f` of it, both `[T, r]`.
    fn low<B: Backend>(&self, cx: &mut Context<'_, B>, x: &B::Buffer) -> Result<[B::Buffer; 2]> {
        let (backend, held, arithmetic) = (cx.backend, cx.held, cx.arithmetic);
        let down = held.matrix(self.down);
        let (rank, width) = backend.shape(down);
        let tokens = backend.len(x) / width;
        let mut low = cx.pool.take(backend, tokens * rank)?;
        let mut bent = cx.pool.take(backend, tokens * rank)?;
        backend.run(Call::Matmul { arithmetic, w: down, x, y: &mut low, accumulate: false })?;
        backend.run(Call::AddBias { bias: held.buffer(self.down_bias), y: &mut low })?;
        backend.run(Call::Map { kind: self.function, x: &low, y: &mut bent })?;
        Ok([low, bent])
    }

    /// Adds the bottleneck of `x` to `y`.
    fn add<B: Backend>(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        let [low, mut bent] = self.low(cx, x)?;
        let (backend, held, arithmetic) = (cx.backend, cx.held, cx.arithmetic);
        let (w, bias) = (held.matrix(self.up), held.buffer(self.up_bias));
        let mut scaled = cx.pool.take(backend, backend.len(bias))?;
        // y += s (f Uᵀ + u)
        backend.run(Call::Copy { x: bias, y: &mut scaled })?;
        backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut scaled })?;
        backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut bent })?;
        backend.run(Call::Matmul { arithmetic, w, x: &bent, y, accumulate: true })?;
        backend.run(Call::AddBias { bias: &scaled, y })?;
        [low, bent, scaled].into_iter().for_each(|buffer| cx.pool.put(backend, buffer));
        Ok(())
    }

    /// Adds to the gradients of its tensors, given that of what it adds; returns that of `x Dᵀ + d`.
    fn pull<B: Backend>(
        &self,
        cx: &mut Context<'_, B>,
        x: &B::Buffer,
        dy: &B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<B::Buffer> {
        let [low, mut bent] = self.low(cx, x)?;
        let (backend, held, arithmetic) = (cx.backend, cx.held, cx.arithmetic);
        let (up, (rank, width)) = (held.matrix(self.up), backend.shape(held.matrix(self.down)));
        let tokens = backend.len(x) / width;
        // y += s (f Uᵀ + u)
        backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut bent })?;
        if let Some(du) = grads.of(self.up) {
            backend.run(Call::MatmulVjpW { tokens, dy, x: &bent, dw: du })?;
        }
        if let Some(du) = grads.of(self.up_bias) {
            let mut sum = cx.pool.take(backend, backend.len(du))?;
            backend.run(Call::Zero { x: &mut sum })?;
            backend.run(Call::SumColumns { a: dy, b: None, y: &mut sum })?;
            backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut sum })?;
            backend.run(Call::AddAssign { x: &sum, y: du })?;
            cx.pool.put(backend, sum);
        }
        let mut dbent = cx.pool.take(backend, tokens * rank)?;
        let mut dlow = cx.pool.take(backend, tokens * rank)?;
        backend.run(Call::MatmulVjpX { arithmetic, terms: &[(up, dy)], dx: &mut dbent, accumulate: false })?;
        backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut dbent })?;
        // bent = f(low)
        backend.run(Call::MapVjp { kind: self.function, x: &low, dy: &dbent, dx: &mut dlow })?;
        // low = x Dᵀ + d
        if let Some(dd) = grads.of(self.down) {
            backend.run(Call::MatmulVjpW { tokens, dy: &dlow, x, dw: dd })?;
        }
        if let Some(dd) = grads.of(self.down_bias) {
            backend.run(Call::SumColumns { a: &dlow, b: None, y: dd })?;
        }
        [low, bent, dbent].into_iter().for_each(|buffer| cx.pool.put(backend, buffer));
        Ok(dlow)
    }

    /// Adds what `x` gets of the gradient of `x Dᵀ + d`.
    fn pass<B: Backend>(&self, cx: &mut Context<'_, B>, dlow: &B::Buffer, dx: &mut B::Buffer) -> Result<()> {
        let terms = [(cx.held.matrix(self.down), dlow)];
        Ok(cx.backend.run(Call::MatmulVjpX { arithmetic: cx.arithmetic, terms: &terms, dx, accumulate: true })?)
    }
}

/// Behind a layer: `y = x + s (..)`.
impl<B: Backend> Change<B> for Bottleneck {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        cx.backend.run(Call::Copy { x, y })?;
        self.add(cx, x, y)
    }

    fn learns(&self, _grads: &mut Gradients<B>) -> bool {
        // Where f is bent depends on x, whoever learns.
        true
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: Option<&B::Buffer>,
        dy: &B::Buffer,
        dx: &mut B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<()> {
        let x = x.expect("it asks for it");
        let dlow = self.pull(cx, x, dy, grads)?;
        cx.backend.run(Call::Copy { x: dy, y: dx })?;
        self.pass(cx, &dlow, dx)?;
        cx.pool.put(cx.backend, dlow);
        Ok(())
    }
}

/// Beside a layer.
impl<B: Backend> Term<B> for Bottleneck {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        self.add(cx, x, y)
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: &B::Buffer,
        dy: &B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<B::Buffer> {
        self.pull(cx, x, dy, grads)
    }

    fn backward_x(&self, cx: &mut Context<'_, B>, dlow: &B::Buffer, dx: &mut B::Buffer) -> Result<()> {
        self.pass(cx, dlow, dx)
    }
}
