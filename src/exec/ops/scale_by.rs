//! `y = factor x` with a parameter as the factor.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::{Param, Value};

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, factor: Param, x: Value, y: Value) -> Result<()> {
    let factors = it.pass.vector(factor);
    let mut out = it.buffer(it.len(y))?;
    // y = factor x, all of it as one row
    it.backend().run(Call::ScaleRows { factors, x: it.data(x), y: &mut out })?;
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(it: &mut Interpreter<'_, B>, factor: Param, x: Value, dy: B::Buffer) -> Result<()> {
    let factors = it.pass.vector(factor);
    let [mut dx] = it.like([x])?;
    // y = factor x, so dx = factor dy
    it.backend().run(Call::ScaleRows { factors, x: &dy, y: &mut dx })?;
    it.put(dy);
    it.add_grad(x, dx)
}
