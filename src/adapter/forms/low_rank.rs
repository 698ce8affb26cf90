//! A low-rank term on a linear layer: `y = x Wᵀ + s (x Aᵀ) Bᵀ` with `A` `[r, in]` and `B` `[out, r]`; on an embedding, where
//! `x` is a token's place in the vocabulary, `y = E[id] + s A[:, id] Bᵀ` with `A` `[r, V]` and `B` `[C, r]`.
//!
//! In training, dropout leaves out elements of `x`, or of `h = x Aᵀ` `[T, r]` whole ranks (columns) or whole tokens (rows), and
//! makes what is left larger by `1 / (1 - p)`. A term that is not in training has none.

use super::{Context, Dropout, DropoutForm, Gradients, Lookup, LowRankFactors, Term};
use crate::adapter::held::{Held, TensorId};
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};

/// A low-rank term on one linear layer.
pub(crate) struct LowRankTerm {
    pub a: TensorId,
    pub b: TensorId,
    /// `c` `[out]`, which gives the term `s c`.
    pub bias: Option<TensorId>,
    /// `s`.
    pub factor: f32,
}

impl LowRankTerm {
    /// What it is multiplied by.
    fn strength<B: Backend>(&self, held: &Held<B>) -> f32 {
        self.factor * held.strength(self.a)
    }

    /// What dropout does, if anything.
    fn dropout<B: Backend>(&self, cx: &Context<'_, B>) -> Option<Dropout> {
        cx.dropout.filter(|_| cx.held.learns(self.a) || cx.held.learns(self.b))
    }

    /// `h` `[T, r]` with the ranks or tokens left out that dropout leaves out.
    fn masked<B: Backend>(&self, cx: &mut Context<'_, B>, h: B::Buffer) -> Result<B::Buffer> {
        let Some(Dropout { p, key, first, form }) = self.dropout(cx).filter(|d| d.form != DropoutForm::Input) else {
            return Ok(h);
        };
        let (rank, input) = cx.backend.shape(cx.held.matrix(self.a));
        let by_rank = form == DropoutForm::Rank;
        let tokens = cx.backend.len(&h) / rank;
        let (count, first) = if by_rank { (rank, 0) } else { (tokens, first / input as u64) };
        let [mut ones, mut factors] = [cx.pool.take(cx.backend, count)?, cx.pool.take(cx.backend, count)?];
        cx.backend.write(&mut ones, &vec![1.0; count]);
        cx.backend.run(Call::Dropout { p, key, first, x: &ones, y: &mut factors })?;
        let mut y = cx.pool.take(cx.backend, cx.backend.len(&h))?;
        if by_rank {
            cx.backend.run(Call::ScaleColumns { factors: &factors, x: &h, y: &mut y })?;
        } else {
            cx.backend.run(Call::ScaleRows { factors: &factors, x: &h, y: &mut y })?;
        }
        [ones, factors, h].into_iter().for_each(|buffer| cx.pool.put(cx.backend, buffer));
        Ok(y)
    }

    /// `s x Aᵀ` `[T, r]`, after dropout; elements of `x` were dropped before.
    fn low<B: Backend>(&self, cx: &mut Context<'_, B>, x: &B::Buffer) -> Result<B::Buffer> {
        let a = cx.held.matrix(self.a);
        let (rank, input) = cx.backend.shape(a);
        let mut h = cx.pool.take(cx.backend, cx.backend.len(x) / input * rank)?;
        cx.backend.run(Call::Matmul { arithmetic: cx.arithmetic, w: a, x, y: &mut h, accumulate: false })?;
        cx.backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut h })?;
        self.masked(cx, h)
    }

    /// `x` after dropout in a buffer of its own, or `None` where nothing drops.
    fn dropped<B: Backend>(&self, cx: &mut Context<'_, B>, x: &B::Buffer) -> Result<Option<B::Buffer>> {
        let Some(dropout) = self.dropout(cx).filter(|d| d.form == DropoutForm::Input) else { return Ok(None) };
        let mut y = cx.pool.take(cx.backend, cx.backend.len(x))?;
        cx.backend.run(Call::Dropout { p: dropout.p, key: dropout.key, first: dropout.first, x, y: &mut y })?;
        Ok(Some(y))
    }
}

