//! Operations, one file each: what runs forward beside what inverts it.

mod add;
mod attention;
mod embed;
mod gate;
mod linear;
mod norm;
mod rope;
mod scale;

use super::interpreter::Interpreter;
use crate::adapter::Gradients;
use crate::error::Result;
use pocketlora_kernels::Backend;
use pocketlora_models::{Op, Value};

/// Computes what `op` writes, from `y` on.
///
/// # Errors
/// Out of memory.
pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, op: &Op, y: Value) -> Result<()> {
    match op {
        Op::Embed { table } => embed::run(it, *table, y),
        Op::Linears { layers, x } => linear::run(it, layers, *x, y),
        Op::Norm { norm, x } => norm::run(it, norm, *x, y),
        Op::Rope { table, heads, x } => rope::run(it, *table, *heads, *x, y),
        Op::Attention { shape, state, q, k, v } => attention::run(it, shape, *state, [*q, *k, *v], y),
        Op::Gate { activation, gate, up } => gate::run(it, *activation, *gate, *up, y),
        Op::Scale { factor, x } => scale::run(it, *factor, *x, y),
        Op::Add { a, b } => add::run(it, *a, *b, y),
    }
}

/// Adds to the gradients of what `op` reads, given those of what it has written from `y` on, which are taken. `dying` are
/// the values that nobody reads after it.
///
/// # Errors
/// Out of memory.
pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    op: &Op,
    y: Value,
    dying: &[Value],
    grads: &mut Gradients<B>,
) -> Result<()> {
    if let Op::Linears { layers, x } = op {
        return linear::back(it, layers, *x, y, dying, grads);
    }
    let Some(dy) = it.slots[y.0 as usize].grad.take() else { return Ok(()) };
    match op {
        Op::Linears { .. } => unreachable!("has several outputs, see above"),
        Op::Embed { .. } => {
            it.put(dy);
            Ok(())
        }
        Op::Norm { norm, x } => norm::back(it, norm, *x, dy),
        Op::Rope { table, heads, x } => rope::back(it, *table, *heads, *x, dy),
        Op::Attention { shape, state, q, k, v } => attention::back(it, shape, *state, [*q, *k, *v], y, dy, grads),
        Op::Gate { activation, gate, up } => gate::back(it, *activation, *gate, *up, dy, dying),
        Op::Scale { factor, x } => scale::back(it, *factor, *x, dy),
        Op::Add { a, b } => add::back(it, *a, *b, dy),
    }
}

/// Runs an addition whose term `into` nobody reads any more in its place.
pub(super) use add::run_in_place as add_in_place;
