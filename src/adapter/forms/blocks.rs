//! What a layer reads turned in blocks of columns, `y = R x` with `R` `[n, c, c]`, and a Kronecker term, `y += s (K1 ⊗ K2) x` with
//! `K1` `[a, b]`, `K2` `[c, d]`: of `x` as `[b, d]`, `K1 (x K2ᵀ)` as `[a, c]`. Where `R` has fewer matrices than there are blocks, it
//! repeats. Backward computes `x K2ᵀ` once more.

use super::{Change, Context, Gradients, Term};
use crate::adapter::held::{Held, TensorId};
use crate::error::Result;
use pocketlora_kernels::{Backend, Blocks, Call};

/// See the module's text.
pub(crate) struct Rotate {
    pub r: TensorId,
    /// Blocks, and columns of each.
    pub count: usize,
    pub size: usize,
}

impl Rotate {
    fn spec(&self) -> Blocks {
        Blocks { count: self.count, shape: [self.size; 2], inner: 1 }
    }
}

impl<B: Backend> Change<B> for Rotate {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        let (spec, w) = (self.spec(), cx.held.buffer(self.r));
        Ok(cx.backend.run(Call::BlockProduct { spec, transposed: false, w, x, y })?)
    }

    fn learns(&self, grads: &mut Gradients<B>) -> bool {
        grads.of(self.r).is_some()
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: Option<&B::Buffer>,
        dy: &B::Buffer,
        dx: &mut B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<()> {
        let (spec, w) = (self.spec(), cx.held.buffer(self.r));
        if let (Some(x), Some(dr)) = (x, grads.of(self.r)) {
            cx.backend.run(Call::BlockProductVjpW { spec, dy, x, dw: dr })?;
        }
        // y = R x
        Ok(cx.backend.run(Call::BlockProduct { spec, transposed: true, w, x: dy, y: dx })?)
    }
}

/// See the module's text.
pub(crate) struct Kronecker {
    /// `K1`, plain values.
    pub left: TensorId,
    /// `K2`, a matrix.
    pub right: TensorId,
    /// `[a, b]`.
    pub shape: [usize; 2],
    /// `s`.
    pub factor: f32,
}

impl Kronecker {
    /// What it is multiplied by.
    fn strength<B: Backend>(&self, held: &Held<B>) -> f32 {
        self.factor * held.strength(self.right)
    }

    /// `s x K2ᵀ` `[T b, c]`, and how `K1` meets it.
    fn right<B: Backend>(&self, cx: &mut Context<'_, B>, x: &B::Buffer) -> Result<(B::Buffer, Blocks)> {
        let w = cx.held.matrix(self.right);
        let (c, d) = cx.backend.shape(w);
        let mut h = cx.pool.take(cx.backend, cx.backend.len(x) / d * c)?;
        cx.backend.run(Call::Matmul { arithmetic: cx.arithmetic, w, x, y: &mut h, accumulate: false })?;
        cx.backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut h })?;
        Ok((h, Blocks { count: 1, shape: self.shape, inner: c }))
    }
}

impl<B: Backend> Term<B> for Kronecker {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        let (h, spec) = self.right(cx, x)?;
        let mut term = cx.pool.take(cx.backend, cx.backend.len(y))?;
        let w = cx.held.buffer(self.left);
        cx.backend.run(Call::BlockProduct { spec, transposed: false, w, x: &h, y: &mut term })?;
        cx.backend.run(Call::AddAssign { x: &term, y })?;
        [h, term].into_iter().for_each(|buffer| cx.pool.put(cx.backend, buffer));
        Ok(())
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: &B::Buffer,
        dy: &B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<B::Buffer> {
        let backend = cx.backend;
        let (h, spec) = self.right(cx, x)?;
        // y += K1 h
        if let Some(dleft) = grads.of(self.left) {
            backend.run(Call::BlockProductVjpW { spec, dy, x: &h, dw: dleft })?;
        }
        let mut dh = cx.pool.take(backend, backend.len(&h))?;
        let w = cx.held.buffer(self.left);
        backend.run(Call::BlockProduct { spec, transposed: true, w, x: dy, y: &mut dh })?;
        // h = s x K2ᵀ
        backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut dh })?;
        if let Some(dright) = grads.of(self.right) {
            let (c, _) = backend.shape(cx.held.matrix(self.right));
            let tokens = backend.len(&dh) / c;
            backend.run(Call::MatmulVjpW { tokens, dy: &dh, x, dw: dright })?;
        }
        cx.pool.put(backend, h);
        Ok(dh)
    }

    fn backward_x(&self, cx: &mut Context<'_, B>, dh: &B::Buffer, dx: &mut B::Buffer) -> Result<()> {
        let terms = [(cx.held.matrix(self.right), dh)];
        Ok(cx.backend.run(Call::MatmulVjpX { arithmetic: cx.arithmetic, terms: &terms, dx, accumulate: true })?)
    }
}
