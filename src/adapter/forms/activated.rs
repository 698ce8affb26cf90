//! Activated LoRA (Greenewald et al. 2025): a low-rank term for the tokens from the last occurrence of an invocation on, its
//! first token included. Those before it are the base's, and so are texts without it. Backward keeps what the term keeps,
//! and reads the rows of these tokens alone.

use super::low_rank::LowRankTerm;
use super::{Context, Gradients, Term};
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};

/// Where the last occurrence of `invocation` in `ids` begins.
pub(crate) fn last_invocation(invocation: &[u32], ids: &[u32]) -> Option<usize> {
    ids.windows(invocation.len().max(1)).rposition(|window| window == invocation)
}

/// A term of the activated tokens.
pub(crate) struct Activated {
    pub term: LowRankTerm,
}

impl Activated {
    /// The activated ones of the rows of `x`, which are `width` wide.
    fn rows<B: Backend>(cx: &Context<'_, B>, x: &B::Buffer, width: usize) -> Vec<u32> {
        let rows = cx.active.iter().take(cx.backend.len(x) / width);
        rows.zip(0..).filter(|(active, _)| **active).map(|(_, row)| row).collect()
    }

    /// Widths of what the layer gives and of what it reads.
    fn widths<B: Backend>(&self, cx: &Context<'_, B>) -> [usize; 2] {
        [cx.backend.shape(cx.held.matrix(self.term.b)).0, cx.backend.shape(cx.held.matrix(self.term.a)).1]
    }

    fn gathered<B: Backend>(cx: &mut Context<'_, B>, x: &B::Buffer, rows: &[u32], width: usize) -> Result<B::Buffer> {
        let mut own = cx.pool.take(cx.backend, rows.len() * width)?;
        cx.backend.run(Call::GatherRows { x, rows, y: &mut own })?;
        Ok(own)
    }
}

impl<B: Backend> Term<B> for Activated {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        let [out, input] = self.widths(cx);
        let rows = Self::rows(cx, x, input);
        if rows.is_empty() {
            return Ok(());
        }
        let own = Self::gathered(cx, x, &rows, input)?;
        let mut added = cx.pool.take(cx.backend, rows.len() * out)?;
        cx.backend.run(Call::Zero { x: &mut added })?;
        self.term.apply(cx, &own, &mut added)?;
        cx.backend.run(Call::ScatterAddRows { x: &added, rows: &rows, y })?;
        [own, added].into_iter().for_each(|buffer| cx.pool.put(cx.backend, buffer));
        Ok(())
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: &B::Buffer,
        dy: &B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<B::Buffer> {
        let [out, input] = self.widths(cx);
        let rows = Self::rows(cx, x, input);
        if rows.is_empty() {
            return cx.pool.take(cx.backend, 0);
        }
        let (own, own_dy) = (Self::gathered(cx, x, &rows, input)?, Self::gathered(cx, dy, &rows, out)?);
        let dh = self.term.backward(cx, &own, &own_dy, grads)?;
        [own, own_dy].into_iter().for_each(|buffer| cx.pool.put(cx.backend, buffer));
        Ok(dh)
    }

    fn backward_x(&self, cx: &mut Context<'_, B>, dh: &B::Buffer, dx: &mut B::Buffer) -> Result<()> {
        let [_, input] = self.widths(cx);
        let rows = Self::rows(cx, dx, input);
        if rows.is_empty() {
            return Ok(());
        }
        let mut own = cx.pool.take(cx.backend, rows.len() * input)?;
        cx.backend.run(Call::Zero { x: &mut own })?;
        self.term.backward_x(cx, dh, &mut own)?;
        cx.backend.run(Call::ScatterAddRows { x: &own, rows: &rows, y: dx })?;
        cx.pool.put(cx.backend, own);
        Ok(())
    }
}