impl<B: Backend> Term<B> for LowRankTerm {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        let dropped = self.dropped(cx, x)?;
        let h = self.low(cx, dropped.as_ref().unwrap_or(x))?;
        cx.backend.run(Call::Matmul {
            arithmetic: cx.arithmetic,
            w: cx.held.matrix(self.b),
            x: &h,
            y,
            accumulate: true,
        })?;
        cx.pool.put(cx.backend, h);
        if let Some(buffer) = dropped {
            cx.pool.put(cx.backend, buffer);
        }
        if let Some(bias) = self.bias {
            // y += s c
            let bias = cx.held.buffer(bias);
            let mut scaled = cx.pool.take(cx.backend, cx.backend.len(bias))?;
            cx.backend.run(Call::Copy { x: bias, y: &mut scaled })?;
            cx.backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut scaled })?;
            cx.backend.run(Call::AddBias { bias: &scaled, y })?;
            cx.pool.put(cx.backend, scaled);
        }
        Ok(())
    }

    fn low_rank<'a>(&self, held: &'a Held<B>) -> Option<LowRankFactors<'a, B>> {
        // With a bias it is more than that.
        self.bias.is_none().then(|| LowRankFactors {
            a: held.matrix(self.a),
            b: held.matrix(self.b),
            factor: self.strength(held),
        })
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: &B::Buffer,
        dy: &B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<B::Buffer> {
        let (backend, held) = (cx.backend, cx.held);
        let (rank, input) = backend.shape(held.matrix(self.a));
        let tokens = backend.len(x) / input;
        let dropped = self.dropped(cx, x)?;
        let x = dropped.as_ref().unwrap_or(x);

        // y += h Bᵀ with h = s x Aᵀ, recomputed rather than kept: it is r wide and costs next to nothing.
        if let Some(db) = grads.of(self.b) {
            let h = self.low(cx, x)?;
            backend.run(Call::MatmulVjpW { tokens, dy, x: &h, dw: db })?;
            cx.pool.put(backend, h);
        }

        if let Some(dc) = self.bias.and_then(|bias| grads.of(bias)) {
            // dc += s sum over t of dy
            let mut sum = cx.pool.take(backend, backend.len(dc))?;
            backend.run(Call::Zero { x: &mut sum })?;
            backend.run(Call::SumColumns { a: dy, b: None, y: &mut sum })?;
            backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut sum })?;
            backend.run(Call::AddAssign { x: &sum, y: dc })?;
            cx.pool.put(backend, sum);
        }

        let mut dh = cx.pool.take(backend, tokens * rank)?;
        backend.run(Call::MatmulVjpX {
            arithmetic: cx.arithmetic,
            terms: &[(held.matrix(self.b), dy)],
            dx: &mut dh,
            accumulate: false,
        })?;
        backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut dh })?;
        let dh = self.masked(cx, dh)?;
        if let Some(da) = grads.of(self.a) {
            backend.run(Call::MatmulVjpW { tokens, dy: &dh, x, dw: da })?;
        }
        if let Some(buffer) = dropped {
            cx.pool.put(backend, buffer);
        }
        Ok(dh)
    }

    fn backward_x(&self, cx: &mut Context<'_, B>, dh: &B::Buffer, dx: &mut B::Buffer) -> Result<()> {
        let backend = cx.backend;
        let Some(dropout) = self.dropout(cx).filter(|d| d.form == DropoutForm::Input) else {
            backend.run(Call::MatmulVjpX {
                arithmetic: cx.arithmetic,
                terms: &[(cx.held.matrix(self.a), dh)],
                dx,
                accumulate: true,
            })?;
            return Ok(());
        };
        let mut part = cx.pool.take(backend, backend.len(dx))?;
        let mut masked = cx.pool.take(backend, backend.len(dx))?;
        backend.run(Call::MatmulVjpX {
            arithmetic: cx.arithmetic,
            terms: &[(cx.held.matrix(self.a), dh)],
            dx: &mut part,
            accumulate: false,
        })?;
        backend.run(Call::Dropout {
            p: dropout.p,
            key: dropout.key,
            first: dropout.first,
            x: &part,
            y: &mut masked,
        })?;
        backend.run(Call::AddAssign { x: &masked, y: dx })?;
        cx.pool.put(backend, part);
        cx.pool.put(backend, masked);
        Ok(())
    }
}

