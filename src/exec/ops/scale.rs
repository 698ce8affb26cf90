//! `y = factor * x`.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::Backend;
use pocketlora_models::Value;

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, factor: f32, x: Value, y: Value) -> Result<()> {
    let mut out = it.buffer(it.len(y))?;
    // y = factor * x
    it.backend().copy(it.data(x), &mut out);
    it.backend().scale(factor, &mut out);
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(it: &mut Interpreter<'_, B>, factor: f32, x: Value, mut dy: B::Buffer) -> Result<()> {
    // y = factor * x, so dx = factor * dy
    it.backend().scale(factor, &mut dy);
    it.add_grad(x, dy);
    Ok(())
}
