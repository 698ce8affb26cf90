//! `y = a * b`, element by element.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::Value;

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, a: Value, b: Value, y: Value) -> Result<()> {
    let mut out = it.buffer(it.len(y))?;
    // y = a * b
    it.backend().run(Call::Multiply { a: it.data(a), b: it.data(b), y: &mut out })?;
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(it: &mut Interpreter<'_, B>, a: Value, b: Value, dy: B::Buffer) -> Result<()> {
    // y = a * b, so da = b * dy and db = a * dy
    for (t, other) in [(a, b), (b, a)] {
        if it.needs(t) {
            let [mut grad] = it.like([t])?;
            it.backend().run(Call::Multiply { a: it.data(other), b: &dy, y: &mut grad })?;
            it.add_grad(t, grad)?;
        }
    }
    it.put(dy);
    Ok(())
}
