//! Operations, one file each: what runs forward beside what inverts it.

mod add;
mod attention;
mod carry;
mod columns;
mod conv;
mod decay;
mod delta_rule;
mod embed;
mod experts;
mod gate;
mod join;
mod linear;
mod map;
mod multiply;
mod norm;
mod rope;
mod route;
mod scale;
mod scale_by;
mod scale_heads;
mod scale_parts;
mod state_space;
mod xielu;

use super::interpreter::Interpreter;
use super::sequence::State;
use crate::adapter::Gradients;
use crate::error::Result;
use pocketlora_kernels::Backend;
use pocketlora_models::{Op, StateId, Value};
use std::ops::Range;

/// Computes what `op` writes, from `y` on.
///
/// # Errors
/// Out of memory.
pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, op: &Op, y: Value) -> Result<()> {
    match op {
        Op::Embed { table } => embed::run(it, *table, y),
        Op::EmbedPositions { table } => embed::run_positions(it, *table, y),
        Op::Linears { layers, x } => linear::run(it, layers, *x, y),
        Op::Norm { norm, x } => norm::run(it, norm, *x, y),
        Op::Rope { table, heads, x } => rope::run(it, *table, *heads, *x, y),
        Op::Attention { shape, state, shared, q, k, v } => {
            attention::run(it, shape, (*state, *shared), [*q, *k, *v], y)
        }
        Op::Carry { slot, x } => carry::run(it, *slot, *x, y),
        Op::Carried { slot, part } => carry::run_read(it, *slot, part, y),
        Op::Gate { activation, gate, up } => gate::run(it, *activation, *gate, *up, y),
        Op::Scale { factor, x } => scale::run(it, *factor, *x, y),
        Op::ScaleBy { factor, x } => scale_by::run(it, *factor, *x, y),
        Op::ScaleHeads { factors, x } => scale_heads::run(it, *factors, *x, y),
        Op::Join { heads, pieces } => join::run(it, *heads, pieces, y),
        Op::ScaleParts { parts, x } => scale_parts::run(it, parts, *x, y),
        Op::Map { map, x } => map::run(it, *map, *x, y),
        Op::Xielu { xielu, x } => xielu::run(it, xielu, *x, y),
        Op::Multiply { a, b } => multiply::run(it, *a, *b, y),
        Op::Columns { x, width, part, .. } => columns::run(it, *x, *width, part, y),
        Op::Conv { conv, state, x } => conv::run(it, conv, *state, *x, y),
        Op::Decay { rate, bias, a } => decay::run(it, [*rate, *bias], *a, y),
        Op::DeltaRule { shape, state, q, k, v, g, beta } => {
            delta_rule::run(it, shape, *state, [*q, *k, *v, *g, *beta], y)
        }
        Op::StateSpace { space, state, x, b, c, dt } => state_space::run(it, space, *state, [*x, *b, *c, *dt], y),
        Op::Route { router, routing, logits } => route::run(it, *router, routing, *logits, y),
        Op::Experts { experts, x, weights } => experts::run(it, experts, *x, *weights, y),
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
    let dy = it.slots[y.0 as usize].grad.take();
    if let Op::Carry { slot, x } = op {
        return carry::back(it, *slot, *x, dy);
    }
    let Some(dy) = dy else { return Ok(()) };
    match op {
        Op::Linears { .. } | Op::Carry { .. } => unreachable!("see above"),
        Op::Embed { table } => embed::back(it, *table, dy, grads),
        Op::EmbedPositions { .. } => {
            it.put(dy);
            Ok(())
        }
        Op::Norm { norm, x } => norm::back(it, norm, *x, dy, grads),
        Op::Rope { table, heads, x } => rope::back(it, *table, *heads, *x, dy),
        Op::Attention { shape, state, q, k, v, .. } => attention::back(it, shape, *state, [*q, *k, *v], y, dy, grads),
        Op::Carried { slot, part } => carry::back_read(it, *slot, part, dy),
        Op::Gate { activation, gate, up } => gate::back(it, *activation, *gate, *up, dy, dying),
        Op::Scale { factor, x } => scale::back(it, *factor, *x, dy),
        Op::ScaleBy { factor, x } => scale_by::back(it, *factor, *x, dy),
        Op::ScaleHeads { factors, x } => scale_heads::back(it, *factors, *x, dy),
        Op::Join { heads, pieces } => join::back(it, *heads, pieces, dy),
        Op::ScaleParts { parts, x } => scale_parts::back(it, parts, *x, dy),
        Op::Map { map, x } => map::back(it, *map, *x, dy),
        Op::Xielu { xielu, x } => xielu::back(it, xielu, *x, dy),
        Op::Multiply { a, b } => multiply::back(it, *a, *b, dy),
        Op::Columns { x, width, part, .. } => columns::back(it, *x, *width, part, dy),
        Op::Conv { conv, x, .. } => conv::back(it, conv, *x, dy),
        Op::Decay { rate, bias, a } => decay::back(it, [*rate, *bias], *a, dy),
        Op::DeltaRule { shape, q, k, v, g, beta, .. } => delta_rule::back(it, shape, [*q, *k, *v, *g, *beta], dy),
        Op::StateSpace { space, x, b, c, dt, .. } => state_space::back(it, space, [*x, *b, *c, *dt], dy),
        Op::Route { routing, logits, .. } => route::back(it, routing, *logits, y, dy),
        Op::Experts { experts, x, weights } => experts::back(it, experts, *x, *weights, dy, grads),
        Op::Add { a, b } => add::back(it, *a, *b, dy),
    }
}

/// Runs an addition whose term `into` nobody reads any more in its place.
pub(super) use add::run_in_place as add_in_place;
/// What a pass carries between layers.
pub(super) use carry::Carried;

/// Runs `work` for each sequence of the batch, with its state `id` and its rows.
fn each_state<B: Backend>(
    it: &mut Interpreter<'_, B>,
    id: StateId,
    mut work: impl FnMut(&Interpreter<'_, B>, &mut State<B>, Range<usize>) -> Result<()>,
) -> Result<()> {
    let mut states = std::mem::take(&mut it.states);
    let (mut start, mut done) = (0, Ok(()));
    for (states, tokens) in states.iter_mut().zip(&it.pass.batch.segments) {
        let rows = start..start + tokens;
        start = rows.end;
        done = done.and_then(|()| work(it, &mut states[id.0 as usize], rows));
    }
    it.states = states;
    done
}
