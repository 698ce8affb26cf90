//! `y = a + b`.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::Value;

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, a: Value, b: Value, y: Value) -> Result<()> {
    let mut out = it.buffer(it.len(y))?;
    // y = a + b
    it.backend().run(Call::Add { a: it.data(a), b: it.data(b), y: &mut out })?;
    it.set(y, out);
    Ok(())
}

/// The sum in the place of the term `into`, which nobody reads any more.
pub(in super::super) fn run_in_place<B: Backend>(
    it: &mut Interpreter<'_, B>,
    into: Value,
    term: Value,
    y: Value,
) -> Result<()> {
    let mut sum = it.take(into);
    // y = into + term
    it.backend().run(Call::AddAssign { x: it.data(term), y: &mut sum })?;
    it.set(y, sum);
    Ok(())
}

pub(super) fn back<B: Backend>(it: &mut Interpreter<'_, B>, a: Value, b: Value, dy: B::Buffer) -> Result<()> {
    // y = a + b, so da = dy and db = dy
    if it.needs(a) && it.needs(b) {
        let (mut db, started) = it.take_grad(b)?;
        if started {
            it.backend().run(Call::AddAssign { x: &dy, y: &mut db })?;
        } else {
            it.backend().run(Call::Copy { x: &dy, y: &mut db })?;
        }
        it.set_grad(b, db);
        it.add_grad(a, dy)
    } else {
        it.add_grad(if it.needs(a) { a } else { b }, dy)
    }
}
