//! A sparse term: `y[t, row_n] += s v_n x[t, col_n]` for the values `v` at some places of the weight.

use super::{Context, Gradients, Term};
use crate::adapter::held::{Held, TensorId};
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};

/// See the module's text.
pub(crate) struct SparseTerm {
    pub values: TensorId,
    pub rows: Vec<u32>,
    pub cols: Vec<u32>,
    /// Inputs of the layer.
    pub input: usize,
    /// `s`.
    pub factor: f32,
}

impl SparseTerm {
    /// What it is multiplied by.
    fn strength<B: Backend>(&self, held: &Held<B>) -> f32 {
        self.factor * held.strength(self.values)
    }

    /// `s x` in a buffer of its own.
    fn scaled<B: Backend>(&self, cx: &mut Context<'_, B>, x: &B::Buffer) -> Result<B::Buffer> {
        let mut scaled = cx.pool.take(cx.backend, cx.backend.len(x))?;
        cx.backend.run(Call::Copy { x, y: &mut scaled })?;
        cx.backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut scaled })?;
        Ok(scaled)
    }
}

impl<B: Backend> Term<B> for SparseTerm {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        let tokens = cx.backend.len(x) / self.input;
        let scaled = if self.strength(cx.held) == 1.0 { None } else { Some(self.scaled(cx, x)?) };
        let (w, read) = (cx.held.buffer(self.values), scaled.as_ref().unwrap_or(x));
        cx.backend.run(Call::SparseProduct { rows: &self.rows, cols: &self.cols, tokens, w, x: read, y })?;
        scaled.into_iter().for_each(|buffer| cx.pool.put(cx.backend, buffer));
        Ok(())
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: &B::Buffer,
        dy: &B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<B::Buffer> {
        let tokens = cx.backend.len(x) / self.input;
        let scaled = self.scaled(cx, dy)?;
        if let Some(dw) = grads.of(self.values) {
            let (rows, cols) = (&self.rows[..], &self.cols[..]);
            cx.backend.run(Call::SparseProductVjpW { rows, cols, tokens, dy: &scaled, x, dw })?;
        }
        Ok(scaled)
    }

    fn backward_x(&self, cx: &mut Context<'_, B>, dy: &B::Buffer, dx: &mut B::Buffer) -> Result<()> {
        let (tokens, w) = (cx.backend.len(dx) / self.input, cx.held.buffer(self.values));
        let (rows, cols) = (&self.cols[..], &self.rows[..]);
        Ok(cx.backend.run(Call::SparseProduct { rows, cols, tokens, w, x: dy, y: dx })?)
    }
}
