//! What a layer reads turned in blocks of columns that do not lie side by side: `y[rows_n] += w_n x[cols_n]` for the values `w` of
//! all blocks. Backward reads `x`.

use super::{Change, Context, Gradients};
use crate::adapter::held::TensorId;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};

/// See the module's text.
pub(crate) struct Butterfly {
    pub values: TensorId,
    pub rows: Vec<u32>,
    pub cols: Vec<u32>,
    /// Columns of the layer.
    pub input: usize,
}

impl<B: Backend> Change<B> for Butterfly {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        let (tokens, w) = (cx.backend.len(x) / self.input, cx.held.buffer(self.values));
        cx.backend.run(Call::Zero { x: y })?;
        Ok(cx.backend.run(Call::SparseProduct { rows: &self.rows, cols: &self.cols, tokens, w, x, y })?)
    }

    fn learns(&self, grads: &mut Gradients<B>) -> bool {
        grads.of(self.values).is_some()
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: Option<&B::Buffer>,
        dy: &B::Buffer,
        dx: &mut B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<()> {
        let (tokens, w) = (cx.backend.len(dy) / self.input, cx.held.buffer(self.values));
        if let (Some(x), Some(dw)) = (x, grads.of(self.values)) {
            cx.backend.run(Call::SparseProductVjpW { rows: &self.rows, cols: &self.cols, tokens, dy, x, dw })?;
        }
        // y[rows] += w x[cols]
        cx.backend.run(Call::Zero { x: dx })?;
        let (rows, cols) = (&self.cols[..], &self.rows[..]);
        Ok(cx.backend.run(Call::SparseProduct { rows, cols, tokens, w, x: dy, y: dx })?)
    }
}
