//! `y = a + b`.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::Backend;
use pocketlora_models::Value;

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, a: Value, b: Value, y: Value) -> Result<()> {
    let mut out = it.buffer(it.len(y))?;
    // y = a + b
    it.backend().add(it.data(a), it.data(b), &mut out);
    it.set(y, out);
    Ok(())
}

/// The sum in the place of the term `into`, which nobody reads any more.
pub(in super::super) fn run_in_place<B: Backend>(it: &mut Interpreter<'_, B>, into: Value, term: Value, y: Value) {
    let mut sum = it.take(into);
    // y = into + term
    it.backend().add_assign(it.data(term), &mut sum);
    it.set(y, sum);
}

pub(super) fn back<B: Backend>(it: &mut Interpreter<'_, B>, a: Value, b: Value, dy: B::Buffer) -> Result<()> {
    // y = a + b, so da = dy and db = dy
    if it.needs(a) && it.needs(b) {
        let (mut db, started) = it.take_grad(b)?;
        if started {
            it.backend().add_assign(&dy, &mut db);
        } else {
            it.backend().copy(&dy, &mut db);
        }
        it.set_grad(b, db);
        it.add_grad(a, dy);
    } else {
        it.add_grad(if it.needs(a) { a } else { b }, dy);
    }
    Ok(())
}
