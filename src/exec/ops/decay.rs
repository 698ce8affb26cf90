//! `g = -e^rate softplus(a + bias)`.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::{Param, Value};

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, [rate, bias]: [Param; 2], a: Value, y: Value) -> Result<()> {
    let (rate, bias) = (it.pass.vector(rate), it.pass.vector(bias));
    let mut g = it.buffer(it.len(y))?;
    // g = -e^rate softplus(a + bias)
    it.backend().run(Call::Decay { rate, bias, a: it.data(a), g: &mut g })?;
    it.set(y, g);
    Ok(())
}

pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    [rate, bias]: [Param; 2],
    a: Value,
    dg: B::Buffer,
) -> Result<()> {
    let (rate, bias) = (it.pass.vector(rate), it.pass.vector(bias));
    let [mut da] = it.like([a])?;
    // g = -e^rate softplus(a + bias)
    it.backend().run(Call::DecayVjp { rate, bias, a: it.data(a), dg: &dg, da: &mut da })?;
    it.put(dg);
    it.add_grad(a, da)
}
