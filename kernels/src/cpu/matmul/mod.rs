//! Products with a weight `W[O, K]` in the arithmetic that was asked for: in f32, in bf16 or in 8 bits.

mod bf16;
mod exact;
mod group;
mod one;
mod q8;

pub(crate) use group::group;

use super::bf16::Bf16;
use super::buffer::Buffer;
use super::matrix::{Band, Elements, Matrix};
use super::q8::Q8;
use super::table::Table;
use super::{Cost, Cpu};
use crate::{Arithmetic, Memory, Product};
use one::OneToken;

use bf16::TASKS;

/// Multiplications below which other threads stay asleep.
const SMALL: usize = 128 * 1024;
/// Tokens from which rounding and arranging operands for bf16 pays.
const BF16_TOKENS: usize = 8;

/// The kernels of products of so many tokens in bf16, where that is asked for and worth it.
fn bf16_kernels(table: &Table, arithmetic: Arithmetic, tokens: usize) -> Option<&Bf16> {
    table.bf16().filter(|_| arithmetic == Arithmetic::Bf16 && tokens >= BF16_TOKENS)
}

/// Of the products of `tokens` with a weight `[O, K]`, forward and by `X`, with adapters of ranks `beside` in all.
pub(crate) fn scratch(
    table: &Table,
    arithmetic: Arithmetic,
    tokens: usize,
    (o, k): (usize, usize),
    beside: usize,
) -> Cost {
    let (floats, halves) = match bf16_kernels(table, arithmetic, tokens) {
        Some(kernels) => (exact::narrow_scratch(o, k), bf16::scratch(kernels, o, k, beside)),
        None => (exact::scratch(table, tokens, o, k), 0),
    };
    Cost::scratch(floats, halves, tokens * o * k < SMALL)
}

/// Of a product of `tokens` of which `width` values are multiplied with a weight, with adapters of `ranks` beside it:
/// scratch, activations rounded to bf16, and the slices of rows that tasks own.
fn product_cost(
    table: &Table,
    arithmetic: Arithmetic,
    tokens: usize,
    width: usize,
    shape: (usize, usize),
    ranks: &[usize],
) -> Cost {
    let rounded = match bf16_kernels(table, arithmetic, tokens) {
        Some(_) => tokens * [&[width], ranks].concat().into_iter().map(super::bf16::padded).sum::<usize>(),
        None => 0,
    };
    Cost {
        passing: TASKS * tokens * size_of::<&mut [f32]>(),
        rounded: rounded * size_of::<u16>(),
        ..scratch(table, arithmetic, tokens, shape, ranks.iter().sum())
    }
}

/// What [`forward`] takes for `len` values of `x`.
pub(crate) fn cost(table: &Table, arithmetic: Arithmetic, len: usize, shape: (usize, usize)) -> Cost {
    product_cost(table, arithmetic, len / shape.1.max(1), shape.1, shape, &[])
}

