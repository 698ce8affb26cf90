//! `y` is the sum of `weight * down(inner(x))` over the experts that a token chose.
//!
//! An expert takes the rows of its tokens at once, on a tape of its own. Backward computes again what it makes of them: only
//! the choice is kept.

use super::Interpreter;
use super::route::chosen;
use crate::adapter::Gradients;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::{Exec, Expert, GateUp, Map, Op, Value};

/// The tokens of one expert.
#[derive(Default)]
struct Tokens {
    /// Their rows, ascending.
    rows: Vec<u32>,
    /// Which of all weights each of them has here.
    places: Vec<u32>,
}

pub(super) fn run<B: Backend>(
    it: &mut Interpreter<'_, B>,
    experts: &[Expert],
    x: Value,
    weights: Value,
    y: Value,
) -> Result<()> {
    let backend = it.backend();
    let mut out = it.buffer(it.len(y))?;
    backend.run(Call::Zero { x: &mut out })?;
    for (expert, tokens) in experts.iter().zip(tokens(it, experts.len(), weights)?) {
        if tokens.rows.is_empty() {
            continue;
        }
        let (own, factors) = (gathered(it, x, &tokens.rows)?, weights_of(it, weights, &tokens)?);
        let pass = it.pass.of_rows(&tokens.rows);
        let mut tape = pass.tape(Some(own), false, it.pool);
        let made = record(&mut tape, expert);
        let made = tape.into_value(made)?;
        let mut term = it.buffer(backend.len(&made))?;
        // y += weight * down(inner(x))
        backend.run(Call::ScaleRows { factors: &factors, x: &made, y: &mut term })?;
        backend.run(Call::ScatterAddRows { x: &term, rows: &tokens.rows, y: &mut out })?;
        [factors, made, term].into_iter().for_each(|buffer| it.put(buffer));
    }
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    experts: &[Expert],
    x: Value,
    weights: Value,
    dy: B::Buffer,
    grads: &mut Gradients<B>,
) -> Result<()> {
    let backend = it.backend();
    let [mut dweights] = it.like([weights])?;
    backend.run(Call::Zero { x: &mut dweights })?;
    // A layer whose input needs no gradient may have adapters on its experts.
    let mut dx = None;
    if it.needs(x) {
        let (mut buffer, started) = it.take_grad(x)?;
        if !started {
            backend.run(Call::Zero { x: &mut buffer })?;
        }
        dx = Some(buffer);
    }
    for (expert, tokens) in experts.iter().zip(tokens(it, experts.len(), weights)?) {
        if tokens.rows.is_empty() {
            continue;
        }
        let (own, factors) = (gathered(it, x, &tokens.rows)?, weights_of(it, weights, &tokens)?);
        let mut part = it.buffer(backend.len(&own))?;
        backend.run(Call::GatherRows { x: &dy, rows: &tokens.rows, y: &mut part })?;
        let (mut dfactors, mut dmade) = (it.buffer(tokens.rows.len())?, it.buffer(backend.len(&part))?);

        let pass = it.pass.of_rows(&tokens.rows);
        let mut tape = pass.tape(Some(own), dx.is_some(), it.pool);
        let made = record(&mut tape, expert);
        // y += weight * made, so dweight = dy . made and dmade = weight * dy
        backend.run(Call::DotRows { a: tape.value(made)?, b: &part, y: &mut dfactors })?;
        backend.run(Call::ScaleRows { factors: &factors, x: &part, y: &mut dmade })?;
        let own = tape.backward(made, dmade, grads)?;

        backend.run(Call::ScatterAddRows { x: &dfactors, rows: &tokens.places, y: &mut dweights })?;
        if let (Some(own), Some(dx)) = (&own, &mut dx) {
            backend.run(Call::ScatterAddRows { x: own, rows: &tokens.rows, y: dx })?;
        }
        own.into_iter().chain([factors, part, dfactors]).for_each(|buffer| it.put(buffer));
    }
    it.put(dy);
    if let Some(dx) = dx {
        it.set_grad(x, dx);
    }
    it.add_grad(weights, dweights)
}

/// `down(inner(x))` of the tape's first value.
fn record(ex: &mut dyn Exec, expert: &Expert) -> Value {
    let h = match expert.inner {
        GateUp::Apart(activation, gate_up) => {
            let [gate, up] = ex.linear_group(gate_up, Value(0));
            ex.run(Op::Gate { activation, gate, up })
        }
        GateUp::ByTurns { layer, width, alpha, limit } => {
            let gate_up = ex.linear(layer, Value(0));
            let [gate, up] = ex.split_heads(gate_up, width, [1, 1]);
            let gate = ex.map(Map::ClampedSwish { alpha, limit }, gate);
            let up = ex.map(Map::Clamp { limit, plus: 1.0 }, up);
            ex.multiply(gate, up)
        }
    };
    ex.linear(expert.down, h)
}

/// Some rows of `x`.
fn gathered<B: Backend>(it: &mut Interpreter<'_, B>, x: Value, rows: &[u32]) -> Result<B::Buffer> {
    let mut own = it.buffer(rows.len() * it.slots[x.0 as usize].width)?;
    it.backend().run(Call::GatherRows { x: it.data(x), rows, y: &mut own })?;
    Ok(own)
}

/// What each token of an expert counts.
fn weights_of<B: Backend>(it: &mut Interpreter<'_, B>, weights: Value, tokens: &Tokens) -> Result<B::Buffer> {
    let mut factors = it.buffer(tokens.places.len())?;
    it.backend().run(Call::GatherRows { x: it.data(weights), rows: &tokens.places, y: &mut factors })?;
    Ok(factors)
}

/// The tokens of each expert.
fn tokens<B: Backend>(it: &Interpreter<'_, B>, experts: usize, weights: Value) -> Result<Vec<Tokens>> {
    let numbers = chosen(weights);
    let mut values = vec![0.0; it.len(numbers)];
    it.backend().read(it.data(numbers), &mut values)?;
    let top = it.slots[numbers.0 as usize].width.max(1);
    let mut tokens: Vec<Tokens> = (0..experts).map(|_| Tokens::default()).collect();
    for (place, expert) in (0u32..).zip(values) {
        let (own, row) = (&mut tokens[expert as usize], place / top as u32);
        // Where work is only counted, all choices of a token are the first expert; no expert has a token twice.
        if own.rows.last() != Some(&row) {
            own.rows.push(row);
            own.places.push(place);
        }
    }
    Ok(tokens)
}
