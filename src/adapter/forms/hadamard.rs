//! A term with the layer's own weight in it: `y += s x (W * (B A))ᵀ`, element by element, with `A` `[r, in]`, `B` `[out, r]`. It goes
//! by tiles of a few outputs, so that no more of `W` than that is ever there in f32, and none of `B A`. Backward makes each tile
//! once more; what a tile gets is a product over the tokens, so that ranks cost nothing beside it.

use super::{Context, Gradients, Term};
use crate::adapter::held::TensorId;
use crate::error::Result;
use pocketlora_kernels::{Backend, Blocks, Call, Columns};
use std::ops::Range;

/// Values of a tile.
const TILE: usize = 1 << 18;

/// See the module's text.
pub(crate) struct Hadamard {
    /// `A`, a matrix.
    pub a: TensorId,
    /// `B`, plain values.
    pub b: TensorId,
    /// `[out, in]`.
    pub layer: [usize; 2],
    /// `s`.
    pub factor: f32,
}

/// Some outputs: rows of W, of B, and of `s W * (B A)`.
struct Tile<B: Backend> {
    weight: B::Buffer,
    b: B::Buffer,
    change: B::Buffer,
}

impl<B: Backend> Tile<B> {
    fn put(self, cx: &mut Context<'_, B>) {
        [self.weight, self.b, self.change].into_iter().for_each(|buffer| cx.pool.put(cx.backend, buffer));
    }
}

impl Hadamard {
    fn strength<B: Backend>(&self, cx: &Context<'_, B>) -> f32 {
        self.factor * cx.held.strength(self.a)
    }

    /// Outputs of each tile.
    fn tiles(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let [out, input] = self.layer;
        let high = (TILE / input.max(1)).max(1);
        (0..out).step_by(high).map(move |first| first..(first + high).min(out))
    }

    fn tile<B: Backend>(&self, cx: &mut Context<'_, B>, rows: &Range<usize>) -> Result<Tile<B>> {
        let (backend, a, table) = (cx.backend, cx.held.matrix(self.a), cx.weight.expect("a term is on a layer"));
        let (rank, input) = backend.shape(a);
        let ids: Vec<u32> = rows.clone().map(|row| row as u32).collect();
        let mut weight = cx.pool.take(backend, ids.len() * input)?;
        backend.run(Call::Embed { table, ids: &ids, y: &mut weight })?;
        let mut b = cx.pool.take(backend, ids.len() * rank)?;
        backend.run(Call::GatherRows { x: cx.held.buffer(self.b), rows: &ids, y: &mut b })?;
        let mut product = cx.pool.take(backend, ids.len() * input)?;
        let (arithmetic, terms) = (cx.arithmetic, [(a, &b)]);
        backend.run(Call::MatmulVjpX { arithmetic, terms: &terms, dx: &mut product, accumulate: false })?;
        let mut change = cx.pool.take(backend, ids.len() * input)?;
        backend.run(Call::Multiply { a: &weight, b: &product, y: &mut change })?;
        backend.run(Call::Scale { factor: self.strength(cx), x: &mut change })?;
        cx.pool.put(backend, product);
        Ok(Tile { weight, b, change })
    }

    /// How a tile of so many outputs meets what the layer reads.
    fn spec(&self, outputs: usize) -> Blocks {
        Blocks { count: 1, shape: [outputs, self.layer[1]], inner: 1 }
    }

    /// The columns `rows` of `dy`.
    fn part<B: Backend>(&self, cx: &mut Context<'_, B>, rows: &Range<usize>, dy: &B::Buffer) -> Result<B::Buffer> {
        let (out, width) = (self.layer[0], rows.len());
        let mut y = cx.pool.take(cx.backend, cx.backend.len(dy) / out * width)?;
        let (x_at, y_at) = (Columns { of: out, first: rows.start }, Columns { of: width, first: 0 });
        cx.backend.run(Call::CopyColumns { width, x: dy, x_at, y: &mut y, y_at, accumulate: false })?;
        Ok(y)
    }
}