/// What [`group()`] takes for `len` values of `x`.
pub(crate) fn group_cost<M: Memory>(
    table: &Table,
    memory: &M,
    arithmetic: Arithmetic,
    len: usize,
    products: &[Product<'_, M>],
) -> Cost {
    let mut cost = Cost::default();
    for Product { w, low_rank, .. } in products {
        let shape = memory.shape(w);
        let tokens = len / shape.1.max(1);
        let ranks: Vec<usize> = low_rank.iter().map(|term| memory.shape(term.a).0).collect();
        cost = cost.then(product_cost(table, arithmetic, tokens, shape.1, shape, &ranks));
        for (term, rank) in low_rank.iter().zip(ranks) {
            let rows = term.rows_of(tokens).len();
            let down = scratch(table, arithmetic, rows, memory.shape(term.a), 0);
            let passing = rows * (rank * size_of::<f32>() + TASKS * size_of::<&mut [f32]>());
            cost = cost.then(Cost { passing, ..down });
        }
    }
    cost
}

/// What [`vjp_x`] takes.
pub(crate) fn vjp_x_cost<M: Memory>(
    table: &Table,
    memory: &M,
    arithmetic: Arithmetic,
    terms: &[(&M::Matrix, &M::Buffer)],
) -> Cost {
    let Some(((w, dy), more)) = terms.split_first() else { return Cost::default() };
    let (o, k) = memory.shape(w);
    let ranks: Vec<usize> = more.iter().map(|(a, _)| memory.shape(a).0).collect();
    product_cost(table, arithmetic, memory.len(dy) / o.max(1), o, (o, k), &ranks)
}

/// What [`vjp_w`] takes for `dy` and `x` of such lengths.
pub(crate) fn vjp_w_cost(tokens: usize, dy: usize, x: usize) -> Cost {
    let tokens = tokens.max(1);
    Cost::scratch(exact::vjp_w_scratch(dy / tokens, x / tokens), 0, true)
}

/// `y[T, O] = x[T, K] Wᵀ`, added to `y` if `accumulate`.
pub(crate) fn forward(cpu: &Cpu, arithmetic: Arithmetic, w: &Matrix, x: &[f32], y: &mut [f32], accumulate: bool) {
    let (o, k) = w.shape();
    let tokens = tokens(x, k, y, o);
    if tokens == 1 && k > 0 && (k > exact::THIN || matches!(w.elements(), Elements::Nf4(_))) {
        return OneToken::new(cpu, arithmetic, x, [w]).product(cpu, w, y, accumulate);
    }
    match arithmetic {
        Arithmetic::Int8 if k > 0 && q8::fits(w) => q8::forward(cpu, w, &Q8::new(cpu, x, k), y, accumulate),
        Arithmetic::Bf16 | Arithmetic::Int8 if takes_bf16(cpu, tokens, k) && !exact::is_narrow(w.whole()) => {
            bf16::forward(cpu, w.whole(), x, y, accumulate);
        }
        _ => exact::forward(cpu, w.whole(), x, y, accumulate),
    }
}

/// Whether a product of so many tokens with sums of `depth` terms is done in bf16 where that is asked for.
pub(crate) fn takes_bf16(cpu: &Cpu, tokens: usize, depth: usize) -> bool {
    bf16_kernels(cpu.table, Arithmetic::Bf16, tokens).is_some() && depth > 0
}

/// [`forward`] with some rows of a weight, in bf16 if `bf16`, where [`takes_bf16`] allows it, or else in f32.
pub(crate) fn forward_band(cpu: &Cpu, bf16: bool, w: Band<'_>, x: &[f32], y: &mut [f32]) {
    let product = if bf16 { bf16::forward } else { exact::forward };
    product(cpu, w, x, y, false);
}

/// [`vjp_x`] with some rows of a weight, added to `dx`; see [`forward_band`].
pub(crate) fn vjp_x_band(cpu: &Cpu, bf16: bool, w: Band<'_>, dy: &[f32], dx: &mut [f32]) {
    let product = if bf16 { bf16::vjp_x } else { exact::vjp_x };
    product(cpu, &[(w, dy)], dx, true);
}

/// See [`crate::Call::MatmulVjpX`].
pub(crate) fn vjp_x(cpu: &Cpu, arithmetic: Arithmetic, terms: &[(&Matrix, &Buffer)], dx: &mut [f32], accumulate: bool) {
    let mut bands = Vec::with_capacity(terms.len());
    let mut bf16 = arithmetic == Arithmetic::Bf16;
    for (w, dy) in terms {
        let (o, k) = w.shape();
        bf16 &= takes_bf16(cpu, tokens(dx, k, dy, o), 1);
        bands.extend((o > 0).then(|| (w.whole(), &dy[..])));
    }
    if bf16 && !bands.is_empty() {
        bf16::vjp_x(cpu, &bands, dx, accumulate);
    } else {
        exact::vjp_x(cpu, &bands, dx, accumulate);
    }
}

/// `dw[O, K] += dy[T, O]ᵀ x[T, K]`.
pub(crate) fn vjp_w(cpu: &Cpu, tokens: usize, dy: &[f32], x: &[f32], dw: &mut [f32]) {
    exact::vjp_w(cpu, tokens, dy, x, dw);
}

/// `T` of `x[T, K]` and `y[T, O]`; asserts that they agree.
fn tokens(x: &[f32], k: usize, y: &[f32], o: usize) -> usize {
    let tokens = x.len().checked_div(k).or(y.len().checked_div(o)).unwrap_or(0);
    assert!(x.len() == tokens * k && y.len() == tokens * o, "x {}, y {} for [{o}, {k}]", x.len(), y.len());
    tokens
}
