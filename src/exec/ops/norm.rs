//! `y = x / rms(x) * w`, see [`Norm`].

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::Backend;
use pocketlora_models::{Norm, Value};

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, norm: &Norm, x: Value, y: Value) -> Result<()> {
    let weight = it.pass.vector(norm.weight.expect("TODO"));
    let mut out = it.buffer(it.len(y))?;
    // y = x / rms(x) * w
    it.backend().rms_norm(weight, norm.eps, it.data(x), &mut out);
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(it: &mut Interpreter<'_, B>, norm: &Norm, x: Value, dy: B::Buffer) -> Result<()> {
    let backend = it.backend();
    let weight = it.pass.vector(norm.weight.expect("TODO"));
    let (mut dx, started) = it.take_grad(x)?;
    if !started {
        backend.zero(&mut dx);
    }
    // y = x / rms(x) * w
    backend.rms_norm_vjp_x(weight, norm.eps, it.data(x), &dy, &mut dx);
    it.set_grad(x, dx);
    it.put(dy);
    Ok(())
}