impl<B: Backend> Term<B> for Hadamard {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        let (backend, [out, input]) = (cx.backend, self.layer);
        let tokens = backend.len(x) / input;
        for rows in self.tiles() {
            let (tile, width) = (self.tile(cx, &rows)?, rows.len());
            let mut part = cx.pool.take(backend, tokens * width)?;
            let (spec, w) = (self.spec(width), &tile.change);
            backend.run(Call::BlockProduct { spec, transposed: false, w, x, y: &mut part })?;
            let (x_at, y_at) = (Columns { of: width, first: 0 }, Columns { of: out, first: rows.start });
            backend.run(Call::CopyColumns { width, x: &part, x_at, y, y_at, accumulate: true })?;
            tile.put(cx);
            cx.pool.put(backend, part);
        }
        Ok(())
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: &B::Buffer,
        dy: &B::Buffer,
        grads: &mut Gradients<B>,
    ) -> Result<B::Buffer> {
        let (backend, a, input) = (cx.backend, cx.held.matrix(self.a), self.layer[1]);
        let (rank, tokens) = (backend.shape(a).0, backend.len(x) / input);
        let learns = grads.of(self.a).is_some() || grads.of(self.b).is_some();
        for rows in self.tiles().filter(|_| learns) {
            let (tile, part) = (self.tile(cx, &rows)?, self.part(cx, &rows, dy)?);
            // The gradient of the tile, s W * dyᵀ x, is that of B A.
            let mut dtile = cx.pool.take(backend, rows.len() * input)?;
            backend.run(Call::Zero { x: &mut dtile })?;
            backend.run(Call::MatmulVjpW { tokens, dy: &part, x, dw: &mut dtile })?;
            let mut dproduct = cx.pool.take(backend, rows.len() * input)?;
            backend.run(Call::Multiply { a: &tile.weight, b: &dtile, y: &mut dproduct })?;
            backend.run(Call::Scale { factor: self.strength(cx), x: &mut dproduct })?;
            if let Some(da) = grads.of(self.a) {
                backend.run(Call::MatmulVjpW { tokens: rows.len(), dy: &tile.b, x: &dproduct, dw: da })?;
            }
            if let Some(db) = grads.of(self.b) {
                let ids: Vec<u32> = rows.clone().map(|row| row as u32).collect();
                let mut rows_of_b = cx.pool.take(backend, rows.len() * rank)?;
                let (arithmetic, y) = (cx.arithmetic, &mut rows_of_b);
                backend.run(Call::Matmul { arithmetic, w: a, x: &dproduct, y, accumulate: false })?;
                backend.run(Call::ScatterAddRows { x: &rows_of_b, rows: &ids, y: db })?;
                cx.pool.put(backend, rows_of_b);
            }
            tile.put(cx);
            [part, dtile, dproduct].into_iter().for_each(|buffer| cx.pool.put(backend, buffer));
        }
        let mut carried = cx.pool.take(backend, backend.len(dy))?;
        backend.run(Call::Copy { x: dy, y: &mut carried })?;
        Ok(carried)
    }

    fn backward_x(&self, cx: &mut Context<'_, B>, dy: &B::Buffer, dx: &mut B::Buffer) -> Result<()> {
        let backend = cx.backend;
        for rows in self.tiles() {
            let (tile, part) = (self.tile(cx, &rows)?, self.part(cx, &rows, dy)?);
            let mut back = cx.pool.take(backend, backend.len(dx))?;
            let (spec, w) = (self.spec(rows.len()), &tile.change);
            backend.run(Call::BlockProduct { spec, transposed: true, w, x: &part, y: &mut back })?;
            backend.run(Call::AddAssign { x: &back, y: dx })?;
            tile.put(cx);
            [part, back].into_iter().for_each(|buffer| cx.pool.put(backend, buffer));
        }
        Ok(())
    }
}
