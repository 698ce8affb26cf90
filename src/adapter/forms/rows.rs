//! Rows that take the place of what an embedding gives: those of single tokens, which are in training, and those of virtual
//! tokens before a text. `y[t] = R[i]` where token `t` is the one that row `i` of `R` `[n, C]` is for.
//!
//! A head that is the embedding sees the rows of single tokens as well: `y[t, id] = x[t] . R[i]`, that is
//! `x (R - E[ids])ᵀ` beside the base's product.

use super::{Context, Gradients, Lookup, Term};
use crate::adapter::encoder::Encoder;
use crate::adapter::held::TensorId;
use crate::error::Result;
use crate::exec::virtual_number;
use pocketlora_kernels::{Backend, Call};
use std::sync::Arc;

/// Which tokens rows are for.
pub(crate) enum Whose {
    /// Those with these ids.
    Tokens(Arc<[u32]>),
    /// The virtual ones. What the family makes of embeddings before its first layer is not for them: rows are divided by
    /// the factor that it multiplies with.
    Virtual { factor: f32 },
}

/// Where the rows `R` `[n, C]` are.
pub(crate) enum From {
    /// They are a tensor.
    Tensor(TensorId),
    /// A network makes them.
    Encoder(Encoder),
}

/// Rows in place of those that are looked up.
pub(crate) struct NewRows {
    pub rows: From,
    pub whose: Whose,
}

impl NewRows {
    /// Of `ids`, which are at `rows` of an output: the rows of it that are replaced, and by which of `R`.
    fn places(&self, ids: &[u32], rows: &[u32]) -> (Vec<u32>, Vec<u32>) {
        let number = |id: u32| match &self.whose {
            Whose::Tokens(own) => own.iter().position(|own| *own == id).map(|i| i as u32),
            Whose::Virtual { .. } => virtual_number(id),
        };
        ids.iter().zip(rows).filter_map(|(id, row)| Some((*row, number(*id)?))).unzip()
    }

    /// `C`.
    fn width<B: Backend>(&self, cx: &Context<'_, B>) -> usize {
        let id = match &self.rows {
            From::Tensor(id) => *id,
            // As wide as what it makes them of.
            From::Encoder(encoder) => encoder.embedding(),
        };
        cx.backend.shape(cx.held.matrix(id)).1
    }

    fn factor(&self) -> f32 {
        match self.whose {
            Whose::Tokens(_) => 1.0,
            Whose::Virtual { factor } => 1.0 / factor,
        }
    }
}

/// Makes zeros of the rows `at` of `y`, by their negatives: exactly that. Returns what they were.
fn clear<B: Backend>(cx: &mut Context<'_, B>, at: &[u32], width: usize, y: &mut B::Buffer) -> Result<B::Buffer> {
    let (backend, len) = (cx.backend, at.len() * width);
    let (mut old, mut negative) = (cx.pool.take(backend, len)?, cx.pool.take(backend, len)?);
    backend.run(Call::GatherRows { x: y, rows: at, y: &mut old })?;
    backend.run(Call::Copy { x: &old, y: &mut negative })?;
    backend.run(Call::Scale { factor: -1.0, x: &mut negative })?;
    backend.run(Call::ScatterAddRows { x: &negative, rows: at, y })?;
    cx.pool.put(backend, negative);
    Ok(old)
}

