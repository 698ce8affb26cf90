//! `y = x / rms(x) * w`, see [`Norm`].

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::{Norm, Value};

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, norm: &Norm, x: Value, y: Value) -> Result<()> {
    let Norm { weight, width, eps, plus_one } = *norm;
    let w = weight.map(|w| it.pass.vector(w));
    let mut out = it.buffer(it.len(y))?;
    // y = x / rms(x) * w
    it.backend().run(Call::RmsNorm { width, w, plus_one, eps, x: it.data(x), y: &mut out })?;
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(it: &mut Interpreter<'_, B>, norm: &Norm, x: Value, dy: B::Buffer) -> Result<()> {
    let backend = it.backend();
    let Norm { weight, width, eps, plus_one } = *norm;
    let w = weight.map(|w| it.pass.vector(w));
    let (mut dx, started) = it.take_grad(x)?;
    if !started {
        backend.run(Call::Zero { x: &mut dx })?;
    }
    // y = x / rms(x) * w
    backend.run(Call::RmsNormVjpX { width, w, plus_one, eps, x: it.data(x), dy: &dy, dx: &mut dx })?;
    it.set_grad(x, dx);
    it.put(dy);
    Ok(())
}