/// A low-rank term on an embedding.
pub(crate) struct LowRankLookup {
    pub a: TensorId,
    pub b: TensorId,
    /// `s`.
    pub factor: f32,
}

impl<B: Backend> Lookup<B> for LowRankLookup {
    fn apply(&self, cx: &mut Context<'_, B>, ids: &[u32], rows: &[u32], y: &mut B::Buffer) -> Result<()> {
        let (backend, a, b) = (cx.backend, cx.held.buffer(self.a), cx.held.matrix(self.b));
        let (width, rank) = backend.shape(b);
        // h[t, j] = s A[j, ids[t]]: single values of A.
        let places = Self::places(ids, backend.len(a) / rank, rank);
        let mut h = cx.pool.take(backend, places.len())?;
        backend.run(Call::GatherRows { x: a, rows: &places, y: &mut h })?;
        backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut h })?;
        // y += h Bᵀ
        let mut term = cx.pool.take(backend, ids.len() * width)?;
        backend.run(Call::Matmul { arithmetic: cx.arithmetic, w: b, x: &h, y: &mut term, accumulate: false })?;
        backend.run(Call::ScatterAddRows { x: &term, rows, y })?;
        [h, term].into_iter().for_each(|buffer| cx.pool.put(backend, buffer));
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
        let (backend, a, b) = (cx.backend, cx.held.buffer(self.a), cx.held.matrix(self.b));
        let (width, rank) = backend.shape(b);
        let mut dterm = cx.pool.take(backend, ids.len() * width)?;
        backend.run(Call::GatherRows { x: dy, rows, y: &mut dterm })?;
        let places = Self::places(ids, backend.len(a) / rank, rank);
        // y += h Bᵀ with h[t, j] = s A[j, ids[t]], looked up again.
        let mut h = cx.pool.take(backend, places.len())?;
        if let Some(db) = grads.of(self.b) {
            backend.run(Call::GatherRows { x: a, rows: &places, y: &mut h })?;
            backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut h })?;
            backend.run(Call::MatmulVjpW { tokens: ids.len(), dy: &dterm, x: &h, dw: db })?;
        }
        if let Some(da) = grads.of(self.a) {
            let terms = [(b, &dterm)];
            backend.run(Call::MatmulVjpX {
                arithmetic: cx.arithmetic,
                terms: &terms,
                dx: &mut h,
                accumulate: false,
            })?;
            backend.run(Call::Scale { factor: self.strength(cx.held), x: &mut h })?;
            backend.run(Call::ScatterAddRows { x: &h, rows: &places, y: da })?;
        }
        [h, dterm].into_iter().for_each(|buffer| cx.pool.put(backend, buffer));
        Ok(())
    }
}

impl LowRankLookup {
    /// What it is multiplied by.
    fn strength<B: Backend>(&self, held: &Held<B>) -> f32 {
        self.factor * held.strength(self.b)
    }

    /// Where the values of `A` `[r, V]` for `ids` are, token by token.
    fn places(ids: &[u32], vocabulary: usize, rank: usize) -> Vec<u32> {
        ids.iter().flat_map(|id| (0..rank as u32).map(move |j| j * vocabulary as u32 + id)).collect()
    }
}
