//! `y = x / rms(x) * w`, or a layer norm, see [`Norm`]. Backward keeps `x`; with `n = x / rms(x)`, computed again, the
//! gradients of a weight and a bias in training are `dw[c] = sum over t of dy n` and `db[c] = sum over t of dy`.

use super::{Gradients, Interpreter};
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

pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    norm: &Norm,
    x: Value,
    dy: B::Buffer,
    grads: &mut Gradients<B>,
) -> Result<()> {
    let backend = it.backend();
    learn(it, norm, x, &dy, grads)?;
    if !it.needs(x) {
        it.put(dy);
        return Ok(());
    }
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

/// Adds to the gradients of the norm's weight and bias, where those are in training.
fn learn<B: Backend>(
    it: &mut Interpreter<'_, B>,
    norm: &Norm,
    x: Value,
    dy: &B::Buffer,
    grads: &mut Gradients<B>,
) -> Result<()> {
    let (backend, adapters) = (it.backend(), it.pass.adapters());
    let Norm { weight, width, eps, centered, bias, .. } = *norm;
    if let Some(dw) = adapters.learned_vector(weight).and_then(|id| grads.of(id)) {
        let mut n = it.buffer(it.len(x))?;
        if centered {
            let mut ones = it.buffer(backend.len(dw))?;
            backend.write(&mut ones, &vec![1.0; backend.len(dw)]);
            backend.run(Call::LayerNorm { w: &ones, b: None, eps, x: it.data(x), y: &mut n })?;
            it.put(ones);
        } else {
            let input = it.data(x);
            backend.run(Call::RmsNorm { width, w: None, plus_one: false, eps, x: input, y: &mut n })?;
        }
        backend.run(Call::SumColumns { a: dy, b: Some(&n), y: dw })?;
        it.put(n);
    }
    if let Some(db) = adapters.learned_vector(bias).and_then(|id| grads.of(id)) {
        backend.run(Call::SumColumns { a: dy, b: None, y: db })?;
    }
    Ok(())
}
