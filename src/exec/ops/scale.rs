//! `y = factor * x`.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::Value;

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, factor: f32, x: Value, y: Value) -> Result<()> {
    let mut out = it.buffer(it.len(y))?;
    // y = factor * x
    it.backend().run(Call::Copy { x: it.data(x), y: &mut out })?;
    it.backend().run(Call::Scale { factor, x: &mut out })?;
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(it: &mut Interpreter<'_, B>, factor: f32, x: Value, mut dy: B::Buffer) -> Result<()> {
    // y = factor * x, so dx = factor * dy
    it.backend().run(Call::Scale { factor, x: &mut dy })?;
    it.add_grad(x, dy)
}
