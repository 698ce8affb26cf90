//! Blocks of a circulant term: `y[i] += s sum_j C_ij x[j]`, where `x` and `y` are cut in pieces of `n` values and each `C_ij`
//! `[n, n]` is circulant. In the basis `F` `[n, n]` of real waves, which is orthonormal, each `C_ij` has but two values in a row:
//! `y += s (S (x Fᵀ)) F` with a sparse `S`. Backward computes `x Fᵀ` once more.

use super::{Context, Gradients, Term};
use crate::adapter::held::TensorId;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};

/// See the module's text.
pub(crate) struct Circulant {
    /// `F`.
    pub basis: TensorId,
    /// The values of `S`, at `rows` and `cols`.
    pub values: TensorId,
    pub rows: Vec<u32>,
    pub cols: Vec<u32>,
    /// `[out, in]`.
    pub layer: [usize; 2],
    /// `s`.
    pub factor: f32,
}

impl Circulant {
    /// `x Fᵀ`, piece by piece.
    fn waves<B: Backend>(&self, cx: &mut Context<'_, B>, x: &B::Buffer) -> Result<B::Buffer> {
        let mut h = cx.pool.take(cx.backend, cx.backend.len(x))?;
        let w = cx.held.matrix(self.basis);
        cx.backend.run(Call::Matmul { arithmetic: cx.arithmetic, w, x, y: &mut h, accumulate: false })?;
        Ok(h)
    }

    /// `s S x`, or with `transposed` `s Sᵀ x`.
    fn product<B: Backend>(&self, cx: &mut Context<'_, B>, transposed: bool, x: &B::Buffer) -> Result<B::Buffer> {
        let [out, input] = self.layer;
        let (from, to) = if transposed { (out, input) } else { (input, out) };
        let (rows, cols) = if transposed { (&self.cols, &self.rows) } else { (&self.rows, &self.cols) };
        let tokens = cx.backend.len(x) / from;
        let mut y = cx.pool.take(cx.backend, tokens * to)?;
        cx.backend.run(Call::Zero { x: &mut y })?;
        let w = cx.held.buffer(self.values);
        cx.backend.run(Call::SparseProduct { rows, cols, tokens, w, x, y: &mut y })?;
        cx.backend.run(Call::Scale { factor: self.factor * cx.held.strength(self.values), x: &mut y })?;
        Ok(y)
    }

    /// Adds `x F`, piece by piece, to `y`.
    fn back<B: Backend>(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        let terms = [(cx.held.matrix(self.basis), x)];
        Ok(cx.backend.run(Call::MatmulVjpX { arithmetic: cx.arithmetic, terms: &terms, dx: y, accumulate: true })?)
    }
}

impl<B: Backend> Term<B> for Circulant {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        let h = self.waves(cx, x)?;
        let z = self.product(cx, false, &h)?;
        self.back(cx, &z, y)?;
        [h, z].into_iter().for_each(|buffer| cx.pool.put(cx.backend, buffer));
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
        // y += z F with z = s S h, so dz = dy Fᵀ
        let dz = self.waves(cx, dy)?;
        if let Some(dw) = grads.of(self.values) {
            let (mut h, tokens) = (self.waves(cx, x)?, backend.len(x) / self.layer[1]);
            backend.run(Call::Scale { factor: self.factor * cx.held.strength(self.values), x: &mut h })?;
            let (rows, cols) = (&self.rows[..], &self.cols[..]);
            backend.run(Call::SparseProductVjpW { rows, cols, tokens, dy: &dz, x: &h, dw })?;
            cx.pool.put(backend, h);
        }
        let dh = self.product(cx, true, &dz)?;
        cx.pool.put(backend, dz);
        Ok(dh)
    }

    fn backward_x(&self, cx: &mut Context<'_, B>, dh: &B::Buffer, dx: &mut B::Buffer) -> Result<()> {
        // h = x Fᵀ
        self.back(cx, dh, dx)
    }
}
