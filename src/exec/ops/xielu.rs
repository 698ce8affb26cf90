//! xIELU: a function of each element with learned constants, see [`pocketlora_models::Xielu`].

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call, Map};
use pocketlora_models::{Value, Xielu};

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, xielu: &Xielu, x: Value, y: Value) -> Result<()> {
    let (kind, mut out) = (kind(it, xielu)?, it.buffer(it.len(y))?);
    // y = xielu(x)
    it.backend().run(Call::Map { kind, x: it.data(x), y: &mut out })?;
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(it: &mut Interpreter<'_, B>, xielu: &Xielu, x: Value, dy: B::Buffer) -> Result<()> {
    let (kind, [mut dx]) = (kind(it, xielu)?, it.like([x])?);
    // y = xielu(x)
    it.backend().run(Call::MapVjp { kind, x: it.data(x), dy: &dy, dx: &mut dx })?;
    it.put(dy);
    it.add_grad(x, dx)
}

/// The constants, which are parameters of one value each.
fn kind<B: Backend>(it: &Interpreter<'_, B>, xielu: &Xielu) -> Result<Map> {
    let read = |p| -> Result<f32> {
        let mut value = [0.0];
        it.backend().read(it.pass.vector(p), &mut value)?;
        Ok(value[0])
    };
    let softplus = |x: f32| x.max(0.0) + (-x.abs()).exp().ln_1p();
    let (beta, eps) = (read(xielu.beta)?, read(xielu.eps)?);
    let (positive, negative) = (softplus(read(xielu.positive)?), beta + softplus(read(xielu.negative)?));
    Ok(Map::Xielu { positive, negative, beta, eps })
}
