//! A low-rank term on a linear layer: `y = x Wᵀ + s (x Aᵀ) Bᵀ` with `A` `[r, in]` and `B` `[out, r]`.

use super::{Adapter, Context};
use crate::error::Result;
use pocketlora_kernels::{ALL_ROWS, Backend, LowRank};

/// A low-rank term on one linear layer.
pub struct LowRankTerm<B: Backend> {
    a: B::Matrix,
    b: B::Matrix,
    scale: f32,
}

impl<B: Backend> LowRankTerm<B> {
    /// `s (x Aᵀ) Bᵀ`.
    pub fn new(a: B::Matrix, b: B::Matrix, scale: f32) -> Self {
        Self { a, b, scale }
    }

    /// `s x Aᵀ` `[T, r]`, with `x` after dropout.
    fn low(&self, cx: &mut Context<'_, B>, x: &B::Buffer) -> Result<B::Buffer> {
        let (rank, input) = cx.backend.shape(&self.a);
        let mut h = cx.pool.take(cx.backend, cx.backend.len(x) / input * rank)?;
        cx.backend.matmul(cx.arithmetic, &self.a, x, &mut h, false);
        cx.backend.scale(self.scale, &mut h);
        Ok(h)
    }

    /// `x` after dropout in a buffer of its own, or `None` where nothing drops.
    fn dropped(cx: &mut Context<'_, B>, x: &B::Buffer) -> Result<Option<B::Buffer>> {
        let Some(dropout) = cx.dropout else { return Ok(None) };
        let mut y = cx.pool.take(cx.backend, cx.backend.len(x))?;
        cx.backend.dropout(dropout.p, dropout.key, dropout.first, x, &mut y);
        Ok(Some(y))
    }
}

impl<B: Backend> Adapter<B> for LowRankTerm<B> {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        let dropped = Self::dropped(cx, x)?;
        let h = self.low(cx, dropped.as_ref().unwrap_or(x))?;
        cx.backend.matmul(cx.arithmetic, &self.b, &h, y, true);
        cx.pool.put(cx.backend, h);
        if let Some(buffer) = dropped {
            cx.pool.put(cx.backend, buffer);
        }
        Ok(())
    }

    fn low_rank(&self) -> Option<LowRank<'_, B>> {
        Some(LowRank { a: &self.a, b: &self.b, scale: self.scale, rows: ALL_ROWS })
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: &B::Buffer,
        dy: &B::Buffer,
        grads: &mut [B::Buffer],
    ) -> Result<B::Buffer> {
        let (backend, [da, db]) = (cx.backend, grads) else {
            unreachable!("the tape hands over one gradient for each of `tensors`")
        };
        let (rank, input) = backend.shape(&self.a);
        let tokens = backend.len(x) / input;
        let dropped = Self::dropped(cx, x)?;
        let x = dropped.as_ref().unwrap_or(x);

        // y += h Bᵀ with h = s x Aᵀ, recomputed rather than kept: it is r wide and costs next to nothing.
        let h = self.low(cx, x)?;
        backend.matmul_vjp_w(tokens, dy, &h, db);
        cx.pool.put(backend, h);

        let mut dh = cx.pool.take(backend, tokens * rank)?;
        backend.matmul_vjp_x(cx.arithmetic, &self.b, dy, &mut dh, false);
        backend.scale(self.scale, &mut dh);
        backend.matmul_vjp_w(tokens, &dh, x, da);
        if let Some(buffer) = dropped {
            cx.pool.put(backend, buffer);
        }
        Ok(dh)
    }

    fn backward_x(&self, cx: &mut Context<'_, B>, dh: &B::Buffer, dx: &mut B::Buffer) -> Result<()> {
        let backend = cx.backend;
        let Some(dropout) = cx.dropout else {
            backend.matmul_vjp_x(cx.arithmetic, &self.a, dh, dx, true);
            return Ok(());
        };
        let mut part = cx.pool.take(backend, backend.len(dx))?;
        let mut masked = cx.pool.take(backend, backend.len(dx))?;
        backend.matmul_vjp_x(cx.arithmetic, &self.a, dh, &mut part, false);
        backend.dropout(dropout.p, dropout.key, dropout.first, &part, &mut masked);
        backend.add_assign(&masked, dx);
        cx.pool.put(backend, part);
        cx.pool.put(backend, masked);
        Ok(())
    }

    fn update(&mut self, backend: &B, work: &mut dyn FnMut(usize, &mut B::Buffer)) {
        for (i, matrix) in [&mut self.a, &mut self.b].into_iter().enumerate() {
            backend.with_values(matrix, &mut |values| work(i, values));
        }
    }

    fn read(&self, backend: &B, index: usize, out: &mut [f32]) -> Result<()> {
        Ok(backend.read_matrix([&self.a, &self.b][index], out)?)
    }
}