impl<B: Backend> Lookup<B> for NewRows {
    fn apply(&self, cx: &mut Context<'_, B>, ids: &[u32], rows: &[u32], y: &mut B::Buffer) -> Result<()> {
        let (at, numbers) = self.places(ids, rows);
        if at.is_empty() {
            return Ok(());
        }
        let (backend, width) = (cx.backend, self.width(cx));
        let mut new = clear(cx, &at, width, y)?;
        // y[t] = R[i]
        match &self.rows {
            From::Tensor(id) => {
                backend.run(Call::Embed { table: cx.held.matrix(*id), ids: &numbers, y: &mut new })?;
            }
            From::Encoder(encoder) => {
                let rows = encoder.forward(cx)?;
                backend.run(Call::GatherRows { x: &rows, rows: &numbers, y: &mut new })?;
                cx.pool.put(backend, rows);
            }
        }
        if self.factor() != 1.0 {
            backend.run(Call::Scale { factor: self.factor(), x: &mut new })?;
        }
        backend.run(Call::ScatterAddRows { x: &new, rows: &at, y })?;
        cx.pool.put(backend, new);
        Ok(())
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        ids: &[u32],
        rows: &[u32],
        dy: &mut B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<()> {
        let (at, numbers) = self.places(ids, rows);
        if at.is_empty() {
            return Ok(());
        }
        let (backend, width) = (cx.backend, self.width(cx));
        // What was there before gave nothing.
        let mut own = clear(cx, &at, width, dy)?;
        backend.run(Call::Scale { factor: self.factor(), x: &mut own })?;
        // dR[i] += the sum of dy[t] over its tokens
        match &self.rows {
            From::Tensor(id) => {
                if let Some(dr) = grads.of(*id) {
                    backend.run(Call::ScatterAddRows { x: &own, rows: &numbers, y: dr })?;
                }
            }
            From::Encoder(encoder) => {
                let tokens = backend.shape(cx.held.matrix(encoder.embedding())).0;
                let mut dr = cx.pool.take(backend, tokens * width)?;
                backend.run(Call::Zero { x: &mut dr })?;
                backend.run(Call::ScatterAddRows { x: &own, rows: &numbers, y: &mut dr })?;
                encoder.backward(cx, dr, grads)?;
            }
        }
        cx.pool.put(backend, own);
        Ok(())
    }
}

/// The same rows on a head that is the embedding.
pub(crate) struct NewRowsOnHead<B: Backend> {
    pub rows: TensorId,
    pub ids: Arc<[u32]>,
    /// `E[ids]` `[n, C]`.
    pub old: Arc<B::Matrix>,
}

impl<B: Backend> NewRowsOnHead<B> {
    /// Where the values of the columns are in `y` `[T, V]`, row after row.
    fn places(&self, tokens: usize, y: usize) -> Vec<u32> {
        let columns = y / tokens.max(1);
        (0..tokens).flat_map(|t| self.ids.iter().map(move |id| (t * columns) as u32 + id)).collect()
    }

    fn tokens(&self, cx: &Context<'_, B>, x: &B::Buffer) -> usize {
        cx.backend.len(x) / cx.backend.shape(&self.old).1
    }
}

impl<B: Backend> Term<B> for NewRowsOnHead<B> {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        let (backend, arithmetic, tokens) = (cx.backend, cx.arithmetic, self.tokens(cx, x));
        let mut h = cx.pool.take(backend, tokens * self.ids.len())?;
        // y[:, ids] += x Rᵀ - x E[ids]ᵀ
        backend.run(Call::Matmul { arithmetic, w: &self.old, x, y: &mut h, accumulate: false })?;
        backend.run(Call::Scale { factor: -1.0, x: &mut h })?;
        backend.run(Call::Matmul { arithmetic, w: cx.held.matrix(self.rows), x, y: &mut h, accumulate: true })?;
        let places = self.places(tokens, backend.len(y));
        backend.run(Call::ScatterAddRows { x: &h, rows: &places, y })?;
        cx.pool.put(backend, h);
        Ok(())
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: &B::Buffer,
        dy: &B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<B::Buffer> {
        let (backend, tokens) = (cx.backend, self.tokens(cx, x));
        let mut dh = cx.pool.take(backend, tokens * self.ids.len())?;
        backend.run(Call::GatherRows { x: dy, rows: &self.places(tokens, backend.len(dy)), y: &mut dh })?;
        if let Some(dr) = grads.of(self.rows) {
            backend.run(Call::MatmulVjpW { tokens, dy: &dh, x, dw: dr })?;
        }
        Ok(dh)
    }

    fn backward_x(&self, cx: &mut Context<'_, B>, dh: &B::Buffer, dx: &mut B::Buffer) -> Result<()> {
        let (backend, arithmetic) = (cx.backend, cx.arithmetic);
        let mut negative = cx.pool.take(backend, backend.len(dh))?;
        backend.run(Call::Copy { x: dh, y: &mut negative })?;
        backend.run(Call::Scale { factor: -1.0, x: &mut negative })?;
        let terms = [(cx.held.matrix(self.rows), dh), (&*self.old, &negative)];
        backend.run(Call::MatmulVjpX { arithmetic, terms: &terms, dx, accumulate: true })?;
        cx.pool.put(backend, negative);
        Ok(())
    }
}
