//! What a method may ask of a layer's frozen weight. It is read in its own few bits: no more than a tile is ever expanded.

use super::replaced::Replaced;
use crate::base::Base;
use crate::error::Result;
use pocketlora_kernels::{Arithmetic, Backend, Call};
use pocketlora_models::Param;
use std::sync::Arc;

/// Values of a tile.
const TILE: usize = 1 << 18;

/// A layer's weight `W` `[out, in]`, as methods know it.
pub(super) trait LayerWeight {
    /// `[out, in]`.
    fn shape(&self) -> [usize; 2];

    /// `x Wᵀ` `[n, out]` of `x` `[n, in]`.
    ///
    /// # Errors
    /// Out of memory.
    fn times(&self, x: &[f32]) -> Result<Vec<f32>>;

    /// `y W` `[n, in]` of `y` `[n, out]`.
    ///
    /// # Errors
    /// Out of memory.
    fn back(&self, y: &[f32]) -> Result<Vec<f32>>;

    /// Sums of the squares of its rows, `[out]`, and of its columns, `[in]`.
    ///
    /// # Errors
    /// Out of memory.
    fn squares(&self) -> Result<[Vec<f64>; 2]>;

    /// The layer's bias `[out]`, if it has one.
    ///
    /// # Errors
    /// Device lost.
    fn bias(&self) -> Result<Option<Vec<f32>>>;
}

/// The weight of a layer on a device.
pub(super) struct Weight<'a, B: Backend> {
    pub base: &'a Base<B>,
    pub replaced: &'a Replaced<B>,
    pub layer: Param,
    /// Memory is counted: there are no values to read.
    pub counts: bool,
}

impl<B: Backend> LayerWeight for Weight<'_, B> {
    fn shape(&self) -> [usize; 2] {
        self.replaced.shape(self.base, self.layer)
    }

    fn times(&self, x: &[f32]) -> Result<Vec<f32>> {
        let (backend, [out, input]) = (&self.base.backend, self.shape());
        let mut y = vec![0.0; x.len() / input * out];
        if self.counts || x.is_empty() {
            return Ok(y);
        }
        let (mut read, mut given) = (backend.buffer(x.len())?, backend.buffer(y.len())?);
        backend.write(&mut read, x);
        let (w, arithmetic) = (self.replaced.factor(self.base, self.layer, Arithmetic::Exact), Arithmetic::Exact);
        backend.run(Call::Matmul { arithmetic, w, x: &read, y: &mut given, accumulate: false })?;
        backend.read(&given, &mut y)?;
        Ok(y)
    }

    fn back(&self, y: &[f32]) -> Result<Vec<f32>> {
        let (backend, [out, input]) = (&self.base.backend, LayerWeight::shape(self));
        let mut x = vec![0.0; y.len() / out.max(1) * input];
        if self.counts || y.is_empty() {
            return Ok(x);
        }
        let (mut read, mut given) = (backend.buffer(y.len())?, backend.buffer(x.len())?);
        backend.write(&mut read, y);
        let (w, arithmetic) = (self.replaced.factor(self.base, self.layer, Arithmetic::Exact), Arithmetic::Exact);
        backend.run(Call::MatmulVjpX { arithmetic, terms: &[(w, &read)], dx: &mut given, accumulate: false })?;
        backend.read(&given, &mut x)?;
        Ok(x)
    }

    fn squares(&self) -> Result<[Vec<f64>; 2]> {
        let (backend, [out, input]) = (&self.base.backend, self.shape());
        let (mut of_rows, mut of_columns) = (vec![0.0; out], vec![0.0; input]);
        if self.counts {
            return Ok([of_rows, of_columns]);
        }
        let table = self.replaced.factor(self.base, self.layer, Arithmetic::Exact);
        let rows: Vec<u32> = (0..out as u32).collect();
        let mut values = Vec::new();
        for ids in rows.chunks((TILE / input.max(1)).max(1)) {
            let mut tile = backend.buffer(ids.len() * input)?;
            backend.run(Call::Embed { table, ids, y: &mut tile })?;
            values.resize(ids.len() * input, 0.0);
            backend.read(&tile, &mut values)?;
            for (id, row) in ids.iter().zip(values.chunks_exact(input.max(1))) {
                for (sum, w) in of_columns.iter_mut().zip(row) {
                    let square = f64::from(*w) * f64::from(*w);
                    *sum += square;
                    of_rows[*id as usize] += square;
                }
            }
        }
        Ok([of_rows, of_columns])
    }

    fn bias(&self) -> Result<Option<Vec<f32>>> {
        let params = self.base.model.params();
        let name = format!("{}.bias", params[self.layer.0 as usize].module());
        let Some(at) = params.iter().position(|spec| spec.name == name) else { return Ok(None) };
        let mut values = vec![0.0; params[at].shape.iter().product()];
        if !self.counts {
            self.base.backend.read(self.replaced.vector(self.base, Param(at as u32)), &mut values)?;
        }
        Ok(Some(values))
    }
}

/// The same as what it is multiplied with, for what decomposes it.
impl<B: Backend> super::init::Operator for Weight<'_, B> {
    fn shape(&self) -> [usize; 2] {
        LayerWeight::shape(self)
    }

    fn times(&self, x: &[f32]) -> Result<Vec<f32>> {
        LayerWeight::times(self, x)
    }

    fn back(&self, y: &[f32]) -> Result<Vec<f32>> {
        LayerWeight::back(self, y)
    }
}

/// Norms of the rows of `V = W + s B A`, for maps that hold what of them stays: `|V_o|² = |W_o|² + 2 s B_o (W Aᵀ)_o + s² B_o
/// (A Aᵀ) B_oᵀ`.
pub(super) fn norms(
    squares: &Arc<[f64]>,
    (a, b): (&[f32], &[f32]),
    factor: f32,
    weight: &dyn LayerWeight,
) -> Result<Vec<f32>> {
    let [out, input] = weight.shape();
    let rank = a.len() / input.max(1);
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    // [r, out]
    let wa = weight.times(a)?;
    let of = |i: usize| &a[i * input..(i + 1) * input];
    let gram: Vec<f64> = (0..rank * rank).map(|at| dot(of(at / rank), of(at % rank))).collect();
    let factor = f64::from(factor);
    let norm = |o: usize| {
        let b = &b[o * rank..(o + 1) * rank];
        let mixed: f64 = b.iter().enumerate().map(|(i, b)| f64::from(*b) * f64::from(wa[i * out + o])).sum();
        let own = |(at, aa): (usize, &f64)| f64::from(b[at / rank]) * f64::from(b[at % rank]) * aa;
        let own: f64 = gram.iter().enumerate().map(own).sum();
        // Rounding may leave less than nothing of a row of zeros.
        (squares[o] + 2.0 * factor * mixed + factor * factor * own).max(0.0).sqrt() as f32
    };
    Ok((0..out).map(norm).collect())
}
