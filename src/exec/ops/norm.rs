//! `y = x / rms(x) * w`, or a layer norm, see [`Norm`].

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::{Norm, Value};

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, norm: &Norm, x: Value, y: Value) -> Result<()> {
    let Norm { weight, width, eps, plus_one, centered, bias } = *norm;
    let [w, b] = [weight, bias].map(|p| p.map(|p| it.pass.vector(p)));
    let mut out = it.buffer(it.len(y))?;
    let x = it.data(x);
    it.backend().run(match w {
        // y = (x - mean(x)) / rms(x - mean(x)) * w + b
        Some(w) if centered => Call::LayerNorm { w, b, eps, x, y: &mut out },
        // y = x / rms(x) * w
        _ => Call::RmsNorm { width, w, plus_one, eps, x, y: &mut out },
    })?;
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(it: &mut Interpreter<'_, B>, norm: &Norm, x: Value, dy: B::Buffer) -> Result<()> {
    let backend = it.backend();
    let Norm { weight, width, eps, plus_one, centered, .. } = *norm;
    let w = weight.map(|w| it.pass.vector(w));
    let (mut dx, started) = it.take_grad(x)?;
    if !started {
        backend.run(Call::Zero { x: &mut dx })?;
    }
    let input = it.data(x);
    backend.run(match w {
        // y = (x - mean(x)) / rms(x - mean(x)) * w + b
        Some(w) if centered => Call::LayerNormVjpX { w, eps, x: input, dy: &dy, dx: &mut dx },
        // y = x / rms(x) * w
        _ => Call::RmsNormVjpX { width, w, plus_one, eps, x: input, dy: &dy, dx: &mut dx },
    })?;
    it.set_grad(x, dx);
    it.put(dy);
    Ok(())
}
