//! `y = factor x` with a factor for each head of each token.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::Value;

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, factors: Value, x: Value, y: Value) -> Result<()> {
    let mut out = it.buffer(it.len(y))?;
    // y[t, h, :] = factors[t, h] x[t, h, :]
    it.backend().run(Call::ScaleRows { factors: it.data(factors), x: it.data(x), y: &mut out })?;
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(it: &mut Interpreter<'_, B>, factors: Value, x: Value, dy: B::Buffer) -> Result<()> {
    let backend = it.backend();
    let [mut dfactors, mut dx] = it.like([factors, x])?;
    // y[t, h, :] = factors[t, h] x[t, h, :], so dfactors = x . dy and dx = factors dy
    backend.run(Call::DotRows { a: it.data(x), b: &dy, y: &mut dfactors })?;
    backend.run(Call::ScaleRows { factors: it.data(factors), x: &dy, y: &mut dx })?;
    it.put(dy);
    it.add_grad(factors, dfactors)?;
    it.add_grad(x, dx)
}
