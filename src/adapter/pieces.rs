//! The few things that methods do on a linear layer, as data: from them come the forms that run, and what merging makes of
//! the layer's weight.

use super::fold::Fold;
use super::forms::LayerForm;
use super::forms::blocks::{Kronecker, Rotate};
use super::forms::bottleneck::Bottleneck;
use super::forms::butterfly::Butterfly;
use super::forms::circulant::Circulant;
use super::forms::hadamard::Hadamard;
use super::forms::low_rank::LowRankTerm;
use super::forms::output::Affine;
use super::forms::reflect::Reflect;
use super::forms::scaled_term::ScaledTerm;
use super::forms::sparse::SparseTerm;
use super::held::{Loader, TensorId};
use super::made::{Input, Link, Map};
use super::tensor::Tensors;
use super::weight::LayerWeight;
use crate::error::{Error, ErrorCode, Result};
use pocketlora_kernels::{Backend, Map as Function};
use std::ops::Range;
use std::sync::Arc;

/// Where the values of a piece's tensor come from.
pub(super) enum Of {
    /// A part of the module in the file, as it is.
    Part(&'static str),
    /// The next one that the [`Map`] makes, of this shape.
    Made(Vec<usize>),
    /// The first rows and columns of a tensor in the file that belongs to no module.
    Corner(&'static str, [usize; 2]),
    /// The same for all layers of a shape: a name for it, its shape and how it is computed.
    Pattern(&'static str, [usize; 2], fn([usize; 2]) -> Vec<f32>),
}

/// What is done on one layer, `y = x Wᵀ + b` without it.
pub(super) enum Piece {
    /// `y += factor (x Aᵀ) Bᵀ`, `A` `[r, in]`, `B` `[out, r]`.
    LowRank { a: Of, b: Of, factor: f32 },
    /// `y += factor outer ((inner (x Aᵀ)) Bᵀ)`, `inner` `[r]`, `outer` `[out]`.
    Scaled { a: Of, b: Of, inner: Of, outer: Of, factor: f32 },
    /// The layer reads `x + (x Uᵀ) Vᵀ`, `U` `[r, in]`, `V` `[in, r]`.
    Reflect { u: Of, v: Of },
    /// The layer gives `y + (y Uᵀ) Vᵀ`, `U` `[r, out]`, `V` `[out, r]`. It is not merged.
    Behind { u: Of, v: Of },
    /// `factor (f(x Dᵀ + d) Uᵀ + u)` of what the layer gives, and added to it, or of what it reads. It is not merged.
    Bottleneck { down: Of, down_bias: Of, up: Of, up_bias: Of, function: Function, factor: f32, behind: bool },
    /// The layer reads `R x`, `R` `[n, c, c]` in `count` blocks of `size` columns.
    Rotate { r: Of, count: usize, size: usize },
    /// `y += factor (left ⊗ right) x`, `left` of the shape `[a, b]`.
    Kronecker { left: Of, right: Of, shape: [usize; 2], factor: f32 },
    /// `y[row_n] += factor values_n x[col_n]`, at the places that the part `places` names: `[2, n]` rows and columns, or
    /// numbers of the values of W in their order.
    Sparse { places: &'static str, flat: bool, values: Of, factor: f32 },
    /// `y += factor x (W * (B A))ᵀ`, element by element, `A` `[r, in]`, `B` `[out, r]`; it comes before other terms.
    Hadamard { a: Of, b: Of, factor: f32 },
    /// `y += factor (S (x Fᵀ)) F`, see [`Circulant`]: `F` is `basis`, `S` has `values` at `rows` and `cols`. Its method merges it.
    Circulant { basis: Of, values: Of, rows: Vec<u32>, cols: Vec<u32>, factor: f32 },
    /// The layer reads `x'` with `x'[rows_n] += values_n x[cols_n]`.
    Butterfly { values: Of, rows: Vec<u32>, cols: Vec<u32> },
    /// The layer gives `scale y + turn swap(y) + shift`, all `[out]`; see [`Affine`].
    Output { scale: Option<Of>, turn: Option<(Of, usize)>, shift: Option<Of> },
}

/// What a method does on one layer, and how the tensors that are not in its file are made.
pub(super) struct Plan {
    /// In the order of what they work on: terms, inputs, outputs.
    pub pieces: Vec<Piece>,
    /// Makes the tensors that are [`Of::Made`], in the order in which the pieces name them.
    pub map: Option<Box<dyn Map>>,
}

impl Plan {
    /// Pieces whose tensors all are in the file.
    pub fn plain(pieces: Vec<Piece>) -> Self {
        Self { pieces, map: None }
    }

    /// Pieces with tensors that `map` makes.
    pub fn made(pieces: Vec<Piece>, map: impl Map + 'static) -> Self {
        Self { pieces, map: Some(Box::new(map)) }
    }
}

/// Puts the tensors of a module's pieces on a device.
struct Placer<'l, 'a, B: Backend> {
    load: &'l mut Loader<'a, B>,
    frozen: &'static [&'static str],
    values: Option<std::vec::IntoIter<Vec<f32>>>,
    /// `[out, in]`.
    layer: [usize; 2],
    /// Parts of the module that are there, and what was made.
    parts: Vec<(&'static str, TensorId)>,
    made: Vec<TensorId>,
}

impl<B: Backend> Placer<'_, '_, B> {
    fn place(&mut self, of: &Of, matrix: bool) -> Result<TensorId> {
        match of {
            Of::Part(part) => {
                let id = match (self.frozen.contains(part), matrix) {
                    (true, matrix) => self.load.fixed(part, matrix)?,
                    (false, true) => self.load.matrix(part)?,
                    (false, false) => self.load.buffer(part)?,
                };
                self.parts.push((part, id));
                Ok(id)
            }
            Of::Made(shape) => {
                let values = self.values.as_mut().map(|values| values.next().expect("one for each that is made"));
                let id = self.load.made(shape, matrix, values.as_deref())?;
                self.made.push(id);
                Ok(id)
            }
            Of::Corner(name, shape) => {
                let whole = self.load.host(name);
                let cols = self.load.columns_of(name);
                if whole.is_some_and(|whole| shape[1] > cols || shape[0] * cols > whole.len()) {
                    let message = format!("expected `{name}` to have `{shape:?}` for a layer, got less of it");
                    return Err(Error::new(ErrorCode::AdapterMismatch, format!("tensor `{name}`"), message));
                }
                self.load.shared(name, *shape, &|| corner(whole.unwrap_or_default(), cols, *shape))
            }
            Of::Pattern(name, shape, values) => self.load.shared(name, *shape, &|| values(*shape)),
        }
    }

    fn form(&mut self, piece: &Piece) -> Result<LayerForm<B>> {
        Ok(match piece {
            Piece::LowRank { a, b, factor } => {
                let (a, b) = (self.place(a, true)?, self.place(b, true)?);
                LayerForm::Term(Arc::new(LowRankTerm { a, b, bias: None, factor: *factor }))
            }
            Piece::Scaled { a, b, inner, outer, factor } => {
                let (a, b) = (self.place(a, true)?, self.place(b, true)?);
                let (inner, outer) = (self.place(inner, false)?, self.place(outer, false)?);
                LayerForm::Term(Arc::new(ScaledTerm { a, b, inner, outer, factor: *factor }))
            }
            Piece::Reflect { u, v } => {
                LayerForm::Input(Arc::new(Reflect { u: self.place(u, true)?, v: self.place(v, true)? }))
            }
            Piece::Behind { u, v } => {
                LayerForm::Output(Arc::new(Reflect { u: self.place(u, true)?, v: self.place(v, true)? }))
            }
            Piece::Bottleneck { down, down_bias, up, up_bias, function, factor, behind } => {
                let (down, down_bias) = (self.place(down, true)?, self.place(down_bias, false)?);
                let (up, up_bias) = (self.place(up, true)?, self.place(up_bias, false)?);
                let form = Bottleneck { down, down_bias, up, up_bias, function: *function, factor: *factor };
                if *behind { LayerForm::Output(Arc::new(form)) } else { LayerForm::Term(Arc::new(form)) }
            }
            Piece::Rotate { r, count, size } => {
                LayerForm::Input(Arc::new(Rotate { r: self.place(r, false)?, count: *count, size: *size }))
            }
            Piece::Kronecker { left, right, shape, factor } => {
                let (left, right) = (self.place(left, false)?, self.place(right, true)?);
                LayerForm::Term(Arc::new(Kronecker { left, right, shape: *shape, factor: *factor }))
            }
            Piece::Sparse { places, flat, values, factor } => {
                let input = self.layer[1];
                let places = self.load.host(places).map(|places| places_of(places, *flat, input));
                let ((rows, cols), values) = (places.unwrap_or_default(), self.place(values, false)?);
                LayerForm::Term(Arc::new(SparseTerm { values, rows, cols, input, factor: *factor }))
            }
            Piece::Hadamard { a, b, factor } => {
                let (a, b) = (self.place(a, true)?, self.place(b, false)?);
                LayerForm::Term(Arc::new(Hadamard { a, b, layer: self.layer, factor: *factor }))
            }
            Piece::Circulant { basis, values, rows, cols, factor } => {
                let (basis, values) = (self.place(basis, true)?, self.place(values, false)?);
                let (rows, cols, layer, factor) = (rows.clone(), cols.clone(), self.layer, *factor);
                LayerForm::Term(Arc::new(Circulant { basis, values, rows, cols, layer, factor }))
            }
            Piece::Butterfly { values, rows, cols } => {
                let (values, input) = (self.place(values, false)?, self.layer[1]);
                LayerForm::Input(Arc::new(Butterfly { values, rows: rows.clone(), cols: cols.clone(), input }))
            }
            Piece::Output { scale, turn, shift } => {
                let scale = scale.as_ref().map(|of| self.place(of, false)).transpose()?;
                let turn = turn.as_ref().map(|(of, half)| Ok::<_, Error>((self.place(of, false)?, *half)));
                let turn = turn.transpose()?;
                let shift = shift.as_ref().map(|of| self.place(of, false)).transpose()?;
                LayerForm::Output(Arc::new(Affine { scale, turn, shift }))
            }
        })
    }
}

/// The forms of `method` on the module that `load` is at.
///
/// # Errors
/// Out of memory.
pub(super) fn forms<B: Backend>(
    parts: &'static [&'static str],
    frozen: &'static [&'static str],
    plan: Plan,
    load: &mut Loader<'_, B>,
) -> Result<Vec<LayerForm<B>>> {
    let (layer, weight) = load.weight();
    let own: Option<Vec<&[f32]>> = parts.iter().map(|part| load.host(part)).collect();
    let values = match (&plan.map, &own) {
        (Some(map), Some(own)) => Some(map.forward(own, &weight)?.into_iter()),
        _ => None,
    };
    let mut placer = Placer { load, frozen, values, layer: weight.shape(), parts: Vec::new(), made: Vec::new() };
    let forms = plan.pieces.iter().map(|piece| placer.form(piece)).collect::<Result<Vec<_>>>()?;
    let Placer { parts: placed, made, .. } = placer;
    let trains = load.trains();
    let mut inputs = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate().filter(|_| trains) {
        inputs.push(match placed.iter().find(|(name, _)| name == part) {
            _ if frozen.contains(part) => {
                Input::Host(load.name_of(part), own.as_ref().map_or(Vec::new(), |own| own[i].to_vec()))
            }
            Some((_, id)) => Input::Held(*id),
            None => Input::Held(load.buffer(part)?),
        });
    }
    if let Some(map) = plan.map.filter(|_| trains) {
        load.link(Link { map, own: inputs, made, layer });
    }
    Ok(forms)
}

/// Rows and columns of the places in a weight `[out, in]` that `places` name: rows, then columns, or where `flat` numbers of
/// its values in their order.
fn places_of(places: &[f32], flat: bool, input: usize) -> (Vec<u32>, Vec<u32>) {
    if flat {
        return places.iter().map(|at| (*at as u32 / input as u32, *at as u32 % input as u32)).unzip();
    }
    let (rows, cols) = places.split_at(places.len() / 2);
    (rows.iter().map(|row| *row as u32).collect(), cols.iter().map(|col| *col as u32).collect())
}

/// The first rows and columns of a matrix with `cols` columns.
fn corner(whole: &[f32], cols: usize, [rows, width]: [usize; 2]) -> Vec<f32> {
    whole.chunks(cols.max(1)).take(rows).flat_map(|row| &row[..width]).copied().collect()
}

/// A piece with its values on the host.
enum Step {
    LowRank { a: Vec<f32>, b: Vec<f32>, rank: usize, factor: f32 },
    Reflect { u: Vec<f32>, v: Vec<f32>, rank: usize },
    Rotate { r: Vec<f32>, size: usize },
    Kronecker { left: Vec<f32>, right: Vec<f32>, shape: [usize; 2], factor: f32 },
    Sparse { rows: Vec<u32>, cols: Vec<u32>, values: Vec<f32>, factor: f32 },
    Hadamard { a: Vec<f32>, b: Vec<f32>, rank: usize, factor: f32 },
    Butterfly { rows: Vec<u32>, cols: Vec<u32>, values: Vec<f32> },
    Output { scale: Option<Vec<f32>>, turn: Option<(Vec<f32>, usize)>, shift: Option<Vec<f32>> },
}

/// What merging makes of a layer's weight.
struct PlanFold(Vec<Step>);

/// There is no device where weights are merged; the map of a method that asks for one has a fold of its own.
pub(super) struct NoWeight(pub [usize; 2]);

impl LayerWeight for NoWeight {
    fn shape(&self) -> [usize; 2] {
        self.0
    }

    fn times(&self, _x: &[f32]) -> Result<Vec<f32>> {
        unreachable!("a method that asks for it merges by a fold of its own")
    }

    fn back(&self, _y: &[f32]) -> Result<Vec<f32>> {
        unreachable!("a method that asks for it merges by a fold of its own")
    }

    fn squares(&self) -> Result<[Vec<f64>; 2]> {
        unreachable!("a method that asks for it merges by a fold of its own")
    }

    fn bias(&self) -> Result<Option<Vec<f32>>> {
        unreachable!("a method that asks for it merges by a fold of its own")
    }
}

/// The fold of `plan` for the module at the path `module`, whose layer is `[out, in]`; `parts` are those in the file.
pub(super) fn fold(
    parts: &'static [&'static str],
    plan: &Plan,
    module: &str,
    tensors: &Tensors,
    layer: [usize; 2],
) -> Option<Box<dyn Fold>> {
    let part = |part: &str| &tensors[&format!("{module}.{part}")];
    let own: Vec<&[f32]> = parts.iter().map(|name| &part(name).data[..]).collect();
    let made = plan.map.as_ref().map_or(Ok(Vec::new()), |map| map.forward(&own, &NoWeight(layer))).ok()?;
    let mut made = made.into_iter();
    let mut values = |of: &Of| -> Vec<f32> {
        match of {
            Of::Part(name) => part(name).data.clone(),
            Of::Made(_) => made.next().expect("one for each that is made"),
            Of::Corner(name, shape) => corner(&tensors[*name].data, tensors[*name].shape[1], *shape),
            Of::Pattern(_, shape, values) => values(*shape),
        }
    };
    let [out, _] = layer;
    let rank_of = |b: &[f32]| b.len() / out.max(1);
    let mut steps = Vec::with_capacity(plan.pieces.len());
    for piece in &plan.pieces {
        steps.push(match piece {
            Piece::LowRank { a, b, factor } => {
                let (a, b) = (values(a), values(b));
                Step::LowRank { rank: rank_of(&b), a, b, factor: *factor }
            }
            Piece::Scaled { a, b, inner, outer, factor } => {
                let (a, mut b, inner, outer) = (values(a), values(b), values(inner), values(outer));
                let rank = inner.len();
                for (row, outer) in b.chunks_mut(rank.max(1)).zip(&outer) {
                    row.iter_mut().zip(&inner).for_each(|(b, inner)| *b *= inner * outer);
                }
                Step::LowRank { a, b, rank, factor: *factor }
            }
            Piece::Reflect { u, v } => {
                let (u, v) = (values(u), values(v));
                Step::Reflect { rank: u.len() / layer[1].max(1), u, v }
            }
            Piece::Hadamard { a, b, factor } => {
                let (a, b) = (values(a), values(b));
                Step::Hadamard { rank: rank_of(&b), a, b, factor: *factor }
            }
            Piece::Butterfly { values: of, rows, cols } => {
                Step::Butterfly { rows: rows.clone(), cols: cols.clone(), values: values(of) }
            }
            Piece::Behind { .. } | Piece::Bottleneck { .. } | Piece::Circulant { .. } => return None,
            Piece::Rotate { r, size, .. } => Step::Rotate { r: values(r), size: *size },
            Piece::Kronecker { left, right, shape, factor } => {
                Step::Kronecker { left: values(left), right: values(right), shape: *shape, factor: *factor }
            }
            Piece::Sparse { places, flat, values: of, factor } => {
                let (rows, cols) = places_of(&part(places).data, *flat, layer[1]);
                Step::Sparse { rows, cols, values: values(of), factor: *factor }
            }
            Piece::Output { scale, turn, shift } => {
                let scale = scale.as_ref().map(&mut values);
                let turn = turn.as_ref().map(|(of, half)| (values(of), *half));
                Step::Output { scale, turn, shift: shift.as_ref().map(&mut values) }
            }
        });
    }
    // What is read last meets the weight first.
    let inputs = steps.iter().take_while(|step| matches!(step, Step::Butterfly { .. })).count();
    steps[..inputs].reverse();
    Some(Box::new(PlanFold(steps)))
}

impl PlanFold {
    /// `c x + t swap(x)` of the columns `values` `[rows, n]`, where row `i` belongs to output `first + i`.
    fn give(scale: Option<&[f32]>, turn: Option<&(Vec<f32>, usize)>, rows: Range<usize>, values: &mut [f32]) {
        let n = values.len() / rows.len().max(1);
        let old = turn.map(|_| values.to_vec());
        for (row, values) in rows.clone().zip(values.chunks_exact_mut(n.max(1))) {
            if let Some(scale) = scale {
                values.iter_mut().for_each(|w| *w *= scale[row]);
            }
            if let (Some((turn, half)), Some(old)) = (turn, &old) {
                let other = if row / half % 2 == 0 { row + half } else { row - half };
                let other = &old[(other - rows.start) * n..][..n];
                values.iter_mut().zip(other).for_each(|(w, other)| *w += turn[row] * other);
            }
        }
    }
}

impl Fold for PlanFold {
    fn weight(&self, rows: Range<usize>, values: &mut [f32]) {
        let cols = values.len() / rows.len().max(1);
        for step in &self.0 {
            match step {
                Step::LowRank { a, b, rank, factor } => {
                    for (row, values) in rows.clone().zip(values.chunks_exact_mut(cols.max(1))) {
                        let mut change = vec![0.0; cols];
                        for (b, a) in b[row * rank..(row + 1) * rank].iter().zip(a.chunks_exact(cols.max(1))) {
                            change.iter_mut().zip(a).for_each(|(change, a)| *change += b * a);
                        }
                        values.iter_mut().zip(&change).for_each(|(w, change)| *w += factor * change);
                    }
                }
                // W (1 + V U)
                Step::Reflect { u, v, rank } => {
                    for values in values.chunks_exact_mut(cols.max(1)) {
                        let mut low = vec![0.0; *rank];
                        for (w, v) in values.iter().zip(v.chunks_exact((*rank).max(1))) {
                            low.iter_mut().zip(v).for_each(|(low, v)| *low += w * v);
                        }
                        for (low, u) in low.iter().zip(u.chunks_exact(cols.max(1))) {
                            values.iter_mut().zip(u).for_each(|(w, u)| *w += low * u);
                        }
                    }
                }
                // W R, a block of columns at a time.
                Step::Rotate { r, size } => {
                    for values in values.chunks_exact_mut(cols.max(1)) {
                        let matrices = r.chunks_exact(size * size).cycle();
                        for (block, r) in values.chunks_exact_mut(*size).zip(matrices) {
                            let old = block.to_vec();
                            block.fill(0.0);
                            for (w, r) in old.iter().zip(r.chunks_exact(*size)) {
                                block.iter_mut().zip(r).for_each(|(new, r)| *new += w * r);
                            }
                        }
                    }
                }
                Step::Kronecker { left, right, shape: [high, wide], factor } => {
                    let (c, d) = (right.len() / (cols / wide).max(1), cols / wide);
                    debug_assert_eq!(left.len(), high * wide);
                    for (row, values) in rows.clone().zip(values.chunks_exact_mut(cols.max(1))) {
                        let (left, right) = (&left[row / c * wide..][..*wide], &right[row % c * d..][..d]);
                        for (block, left) in values.chunks_exact_mut(d.max(1)).zip(left) {
                            block.iter_mut().zip(right).for_each(|(w, right)| *w += factor * left * right);
                        }
                    }
                }
                Step::Sparse { rows: at, cols: columns, values: own, factor } => {
                    for ((row, col), value) in at.iter().zip(columns).zip(own) {
                        if let Some(row) = (*row as usize).checked_sub(rows.start).filter(|row| *row < rows.len()) {
                            values[row * cols + *col as usize] += factor * value;
                        }
                    }
                }
                Step::Hadamard { a, b, rank, factor } => {
                    for (row, values) in rows.clone().zip(values.chunks_exact_mut(cols.max(1))) {
                        let mut change = vec![0.0; cols];
                        for (b, a) in b[row * rank..(row + 1) * rank].iter().zip(a.chunks_exact(cols.max(1))) {
                            change.iter_mut().zip(a).for_each(|(change, a)| *change += b * a);
                        }
                        values.iter_mut().zip(&change).for_each(|(w, change)| *w += factor * *w * change);
                    }
                }
                // W with x' of x in it.
                Step::Butterfly { rows: to, cols: from, values: own } => {
                    for values in values.chunks_exact_mut(cols.max(1)) {
                        let old = values.to_vec();
                        values.fill(0.0);
                        for ((to, from), v) in to.iter().zip(from).zip(own) {
                            values[*from as usize] += v * old[*to as usize];
                        }
                    }
                }
                Step::Output { scale, turn, .. } => {
                    Self::give(scale.as_deref(), turn.as_ref(), rows.clone(), values);
                }
            }
        }
    }

    fn bias(&self, bias: &mut [f32]) {
        for step in &self.0 {
            if let Step::Output { scale, turn, shift } = step {
                Self::give(scale.as_deref(), turn.as_ref(), 0..bias.len(), bias);
                bias.iter_mut().zip(shift.iter().flatten()).for_each(|(b, s)| *b += s);
            }
        }
    }

    fn needs_bias(&self) -> bool {
        self.0.iter().any(|step| matches!(step, Step::Output { shift: Some(_), .. }))
    }

    fn span(&self, rows: Range<usize>) -> Range<usize> {
        let widest = self.0.iter().filter_map(|step| match step {
            Step::Output { turn: Some((_, half)), .. } => Some(2 * half),
            _ => None,
        });
        match widest.max() {
            Some(group) => rows.start / group * group..rows.end.div_ceil(group) * group,
            None => rows,
        }
    }
}
